"""What an operator may set about tasks and training, as structs.

Belongs here: settings that the config and the simulator's scenarios read before any work begins. Nothing here imports
torch or numpy, so that the commands that only read a config start without them.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct


class TrainingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Plain SGD, one round of it.

    local_steps: mini-batches between two exchanges. More save traffic; on skewed data they let nodes drift.
    batch_size: samples a step; a node with fewer takes all it has.
    learning_rate: 0.1 suits small networks on standardised inputs; try a third where the loss jumps.
    momentum: 0.9 is usual where `local_steps` is large. It starts afresh each round.
    weight_decay: L2, on every parameter, as in `torch.optim.SGD`; 1e-4 is usual.
    """

    local_steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 10
    batch_size: Annotated[int, Meta(ge=1, le=1_048_576)] = 16
    learning_rate: Annotated[float, Meta(gt=0, le=1000)] = 0.1
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 0.0


class Partition(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one data set is dealt to `count` nodes. Every node that says the same gets a part of the same deal.

    partitioner: "iid" to begin with; "dirichlet" for the usual skewed labels; "shard" for a few classes each.
    alpha: of "dirichlet": 0.1 is very skewed, 1 mild, 100 nearly even.
    shards_per_node: of "shard": about the number of classes a node sees.
    """

    count: Annotated[int, Meta(ge=1)]
    partitioner: Literal["iid", "dirichlet", "shard"] = "iid"
    alpha: Annotated[float, Meta(gt=0)] = 0.5
    shards_per_node: Annotated[int, Meta(ge=1)] = 2
    seed: int = 0


class Shard(Partition, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node's part of the deal: `index`, from 0 to `count - 1`."""

    index: Annotated[int, Meta(ge=0)]
