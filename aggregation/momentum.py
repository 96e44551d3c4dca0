"""Momentum over merges: a merge is taken for a step, and steps in the same direction add up.

Belongs here: rules that go on from where a mean arrived, by what the merges before it did.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from aggregation.base import Contribution, Params, Rule, State, is_number, require

FORMS = ("fedavg-m", "nesterov", "heavy-ball")


class Track(NamedTuple):
    """Where the last merge arrived, and the velocity there; of the tensors that move."""

    position: Params
    velocity: Params


def outer(
    form: str = "nesterov", mu: float = 0.9, lr: float = 0.7, beta: float = 0.1, gamma: float = 1.0
) -> Rule:
    """Takes what was merged for a step from the previous result, and makes that step with momentum.

        d = previous result - merged          what all learned since, as a descent direction
        nesterov      v <- mu v + d                     x = previous - lr (d + mu v)
        heavy-ball    v <- mu v + d                     x = previous - lr v
        fedavg-m      v <- beta d + (1 - beta) v        x = previous - gamma v

    Stands behind a rule that reduces. The first merge passes through and is remembered. So is a merge that
    left the local model as it was (nothing received, or not accepted): the velocity stays, the next step
    starts from there. Counters and BatchNorm's running statistics are left as merged: to overshoot a variance
    can make it negative. Where a result would leave its dtype's range the merged model stays and the velocity
    is forgotten.

    fedavg-m with beta = 1 and gamma = 1, nesterov with mu = 0 and lr = 1, and heavy-ball likewise are no
    momentum. The paper of fedavg-m mixes the previous direction into every local step, (1 - beta) of it; here
    it enters at the merge. With gradients that do not change within a round both give the same point, with
    gamma here for the paper's gamma over local learning rate times local steps.

    Args:
        form: nesterov looks ahead, heavy-ball does not; fedavg-m is an exponential mean of directions.
        mu: how much of the velocity stays, from 0 to below 1; of nesterov and heavy-ball.
        lr: length of a step, above 0; of nesterov and heavy-ball. lr / (1 - mu) is its length in the long
            run.
        beta: share of the new direction, above 0 up to 1; of fedavg-m. The smaller, the longer the memory.
        gamma: length of a step, above 0; of fedavg-m.

    Raises ValueError for an argument outside its range; in a merge, where there is not exactly one
    contribution.

    Source: nesterov arXiv 2311.08105 (DiLoCo), with its defaults; fedavg-m arXiv 2306.16504. That every node
    keeps its own velocity in place of a server's is ours.
    """
    require(form in FORMS, "form", f"one of {', '.join(FORMS)}", form)
    require(is_number(mu) and 0 <= mu < 1, "mu", "a number from 0 to below 1", mu)
    require(is_number(lr) and lr > 0, "lr", "a number above 0", lr)
    require(is_number(beta) and 0 < beta <= 1, "beta", "a number above 0, up to 1", beta)
    require(is_number(gamma) and gamma > 0, "gamma", "a number above 0", gamma)

    def moved(position: Tensor, velocity: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
        """The next position and velocity, float64."""
        direction = position.double() - merged.double()
        if form == "fedavg-m":
            after = velocity.double().lerp(direction, beta)
            return position.double() - gamma * after, after
        after = mu * velocity.double() + direction
        step = direction + mu * after if form == "nesterov" else after
        return position.double() - lr * step, after

    def update(
        contributions: Sequence[Contribution], state: State, local: Contribution
    ) -> tuple[list[Contribution], State]:
        if len(contributions) != 1:
            raise ValueError(
                f"momentum.outer takes one contribution, not {len(contributions)}: "
                "put it behind a rule that reduces, such as mean"
            )
        (merged,) = contributions
        track: Track | None = state
        if track is None:
            return [merged], _at_rest(merged.params)
        if all(merged.params[name] is local.params[name] for name in track.position):
            # Rules hand on the receiver's own tensors where nothing changed; statistics may still be new.
            return [merged], Track(_moving(merged.params), track.velocity)
        params, after = _step(moved, track, merged.params)
        return [replace(merged, params=params)], after

    return Rule(init=lambda params: None, update=update)


Move = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(position, velocity, merged) -> the next position and velocity, float64."""


@torch.no_grad()
def _step(move: Move, track: Track, merged: Params) -> tuple[Params, Track]:
    """The model after a step, and the track from there; `merged` and a rest where it leaves its range."""
    position, velocity = {}, {}
    for name, start in track.position.items():
        arrived, speed = move(start, track.velocity[name], merged[name])
        position[name] = arrived.to(start.dtype)
        velocity[name] = speed.to(track.velocity[name].dtype)
        if not bool(position[name].isfinite().all() and velocity[name].isfinite().all()):
            return merged, _at_rest(merged)
    return merged | position, Track(position, velocity)


def _at_rest(params: Params) -> Track:
    position = _moving(params)
    return Track(
        position, {name: torch.zeros_like(tensor, dtype=_wide(tensor)) for name, tensor in position.items()}
    )


def _moving(params: Params) -> Params:
    """Copies of the tensors that momentum moves: what was merged may be the live tensors of a model."""
    return {
        name: tensor.detach().clone()
        for name, tensor in params.items()
        if tensor.is_floating_point() and not name.endswith(("running_mean", "running_var"))
    }


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
