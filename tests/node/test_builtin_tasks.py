"""Tasks from digits and from tables in files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from node.settings import TrainingSettings
from node.task_loading import make_task
from node.tasks import Task, initial_params
from node.training import evaluate, train
from node.weights import schema_of
from protocols.errors import ConfigError


def refused(reference: str, options: Mapping[str, Any], base: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        make_task(reference, options, base)
    return str(caught.value)


def learns(task: Task) -> dict[str, float]:
    params, steps = initial_params(task, 0), TrainingSettings(local_steps=300)
    trained, _ = train(task, params, steps, round=0, seed=0, node=0)
    return evaluate(task, trained)


def test_digits_are_split_the_same_everywhere_and_by_class(tmp_path: Path) -> None:
    task, again = make_task("digits", {}, tmp_path), make_task("digits", {"hidden": [5, 4]}, tmp_path)
    assert torch.equal(task.train[0], again.train[0])
    assert task.train[0].shape == (1438, 64)
    assert task.test[0].shape == (359, 64)
    assert task.train[0].dtype == torch.float32
    assert (task.train[0].min().item(), task.train[0].max().item()) == (0.0, 1.0)
    assert set(torch.bincount(task.test[1]).tolist()) <= {34, 35, 36, 37}
    assert [spec.shape for spec in schema_of(again.model()).values()] == [
        (5,),
        (5, 64),
        (4,),
        (4, 5),
        (10,),
        (10, 4),
    ]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def pets(path: Path, *, header: bool = True) -> Path:
    """40 animals: kg decides the kind; age says nothing."""
    weights = [*range(20), *range(50, 70)]
    rows = [f"{kg},{(7 * kg) % 11},{'cat' if kg < 20 else 'dog'}" for kg in weights]
    return write(path, "\n".join((["kg,age,kind"] if header else []) + rows) + "\n")


def test_a_csv_with_text_labels_becomes_sorted_classes(tmp_path: Path) -> None:
    pets(tmp_path / "pets.csv")
    task = make_task("csv", {"path": "pets.csv", "label": "kind", "hidden": [8]}, tmp_path)
    assert task.train[0].shape == (32, 2)
    assert task.test[0].shape == (8, 2)
    assert torch.bincount(task.test[1]).tolist() == [4, 4]
    assert torch.allclose(task.train[0].mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(task.train[0].std(0, unbiased=False), torch.ones(2))
    heavy = task.train[1] == 1
    assert task.train[0][heavy, 0].min() > task.train[0][~heavy, 0].max()
    assert learns(task)["accuracy"] == 1.0


def test_a_csv_needs_neither_header_nor_label_name(tmp_path: Path) -> None:
    plain, titled = pets(tmp_path / "plain.csv", header=False), pets(tmp_path / "titled.csv")
    by_default = make_task("csv", {"path": str(plain)}, tmp_path)
    by_index = make_task("csv", {"path": str(titled), "label": 2}, tmp_path)
    assert torch.equal(by_default.train[0], by_index.train[0])
    forced = make_task("csv", {"path": str(plain), "header": True}, tmp_path)
    assert len(forced.train[0]) + len(forced.test[0]) == 40 - 1
    assert refused("csv", {"path": str(titled), "header": False}, tmp_path) == (
        "task.options.path: row 1, column '0': 'kg' is not a finite number"
    )


def test_a_csv_may_have_a_byte_order_mark_quotes_semicolons_and_empty_lines(tmp_path: Path) -> None:
    rows = "\n\n".join(f'{n}; "{n % 2}"' for n in range(10))
    write(tmp_path / "t.csv", f"\ufeffx;y\n{rows}\n")
    task = make_task("csv", {"path": "t.csv", "label": "y", "delimiter": ";"}, tmp_path)
    assert len(task.train[0]) + len(task.test[0]) == 10


def test_a_csv_with_fractional_labels_is_a_regression(tmp_path: Path) -> None:
    write(tmp_path / "line.csv", "x,y\n" + "".join(f"{n},{n / 40 + 0.1}\n" for n in range(50)))
    task = make_task("csv", {"path": "line.csv", "label": "y"}, tmp_path)
    assert task.train[1].shape == (40, 1)
    metrics = learns(task)
    assert list(metrics) == ["rmse", "r2", "loss"]
    assert metrics["r2"] > 0.95


def test_whole_numbers_can_be_a_regression_when_the_operator_says_so(tmp_path: Path) -> None:
    write(tmp_path / "line.csv", "x,y\n" + "".join(f"{n},{n}\n" for n in range(12)))
    classes = make_task("csv", {"path": "line.csv"}, tmp_path)
    numbers = make_task("csv", {"path": "line.csv", "kind": "regression"}, tmp_path)
    assert schema_of(classes.model())["2.bias"].shape == (12,)
    assert schema_of(numbers.model())["2.bias"].shape == (1,)
    assert sorted(classes.train[1].tolist() + classes.test[1].tolist()) == list(range(12))


def test_a_feature_that_never_varies_does_no_harm(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", "".join(f"{n},7,{n % 2}\n" for n in range(10)))
    task = make_task("csv", {"path": "t.csv"}, tmp_path)
    assert not task.train[0][:, 1].any()
    raw = make_task("csv", {"path": "t.csv", "standardise": False}, tmp_path)
    assert (raw.train[0][:, 1] == 7).all()


def test_nodes_whose_files_lack_a_class_agree_once_the_classes_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "kg,kind\n" + "1,cat\n2,dog\n" * 5)
    write(tmp_path / "b.csv", "kg,kind\n" + "1,cat\n2,owl\n" * 5)
    write(tmp_path / "c.csv", "age,kind\n" + "1,cat\n2,dog\n" * 5)
    classes = {"classes": ["cat", "dog", "owl"]}
    names = [make_task("csv", {"path": f"{file}.csv"}, tmp_path).name for file in "abc"]
    assert len(set(names)) == 3, "other classes or columns must not be averaged"
    a, b = (make_task("csv", {"path": f"{file}.csv"} | classes, tmp_path) for file in "ab")
    assert a.name == b.name
    assert schema_of(a.model()) == schema_of(b.model())
    assert set(b.train[1].tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, "task.options.path: there is no file {path}"),
        ("", {}, "task.options.path: {path} is empty"),
        ("a,b\n", {}, "task.options.path: t.csv has no row of data"),
        ("1,x\n2\n", {}, "task.options.path: row 2 has 1 cells, the first has 2"),
        ("x\ny\n", {}, "task.options.path: t.csv has no column but the label"),
        ("a,b\n1,x\n", {"label": "c"}, "task.options.label: there is no column 'c' (allowed: a, b)"),
        ("a,b\n1,x\n", {"label": 2}, "task.options.label: there is no column 2 among 2 (allowed: a, b)"),
        ("a,b\n1,x\n\ntall,y\n", {}, "task.options.path: row 4, column 'a': 'tall' is not a finite number"),
        ("a,b\n1,x\n,y\n", {}, "task.options.path: row 3, column 'a': '' is not a finite number"),
        ("a,b\n1,x\nnan,y\n", {}, "task.options.path: row 3, column 'a': 'nan' is not a finite number"),
        ("a,b\n1,x\n2,\n", {}, "task.options.label: row 3, column 'b': '' is not a label"),
        (
            "a,b\n1,x\n",
            {"kind": "regression"},
            "task.options.label: row 2, column 'b': 'x' is not a finite number",
        ),
        (
            "a,b\n1,x\n2,x\n",
            {},
            "task.options.label: classification needs at least 2 classes, found {{'x'}}",
        ),
        (
            "a,b\n1,x\n2,y\n",
            {"classes": ["x", "x", "y"]},
            "task.options.classes: ['x', 'x', 'y'] are not at least 2 different names",
        ),
        (
            "a,b\n1,x\n2,owl\n",
            {"classes": ["x", "y"]},
            "task.options.classes: the data has a label 'owl' that is not listed (allowed: x, y)",
        ),
        ("a,b\n1,x\n2,y\n", {}, "task.options.test_fraction: 0.2 of 2 samples holds out none"),
        (
            "a,b\n1e300,x\n2,y\n",
            {"test_fraction": 0.5},
            "task.options.path: some numbers are too large for 32-bit floats",
        ),
        ("a,b\n1,x\n", {"delimiter": ",,"}, "task.options.delimiter: Expected `str` of length <= 1"),
        ("a,b\n1,x\n", {"hidden": [8, 0]}, "task.options.hidden[1]: Expected `int` >= 1"),
        ("a,b\n1,x\n", {"hidden": "8"}, "task.options.hidden: Expected `array`, got `str`"),
        ("a,b\n1,x\n", {"kind": "ranking"}, "task.options.kind: Invalid enum value 'ranking'"),
        (
            "a,b\n1,x\n",
            {"lable": "b"},
            (
                "task.options.lable: not an option of the task `csv` (allowed: path, hidden, kind, classes, "
                "test_fraction, standardise, label, header, delimiter)"
            ),
        ),
    ],
)
def test_every_mistake_with_a_csv_says_what_and_where(
    text: str | None, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    if text is not None:
        write(path, text)
    assert refused("csv", {"path": "t.csv"} | options, tmp_path) == message.format(path=path)


def test_a_csv_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a table" in refused("csv", {"path": "t.csv"}, tmp_path)


def test_npz_arrays_are_split_or_taken_as_given(tmp_path: Path) -> None:
    x = np.arange(80.0).reshape(20, 2, 2)
    y = np.arange(20) % 2
    np.savez(tmp_path / "one.npz", x=x, y=y)
    np.savez(tmp_path / "two.npz", x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])
    one, two = (make_task("npz", {"path": f"{name}.npz"}, tmp_path) for name in ("one", "two"))
    assert one.train[0].shape == (16, 4)
    assert one.test[0].shape == (4, 4)
    assert two.train[0].shape == (20, 4)
    assert two.test[0].shape == (6, 4)
    assert one.name == two.name


def test_npz_labels_may_be_fractional_text_or_a_column(tmp_path: Path) -> None:
    x = np.arange(20.0).reshape(10, 2)
    np.savez(tmp_path / "real.npz", x=x, y=np.arange(10)[:, None] / 3)
    np.savez(tmp_path / "text.npz", x=x, y=np.array(["no", "yes"] * 5))
    np.savez(tmp_path / "bool.npz", x=x, y=np.array([False, True] * 5))
    assert make_task("npz", {"path": "real.npz"}, tmp_path).train[1].shape == (8, 1)
    for name in ("text", "bool"):
        assert set(make_task("npz", {"path": f"{name}.npz"}, tmp_path).train[1].tolist()) == {0, 1}
    assert refused("npz", {"path": "text.npz", "kind": "regression"}, tmp_path).startswith(
        "task.options.label: regression needs numbers: could not convert string to float"
    )


X, Y = np.ones((4, 2)), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "{path} holds the arrays ['x'] (allowed: x and y, x_train, y_train, x_test and y_test)"),
        ({"x": X[:, 0], "y": Y}, "x is float64[4] (allowed: numbers [samples, features])"),
        ({"x": X.astype(np.str_), "y": Y}, "x is <U32[4, 2] (allowed: numbers [samples, features])"),
        ({"x": X, "y": Y[:3]}, "y is int64[3] (allowed: one label for 4 rows)"),
        ({"x": X * np.inf, "y": Y}, "x at index 0, 0 hold inf, not a finite number"),
        ({"x": X, "y": Y * np.nan}, "y at index 0 hold nan, not a finite number"),
        (
            {"x_train": X, "y_train": Y, "x_test": np.ones((2, 3)), "y_test": Y[:2]},
            "x_train has 2 features, x_test 3",
        ),
    ],
)
def test_every_mistake_with_an_npz_says_what(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, **arrays)
    assert refused("npz", {"path": "t.npz"}, tmp_path) == "task.options.path: " + message.format(path=path)


def test_an_npz_with_pickles_or_damage_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object), y=np.zeros(1))
    whole = (tmp_path / "pickled.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    for name in ("pickled", "cut", "single"):
        assert "cannot be read as arrays" in refused("npz", {"path": f"{name}.npz"}, tmp_path)


def spam(path: Path, num_samples: int) -> None:
    write(path, "".join(f"{n % 2 or -1} 1:{n} {3}:{(n % 2) * 2 - 1}\n" for n in range(num_samples)))


def test_libsvm_lines_become_dense_features(tmp_path: Path) -> None:
    spam(tmp_path / "train", 40)
    spam(tmp_path / "test", 10)
    split = make_task("libsvm", {"path": "train"}, tmp_path)
    given_test = make_task("libsvm", {"path": "train", "test_path": "test", "features": 5}, tmp_path)
    assert split.train[0].shape == (32, 3)
    assert given_test.train[0].shape == (40, 5)
    assert given_test.test[0].shape == (10, 5)
    assert set(split.train[1].tolist()) == {0, 1}
    assert learns(split)["accuracy"] == 1.0


def test_libsvm_features_count_from_one_unless_said_otherwise(tmp_path: Path) -> None:
    write(tmp_path / "t", "".join(f"{n % 2} 0:{n} 1:1\n" for n in range(10)))
    assert "Invalid index 0" in refused("libsvm", {"path": "t"}, tmp_path)
    assert make_task("libsvm", {"path": "t", "zero_based": True}, tmp_path).train[0].shape == (8, 2)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, "task.options.path: there is no file"),
        ("0 1:1\n", {"test_path": "no"}, "task.options.test_path: there is no file"),
        ("0 1:x\n", {}, "cannot be read as libsvm lines"),
        ("0 1:1 2:1\n", {"features": 1}, "cannot be read as libsvm lines"),
        ("# nothing\n", {}, "holds no sample"),
        ("0 1:nan\n1 1:2\n", {}, "values at index 0, 0 hold nan, not a finite number"),
        ("nan 1:1\n1 1:2\n", {}, "labels at index 0 hold nan, not a finite number"),
    ],
)
def test_every_mistake_with_libsvm_says_what(
    text: str | None, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if text is not None:
        write(tmp_path / "t", text)
    assert message in refused("libsvm", {"path": "t"} | options, tmp_path)
