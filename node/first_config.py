"""The config that `covey init` and `covey join` write: what most people change, each with a word on it, and what the command
line sets."""

from collections.abc import Sequence
from typing import Any

from node.config import Setting, toml_key, toml_value

HEAD = """\
# The settings of one covey node. What is left out has its default: `covey config show` lists all.
# Any of them can be set from the environment: COVEY_NETWORK__TARGET_DEGREE=4 sets network.target_degree.
"""

_Lines = dict[tuple[str, ...], tuple[Any, str]]

_NETWORK: _Lines = {
    ("network", "name"): ("covey", "nodes of another network refuse each other"),
    ("network", "listen"): ((), ""),
    ("network", "bootstrap"): ((), 'peers to ask first: "/ip4/…/tcp/…/p2p/<peer id>"'),
}
_GOSSIP: _Lines = {
    ("learning", "protocol"): ("gossip", '"none": learn nothing; introduce others, and share files'),
    ("learning", "rule"): (("mean", "variance.corrected"), "how received models are merged, in order"),
    ("learning", "rounds"): (0, "0: for ever"),
    ("task", "name"): ("digits", 'a built-in, or "my_task.py:make_task" beside this file'),
    ("training", "local_steps"): (10, "mini-batches between two exchanges"),
    ("training", "batch_size"): (16, ""),
    ("training", "learning_rate"): (0.1, ""),
}
_SAMPLED: _Lines = {
    ("learning", "protocol"): ("sampled", "a few nodes, drawn anew, train in each round"),
    ("sampled", "rounds"): (0, "0: for ever. * must be the same on all nodes"),
    ("sampled", "sample_size"): (10, "* nodes that train in each round"),
    ("sampled", "aggregators"): (1, "* nodes that average their models; 3 are compared with each other"),
    ("sampled", "deadline_s"): (30.0, "longest wait for a round's models"),
    ("task", "name"): ("digits", '* a built-in, or "my_task.py:make_task" beside this file'),
    ("training", "local_steps"): (10, "mini-batches in a round"),
    ("training", "batch_size"): (16, ""),
    ("training", "learning_rate"): (0.1, ""),
}
_SCALARS: _Lines = {
    ("learning", "protocol"): (
        "scalars",
        "peers exchange one byte for each gradient estimate, never a model",
    ),
    ("scalars", "rounds"): (0, "0: for ever. * must be the same on all nodes"),
    ("scalars", "samples"): (8, "scalars of this node in each round"),
    ("scalars", "learning_rate"): (0.001, "* smaller for more trained parameters"),
    ("task", "name"): ("digits", '* a built-in, or "my_task.py:make_task" beside this file'),
    ("training", "batch_size"): (16, "samples that one scalar is measured on"),
}
_LEARNING = {"sampled": _SAMPLED, "scalars": _SCALARS}
_BOUND: _Lines = {
    ("network", "manifest"): (
        "manifest.toml",
        "what all nodes of the network agree on: nothing of it stands here",
    ),
    ("network", "listen"): (("/ip4/0.0.0.0/tcp/4001",), ""),
    ("network", "bootstrap"): ((), "peers to ask first, beside those of the manifest"),
    ("training", "threads"): (1, "CPU threads"),
}


def first_config(protocol: str, settings: Sequence[Setting]) -> str:
    """The text of a `covey.toml` with these settings in it. What they set may be wrong: check it."""
    return _text({**_NETWORK, **_LEARNING.get(protocol, _GOSSIP)}, settings)


def bound_config(settings: Sequence[Setting]) -> str:
    """The same for a home that belongs to a network with a manifest."""
    return _text(_BOUND, settings)


def _text(lines: _Lines, settings: Sequence[Setting]) -> str:
    lines = dict(lines)
    for setting in settings:
        _, comment = lines.get(setting.path, (None, ""))
        lines[setting.path] = setting.value, comment
    tables = dict.fromkeys(path[0] for path in lines)
    return "\n".join([HEAD, *(_table(name, lines) for name in tables)])


def _table(name: str, lines: _Lines) -> str:
    rows = [f"[{toml_key(name)}]"]
    for path, (value, comment) in lines.items():
        if path[0] == name:
            row = f"{'.'.join(map(toml_key, path[1:]))} = {toml_value(value)}"
            rows.append(f"{row:39} # {comment}" if comment else row)
    return "\n".join(rows) + "\n"
