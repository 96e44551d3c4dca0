"""The tasks that come with covey: digits, and tables from csv, npz and libsvm files.

Belongs here: their options, reading their data, and the split of samples into training and test. An operator's mistake
is a ConfigError with the option's path.
"""

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta, Struct
from numpy.typing import NDArray
from torch import Tensor

from node.partition import Indices
from node.randomness import stream
from node.tasks import Task, classification_metrics, mlp, regression_metrics
from protocols.errors import ConfigError

SPLIT_SEED = 20_240_404
"""The built-ins split train from test by this alone, so every node holds out the same samples."""


# --- options ----------------------------------------------------------------------------
Width = Annotated[int, Meta(ge=1, le=2**20)]
Kind = Literal["classification", "regression"]


class DigitsOptions(Struct, frozen=True):
    """hidden: widths of the hidden layers, none for a linear model."""

    hidden: tuple[Width, ...] = (64,)


class TableOptions(Struct, frozen=True, kw_only=True):
    """What every table from a file shares.

    path: the file, relative to the configuration's folder.
    hidden: widths of the MLP's hidden layers, none for a linear model.
    kind: what the label is. None: regression where labels are fractional numbers, else classification.
    classes: every class in order, for nodes whose own files may lack some. None: those found, sorted.
    test_fraction: share of the samples held out for testing, where no test set is given.
    standardise: shift and scale each feature to mean 0 and variance 1 over the training samples.
    """

    path: str
    hidden: tuple[Width, ...] = (64,)
    kind: Kind | None = None
    classes: tuple[str | int, ...] | None = None
    test_fraction: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    standardise: bool = True


class CsvOptions(TableOptions, frozen=True, kw_only=True):
    """label: the column to predict, by name or by index (-1 is the last).

    header: whether the first row names the columns. None: it does where no cell of it is a number.
    """

    label: str | int = -1
    header: bool | None = None
    delimiter: Annotated[str, Meta(min_length=1, max_length=1)] = ","


class NpzOptions(TableOptions, frozen=True, kw_only=True):
    """The file holds `x` and `y`, or `x_train`, `y_train`, `x_test` and `y_test`."""


class LibsvmOptions(TableOptions, frozen=True, kw_only=True):
    """test_path: a second file to test on. None: `test_fraction` of the first.

    features: how many there are. None: the largest index found, which may differ between nodes' own files.
    zero_based: whether the first feature has index 0; the format's custom is 1.
    """

    test_path: str | None = None
    features: Annotated[int, Meta(ge=1)] | None = None
    zero_based: bool = False


# --- digits -----------------------------------------------------------------------------
def digits(options: DigitsOptions, base: Path) -> Task:
    """scikit-learn's 1,797 images of 8 x 8 pixels in 10 classes; 1,438 of them to train on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train, test = split_samples(labels, 0.2)
    x, y = torch.from_numpy(images / 16.0).float(), torch.from_numpy(labels).long()
    return Task(
        name="digits",
        model=partial(mlp, 64, options.hidden, 10),
        train=(x[train], y[train]),
        test=(x[test], y[test]),
    )


def split_samples(targets: NDArray[Any], test_fraction: float) -> tuple[Indices, Indices]:
    """Training and test indices, sorted. Stratified: evenly spaced picks from a shuffle sorted by target.

    Raises ConfigError where the share holds out nothing.
    """
    shuffled = stream(SPLIT_SEED, "split").permutation(len(targets))
    by_target = shuffled[np.argsort(targets[shuffled], kind="stable")]
    quota = np.floor(np.arange(len(targets) + 1) * test_fraction)
    is_test = np.diff(quota) > 0
    if not is_test.any():
        raise ConfigError(
            "task.options.test_fraction", f"{test_fraction} of {len(targets)} samples holds out none"
        )
    return np.sort(by_target[~is_test]), np.sort(by_target[is_test])


# --- tables -----------------------------------------------------------------------------
class _Table(NamedTuple):
    """Features [samples, columns], labels [samples] as numbers or strings, and the columns' names."""

    x: NDArray[Any]
    y: NDArray[Any]
    columns: Sequence[str] = ()


def _table_task(builtin: str, options: TableOptions, train: _Table, test: _Table | None = None) -> Task:
    kind = options.kind or ("regression" if _fractional(train.y) else "classification")
    tables = [train] if test is None else [train, test]
    if kind == "classification":
        classes = _classes(np.concatenate([_label_names(table.y) for table in tables]), options)
        targets = [encode_labels(_label_names(table.y), classes) for table in tables]
    else:
        classes = []
        targets = [_numbers(table.y) for table in tables]
    if test is None:
        kept, held_out = split_samples(targets[0], options.test_fraction)
        inputs = [train.x[kept], train.x[held_out]]
        targets = [targets[0][kept], targets[0][held_out]]
    else:
        inputs = [train.x, test.x]
    if options.standardise:
        inputs = _standardised(inputs)
    # Two nodes with other columns or classes must not average: what tells them apart goes into the name.
    meaning = json.dumps([kind, list(train.columns), classes]).encode()
    pairs = [_tensors(x, y, kind) for x, y in zip(inputs, targets, strict=True)]
    regression = kind == "regression"
    return Task(
        name=f"{builtin}-{hashlib.sha256(meaning).hexdigest()[:8]}",
        model=partial(mlp, train.x.shape[1], options.hidden, 1 if regression else len(classes)),
        train=pairs[0],
        test=pairs[1],
        loss=F.mse_loss if regression else F.cross_entropy,
        metrics=regression_metrics if regression else classification_metrics,
    )


