"""One scalar of one node: on which samples, along which direction, what it comes to, and its byte.

Belongs here: what a daemon and the simulator must do alike, so that a simulated scalar is what a daemon would measure.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aggregation import spsa
from aggregation.base import Params
from aggregation.perturbation import FORMATS, pool_key, seed_key, trained
from aggregation.scalar_code import encode
from node.randomness import RoundStreams, stream
from node.settings import TrainingSettings
from node.tasks import Task
from node.training import batch_indices
from protocols.errors import ConfigError
from protocols.scalar_terms import GENERATORS, ScalarSettings


def trained_by_scalars(task: Task, module: nn.Module, path: str) -> Params:
    """What is trained, as `perturbation.trained` gives it.

    path: of the field that names the task. Raises ConfigError where nothing can be trained by scalars.
    """
    params = trained(module)
    if not params:
        raise ConfigError(path, f"no parameter of '{task.name}' requires a gradient: nothing is learnt")
    for name, tensor in params.items():
        if tensor.dtype not in FORMATS:
            allowed = [str(dtype).removeprefix("torch.") for dtype in FORMATS]
            raise ConfigError(path, f"{name} is {tensor.dtype}, which scalars cannot train", allowed)
    return params


def undecayed(params: Params) -> frozenset[str]:
    """Names of what does not decay: tensors with fewer than two dimensions, which are biases and the scales of norms."""
    return frozenset(name for name, tensor in params.items() if tensor.dim() < 2)


def scalar_streams(seed: int, names: Sequence[str]) -> RoundStreams:
    """From which nodes of these names draw the samples of their scalars."""
    return RoundStreams(seed, names, "scalar batches")


def scalar_batches(
    streams: RoundStreams,
    index: int,
    round_: int,
    num_scalars: int,
    num_samples: int,
    settings: TrainingSettings,
) -> NDArray[np.int64]:
    """Which of a node's samples each scalar of a round is measured on: [scalars, batch].

    streams, index: as `scalar_streams` made them, and the node's place among its names. num_samples: that the node has.
    """
    settings = msgspec.structs.replace(settings, local_steps=num_scalars)
    own: NDArray[np.int64] = batch_indices(streams, [(index, round_)], num_samples, settings)[0]
    return own


def direction_key(settings: ScalarSettings, base: bytes, author: bytes, round_: int, sample: int) -> int:
    """Of the direction that an author's sample is measured along. base, author: 32 bytes each."""
    if settings.pool:
        return pool_key(base, spsa.pool_index(base, author, round_, sample, settings.pool))
    return seed_key(base, author, round_, sample)


def measure(
    task: Task,
    module: nn.Module,
    params: Params,
    batch: Tensor,
    key: int,
    settings: ScalarSettings,
    noise: np.random.Generator,
) -> float:
    """The slope of the task's loss along a direction, on these training samples, with the privacy that is asked for.

    module: in evaluation mode, at the state; params: what is trained of it, moved and put back. batch: indices. noise: of
        a private scalar, where one is asked for.
    """
    inputs, targets = (part.index_select(0, batch) for part in task.train)
    kind, epsilon = GENERATORS[settings.direction], settings.epsilon

    def loss() -> float:
        with torch.inference_mode():
            return float(task.loss(module(inputs), targets))

    def losses() -> Tensor:
        with torch.inference_mode():
            outputs = module(inputs)
            rows = range(len(targets))
            return torch.stack([task.loss(outputs[i : i + 1], targets[i : i + 1]) for i in rows])

    if settings.private_clip is None:
        return spsa.central_difference(loss, params, key, epsilon, kind)
    clip, scale = settings.private_clip, settings.private_noise
    return spsa.private_difference(losses, params, key, epsilon, clip, scale, noise, kind)


def codes_of(values: Sequence[float], settings: ScalarSettings, seed: int, node: str, round_: int) -> bytes:
    """A byte for each scalar of a round. Raises ValueError for a value that is not finite."""
    if settings.rounding == "nearest":
        return bytes(map(encode, values))
    draws = stream(seed, node, "scalar rounding", round_).random(len(values)).tolist()
    return bytes(map(encode, values, draws))
