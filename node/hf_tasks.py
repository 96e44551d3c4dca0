"""Tasks that fine-tune a pretrained language model from a local file: `hf-classifier` and `hf-causal-lm`.

Belongs here: their options, finding and loading the model, turning texts into tokens, and which of the model's
parameters learn. Only these are parameters of the task: the rest is frozen, shared by all modules of a process, and
stands in no `state_dict`, so that it is never saved, sent or merged. Nothing is ever downloaded, no code that comes
with a checkpoint is run, and only GGUF and safetensors files are read.

transformers, gguf, accelerate and peft come with `pip install 'covey[llm]'` and are imported when a task is made.
"""

import copy
import hashlib
import importlib.util
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta, Struct
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from node.builtin_tasks import SPLIT_SEED, encode_labels, existing_file, sorted_names, split_samples
from node.randomness import stream, torch_seed, torch_seeded
from node.tasks import Task
from protocols.errors import ConfigError

PAD = -1
"""Fills a row of tokens up to its width. No tokenizer gives it, so what is padding is never in doubt."""

FORWARD_ROWS = 8
"""Samples that pass through the network at once on a CPU, those of like length together: more cost time on padding."""

FORWARD_ROWS_ELSEWHERE = 64
"""The same on other devices: a bound on memory."""

LOSS_POSITIONS = 256
"""Positions whose scores over the whole vocabulary are in memory at once."""

MIN_REFERENCE_TEXTS = 8

SUBSETS = ("all", "norms", "head", "lora", "prefix")

Limit = Annotated[int, Meta(ge=1)] | None

REFERENCE_TEXTS = (
    "The meeting starts at nine.",
    "She put the book on the table and left the room.",
    "Water boils at one hundred degrees.",
    "The train to the coast leaves twice a day, and more often in summer.",
    "He asked whether the shop was still open.",
    "Most of the houses in this street are older than the church.",
    "They walked along the river until it was dark.",
    "the report has four parts and a list of sources",
    "A new bridge was built last year between the two towns.",
    "My brother works in a small office near the harbour.",
    "the cat slept on the chair all day",
    "You can find the key under the mat.",
    "The price of bread went up again this month, as everyone had expected.",
    "two men were talking in the hall",
    "The letter came on Monday.",
    "It rained for a week, and then the sun came out.",
    "The children played in the garden behind the school.",
    "the film runs for two hours and has three parts",
    "The map shows the way to the station.",
    "I wrote down the number, but I did not call.",
    "What they wanted was a quiet place to sit and read.",
    "In the second half of the story the two sisters meet again.",
    "a long road through the hills",
    "the new version , which came out in may , is smaller",
    "Nobody knew who had sent the parcel.",
    "The doctor told him to come back after ten days.",
    "there is not much to say about the weather",
    "This is the first time that we have seen the sea from here.",
    "If you turn left after the bridge, you will see a red door.",
    "the music begins slowly and ends with a song",
    "She has written five books about the history of trade.",
    "An hour later the lights went out in the whole town.",
)
"""Neither good nor bad, short and long: what a head sees is shifted and scaled by these where nothing better is given."""