def _tensors(x: NDArray[Any], y: NDArray[Any], kind: Kind) -> tuple[Tensor, Tensor]:
    inputs = _float32(x)
    if kind == "regression":
        return inputs, _float32(y).reshape(-1, 1)
    return inputs, torch.from_numpy(y)


def _float32(numbers: NDArray[Any]) -> Tensor:
    with np.errstate(over="ignore"):
        single = numbers.astype(np.float32)
    if not np.isfinite(single).all():
        raise ConfigError("task.options.path", "some numbers are too large for 32-bit floats")
    return torch.from_numpy(single)


def _standardised(inputs: list[NDArray[Any]]) -> list[NDArray[Any]]:
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused by `_float32`
        mean, deviation = inputs[0].mean(axis=0), inputs[0].std(axis=0)
        deviation[deviation == 0] = 1.0
        return [(x - mean) / deviation for x in inputs]


def _fractional(labels: NDArray[Any]) -> bool:
    return labels.dtype.kind == "f" and bool((labels != np.floor(labels)).any())


def _label_names(labels: NDArray[Any]) -> NDArray[Any]:
    """Labels as text, whole numbers without a point: 1, 1.0 and "1" are one class."""
    if labels.dtype.kind == "f":
        return np.array([str(int(v)) if v.is_integer() else repr(v) for v in labels.tolist()], dtype=np.str_)
    return labels.astype(np.str_)


def _classes(names: NDArray[Any], options: TableOptions) -> list[str]:
    """The classes in their order: numbers by value, else text by code point."""
    found = set(names.tolist())
    if options.classes is None:
        if len(found) < 2:
            raise ConfigError("task.options.label", f"classification needs at least 2 classes, found {found}")
        return sorted_names(found)
    classes = [str(name) for name in options.classes]
    if len(set(classes)) < max(2, len(classes)):
        raise ConfigError("task.options.classes", f"{classes} are not at least 2 different names")
    if unknown := sorted(found - set(classes)):
        raise ConfigError(
            "task.options.classes", f"the data has a label {unknown[0]!r} that is not listed", classes
        )
    return classes


def sorted_names(names: set[str]) -> list[str]:
    """Classes in their order: by value where all are numbers, else as text."""
    try:
        return sorted(names, key=float)
    except ValueError:
        return sorted(names)


def encode_labels(names: NDArray[Any], classes: list[str]) -> NDArray[np.int64]:
    """The index of each label's class. Every label is one of the classes."""
    position = {name: index for index, name in enumerate(classes)}
    return np.array([position[name] for name in names.tolist()], dtype=np.int64)


def _numbers(labels: NDArray[Any]) -> NDArray[Any]:
    try:
        numbers: NDArray[Any] = labels.astype(np.float64)
    except ValueError as error:
        raise ConfigError("task.options.label", f"regression needs numbers: {error}") from error
    _check_finite("task.options.label", "labels", numbers)
    return numbers


def _check_finite(path: str, what: str, numbers: NDArray[Any]) -> None:
    bad = np.argwhere(~np.isfinite(numbers))
    if len(bad):
        place = ", ".join(str(i) for i in bad[0].tolist())
        raise ConfigError(path, f"{what} at index {place} hold {numbers[tuple(bad[0])]}, not a finite number")


def existing_file(base: Path, path: str, field: str = "path") -> Path:
    """A file that an option names, from the configuration's folder. Raises ConfigError where there is none."""
    found = base / Path(path).expanduser()
    if not found.is_file():
        raise ConfigError(f"task.options.{field}", f"there is no file {found}")
    return found


# --- csv --------------------------------------------------------------------------------
def csv_table(options: CsvOptions, base: Path) -> Task:
    """A text table: every column but the label is a numeric feature. Empty lines are skipped."""
    rows = _read_rows(existing_file(base, options.path), options.delimiter)
    header = _has_header(rows[0][1], options)
    columns = rows[0][1] if header else [str(index) for index in range(len(rows[0][1]))]
    body = rows[1:] if header else rows
    if not body:
        raise ConfigError("task.options.path", f"{options.path} has no row of data")
    for line, cells in body:
        if len(cells) != len(columns):
            raise ConfigError(
                "task.options.path", f"row {line} has {len(cells)} cells, the first has {len(columns)}"
            )
    label = _label_index(columns, options.label)
    labels = [cells.pop(label) for _, cells in body]
    names = columns[:label] + columns[label + 1 :]
    if not names:
        raise ConfigError("task.options.path", f"{options.path} has no column but the label")
    for (line, _), text in zip(body, labels, strict=True):
        if not text or (options.kind == "regression" and not _is_finite(text)):
            raise ConfigError(
                "task.options.label",
                f"row {line}, column {columns[label]!r}: {text!r} is not a {_label_kind(options)}",
            )
    all_numbers = all(_is_finite(text) for text in labels)
    y = np.array([float(text) for text in labels]) if all_numbers else np.array(labels, dtype=np.str_)
    return _table_task("csv", options, _Table(_features(body, names), y, names))


