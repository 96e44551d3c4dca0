"""From the name in the configuration to a Task: a built-in's name, or `file.py:function` for one's own.

Belongs here: the table of built-ins, the check of options against what a task takes, and running a user's file.
"""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from msgspec import Struct
from torch import Tensor

from node.builtin_tasks import (
    SPLIT_SEED,
    CsvOptions,
    DigitsOptions,
    LibsvmOptions,
    NpzOptions,
    csv_table,
    digits,
    libsvm_table,
    npz_table,
)
from node.hf_tasks import HfCausalLmOptions, HfClassifierOptions, hf_causal_lm, hf_classifier
from node.randomness import torch_seed, torch_seeded
from node.settings import Shard
from node.tasks import Task, shard_task
from protocols.errors import ConfigError, CoveyError


class Builtin(NamedTuple):
    """Its options, and what makes a task of them: (options, folder for relative paths) -> Task."""

    options: type[Struct]
    make: Callable[[Any, Path], Task]


TASKS: dict[str, Builtin] = {
    "digits": Builtin(DigitsOptions, digits),
    "csv": Builtin(CsvOptions, csv_table),
    "npz": Builtin(NpzOptions, npz_table),
    "libsvm": Builtin(LibsvmOptions, libsvm_table),
    "hf-classifier": Builtin(HfClassifierOptions, hf_classifier),
    "hf-causal-lm": Builtin(HfCausalLmOptions, hf_causal_lm),
}


def make_task(
    reference: str,
    options: Mapping[str, Any],
    base: Path,
    shard: Shard | None = None,
    probe: str | None = None,
) -> Task:
    """The task that the configuration names.

    reference: a name in TASKS, or `file.py:function` for one's own.
    options: as in the built-in's options struct, or the function's keyword arguments.
    base: the folder that relative paths start from.
    shard: restricts `train` to one node's part.
    probe: a file of inputs that all nodes have, in place of those that the task brings.
    Raises ConfigError on every mistake of the operator, with `task.name`, `task.options.<option>`, `task.shard` or
    `task.probe`.
    """
    if reference in TASKS:
        builtin = TASKS[reference]
        task = builtin.make(_checked_options(reference, builtin.options, options), base)
    elif ":" in reference or reference.endswith(".py"):
        task = load_task(reference, options, base)
    else:
        raise ConfigError("task.name", f"there is no task {reference!r}", [*TASKS, "<file>.py:<function>"])
    if probe is not None:
        task = replace(task, probe=_load_probe(base / Path(probe).expanduser(), task))
    return task if shard is None else shard_task(task, shard)


def _load_probe(path: Path, task: Task) -> Tensor:
    """The array `x` of an npz file: inputs [samples, ...], as the network takes them."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = torch.from_numpy(np.ascontiguousarray(archive["x"]))
    except Exception as error:  # zipfile, zlib and numpy raise seven kinds on damaged files
        raise ConfigError(
            "task.probe", f"{path} cannot be read: {error}", ["an .npz file with an array x"]
        ) from error
    inputs = task.train[0]
    if found.shape[1:] != inputs.shape[1:] or not len(found):
        expected = f"[samples, {', '.join(map(str, inputs.shape[1:]))}], as the network takes them"
        raise ConfigError("task.probe", f"x is {list(found.shape)}", [expected])
    if not bool(found.isfinite().all()):
        raise ConfigError("task.probe", "x holds a value that is not finite")
    return found.to(inputs.dtype)


def _checked_options(reference: str, kind: type[Struct], options: Mapping[str, Any]) -> Struct:
    fields = msgspec.structs.fields(kind)
    names = [field.name for field in fields]
    for name in options:
        if name not in names:
            raise ConfigError(f"task.options.{name}", f"not an option of the task `{reference}`", names)
    for field in fields:
        if field.required and field.name not in options:
            raise ConfigError(f"task.options.{field.name}", f"missing; the task `{reference}` needs it")
    try:
        return msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$.")
        raise ConfigError(f"task.options.{place.rstrip('`')}", problem) from error


def load_task(reference: str, options: Mapping[str, Any], base: Path = Path()) -> Task:
    """Import `file.py` and call `function(**options)`, for a reference `file.py:function`.

    The file runs as a module of its own name; modules beside it are not found. torch's generator is seeded the
    same for every node while it runs, and restored after. Raises ConfigError, from the user's own exception
    where there was one.
    """
    file, _, function = reference.rpartition(":")
    path = base / Path(file).expanduser()
    if not file:
        raise ConfigError("task.name", f"{reference!r} names no function", ["<file>.py:<function>"])
    if not path.is_file():
        raise ConfigError("task.name", f"there is no file {path}")
    try:
        with torch_seeded(torch_seed(SPLIT_SEED, "task")):
            make = _function_of(_import_file(path), function)
            _check_arguments(make, function, options)
            task = make(**options)
    except CoveyError:
        raise
    except Exception as error:  # a user's code may raise anything, and the operator must read it
        raise ConfigError("task.name", f"{reference} raised {type(error).__name__}: {error}") from error
    return _checked_task(task, reference)


def _import_file(path: Path) -> ModuleType:
    name = "covey_task_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError("task.name", f"{path} is no Python file", ["<file>.py:<function>"])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _function_of(module: ModuleType, function: str) -> Callable[..., object]:
    make = getattr(module, function, None)
    if not inspect.isfunction(make):
        own = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
        raise ConfigError("task.name", f"{module.__file__} has no function {function!r}", own)
    return make


def _check_arguments(make: Callable[..., object], function: str, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in options:
        if name not in parameters and not takes_any:
            raise ConfigError(f"task.options.{name}", f"not an option of `{function}`", parameters)
    for name, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"task.options.{name}", f"missing; `{function}` needs it")


def _checked_task(task: object, reference: str) -> Task:
    if not isinstance(task, Task):
        raise ConfigError("task.name", f"{reference} returned {type(task).__name__}, not a Task")
    if not 1 <= len(task.name) <= 64:
        raise ConfigError("task.name", f"{reference} names its task {task.name!r}", ["1 to 64 characters"])
    for part, (inputs, targets) in (("train", task.train), ("test", task.test)):
        if len(inputs) != len(targets) or not len(inputs):
            raise ConfigError(
                "task.name",
                f"{reference} gives {part} {len(inputs)} inputs and {len(targets)} targets",
                ["as many of each, at least one"],
            )
    return task
