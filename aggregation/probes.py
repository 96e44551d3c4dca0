"""The inputs on which a receiver runs networks to compare or to correct them.

Belongs here: choosing them, and small questions that several such rules ask.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aggregation.base import Params, Receiver

PROBES = ("own", "shared")
CHUNK = 256
"""Samples in one pass: a bound on memory, without influence on what is found beyond rounding."""


def probe_of(receiver: Receiver, probe: str, samples: int) -> Tensor:
    """At most `samples` inputs, evenly spaced, in whole chunks.

    probe: "own", of the receiver's own training data, or "shared", of those that all nodes have.

    Raises ValueError where the task has no shared ones, or there is no sample.
    """
    inputs = receiver.samples[0] if probe == "own" else receiver.probe
    if inputs is None:
        raise ValueError(
            'probe is "shared", but the task has no shared probe inputs (task.probe in the config, or Task.probe); use "own"'
        )
    wanted = min(samples, len(inputs))
    if not wanted:
        raise ValueError("there is no sample to run the networks on")
    if wanted > CHUNK:
        wanted -= wanted % CHUNK
    return inputs[evenly_spaced(len(inputs), wanted)]


def evenly_spaced(total: int, at_most: int) -> Tensor:
    """int64, ascending indices below `total`, at most `at_most` of them.

    >>> evenly_spaced(10, 4).tolist(), evenly_spaced(2, 4).tolist()
    ([0, 2, 5, 7], [0, 1])
    """
    count = min(total, at_most)
    return torch.arange(count) * total // max(count, 1)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts every submodule's training flag back after."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def batches(inputs: Tensor, size: int) -> Iterator[Tensor]:
    """Whole batches only: a traced graph takes no others."""
    for start in range(0, len(inputs) - size + 1, size):
        yield inputs[start : start + size]


def same(params: Params, others: Params) -> bool:
    """Whether two models are one, to the bit."""
    return all(torch.equal(tensor, others[name]) for name, tensor in params.items())