def _label_kind(options: TableOptions) -> str:
    return "finite number" if options.kind == "regression" else "label"


def _read_rows(path: Path, delimiter: str) -> list[tuple[int, list[str]]]:
    """(line number from 1, its cells) of every line that is not empty; at least one."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError("task.options.path", f"{path} cannot be read as a table: {error}") from error
    if not rows:
        raise ConfigError("task.options.path", f"{path} is empty")
    return rows


def _has_header(first: list[str], options: CsvOptions) -> bool:
    if options.header is not None:
        return options.header
    return isinstance(options.label, str) or not any(_is_number(cell) for cell in first)


def _label_index(columns: list[str], label: str | int) -> int:
    if isinstance(label, str):
        if label not in columns:
            raise ConfigError("task.options.label", f"there is no column {label!r}", columns)
        return columns.index(label)
    if not -len(columns) <= label < len(columns):
        raise ConfigError("task.options.label", f"there is no column {label} among {len(columns)}", columns)
    return label % len(columns)


def _features(body: list[tuple[int, list[str]]], names: list[str]) -> NDArray[np.float64]:
    try:
        x = np.array([cells for _, cells in body], dtype=np.float64)
    except ValueError:
        x = np.full((1, 1), np.nan)
    if np.isfinite(x).all():
        return x
    line, name, cell = next(
        (line, name, cell)
        for line, cells in body
        for name, cell in zip(names, cells, strict=True)
        if not _is_finite(cell)
    )
    raise ConfigError("task.options.path", f"row {line}, column {name!r}: {cell!r} is not a finite number")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_finite(text: str) -> bool:
    return _is_number(text) and math.isfinite(float(text))


# --- npz and libsvm ---------------------------------------------------------------------
def npz_table(options: NpzOptions, base: Path) -> Task:
    """Arrays from `numpy.savez`: x [samples, ...] of numbers, flattened; y [samples]."""
    path = existing_file(base, options.path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and numpy raise seven kinds on damaged files
        raise ConfigError("task.options.path", f"{path} cannot be read as arrays: {error}") from error
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        train = _array_table(arrays, "x_train", "y_train")
        test = _array_table(arrays, "x_test", "y_test")
        if train.x.shape[1] != test.x.shape[1]:
            raise ConfigError(
                "task.options.path", f"x_train has {train.x.shape[1]} features, x_test {test.x.shape[1]}"
            )
        return _table_task("npz", options, train, test)
    if {"x", "y"} <= arrays.keys():
        return _table_task("npz", options, _array_table(arrays, "x", "y"))
    raise ConfigError(
        "task.options.path",
        f"{path} holds the arrays {sorted(arrays)}",
        ["x and y", "x_train, y_train, x_test and y_test"],
    )


def _array_table(arrays: Mapping[str, NDArray[Any]], x_name: str, y_name: str) -> _Table:
    x, y = arrays[x_name], arrays[y_name]
    if x.ndim < 2 or x.dtype.kind not in "fiub" or not x.size:
        raise ConfigError(
            "task.options.path", f"{x_name} is {x.dtype}{list(x.shape)}", ["numbers [samples, features]"]
        )
    if y.shape == (len(x), 1):
        y = y[:, 0]
    if y.shape != (len(x),) or y.dtype.kind not in "fiubU":
        raise ConfigError(
            "task.options.path", f"{y_name} is {y.dtype}{list(y.shape)}", [f"one label for {len(x)} rows"]
        )
    flat = x.reshape(len(x), -1).astype(np.float64)
    _check_finite("task.options.path", x_name, flat)
    if y.dtype.kind == "f":
        _check_finite("task.options.path", y_name, y)
    return _Table(flat, y.astype(np.int64) if y.dtype.kind == "b" else y)


def libsvm_table(options: LibsvmOptions, base: Path) -> Task:
    """Lines of `label index:value ...`, made dense: samples times features times 8 bytes must fit in memory."""
    from sklearn.datasets import load_svmlight_files

    paths = [existing_file(base, options.path)]
    if options.test_path is not None:
        paths.append(existing_file(base, options.test_path, "test_path"))
    try:
        loaded = load_svmlight_files(
            [str(path) for path in paths], n_features=options.features, zero_based=options.zero_based
        )
    except ValueError as error:
        raise ConfigError(
            "task.options.path", f"{paths[0]} cannot be read as libsvm lines: {error}"
        ) from error
    tables = [_Table(x.toarray(), y) for x, y in zip(loaded[::2], loaded[1::2], strict=True)]
    for path, table in zip(paths, tables, strict=True):
        if not table.x.size:
            raise ConfigError("task.options.path", f"{path} holds no sample")
        _check_finite("task.options.path", "values", table.x)
        _check_finite("task.options.path", "labels", table.y)
    return _table_task("libsvm", options, *tables)