# --- options ----------------------------------------------------------------------------
class LanguageOptions(Struct, frozen=True, kw_only=True):
    """What both tasks share.

    model: a folder with a transformers checkpoint, a .gguf file, or `package:<import name>` for an installed package
        that ships either. Every node needs the same.
    path: the texts: a .jsonl file of objects, else lines of cells with tabs between them.
    test_path: a second file to test on. None: `test_fraction` of the first.
    text: the column or key that holds the text. None: the first column, the key "text".
    header: whether the first line names the columns. None: it does where a column is chosen by its name, or where one
        of its cells is `text`, `sentence` or `label`.
    max_tokens: longer texts are cut, the template is not. Time grows with the tokens there are, not with this.
    train_limit, test_limit: use so many samples, the same on every node with the same file.
    train: what learns, one or several of: "all" parameters; the scales and biases of the "norms"; the "head" that gives
        scores; low-rank adapters ("lora", arXiv 2106.09685) beside the weights; a "prefix" of input embeddings (arXiv
        2101.00190); or patterns of parameters' names such as "layers.2?.mlp.*". Without gradients, a thousand scalars
        teach a head much, norms something, and the rest hardly anything: adapters are for training with gradients.
    lora_rank, lora_alpha: of "lora": width of the adapters, and `alpha / rank` scales what they add.
    lora_targets: names of the layers that get adapters. None: the queries and values of attention, where known.
    prefix_tokens: of "prefix": how many embeddings.
    dtype: of the network's weights and arithmetic. "bfloat16" takes half the memory and, on CPUs that know it, a third
        of the time. Heads, adapters, prefixes and norms that learn are 32-bit whatever stands here; other weights of the
        network are not, and small steps on them are lost in half precision.
    """

    model: str
    path: str
    test_path: str | None = None
    test_fraction: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    text: str | int | None = None
    header: bool | None = None
    max_tokens: Annotated[int, Meta(ge=2, le=8192)] = 64
    train_limit: Limit = None
    test_limit: Limit = None
    train: str | tuple[str, ...] = "norms"
    lora_rank: Annotated[int, Meta(ge=1, le=1024)] = 8
    lora_alpha: Annotated[float, Meta(gt=0)] = 16.0
    lora_targets: tuple[str, ...] | None = None
    prefix_tokens: Annotated[int, Meta(ge=1, le=1024)] = 5
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class HfClassifierOptions(LanguageOptions, frozen=True, kw_only=True):
    """label: the column or key that holds the class. None: the last column, the key "label".

    classes: every class in order, for nodes whose own files may lack some. None: those of the verbaliser, else those
        found, sorted.
    head: "verbaliser": scores are those that a language model gives to one word a class, so it knows something before
        it has learnt. "linear": any network, no words, and the layer that `train = "head"` means always learns.
    verbaliser: the word of each class, as {class = word} or in the order of the classes. It must be one token, which
        for most models means a word with its leading space.
    template: the text goes where {text} stands. None: "{text} It was" for language models, "{text}" for encoders.
    pool: which hidden state stands for a text under a linear head: the "last" token's or the "mean" of all. None: the
        mean for encoders, the last for language models.
    standardise: shift and scale what the head sees to mean 0 and variance 1 over some reference texts. Words that the
        model likes anyway then win no more often (arXiv 2102.09690), and the head's weights learn at one rate.
    reference: a file of texts without labels, one a line, the same on every node; a hundred of the kind that is to be
        told apart serve best. None: plain English sentences that come with covey.
    """

    label: str | int | None = None
    classes: tuple[str | int, ...] | None = None
    head: Literal["verbaliser", "linear"] = "verbaliser"
    verbaliser: dict[str, str] | tuple[str, ...] | None = None
    template: str | None = None
    pool: Literal["last", "mean"] | None = None
    standardise: bool = True
    reference: str | None = None
    train: str | tuple[str, ...] = "head"


class HfCausalLmOptions(LanguageOptions, frozen=True, kw_only=True):
    """Predicts each token from those before it. The head is the output layer, where it is not the input embedding."""


def _wrong(option: str, problem: str, allowed: Iterable[str] = ()) -> ConfigError:
    return ConfigError(f"task.options.{option}", problem, allowed)


# --- the two tasks ----------------------------------------------------------------------
def hf_classifier(options: HfClassifierOptions, base: Path) -> Task:
    """Texts into classes. With `train = "head"` alone this is a linear probe: the network itself stays as it is, and
    what it makes of a sample is computed once and kept.
    """
    _check_together(options)
    pretrained = _find_and_load(options, base)
    _check_head(options, pretrained)
    template = options.template or ("{text} It was" if pretrained.causal else "{text}")
    found = _texts(options, base, options.label)
    classes = _classes(options, [label for texts in found for label in texts.labels])
    words = _verbaliser_tokens(options, classes, pretrained.tokenizer)
    last = (options.pool or ("last" if pretrained.causal else "mean")) == "last"
    subset = _subset(options, pretrained.trunk, ["weight", "bias"])
    head, reference = _ClassHead(_word_rows(pretrained, words), len(classes), pretrained.width), None
    if options.standardise:
        reference = _reference_texts(options, base)
        tokens = _tokens(pretrained, options, template, reference)
        with torch.inference_mode():
            features = _by_length(tokens, _Classifier(pretrained, subset, head, last).eval().pooled)
        head.standardise(features)
    build = partial(_Classifier, pretrained, subset, head, last, None if subset.below else _KeptFeatures())
    targets = [encode_labels(np.array(texts.labels), classes) for texts in found]
    train, test = _pairs(options, found, targets, partial(_tokens, pretrained, options, template))
    meaning = [template, classes, words, last, reference]
    return Task(
        name=_task_name("hf-classifier", options, pretrained, build, meaning),
        model=build,
        train=train,
        test=test,
    )


