"""Local training and evaluation: pure functions from parameters to parameters.

Belongs here: which samples a round takes, the steps of plain SGD, and measuring a model. No clock, no file, and
no generator but those made from (seed, node, purpose, round): the daemon and the simulator get the same bits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aggregation.base import Params
from node.randomness import stream, torch_seed, torch_seeded
from node.settings import TrainingSettings
from node.tasks import Task, build_model
from node.weights import all_sane
from protocols.errors import LocalError

EVALUATION_BATCH = 1024
"""Samples in one forward pass of `evaluate`: a bound on memory, without influence on the result."""


def batch_indices(
    num_samples: int, settings: TrainingSettings, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Which samples each step takes: [local_steps, min(batch_size, num_samples)].

    One random order of the samples, walked through again and again: no batch holds a sample twice, and no
    sample is taken more than once oftener than another.
    """
    assert num_samples >= 1, "a task without training samples"
    batch = min(settings.batch_size, num_samples)
    wanted = settings.local_steps * batch
    order = rng.choice(num_samples, size=min(wanted, num_samples), replace=False)
    return np.resize(order, (settings.local_steps, batch))


def train(
    task: Task,
    params: Params,
    settings: TrainingSettings,
    *,
    round: int,  # noqa: A002  the vocabulary's word
    seed: int,
    node: str | int,
    model: nn.Module | None = None,
) -> tuple[Params, int]:
    """One round of SGD on the task's training samples, from `params`, which stay as they are.

    round, seed, node: say which batches (stream "batches") and which dropout masks (stream "train") are drawn.
    model: a module of this task to work in, for callers with many rounds. Its contents are overwritten, and
        nothing in them matters. None builds one.

    Returns new parameters and buffers, and the number of training samples, which is the contribution's weight.
    Raises LocalError where the result is not finite. Takes torch's generator of the process for its time and
    puts it back, so only one thread may train.
    """
    inputs, targets = task.train
    batches = torch.from_numpy(batch_indices(len(inputs), settings, stream(seed, node, "batches", round))).to(
        inputs.device
    )
    module = build_model(task) if model is None else model
    module.load_state_dict(params)
    module.train()
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimiser = _Sgd(weights, settings)
    with torch_seeded(torch_seed(seed, node, "train", round)), torch.enable_grad():
        for batch in batches:
            outputs = module(inputs.index_select(0, batch))
            loss = task.loss(outputs, targets.index_select(0, batch))
            optimiser.step(torch.autograd.grad(loss, weights, allow_unused=True))
    trained = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    for name, tensor in trained.items():
        if not all_sane(tensor):
            raise LocalError(
                f"training in round {round} made {name} non-finite; "
                f"learning_rate {settings.learning_rate} may be too high"
            )
    return trained, len(inputs)


class _Sgd:
    """What `torch.optim.SGD` does to the same gradients, without the third of a small step that it costs."""

    def __init__(self, weights: Sequence[Tensor], settings: TrainingSettings) -> None:
        # Detached aliases share the memory, and writing to them is invisible to autograd.
        self._values = [weight.detach() for weight in weights]
        self._velocities: list[Tensor | None] = [None] * len(self._values)
        self._settings = settings

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Move every weight that the loss depends on; None, for the others, leaves them alone."""
        reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
        values = [self._values[i] for i in reached]
        directions = [gradient for gradient in gradients if gradient is not None]
        if self._settings.weight_decay:
            # Not in place: autograd may hand out one tensor for two weights.
            directions = list(torch._foreach_add(directions, values, alpha=self._settings.weight_decay))
        if self._settings.momentum:
            directions = self._accelerated(reached, directions)
        torch._foreach_add_(values, directions, alpha=-self._settings.learning_rate)

    def _accelerated(self, reached: Sequence[int], directions: Sequence[Tensor]) -> list[Tensor]:
        for i, direction in zip(reached, directions, strict=True):
            velocity = self._velocities[i]
            if velocity is None:
                self._velocities[i] = direction.clone()
            else:
                velocity.mul_(self._settings.momentum).add_(direction)
        return [velocity for i in reached if (velocity := self._velocities[i]) is not None]


def evaluate(task: Task, params: Params, *, model: nn.Module | None = None) -> dict[str, float]:
    """The task's metrics on its test samples, the primary one first, and "loss" last.

    model: as in `train`. Draws nothing, and leaves `params` as they are.
    """
    module = build_model(task) if model is None else model
    module.load_state_dict(params)
    module.eval()
    inputs, targets = task.test
    with torch.inference_mode():
        outputs = torch.cat([module(chunk) for chunk in torch.split(inputs, EVALUATION_BATCH)])
        loss = task.loss(outputs, targets).item()
        metrics = {str(name): float(value) for name, value in task.metrics(outputs, targets).items()}
        return {**metrics, "loss": loss}
