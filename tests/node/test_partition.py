"""Laws that every partitioner keeps, and what each is for."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.partition import PARTITIONERS, Labels, by_class, dirichlet, iid, shard
from node.randomness import stream

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "iid": [{}],
    "dirichlet": [{"alpha": 0.01}, {"alpha": 100.0}, {"alpha": 1e-300}, {"alpha": 1e300}],
    "shard": [{"shards_per_node": 1}],
}
CASES = [(name, options) for name, cases in OPTIONS.items() for options in cases]


@st.composite
def shared_data(draw: st.DrawFn) -> tuple[Labels, int]:
    labels = draw(st.lists(st.integers(0, 4), min_size=1, max_size=120))
    return np.array(labels), draw(st.integers(1, len(labels)))


@pytest.mark.parametrize(("name", "options"), CASES)
@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=shared_data(), seed=st.integers(0, 100))
def test_parts_are_disjoint_cover_everything_and_are_never_empty(
    name: str, options: dict[str, Any], data: tuple[Labels, int], seed: int
) -> None:
    labels, num_partitions = data
    parts = PARTITIONERS[name](labels, num_partitions, stream(seed), **options)
    assert len(parts) == num_partitions
    assert all(len(part) >= 1 and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_seed_decides_the_parts(name: str, options: dict[str, Any]) -> None:
    labels = np.arange(300) % 7
    first, again, other = (PARTITIONERS[name](labels, 9, stream(seed), **options) for seed in (1, 1, 2))
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(first, other, strict=True))


def test_by_class_no_two_nodes_share_a_class_and_all_samples_are_dealt() -> None:
    labels = np.array([5, 3, 9, 3, 5, 7, 9, 5, 1])  # classes 1, 3, 5, 7, 9
    parts = by_class(labels, 2, stream(0))
    assert [np.unique(labels[part]).tolist() for part in parts] == [[1, 5, 9], [3, 7]]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


def test_by_class_wants_a_class_for_every_node() -> None:
    with pytest.raises(ValueError, match=r"num_partitions: 3 \(allowed: 1 to 2 for this data\)"):
        by_class(np.array([0, 1, 1, 0]), 3, stream(0))


def test_iid_parts_differ_by_at_most_one_sample() -> None:
    sizes = [len(part) for part in iid(np.zeros(1003), 10, stream(0))]
    assert set(sizes) == {100, 101}


@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=shared_data(), seed=st.integers(0, 100), fraction=st.floats(0, 1))
def test_dirichlet_keeps_the_least_size_asked_for(
    data: tuple[Labels, int], seed: int, fraction: float
) -> None:
    labels, num_partitions = data
    least = max(1, int(fraction * (len(labels) // num_partitions)))
    parts = dirichlet(labels, num_partitions, stream(seed), alpha=0.05, min_partition_size=least)
    assert min(map(len, parts)) >= least


def test_dirichlet_gives_ten_samples_to_each_unless_data_is_short() -> None:
    assert min(map(len, dirichlet(np.arange(1000) % 10, 20, stream(0), alpha=0.05))) >= 10
    assert {len(part) for part in dirichlet(np.arange(40) % 10, 20, stream(0), alpha=0.05)} == {2}


def test_a_small_alpha_skews_the_labels_and_a_large_one_does_not() -> None:
    labels = np.arange(5000) % 10

    def largest_share(alpha: float) -> float:
        parts = dirichlet(labels, 10, stream(3), alpha=alpha)
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert largest_share(0.05) > 0.6
    assert largest_share(1000.0) < 0.15


def test_shards_hold_few_labels_each() -> None:
    labels = np.arange(1000) % 10
    parts = shard(labels, 10, stream(0), shards_per_node=2)
    assert {len(part) for part in parts} == {100}
    assert max(len(np.unique(labels[part])) for part in parts) <= 2


@pytest.mark.parametrize("name", PARTITIONERS)
@pytest.mark.parametrize("num_partitions", [0, 6])
def test_a_wrong_number_of_partitions_is_refused(name: str, num_partitions: int) -> None:
    with pytest.raises(
        ValueError, match=rf"num_partitions: {num_partitions} \(allowed: 1 to 5 for this data"
    ):
        PARTITIONERS[name](np.zeros(5, dtype=np.int64), num_partitions, stream(0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dirichlet", {"alpha": 0.0}, r"alpha: 0.0 \(allowed: a number above 0\)"),
        ("dirichlet", {"alpha": float("nan")}, r"alpha: nan \(allowed: a number above 0\)"),
        ("dirichlet", {"min_partition_size": 6}, r"min_partition_size: 6 \(allowed: 1 to 5 for this data\)"),
        ("shard", {"shards_per_node": 0}, r"shards_per_node: 0 \(allowed: 1 to 5 for this data\)"),
        ("shard", {"shards_per_node": 6}, r"shards_per_node: 6 \(allowed: 1 to 5 for this data\)"),
    ],
)
def test_an_option_out_of_its_range_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PARTITIONERS[name](np.zeros(10, dtype=np.int64), 2, stream(0), **options)


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels: float64 has no classes \(allowed: integers\)"):
        dirichlet(np.zeros(10), 2, stream(0))
    with pytest.raises(ValueError, match=r"labels: shape \[10, 2\] \(allowed: one label a sample\)"):
        iid(np.zeros((10, 2)), 2, stream(0))