def hf_causal_lm(options: HfCausalLmOptions, base: Path) -> Task:
    """Texts from which each next token is predicted.

    The model's outputs are summed losses, one a sample, and the targets are how many tokens each sum is over.
    """
    _check_together(options)
    pretrained = _find_and_load(options, base)
    if pretrained.output is None:
        raise _wrong("model", f"{options.model} is an encoder; this task needs a language model")
    head = [] if pretrained.output.tied else [name for name, _ in pretrained.output.layer.named_parameters()]
    build = partial(_CausalLm, pretrained, _subset(options, pretrained.trunk, head))
    found = _texts(options, base, label=False)
    targets = [np.zeros(len(texts.texts), dtype=np.int64) for texts in found]
    pairs = _pairs(options, found, targets, partial(_tokens, pretrained, options, "{text}"))
    train, test = (_predictable(tokens) for tokens, _ in pairs)
    return Task(
        name=_task_name("hf-causal-lm", options, pretrained, build, []),
        model=build,
        train=train,
        test=test,
        loss=mean_token_loss,
        metrics=perplexity,
    )


def mean_token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """outputs: summed losses of samples [samples]; targets: how many tokens each is over. In nats."""
    return outputs.sum() / targets.sum()


def perplexity(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Arguments as in `mean_token_loss`. {"perplexity": 1 is perfect, the vocabulary's size a blind guess}."""
    return {"perplexity": mean_token_loss(outputs, targets).exp().item()}


def _predictable(tokens: Tensor) -> tuple[Tensor, Tensor]:
    counts = (tokens != PAD).sum(1) - 1
    if not bool((counts > 0).any()):
        raise _wrong("path", "no text has two tokens, so there is nothing to predict")
    return tokens[counts > 0], counts[counts > 0].float()


def _check_together(options: LanguageOptions) -> None:
    """Options that would do nothing beside the others."""
    train = _entries(options)
    if not train:
        raise _wrong("train", "nothing learns", [*SUBSETS, "patterns of names"])
    for field in options.__struct_fields__:
        part = field.partition("_")[0]
        if part not in ("lora", "prefix") or part in train:
            continue
        default = getattr(type(options)(model="", path=""), field)
        if getattr(options, field) != default:
            raise _wrong(field, f"set, but train is {options.train!r} without {part!r}")


def _task_name(
    builtin: str,
    options: LanguageOptions,
    pretrained: "_Pretrained",
    build: Callable[[], nn.Module],
    meaning: Sequence[object],
) -> str:
    """Nodes must not average what started from other weights or means other things: a hash of all that tells."""
    learning = {name: list(tensor.shape) for name, tensor in build().state_dict().items()}
    facts = [pretrained.digest, options.dtype, options.lora_alpha, learning, *meaning]
    return f"{builtin}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


# --- finding and loading a model --------------------------------------------------------
class _Source(NamedTuple):
    """A folder, the name of the .gguf file in it or None, and a hash of all that is read."""

    folder: Path
    gguf: str | None
    digest: str


class _Output(NamedTuple):
    """A language model's output layer. tied: its weight is the input embedding."""

    layer: nn.Module
    tied: bool


class _Pretrained(NamedTuple):
    """A network without its output layer, all of it frozen; `output` is None for encoders."""

    trunk: nn.Module
    tokenizer: Any
    output: _Output | None
    digest: str

    @property
    def causal(self) -> bool:
        return self.output is not None

    @property
    def width(self) -> int:
        return int(self.trunk.config.hidden_size)  # type: ignore[union-attr, arg-type]


def _find_and_load(options: LanguageOptions, base: Path) -> _Pretrained:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    needed = ["transformers", "accelerate", "gguf", *(["peft"] if "lora" in _entries(options) else [])]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise ConfigError("task.name", f"needs the package {package}: pip install 'covey[llm]'")
    pretrained = _load(_source(options.model, base), options.dtype)
    longest = getattr(pretrained.trunk.config, "max_position_embeddings", None)
    prefix = options.prefix_tokens if "prefix" in _entries(options) else 0
    if isinstance(longest, int) and options.max_tokens + prefix > longest:
        problem = f"{options.max_tokens} and {prefix} of the prefix are more than the model takes"
        raise _wrong("max_tokens", problem, [f"2 to {longest - prefix}"])
    return pretrained


def _source(model: str, base: Path) -> _Source:
    if model.startswith("package:"):
        path = _in_package(model.removeprefix("package:"))
    else:
        path = base / Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _Source(path.parent, path.name, _digest([path]))
    if not path.is_dir():
        allowed = ["a folder with config.json", "a .gguf file", "package:<import name>"]
        raise _wrong("model", f"there is no model at {path}; nothing is downloaded", allowed)
    weights = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not weights:
        raise _wrong("model", f"{path} needs config.json and weights in .safetensors files")
    names = ("config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")
    return _Source(
        path, None, _digest([*weights, *sorted({file for name in names for file in path.glob(name)})])
    )


def _in_package(name: str) -> Path:
    """The one model in an installed package's folder. The package is not imported."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    if not folders:
        raise _wrong("model", f"there is no installed package {name!r}", ["package:<import name>"])
    found = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    configs = sorted(file for folder in folders for file in folder.rglob("config.json"))
    found += [file.parent for file in configs if any(file.parent.glob("*.safetensors"))]
    if len(found) != 1:
        problem = f"the package {name!r} holds {len(found)} models"
        raise _wrong("model", problem, map(str, found))
    return found[0]


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _load(source: _Source, dtype: str) -> _Pretrained:
    """Once for each process: reading takes seconds, and every task and module shares what is frozen."""
    try:
        with _quiet(), torch_seeded(torch_seed(SPLIT_SEED, "hf", "load")):
            trunk, tokenizer, output = _read(source, getattr(torch, dtype))
    except ConfigError:
        raise
    except Exception as error:  # transformers raises whatever its readers do
        problem = f"{source.folder / (source.gguf or '')} cannot be loaded: {type(error).__name__}: {error}"
        raise _wrong("model", problem) from error
    return _Pretrained(trunk.eval().requires_grad_(False), tokenizer, output, source.digest)


def _read(source: _Source, dtype: torch.dtype) -> tuple[nn.Module, Any, _Output | None]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto import modeling_auto as known

    place: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if source.gguf is not None:
        place["gguf_file"] = source.gguf
    config = AutoConfig.from_pretrained(source.folder, **place)
    if config.is_encoder_decoder:
        raise _wrong("model", f"{config.model_type} is an encoder with a decoder", ["one of them"])
    tokenizer = AutoTokenizer.from_pretrained(source.folder, **place)
    causal = config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # BERT and its kin can be made either
        causal = getattr(config, "is_decoder", False)
    config.use_cache = False
    place |= {"config": config, "dtype": dtype, "output_loading_info": True}
    if source.gguf is None:
        place["use_safetensors"] = True
    kind = AutoModelForCausalLM if causal else AutoModel
    model, told = kind.from_pretrained(source.folder, **place)
    if missing := sorted(name for name in told["missing_keys"] if not name.startswith("pooler.")):
        raise _wrong("model", f"{source.folder} lacks {len(missing)} of its weights, {missing[0]} the first")
    model.eval()
    if not causal:
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # made for another end; its output is not used here
        return model, tokenizer, None
    return model.base_model, tokenizer, _output_layer(model)


def _output_layer(model: nn.Module) -> _Output:
    """Checked against the model's own scores: some cap or scale them, which is not done here."""
    trunk, layer = model.base_model, model.get_output_embeddings()  # type: ignore[operator]
    tokens = torch.arange(4)[None]
    with torch.no_grad():
        scores = layer(trunk(input_ids=tokens).last_hidden_state)  # type: ignore[operator]
        if not torch.allclose(scores, model(input_ids=tokens).logits, rtol=1e-3, atol=1e-3):
            raise _wrong("model", "its scores are not a linear function of its hidden states")
    tied = layer.weight is trunk.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    return _Output(layer.requires_grad_(False), tied)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither bars nor advice while a model is read: what goes wrong is an exception."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


# --- what learns ------------------------------------------------------------------------
class _Subset(NamedTuple):
    """What learns: parameters of the trunk and of the head by name, LoRA's settings, the length of the prefix."""

    trunk: tuple[str, ...]
    head: tuple[str, ...]
    lora: dict[str, Any] | None
    prefix: int

    @property
    def below(self) -> bool:
        """Whether anything but the head learns."""
        return bool(self.trunk or self.lora or self.prefix)


def _entries(options: LanguageOptions) -> tuple[str, ...]:
    return (options.train,) if isinstance(options.train, str) else options.train


def _subset(options: LanguageOptions, trunk: nn.Module, head: Sequence[str]) -> _Subset:
    """head: the names of its parameters."""
    names = [name for name, _ in trunk.named_parameters()]
    heads = [f"head.{name}" for name in head]
    chosen: set[str] = set()
    for entry in _entries(options):
        if entry in ("lora", "prefix"):
            continue
        selected = {
            "all": [*names, *heads],
            "norms": [name for name in names if _is_norm(trunk.get_submodule(name.rpartition(".")[0]))],
            "head": heads,
        }.get(entry, [name for name in [*names, *heads] if fnmatchcase(name, entry)])
        if not selected:
            known = dict.fromkeys(re.sub(r"\d+", "*", name) for name in [*names, *heads])
            raise _wrong("train", f"{entry!r} chooses no parameter", [*SUBSETS, *known])
        chosen.update(selected)
    if isinstance(options, HfClassifierOptions) and options.head == "linear":
        chosen.update(heads)  # while it is zero, nothing below it can learn
    lora = None
    if "lora" in _entries(options):
        targets = None if options.lora_targets is None else list(options.lora_targets)
        lora = {"r": options.lora_rank, "lora_alpha": options.lora_alpha, "target_modules": targets}
    return _Subset(
        trunk=tuple(name for name in names if name in chosen),
        head=tuple(name for name in head if f"head.{name}" in chosen),
        lora=lora,
        prefix=options.prefix_tokens if "prefix" in _entries(options) else 0,
    )


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _fresh(module: nn.Module, learning: Sequence[str]) -> nn.Module:
    """A module of its own: what learns is copied, the frozen parameters are shared."""
    frozen = [parameter for name, parameter in module.named_parameters() if name not in learning]
    fresh = copy.deepcopy(module, {id(parameter): parameter for parameter in frozen})
    for name in learning:
        fresh.get_parameter(name).requires_grad_(True)
    return fresh


def _fresh_trunk(pretrained: _Pretrained, subset: _Subset) -> nn.Module:
    trunk = _fresh(pretrained.trunk, subset.trunk)
    learning = [trunk.get_parameter(name) for name in subset.trunk]
    for module in trunk.modules():
        if _is_norm(module):
            _keep_exact([own for own in module.parameters(recurse=False) if own.requires_grad], module)
    if subset.lora is not None:
        _put_in_adapters(trunk, subset.lora)
        for parameter in learning:
            parameter.requires_grad_(True)  # peft freezes all but the adapters
    return trunk


def _keep_exact(parameters: Sequence[nn.Parameter], norm: nn.Module) -> None:
    """32 bits for scales that learn: around 1, half precision knows no step below a hundredth."""
    for parameter in parameters:
        if parameter.dtype == torch.float32:
            continue
        norm.register_forward_hook(partial(_rounded, parameter.dtype))
        parameter.data = parameter.data.float()


def _rounded(dtype: torch.dtype, _norm: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output.to(dtype)


def _put_in_adapters(trunk: nn.Module, settings: Mapping[str, Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    try:
        with torch_seeded(torch_seed(SPLIT_SEED, "hf", "lora")):
            inject_adapter_in_model(LoraConfig(**settings), trunk)
    except ValueError as error:
        layers = {
            name.rpartition(".")[2] for name, module in trunk.named_modules() if isinstance(module, nn.Linear)
        }
        raise _wrong("lora_targets", str(error), sorted(layers)) from error
    for name, parameter in trunk.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _fresh_prefix(pretrained: _Pretrained, length: int) -> nn.Parameter | None:
    """Starts at the embeddings of some tokens, the same on every node."""
    if not length:
        return None
    table: Tensor = pretrained.trunk.get_input_embeddings().weight  # type: ignore[operator]
    rows = stream(SPLIT_SEED, "hf", "prefix").integers(len(table), size=length)
    return nn.Parameter(table[torch.from_numpy(rows)].float())


# --- the networks -----------------------------------------------------------------------
class _LanguageNetwork(nn.Module):
    """A pretrained network and what is put around it. Takes tokens [samples, length], filled up with PAD on the right.

    Its `state_dict` holds what learns and nothing else.
    """

    def __init__(self, pretrained: _Pretrained, subset: _Subset) -> None:
        super().__init__()
        self.trunk = _fresh_trunk(pretrained, subset)
        self.prefix = _fresh_prefix(pretrained, subset.prefix)
        # Stands where padding is: some networks know by it which positions count.
        pad = pretrained.tokenizer.pad_token_id
        self._filler = 0 if pad is None else int(pad)
        self.register_state_dict_post_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_do_not_miss_frozen)  # type: ignore[no-untyped-call]

    def _hidden(self, tokens: Tensor) -> Tensor:
        """The last hidden state of every token, [samples, length, width]."""
        mask = tokens != PAD
        filled = tokens.where(mask, self._filler)
        if self.prefix is None:
            hidden: Tensor = self.trunk(input_ids=filled, attention_mask=mask.long()).last_hidden_state
            return hidden
        embedded: Tensor = self.trunk.get_input_embeddings()(filled)  # type: ignore[operator]
        prefix = self.prefix.to(embedded.dtype).expand(len(tokens), -1, -1)
        mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)
        embedded = torch.cat([prefix, embedded], dim=1)
        hidden = self.trunk(inputs_embeds=embedded, attention_mask=mask.long()).last_hidden_state
        return hidden[:, prefix.shape[1] :]


def _learning(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    learning = {prefix + name for name in _learning(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in learning]:
        del state[name]


def _do_not_miss_frozen(module: nn.Module, keys: Any) -> None:
    learning = set(_learning(module))
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in learning]


def _by_length(tokens: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run` on a few rows of like length at a time, without the padding that all of them have."""
    lengths = (tokens != PAD).sum(1)
    order = lengths.argsort(stable=True)
    at_once = FORWARD_ROWS if tokens.device.type == "cpu" else FORWARD_ROWS_ELSEWHERE
    parts = [run(tokens[rows, : int(lengths[rows[-1]])]) for rows in torch.split(order, at_once)]
    return torch.cat(parts)[order.argsort()]


class _KeptFeatures:
    """What a frozen network makes of a sample, by its tokens: the same for all modules of one task.

    It takes 4 bytes a sample and feature, as much as a row of 300 tokens where a network is 576 wide.
    """

    def __init__(self) -> None:
        self._rows: dict[bytes, Tensor] = {}

    def of(self, tokens: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """compute: tokens [samples, length] -> features [samples, width]."""
        keys = [row.tobytes() for row in tokens.cpu().numpy()]
        missing = list({key: index for index, key in enumerate(keys) if key not in self._rows}.values())
        if missing:
            with torch.inference_mode(mode=False), torch.no_grad():
                features = compute(tokens[missing].clone())
            self._rows.update((keys[index], row) for index, row in zip(missing, features, strict=True))
        return torch.stack([self._rows[key] for key in keys]).to(tokens.device)


class _ClassHead(nn.Module):
    """Scores of classes: those of their words, if there are any, and those of a linear layer that starts at zero."""

    mean: Tensor
    deviation: Tensor
    words: Tensor | None

    def __init__(self, words: Tensor | None, num_classes: int, width: int) -> None:
        """words: [classes, width], what a language model multiplies its last hidden state by."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, width), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_classes), requires_grad=False)
        self.register_buffer("mean", torch.zeros(width), persistent=False)
        self.register_buffer("deviation", torch.ones(width), persistent=False)
        self.register_buffer("words", words, persistent=False)

    def standardise(self, features: Tensor) -> None:
        """Shift and scale by these, [texts, width]."""
        self.mean = features.mean(0)
        deviation = features.std(0, correction=0)
        self.deviation = deviation.where(deviation > 0, 1.0)

    def forward(self, features: Tensor) -> Tensor:
        shifted = features - self.mean
        scores = F.linear(shifted / self.deviation, self.weight, self.bias)
        return scores if self.words is None else scores + F.linear(shifted, self.words)


class _Classifier(_LanguageNetwork):
    """Scores [samples, classes]."""

    def __init__(
        self,
        pretrained: _Pretrained,
        subset: _Subset,
        head: _ClassHead,
        last: bool,
        kept: _KeptFeatures | None = None,
    ) -> None:
        super().__init__(pretrained, subset)
        self.head = _fresh(head, subset.head)
        self._last = last
        self._kept = kept

    def train(self, mode: bool = True) -> "_Classifier":
        super().train(mode)
        if self._kept is not None:
            self.trunk.eval()  # what is kept is computed without dropout
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        if self._kept is None:
            features = _by_length(tokens, self.pooled)
        else:
            features = self._kept.of(tokens, lambda rows: _by_length(rows, self.pooled))
        scores: Tensor = self.head(features)
        return scores

    def pooled(self, tokens: Tensor) -> Tensor:
        """What stands for each row, [rows, width]."""
        mask = tokens != PAD
        hidden = self._hidden(tokens)
        if self._last:
            return hidden[torch.arange(len(tokens)), mask.sum(1) - 1].float()
        weights = mask.float() / mask.sum(1, keepdim=True)
        return (hidden.float() * weights[..., None]).sum(1)


class _CausalLm(_LanguageNetwork):
    """The summed loss of predicting each sample's tokens from those before, [samples]."""

    def __init__(self, pretrained: _Pretrained, subset: _Subset) -> None:
        super().__init__(pretrained, subset)
        output = pretrained.output
        assert output is not None
        self.head = (
            None if output.tied else _fresh(output.layer, subset.head)
        )  # tied: it is the input embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return _by_length(tokens, self._row_losses)

    def _row_losses(self, tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:]
        real = targets != PAD
        hidden = self._hidden(tokens)[:, :-1][real]
        chunks = zip(
            torch.split(hidden, LOSS_POSITIONS), torch.split(targets[real], LOSS_POSITIONS), strict=True
        )
        losses = torch.cat([self._losses(*chunk) for chunk in chunks])
        return torch.zeros(real.shape, device=tokens.device).masked_scatter(real, losses).sum(1)

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Forgets the scores over the vocabulary, and computes them again where gradients need them."""
        if torch.is_grad_enabled():
            again: Tensor = checkpoint(
                self._position_losses, hidden, targets, use_reentrant=False, preserve_rng_state=False
            )
            return again
        return self._position_losses(hidden, targets)

    def _position_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        embedding = self.trunk.get_input_embeddings()  # type: ignore[operator]
        scores = F.linear(hidden, embedding.weight) if self.head is None else self.head(hidden)
        return F.cross_entropy(scores.float(), targets, reduction="none")


# --- classes and their words ------------------------------------------------------------
def _check_head(options: HfClassifierOptions, pretrained: _Pretrained) -> None:
    if options.reference is not None and not options.standardise:
        raise _wrong("reference", "set beside standardise = false, which needs none")
    if options.head == "linear":
        if options.verbaliser is not None:
            raise _wrong("verbaliser", 'set beside head = "linear", which has no words')
        return
    if not pretrained.causal:
        raise _wrong("head", f"{options.model} is an encoder, which predicts no word", ["linear"])
    if options.verbaliser is None:
        allowed = ['a word for each class, such as {"0" = " bad", "1" = " good"}', 'head = "linear"']
        raise _wrong("verbaliser", "missing", allowed)
    if options.pool is not None:
        raise _wrong("pool", 'set, but it belongs to head = "linear"')
    if isinstance(options.verbaliser, Mapping) and options.classes is not None:
        raise _wrong("classes", "set, but the verbaliser names the classes")


def _classes(options: HfClassifierOptions, labels: Sequence[str]) -> list[str]:
    """The classes in their order: as listed, else numbers by value and text by code point."""
    found, field = set(labels), "classes"
    if isinstance(options.verbaliser, Mapping):
        classes, field = sorted_names(set(options.verbaliser)), "verbaliser"
    elif options.classes is not None:
        classes = [str(name) for name in options.classes]
    else:
        classes = sorted_names(found)
    if len(set(classes)) < max(2, len(classes)):
        raise _wrong(field, f"{classes} are not at least 2 different classes")
    if unknown := sorted(found - set(classes)):
        raise _wrong(field, f"the data has a label {unknown[0]!r} that is not listed", classes)
    return classes


def _verbaliser_tokens(
    options: HfClassifierOptions, classes: Sequence[str], tokenizer: Any
) -> list[int] | None:
    """The token of each class's word; None for a linear head."""
    if options.verbaliser is None:
        return None
    if isinstance(options.verbaliser, Mapping):
        words = [options.verbaliser[name] for name in classes]
    else:
        words = list(options.verbaliser)
    if len(words) != len(classes):
        raise _wrong("verbaliser", f"{len(words)} words for {len(classes)} classes", classes)
    tokens: list[int] = []
    for word in words:
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1 or tokenizer.decode(pieces).strip().lower() != word.strip().lower():
            shown = tokenizer.convert_ids_to_tokens(pieces)
            raise _wrong(
                "verbaliser", f"{word!r} becomes {shown}", ["words that are one token, most after a space"]
            )
        tokens += pieces
    if len(set(tokens)) < len(tokens):
        raise _wrong("verbaliser", f"two of {words} are one token")
    return tokens


def _word_rows(pretrained: _Pretrained, words: Sequence[int] | None) -> Tensor | None:
    if words is None:
        return None
    assert pretrained.output is not None
    rows: Tensor = pretrained.output.layer.weight[torch.tensor(words)]  # type: ignore[index]
    return rows.float()


# --- texts and tokens -------------------------------------------------------------------
class _Texts(NamedTuple):
    texts: list[str]
    labels: list[str]


def _texts(options: LanguageOptions, base: Path, label: str | int | Literal[False] | None) -> list[_Texts]:
    """The file of `path`, and that of `test_path` if there is one. label: the column; False for texts alone."""
    columns = {"text": options.text} if label is False else {"text": options.text, "label": label}
    paths = {"path": options.path, "test_path": options.test_path}
    found = []
    for field, name in paths.items():
        if name is not None:
            rows = _rows(existing_file(base, name, field), field, columns, options.header)
            found.append(_Texts([row[0] for row in rows], [row[-1] for row in rows]))
    return found


def _reference_texts(options: HfClassifierOptions, base: Path) -> list[str]:
    if options.reference is None:
        return list(REFERENCE_TEXTS)
    rows = _rows(
        existing_file(base, options.reference, "reference"), "reference", {"text": None}, header=False
    )
    if len(rows) < MIN_REFERENCE_TEXTS:
        raise _wrong("reference", f"{len(rows)} texts", [f"at least {MIN_REFERENCE_TEXTS}, better a hundred"])
    return [row[0] for row in rows]


Columns = Mapping[str, str | int | None]


def _rows(path: Path, field: str, columns: Columns, header: bool | None) -> list[list[str]]:
    """The wanted cells of every line that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(field, f"{path} cannot be read as text: {error}") from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    read = _json_rows if path.suffix == ".jsonl" else _tab_rows
    rows = read(numbered, field, columns, header) if numbered else []
    if not rows:
        raise _wrong(field, f"{path} holds no text")
    for (number, _), row in zip(numbered[-len(rows) :], rows, strict=True):
        if not all(row):
            raise _wrong(field, f"line {number} has an empty {' or '.join(columns)}")
    return rows


def _json_rows(
    lines: Sequence[tuple[int, str]], field: str, columns: Columns, header: bool | None
) -> list[list[str]]:
    if header:
        raise _wrong("header", "set, but a .jsonl file has keys")
    keys = {option: option if key is None else key for option, key in columns.items()}
    rows = []
    for number, line in lines:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise _wrong(field, f"line {number} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise _wrong(field, f"line {number} is not an object with keys")
        for option, key in keys.items():
            if not isinstance(found.get(str(key)), (str, int)):
                raise _wrong(option, f"line {number} has no text at {key!r}", found)
        rows.append([str(found[str(key)]).strip() for key in keys.values()])
    return rows


def _tab_rows(
    lines: Sequence[tuple[int, str]], field: str, columns: Columns, header: bool | None
) -> list[list[str]]:
    table = [(number, [cell.strip() for cell in line.split("\t")]) for number, line in lines]
    first = table[0][1]
    if header is None:
        named = any(isinstance(column, str) for column in columns.values())
        header = named or not {"text", "sentence", "label"}.isdisjoint(cell.lower() for cell in first)
    names = first if header else [str(index) for index in range(len(first))]
    places = [_place(option, column, names) for option, column in columns.items()]
    if len(set(places)) < len(places):
        raise _wrong("label", "text and label are one column", names)
    for number, cells in table:
        if len(cells) != len(first):
            problem = f"line {number} has {len(cells)} cells, the first has {len(first)}"
            raise _wrong(field, problem)
    return [[cells[place] for place in places] for _, cells in (table[1:] if header else table)]


def _place(option: str, column: str | int | None, names: Sequence[str]) -> int:
    if column is None:
        column = 0 if option == "text" else -1
    if isinstance(column, str):
        if column not in names:
            raise _wrong(option, f"there is no column {column!r}", names)
        return names.index(column)
    if not -len(names) <= column < len(names):
        raise _wrong(option, f"there is no column {column} among {len(names)}", names)
    return column % len(names)


def _pairs(
    options: LanguageOptions,
    found: Sequence[_Texts],
    targets: Sequence[NDArray[np.int64]],
    tokens: Callable[[Sequence[str]], Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Training and test samples as tokens and targets: split where there is no test file, then limited."""
    if len(found) == 1:
        parts = [
            (found[0].texts, targets[0], indices)
            for indices in split_samples(targets[0], options.test_fraction)
        ]
    else:
        parts = [(texts.texts, y, np.arange(len(y))) for texts, y in zip(found, targets, strict=True)]
    pairs = []
    for (texts, y, indices), limit in zip(parts, (options.train_limit, options.test_limit), strict=True):
        chosen = indices
        if limit is not None and limit < len(indices):
            drawn = stream(SPLIT_SEED, "hf", "limit").permutation(len(indices))[:limit]
            chosen = indices[np.sort(drawn)]
        pairs.append((tokens([texts[index] for index in chosen]), torch.from_numpy(y[chosen])))
    return pairs


def _tokens(pretrained: _Pretrained, options: LanguageOptions, template: str, texts: Sequence[str]) -> Tensor:
    """[texts, max_tokens], PAD on the right. Of a text that is too long the end goes, never the template's."""
    before, found, after = template.partition("{text}")
    if not found:
        raise _wrong("template", f"{template!r} has no place for the text", ["... {text} ..."])
    tokenizer: Any = partial(pretrained.tokenizer, verbose=False)
    ends = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][::-1]
    num_last = len(tokenizer(after, add_special_tokens=False)["input_ids"]) + ends.index(0)
    if num_last + len(tokenizer(before)["input_ids"]) >= options.max_tokens:
        problem = f"{options.max_tokens} leaves no room for a text beside the template"
        raise _wrong("max_tokens", problem)
    rows = tokenizer([f"{before}{text}{after}" for text in texts])["input_ids"]
    tokens = torch.full((len(rows), options.max_tokens), PAD)
    for index, row in enumerate(rows):
        if len(row) > options.max_tokens:
            row = row[: options.max_tokens - num_last] + row[len(row) - num_last :]
        tokens[index, : len(row)] = torch.tensor(row)
    return tokens
