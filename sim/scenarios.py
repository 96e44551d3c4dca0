"""What a simulated run is made of: one struct, read from TOML, checked before anything runs.

Belongs here: the fields of a scenario and how one is found, read, overridden and refused. Nothing here imports torch.
How a field acts is said where it acts; how to choose its value is said here.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from node.settings import TrainingSettings
from protocols.exchange import ExchangeSettings
from protocols.gossip import GossipSettings
from protocols.sampling import SampledSettings
from protocols.scalar_terms import ScalarSettings
from protocols.view import ViewSettings
from sim.churn import ChurnSettings
from sim.links import LinkSettings
from sim.nat import NatSettings

Share = Annotated[float, Meta(ge=0, le=1)]


class DataSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What is learned, from which samples, and where models begin."""

    task: str = "digits"
    """A built-in task, or `my_task.py:make_task`."""
    options: dict[str, Any] = {}
    """What the task takes, as in a node's config; for `digits` `hidden = [32]`."""
    probe: str | None = None
    """An .npz file with inputs that all nodes have, as a node's `task.probe`: for rules with `probe = "shared"`."""
    partitioner: Literal["iid", "dirichlet", "shard", "class"] = "iid"
    """How samples are dealt: `iid` to begin with, `dirichlet` for the usual skewed labels, `shard` for a few classes
    each, `class` where no two nodes share a class."""
    alpha: Annotated[float, Meta(gt=0)] = 0.5
    """Of the Dirichlet split: 0.1 is very skewed, 100 nearly even."""
    shards_per_node: Annotated[int, Meta(ge=1)] = 2
    """Of `shard`: about the number of classes that a node sees."""
    samples_per_node: Annotated[int, Meta(ge=1)] | None = None
    """Every node draws so many training samples, and several may hold the same one: for more nodes than the data
    can be dealt to. Only with `iid`. Left out, the data is dealt and every sample has one owner."""
    start: Literal["different", "common"] = "different"
    """Whether nodes begin from different random models or from one. Only `gossip` can
    begin from different ones."""
    model_bytes: Annotated[int, Meta(ge=1)] = 20_000
    """A model's size in a dry run, which loads no task."""


class TopologySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Who is linked with whom."""

    kind: Literal["regular", "ring", "full", "discover", "file"] = "regular"
    """`discover`: every node knows one bootstrap node and finds the others itself."""
    degree: Annotated[int, Meta(ge=1, le=64)] = 4
    """Links of each node in `regular`, the target degree in `discover`."""
    islands: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Of `discover`: so many parts of equal size, by node number, each with a bootstrap node of its own. Who of one part
    hears of another is said in the timeline (`introduce`)."""
    path: str | None = None
    """Of `file`: a CSV with the columns `a,b`, one undirected link a row."""


