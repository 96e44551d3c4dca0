"""The steps of SGD and Adam, as `torch.optim` takes them, on lists of plain tensors.

Belongs here: how a gradient moves a weight. Every operation is elementwise, so a tensor may be one model's or hold
many models along its first dimension: the daemon and the simulator's batches share each line. `torch.optim` itself
would cost a third of a small step.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from node.settings import TrainingSettings

Gradients = Sequence[Tensor | None]


class Optimizer(Protocol):
    """Moves the tensors it was made for, in place."""

    def step(self, gradients: Gradients) -> None:
        """One gradient a tensor; None, where the loss does not depend on it, leaves it alone."""


def make_optimizer(values: Sequence[Tensor], settings: TrainingSettings) -> Optimizer:
    """A fresh state for these tensors, which need no `requires_grad`: they are written to behind autograd's back."""
    kind = Sgd if settings.optimizer == "sgd" else Adam
    return kind([value.detach() for value in values], settings)


class Sgd:
    """`torch.optim.SGD` with momentum, Nesterov's momentum and L2 weight decay."""

    def __init__(self, values: Sequence[Tensor], settings: TrainingSettings) -> None:
        self._values = values
        self._velocities: list[Tensor | None] = [None] * len(values)
        self._settings = settings

    def step(self, gradients: Gradients) -> None:
        reached, values, directions = _reached(self._values, gradients)
        if self._settings.weight_decay:
            # Not in place: autograd may hand out one tensor for two weights.
            directions = list(torch._foreach_add(directions, values, alpha=self._settings.weight_decay))
        if self._settings.momentum:
            directions = self._accelerated(reached, directions)
        torch._foreach_add_(values, directions, alpha=-self._settings.learning_rate)

    def _accelerated(self, reached: Sequence[int], directions: list[Tensor]) -> list[Tensor]:
        momentum = self._settings.momentum
        for i, direction in zip(reached, directions, strict=True):
            velocity = self._velocities[i]
            if velocity is None:
                self._velocities[i] = direction.clone()
            else:
                velocity.mul_(momentum).add_(direction)
        velocities = [velocity for i in reached if (velocity := self._velocities[i]) is not None]
        if self._settings.nesterov:
            return list(torch._foreach_add(directions, velocities, alpha=momentum))
        return velocities


class Adam:
    """`torch.optim.Adam`, and for "adamw" `torch.optim.AdamW`, which takes the decay off the weight itself."""

    def __init__(self, values: Sequence[Tensor], settings: TrainingSettings) -> None:
        self._values = values
        self._firsts = [torch.zeros_like(value) for value in values]
        self._seconds = [torch.zeros_like(value) for value in values]
        self._counts = [0] * len(values)
        self._settings = settings

    def step(self, gradients: Gradients) -> None:
        settings, rate = self._settings, self._settings.learning_rate
        reached, values, directions = _reached(self._values, gradients)
        if settings.weight_decay and settings.optimizer == "adamw":
            torch._foreach_mul_(values, 1 - rate * settings.weight_decay)
        elif settings.weight_decay:
            directions = list(torch._foreach_add(directions, values, alpha=settings.weight_decay))
        first_beta, second_beta = settings.betas
        firsts, seconds = [self._firsts[i] for i in reached], [self._seconds[i] for i in reached]
        torch._foreach_lerp_(firsts, directions, 1 - first_beta)
        torch._foreach_mul_(seconds, second_beta)
        torch._foreach_addcmul_(seconds, directions, directions, 1 - second_beta)
        for i in reached:
            self._counts[i] += 1
        counts = [self._counts[i] for i in reached]
        scales = list(torch._foreach_sqrt(seconds))
        torch._foreach_div_(scales, [(1 - second_beta**count) ** 0.5 for count in counts])
        torch._foreach_add_(scales, settings.epsilon)
        torch._foreach_addcdiv_(values, firsts, scales, [-rate / (1 - first_beta**count) for count in counts])


def _reached(values: Sequence[Tensor], gradients: Gradients) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Which tensors have a gradient, these tensors, and their gradients."""
    reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
    directions = [gradient for gradient in gradients if gradient is not None]
    return reached, [values[i] for i in reached], directions
