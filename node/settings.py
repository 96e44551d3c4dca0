"""What an operator may set about tasks and training, as structs.

Belongs here: settings that the config and the simulator's scenarios read before any work begins. Nothing here imports
torch or numpy, so that the commands that only read a config start without them.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Beta = Annotated[float, Meta(ge=0, lt=1)]
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


class TrainingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """One round of local training: every step as `torch.optim` does it, from a fresh state in each round.

    What an optimiser remembers (velocities, Adam's moments) belongs to the weights it was measured on, and those are
    replaced by the merge.
    """

    local_steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 10
    """Mini-batches between two exchanges. More save traffic; on skewed data they let nodes drift."""
    batch_size: Annotated[int, Meta(ge=1, le=1_048_576)] = 16
    """Samples a step; a node with fewer takes all it has."""
    learning_rate: Annotated[float, Meta(gt=0, le=1000)] = 0.1
    """For "sgd" 0.1 suits small networks on standardised inputs, for "adam" and "adamw" 0.001; try a third where
    the loss jumps."""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Of "sgd": 0.9 is usual where `local_steps` is large."""
    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """On every parameter that the loss depends on: part of the gradient (L2) for "sgd" and "adam", where 1e-4 is
    usual; taken off the weight itself for "adamw" (arXiv 1711.05101), where 0.01 is."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """"sgd" to begin with. "adam" (arXiv 1412.6980) where gradients of layers differ by orders of magnitude and
    `local_steps` is at least ten or so: with few steps its moments never settle."""
    nesterov: bool = False
    """Of "sgd" with momentum: look ahead before each step. Seldom worse, a little faster."""
    betas: tuple[Beta, Beta] = ADAM_BETAS
    """Of "adam" and "adamw": how slowly the two moments forget. Lower the second, to 0.99, for short rounds."""
    validation: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    """Share of the node's own samples that it does not train on but judges models by. Held out only where a merge rule
    judges (`covey rules` says which) or `final_keep` is `better`; more makes better judgements and worse models."""
    epsilon: Annotated[float, Meta(gt=0, le=1)] = ADAM_EPSILON
    """Of "adam" and "adamw": keeps steps small where gradients vanish; try 1e-4 where training is unstable."""

    def __post_init__(self) -> None:
        """Raises ValueError where one setting would do nothing beside another."""
        if self.optimizer != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"momentum and nesterov belong to sgd; {self.optimizer} has betas")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; 0.9 is usual")
        if self.optimizer == "sgd" and (self.betas != ADAM_BETAS or self.epsilon != ADAM_EPSILON):
            raise ValueError("betas and epsilon belong to adam and adamw; sgd has momentum")


class Partition(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one data set is dealt to `count` nodes. Every node that says the same gets a part of the same deal.

    partitioner: "iid" to begin with; "dirichlet" for the usual skewed labels; "shard" for a few classes each;
        "class" where no two nodes share a class.
    alpha: of "dirichlet": 0.1 is very skewed, 1 mild, 100 nearly even.
    shards_per_node: of "shard": about the number of classes a node sees.
    samples_per_node: of "iid": every node draws so many samples by itself, and several may hold the same one. For
        more nodes than the data can be dealt to. Left out, the data is dealt and every sample has one owner.
    """

    count: Annotated[int, Meta(ge=1)]
    partitioner: Literal["iid", "dirichlet", "shard", "class"] = "iid"
    alpha: Annotated[float, Meta(gt=0)] = 0.5
    shards_per_node: Annotated[int, Meta(ge=1)] = 2
    seed: int = 0
    samples_per_node: Annotated[int, Meta(ge=1)] | None = None


class Shard(Partition, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node's part of the deal: `index`, from 0 to `count - 1`."""

    index: Annotated[int, Meta(ge=0)]
