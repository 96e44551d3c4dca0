"""How one data set is shared out among nodes.

Belongs here: functions from labels to indices. They know no tensor, no task and no file. The names are Flower's,
so that a reader of `flwr_datasets.partitioner` finds them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Labels = NDArray[Any]

MAX_TRIES = 10
"""How often `dirichlet` draws again before it moves samples. Flower's number of retries."""
DEFAULT_MIN_SIZE = 10


def iid(labels: Labels, num_partitions: int, rng: np.random.Generator) -> list[Indices]:
    """Deal shuffled samples one by one: sizes differ by at most one (Flower's `IidPartitioner`, shuffled).

    labels: shape [samples], of any kind: only their number matters.
    Returns one sorted index array per node; together they hold every sample once, and none is empty.
    Raises ValueError where `num_partitions` is not in 1..samples.
    """
    _check(labels, num_partitions)
    owner = np.empty(len(labels), dtype=np.int64)
    owner[rng.permutation(len(labels))] = np.arange(len(labels)) % num_partitions
    return _by_owner(owner, num_partitions)


def dirichlet(
    labels: Labels,
    num_partitions: int,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
    min_partition_size: int | None = None,
) -> list[Indices]:
    """Split each class by proportions drawn from Dirichlet(alpha) (Flower's `DirichletPartitioner`).

    As there by default (`self_balancing`), a node that already holds its even share gets nothing of the
    classes that follow, so what is skewed is mostly the mix of labels.

    labels: integer classes, shape [samples].
    alpha: small (0.1) gives a node few classes, large (100) is close to `iid`.
    min_partition_size: every part has at least so many samples: up to 10 draws, then samples move from the
        largest part. Default 10, or the even share where that is less.
    Returns as `iid`. Raises ValueError on an argument out of its range.
    """
    _check(labels, num_partitions)
    if labels.dtype.kind not in "iub":
        raise ValueError(f"labels: {labels.dtype} has no classes (allowed: integers)")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha: {alpha} (allowed: a number above 0)")
    share = len(labels) // num_partitions
    smallest = min(DEFAULT_MIN_SIZE, share) if min_partition_size is None else min_partition_size
    _check_range("min_partition_size", smallest, share)
    owner = _draw_owners(labels, num_partitions, rng, alpha)
    for _ in range(MAX_TRIES - 1):
        if np.bincount(owner, minlength=num_partitions).min() >= smallest:
            break
        owner = _draw_owners(labels, num_partitions, rng, alpha)
    _top_up(owner, num_partitions, smallest, rng)
    return _by_owner(owner, num_partitions)


def shard(
    labels: Labels, num_partitions: int, rng: np.random.Generator, *, shards_per_node: int = 2
) -> list[Indices]:
    """Sort by label, cut into equal shards, deal each node `shards_per_node` (Flower's `ShardPartitioner`).

    The pathological split of McMahan et al. 2017, section 3: with 2 shards a node sees about 2 classes.

    labels: anything that sorts, shape [samples]; equal labels are shuffled first.
    Returns as `iid`. Raises ValueError where there are fewer samples than shards.
    """
    _check(labels, num_partitions)
    _check_range("shards_per_node", shards_per_node, len(labels) // num_partitions)
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    dealt = rng.permutation(num_partitions * shards_per_node) % num_partitions
    owner = np.empty(len(labels), dtype=np.int64)
    for node, indices in zip(dealt, np.array_split(by_label, len(dealt)), strict=True):
        owner[indices] = node
    return _by_owner(owner, num_partitions)


def by_class(labels: Labels, num_partitions: int, rng: np.random.Generator) -> list[Indices]:
    """Class c goes whole to node c mod n: no two nodes share a class (DIMAT's non-IID split, arXiv 2404.08079).

    labels: anything that sorts, shape [samples]; classes are numbered in their order. Nothing is drawn.
    Returns as `iid`. Raises ValueError where there are fewer classes than nodes.
    """
    _check(labels, num_partitions)
    classes, numbers = np.unique(labels, return_inverse=True)
    _check_range("num_partitions", num_partitions, len(classes))
    return _by_owner(numbers % num_partitions, num_partitions)


PARTITIONERS: dict[str, Callable[..., list[Indices]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shard": shard,
    "class": by_class,
}


def _check(labels: Labels, num_partitions: int) -> None:
    if labels.ndim != 1:
        raise ValueError(f"labels: shape {list(labels.shape)} (allowed: one label a sample)")
    _check_range("num_partitions", num_partitions, len(labels))


def _check_range(argument: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ValueError(f"{argument}: {value} (allowed: 1 to {most} for this data)")


def _by_owner(owner: Indices, num_partitions: int) -> list[Indices]:
    cuts: Sequence[int] = np.cumsum(np.bincount(owner, minlength=num_partitions))[:-1].tolist()
    return np.split(np.argsort(owner, kind="stable"), cuts)


def _draw_owners(labels: Labels, num_partitions: int, rng: np.random.Generator, alpha: float) -> Indices:
    """The node of each sample, shape [samples], by one draw of proportions a class."""
    owner = np.empty(len(labels), dtype=np.int64)
    sizes = np.zeros(num_partitions, dtype=np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        wants_more = sizes < len(labels) / num_partitions
        proportions = np.where(wants_more, rng.dirichlet(np.full(num_partitions, alpha)), 0.0)
        if not (0 < proportions.sum() < math.inf):  # an extreme alpha leaves zeros or NaN: share evenly
            proportions = wants_more.astype(np.float64)
        shares = np.cumsum(proportions) / proportions.sum()
        cuts = np.floor(shares[:-1] * len(members)).astype(np.int64)
        counts = np.diff(cuts, prepend=0, append=len(members))
        owner[members] = np.repeat(np.arange(num_partitions), counts)
        sizes += counts
    return owner


def _top_up(owner: Indices, num_partitions: int, smallest: int, rng: np.random.Generator) -> None:
    """Move samples, in place, from the largest part of the moment until no part has less than `smallest`."""
    sizes = np.bincount(owner, minlength=num_partitions)
    for poor in np.flatnonzero(sizes < smallest):
        while sizes[poor] < smallest:
            rich = int(np.argmax(sizes))
            owner[rng.choice(np.flatnonzero(owner == rich))] = poor
            sizes[rich] -= 1
            sizes[poor] += 1
