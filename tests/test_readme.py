"""What the project's documents say can be done, can be done: commands, options, links, make targets, listings."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.main import get_command

from node import cli, cli_common
from node.config import Config, parse_config
from node.settings import TrainingSettings
from node.task_loading import make_task
from node.tasks import initial_params
from node.training import evaluate, train
from sim.cli import register
from sim.scenario_files import convert

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docker/README.md", "protocols/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]  # fmt: skip
MAX_TASK_LINES = 20

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


# --- links ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text_of(document))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


def test_every_decision_is_in_the_list() -> None:
    pages = [path.name for path in (ROOT / "docs" / "decisions").glob("*.md")]
    assert pages
    listed = text_of("docs/README.md")
    assert [name for name in pages if f"(decisions/{name})" not in listed] == []


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs" / "decisions").glob("*.md")), ids=lambda page: page.stem
)
def test_a_decision_has_its_four_parts(page: Path) -> None:
    parts = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert parts == ["Context", "Choice", "What it costs", "What would change our mind"]


# --- commands -------------------------------------------------------------------------------------------
def commands_in(text: str) -> Iterator[list[str]]:
    """Every `covey …` in shell blocks, `$(…)` included, and in code marks within the prose."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(covey [^`]+)`", prose(text).replace("\n", " "))
    for line in lines:
        found = re.search(r"(?:^|[\s(/])(covey [^|)]*)", line.split(" #")[0])
        # Before `exec` or `run` of docker, `covey` is also the name of a container.
        if found and "docker run" not in line:
            yield shlex.split(found[1].replace("covey covey", "covey").replace("<", "").replace(">", ""))


def whole_command() -> Any:
    """`covey` with the simulator's commands, which come in through the entry point."""
    whole, more = get_command(cli.app), typer.Typer()
    register(more)
    whole.commands |= get_command(more).commands  # type: ignore[attr-defined]
    return whole


def check_command(words: list[str]) -> None:
    """Walk down the groups of the real command line; every option named must be one of the last command's."""
    command = whole_command()
    rest = words[1:]
    while rest and hasattr(command, "commands"):
        name = rest[0]
        if command.name == "sim" and name not in command.commands:
            name, rest = "run", ["run", *rest]
        if name.startswith("-") or "…" in name:
            break
        assert name in command.commands, f"{' '.join(words)}: no command {name!r}"
        command, rest = command.commands[name], rest[1:]
    options = {"--help", *(option for parameter in command.params for option in parameter.opts)}
    for word in rest:
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"{' '.join(words)}: no option {word}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_exists(document: str) -> None:
    for words in commands_in(text_of(document)):
        check_command(words)


def test_the_readme_names_every_command() -> None:
    named = {words[1] for words in commands_in(README) if len(words) > 1}
    assert named >= set(whole_command().commands)


@pytest.mark.parametrize(
    "command", ["covey fly", "covey run --nodes 4", "covey config shown", "covey sim --home x"]
)
def test_a_command_that_does_not_exist_is_noticed(command: str) -> None:
    with pytest.raises(AssertionError):
        check_command(shlex.split(command))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_exists(document: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    text = text_of(document)
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(text))
    named = {found[1] for line in lines if (found := re.search(r"(?:^|\s)make ([a-z][\w-]*)", line))}
    assert named <= targets


def test_the_exit_codes_are_those_of_the_command() -> None:
    assert (cli_common.EXIT_FAILED, cli_common.EXIT_USAGE, cli_common.EXIT_INTERRUPTED) == (1, 2, 130)
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted." in README
    assert cli.app.info.epilog in README


# --- configuration --------------------------------------------------------------------------------------
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_toml_block_and_variable_is_a_valid_config(document: str) -> None:
    text = text_of(document)
    for block in blocks(text, "toml"):
        if document == "docs/scenarios.md":
            convert({key: value for key, value in tomllib.loads(block).items() if key != "extends"})
        else:
            parse_config(block.replace("<peer id>", "12D3KooW"), {})
    for name, value in re.findall(r"\b(COVEY_[A-Z]+__[A-Z_]+)=(\w+)", text):
        parse_config("", {name: value})


def test_the_table_lists_every_table_of_the_config() -> None:
    section = README.split("\n## Configuration\n", 1)[1].split("\n## ", 1)[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [
        f.name for f in msgspec.structs.fields(Config)
    ]


# --- the listing ----------------------------------------------------------------------------------------
@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the task that the README shows, and a table for it."""
    (listing,) = blocks(README, "python")
    assert len(listing.splitlines()) <= MAX_TASK_LINES
    (tmp_path / "my_task.py").write_text(listing, encoding="utf-8")
    flats = [(40 + n * 37 % 40, n % 7) for n in range(120)]
    rows = "".join(f"{area},{floor},{int(area > 60)}\n" for area, floor in flats)
    (tmp_path / "flats.csv").write_text("area,floor,dear\n" + rows, encoding="utf-8")
    return tmp_path


def test_the_listing_is_a_task_that_trains(own: Path) -> None:
    task = make_task("my_task.py:make_task", {}, own)
    before = initial_params(task, 0)
    after, num_samples = train(task, before, TrainingSettings(local_steps=300), round=0, seed=0, node=0)
    assert num_samples == 100
    assert evaluate(task, after)["accuracy"] > max(0.9, evaluate(task, before)["accuracy"])


def test_the_listing_runs_in_the_simulator_as_the_readme_says(own: Path) -> None:
    (told,) = [
        words for words in commands_in(README) if words[1:4] == ["sim", "--task", "my_task.py:make_task"]
    ]
    few = [*told[1:], "--json", "--no-out"]
    few[few.index("--rounds") + 1] = "10"
    done = subprocess.run([sys.executable, "-m", "node", *few], cwd=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["finished"] == int(told[told.index("--nodes") + 1])
    assert result["accuracy_mean"] > 0.8


def test_the_csv_table_of_the_readme_is_a_task(own: Path) -> None:
    (block,) = [block for block in blocks(README, "toml") if 'name = "csv"' in block]
    config = parse_config(block, {})
    task = make_task(config.task.name, config.task.options, own)
    assert len(task.train[0]) > len(task.test[0]) > 0


# --- the changelog --------------------------------------------------------------------------------------
def test_the_changelog_has_this_version_on_top() -> None:
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    first = re.search(r"^## \[(.+?)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    assert first
    assert first[1] == version
