"""Local training and evaluation: pure functions from parameters to parameters.

Belongs here: which samples a round takes, the round itself, and measuring a model. How one step moves the weights is
in `optimizers.py`. No clock, no file, and no generator but those made from (seed, node, purpose, round): the daemon
and the simulator get the same bits.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from aggregation.base import Params
from node.optimizers import make_optimizer
from node.randomness import RoundStreams, torch_seed, torch_seeded
from node.settings import TrainingSettings
from node.tasks import Task, build_model
from node.weights import all_sane
from protocols.errors import LocalError
from protocols.vocabulary import MAX_SAMPLES

GoesOn = Callable[[int], bool]
"""Whether to take another step of a round, after so many of them. The first is always taken."""
MAX_FACTOR = 10.0
"""The most that a model counts for steps that were left out: beyond it the mean would move with a model that hardly did."""
EVALUATION_BATCH = 1024
"""Samples in one forward pass of `evaluate`: a bound on memory, without influence on the result."""


def batch_indices(
    streams: RoundStreams,
    places: Sequence[tuple[int, int]],
    num_samples: int,
    settings: TrainingSettings,
) -> NDArray[np.int64]:
    """Which samples each step takes: [places, local_steps, min(batch_size, num_samples)].

    streams: made with the purpose "batches"; places: (index of the node's name, round).

    One random order of a node's samples, walked through again and again: no batch holds a sample twice, and no
    sample is taken more than once oftener than another.
    """
    assert num_samples >= 1, "a task without training samples"
    batch = min(settings.batch_size, num_samples)
    wanted = settings.local_steps * batch
    orders = streams.random_orders(places, num_samples, min(wanted, num_samples))
    if wanted > num_samples:
        orders = orders[:, np.arange(wanted) % num_samples]
    return orders.reshape(len(places), settings.local_steps, batch)


def train(
    task: Task,
    params: Params,
    settings: TrainingSettings,
    *,
    round: int,  # noqa: A002  the vocabulary's word
    seed: int,
    node: str | int,
    model: nn.Module | None = None,
    goes_on: GoesOn = lambda num_steps: True,
) -> tuple[Params, int]:
    """One round of training on the task's training samples, from `params`, which stay as they are.

    round, seed, node: say which batches (streams "batches") and which dropout masks (stream "train") are drawn.
    model: a module of this task to work in, for callers with many rounds. Its contents are overwritten, and
        nothing in them matters. None builds one.
    goes_on: may end the round early. The result follows from the number of steps made.

    Returns new parameters and buffers, and the contribution's weight: the number of training samples, or of a round that
    ended early what `fair_weight` makes of it.
    Raises LocalError where the result is not finite. Takes torch's generator of the process for its time and
    puts it back, so only one thread may train.
    """
    num_samples = len(task.train[0])
    (batches,) = batch_indices(RoundStreams(seed, [node], "batches"), [(0, round)], num_samples, settings)
    masks = torch_seed(seed, node, "train", round)
    module = build_model(task) if model is None else model
    trained, num_steps = _train_on(task, params, settings, batches, round, masks, module, goes_on)
    return trained, fair_weight(num_samples, len(batches), num_steps)


def fair_weight(num_samples: int, planned: int, made: int) -> int:
    """The weight of a model that so many of the planned local steps were made for: as much more as there were fewer.

        num_samples * planned / made    at most MAX_FACTOR times num_samples

    A model is its start plus steps. Where all start alike, a mean by these weights goes in the direction of the mean of
    all nodes' gradients by their samples, however many steps each made.

    >>> fair_weight(100, 10, 4)
    250

    Source: arXiv 2108.09875 (Anarchic FL), which divides each update by its number of steps; here the weight is.
    """
    return min(round(num_samples * min(planned / made, MAX_FACTOR)), MAX_SAMPLES)


def train_on(
    task: Task,
    params: Params,
    settings: TrainingSettings,
    batches: NDArray[np.int64],
    *,
    round: int,  # noqa: A002
    masks: int,
    model: nn.Module,
) -> Params:
    """`train` on given batches, [steps, batch]: indices into the task's training samples.

    masks: seeds torch's generator, and so dropout. round: only named in the error. The rest as in `train`.
    """
    trained, _ = _train_on(task, params, settings, batches, round, masks, model, lambda num_steps: True)
    return trained


def _train_on(
    task: Task,
    params: Params,
    settings: TrainingSettings,
    batches: NDArray[np.int64],
    round: int,  # noqa: A002
    masks: int,
    model: nn.Module,
    goes_on: GoesOn,
) -> tuple[Params, int]:
    """The trained parameters, and how many steps were made."""
    inputs, targets = task.train
    model.load_state_dict(params)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = make_optimizer(weights, settings)
    num_steps = 0
    with torch_seeded(masks), torch.enable_grad():
        for batch in torch.from_numpy(batches).to(inputs.device):
            if num_steps and not goes_on(num_steps):
                break
            num_steps += 1
            outputs = model(inputs.index_select(0, batch))
            loss = task.loss(outputs, targets.index_select(0, batch))
            optimizer.step(torch.autograd.grad(loss, weights, allow_unused=True))
    trained = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in trained.items():
        if not all_sane(tensor):
            raise diverged(round, name, settings)
    return trained, num_steps


def diverged(round: int, name: str, settings: TrainingSettings) -> LocalError:  # noqa: A002
    """The error of a round after which the tensor `name` is not sane."""
    return LocalError(
        f"training in round {round} made {name} non-finite; "
        f"learning_rate {settings.learning_rate} may be too high"
    )


def evaluate(task: Task, params: Params, *, model: nn.Module | None = None) -> dict[str, float]:
    """The task's metrics on its test samples, the primary one first, and "loss" last.

    model: as in `train`. Draws nothing, and leaves `params` as they are.
    """
    module = build_model(task) if model is None else model
    module.load_state_dict(params)
    return evaluate_module(task, module)


def evaluate_module(task: Task, module: nn.Module) -> dict[str, float]:
    """`evaluate` of a module as it is, without a copy of its parameters. It is left in evaluation mode."""
    module.eval()
    inputs, targets = task.test
    with torch.inference_mode():
        outputs = torch.cat([module(chunk) for chunk in torch.split(inputs, EVALUATION_BATCH)])
        loss = task.loss(outputs, targets).item()
        metrics = {str(name): float(value) for name, value in task.metrics(outputs, targets).items()}
        return {**metrics, "loss": loss}