class DeviceClass(Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of device."""

    name: str
    """For tables and drawings."""
    share: Annotated[float, Meta(gt=0, le=1)]
    """Of the nodes."""
    slowdown: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    """How many times longer work takes."""


class DeviceSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How long work takes, in virtual seconds, and how well clocks run."""

    estimate_s: Annotated[float, Meta(ge=0)] = 0.02
    """One scalar of `learning = "scalars"`: two forward passes of a batch."""
    replay_s: Annotated[float, Meta(ge=0)] = 0.00001
    """Applying one scalar. It takes no forward pass, only the direction: a hundredth of an estimate for a batch of a few
    numbers, a thousandth and less for one of sentences. A round has those of all nodes."""
    train_s: Annotated[float, Meta(ge=0)] = 0.5
    """One round's training. Measure it on a device: it is most of a round's length."""
    aggregate_s: Annotated[float, Meta(ge=0)] = 0.05
    """One merge."""
    evaluate_s: Annotated[float, Meta(ge=0)] = 0.05
    """One evaluation."""
    spread: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Each node's speed is drawn once, uniformly within this share around its class's."""
    classes: tuple[DeviceClass, ...] = ()
    """Their shares add up to 1. Left out, all nodes are alike but for `spread`."""
    clock_offset_s: Annotated[float, Meta(ge=0)] = 0.0
    """Each node's clock starts up to this far ahead."""
    clock_drift: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0
    """Each node's clock runs fast or slow by up to this share; 1e-4 is a bad quartz."""


class EvaluationSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Who is measured, and how often."""

    share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Of the nodes, drawn once, at least one. 0.01 is enough for a thousand nodes."""
    every: Annotated[int, Meta(ge=1)] = 1
    """Rounds."""
    sample_every_s: Annotated[float, Meta(gt=0)] = 1.0
    """Virtual time between two rows of `samples.csv`. It doubles after every 500 rows."""
    consensus: bool = True
    """Measure how far the evaluated nodes' models are from each other."""
    merged: bool = False
    """Measure, at every sample, the mean of the evaluated nodes' models, which none of them has. It shows what a final
    merge would give where the nodes' own accuracies are low. One evaluation more a sample; nothing else changes."""


class ComputeSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How the real computing is done. Nothing here changes the trace; results agree to rounding."""

    batching: Literal["auto", "always", "never"] = "auto"
    """Whether many nodes train in one call. `auto` measures once per model which is faster; `never` runs the
    daemon's own code node by node."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` takes CUDA where there is one."""
    tile: Annotated[int, Meta(ge=1)] | None = None
    """Nodes in one call. Left out, what fits the cache."""
    threads: Annotated[int, Meta(ge=1)] | None = None
    """Of torch, beside the process that handles events. Left out, one, or all cores where a model is so large that they
    prove faster; OMP_NUM_THREADS sets how many that are. Two cost dearly where another program wants the cores too."""
    max_pending: Annotated[int, Meta(ge=1)] | None = None
    """Orders held back before they are computed. Left out, two rounds of all nodes; fewer take less memory."""


class Scenario(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole run. The same scenario gives the same trace."""

    name: str = ""
    """Left out, the file's name."""
    summary: str = ""
    """What it shows, in one line."""
    seed: int = 0
    """Decides everything that is drawn. Run a few to see how much of a result is chance."""
    nodes: Annotated[int, Meta(ge=1, le=1_000_000)] = 16
    """100 show most effects in seconds; for more than the data has samples, see `data.samples_per_node`."""
    at_most_s: Annotated[float, Meta(gt=0)] = 36_000.0
    """Virtual time after which the run ends in any case."""
    dry_run: bool = False
    """The whole network without the learning: no task is loaded, nothing is computed, there is no accuracy."""
    learning: Literal["gossip", "sampled", "scalars", "none"] = "gossip"
    """What is exchanged: whole models with neighbours (`gossip`), whole models of a few nodes drawn anew in each round
    (`sampled`), or one byte for each estimate of a gradient, from which every node rebuilds the same model (`scalars`). The
    tables of the others then mean nothing. With `none` nothing is learned:
    nodes only keep their network together, until `at_most_s`."""
    rule: str | tuple[str | dict[str, Any], ...] = "corrected"
    """Merge rules in order, as in a node's config. A string joins names with `+`; `corrected` is short for
    `mean+variance.corrected`."""
    final_rule: str | tuple[str | dict[str, Any], ...] = "fedavg"
    """The same for the merge after the last round (`gossip.final_merge`)."""
    timeline: tuple[str, ...] = ()
    """What befalls the network: `at 120 s: crash 30 %`, `at 300 s: partition a|b`, `at 400 s: heal`."""
    data: DataSettings = field(default_factory=DataSettings)
    topology: TopologySettings = field(default_factory=TopologySettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    gossip: GossipSettings = field(
        default_factory=lambda: GossipSettings(rounds=40, quorum=1.0, deadline_s=5.0, pause_s=0.0)
    )
    sampled: SampledSettings = field(default_factory=lambda: SampledSettings(rounds=100, deadline_s=10.0))
    scalars: ScalarSettings = field(
        default_factory=lambda: ScalarSettings(rounds=100, samples=4, learning_rate=0.05, deadline_s=5.0)
    )
    """Batches have the size of `training.batch_size`; nothing else of `training` counts."""
    exchange: ExchangeSettings = field(default_factory=ExchangeSettings)
    view: ViewSettings = field(default_factory=ViewSettings)
    """Heartbeats and redialling. `bootstrap`, `static` and the degrees come from the topology."""
    links: LinkSettings = field(default_factory=LinkSettings)
    nat: NatSettings = field(default_factory=NatSettings)
    devices: DeviceSettings = field(default_factory=DeviceSettings)
    churn: ChurnSettings = field(default_factory=ChurnSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)


def rule_specs(rule: str | tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
    """The rule as a list for `aggregation.rules.build`."""
    if not isinstance(rule, str):
        return rule
    return tuple(
        part.strip() for name in rule.split("+") for part in RULE_ALIASES.get(name.strip(), name).split("+")
    )


RULE_ALIASES = {"corrected": "mean+variance.corrected"}
