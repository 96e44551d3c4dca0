"""How good a model is in the receiver's own eyes.

Belongs here: the one evaluation on validation samples that every rule shares which judges models. What
follows from a score is the rule's matter: a weight (`weighting.py`), a choice (`judging.py`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aggregation.base import Params, Receiver, require
from aggregation.probes import modes_kept

MEASURES = ("loss", "accuracy")
"""By what a rule may judge: the task's loss, or its metric of that name."""

BATCH = 1024
"""Samples in one forward pass."""


def require_measure(by: str) -> None:
    """Raises ValueError where `by` is none of MEASURES."""
    require(by in MEASURES, "by", f"one of {', '.join(MEASURES)}", by)


def score(receiver: Receiver, params: Params, by: str) -> float:
    """How well `params` do on the receiver's validation samples. Larger is better, -inf is no number.

    by: "loss" is the loss with its sign changed, "accuracy" the metric of that name, from 0 to 1.

    A peer's own figure is never asked for: it would have to be believed. Writes into `receiver.model` and
    nothing else; its training flags are put back.

    Raises ValueError where the receiver holds no validation samples, or the task has no such metric.
    """
    if receiver.validation is None:
        raise ValueError("this rule needs samples the receiver does not train on: hold some out")
    inputs, targets = receiver.validation
    with evaluating(receiver.model, params) as model, torch.inference_mode():
        outputs = torch.cat([model(chunk) for chunk in torch.split(inputs, BATCH)])
        value = -float(receiver.loss(outputs, targets)) if by == "loss" else _metric(receiver, outputs, by)
    return value if math.isfinite(value) else -math.inf


def figure(score: float, by: str) -> float:
    """The measure itself, for the operator.

    >>> figure(-0.25, "loss"), figure(0.9, "accuracy")
    (0.25, 0.9)
    """
    return -score if by == "loss" else score


@contextmanager
def evaluating(model: nn.Module, params: Params) -> Iterator[nn.Module]:
    """`model` with `params` loaded, in eval mode; each submodule's training flag is put back after."""
    with modes_kept(model):
        model.load_state_dict(params)
        model.eval()
        yield model


def _metric(receiver: Receiver, outputs: Tensor, name: str) -> float:
    assert receiver.validation is not None
    metrics = receiver.metrics(outputs, receiver.validation[1])
    if name not in metrics:
        raise ValueError(f"by must be one of the task's metrics ({', '.join(metrics)}) or loss, not {name!r}")
    return float(metrics[name])
