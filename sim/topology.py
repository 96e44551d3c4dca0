"""Who is linked with whom at the start: edges drawn from a seed, or read from a file.

Belongs here: graphs as lists of pairs of node indices. Who dials whom, and what a node knows of it, is the world's
affair.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocols.errors import ConfigError
from sim.csv_files import read_rows

if TYPE_CHECKING:
    from sim.scenarios import TopologySettings

EDGE_COLUMNS = ("a", "b")
MAX_FULL_NODES = 2_000
"""Two million links, each with its heartbeats: more has never been meant."""

Edge = tuple[int, int]


def draw_edges(topology: "TopologySettings", nodes: int, seed: int, base: Path) -> list[Edge]:
    """The undirected edges, each as (low, high), sorted and without repeats. None for `discover`.

    A drawn graph is connected; one from a file is as it is. `regular` is uniform over the regular graphs up to the
    bias of the pairing (Steger and Wormald 1999, the algorithm of networkx).

    base: the folder that a relative `topology.path` starts from.

    Raises:
        ConfigError: no such graph exists, or the file is wrong, with its line.
    """
    check_topology(topology, nodes)
    match topology.kind:
        case "file":
            return read_edges(topology.path, nodes, base)
        case "ring":
            return _cycle(range(nodes))
        case "full":
            return list(combinations(range(nodes), 2))
        case "regular":
            return _regular(topology.degree, nodes, random.Random(f"{seed} topology"))
        case "discover":
            return []


def check_topology(topology: "TopologySettings", nodes: int) -> None:
    """Whether there is such a graph; a file is not opened.

    Raises:
        ConfigError: at `topology.degree`, `topology.kind` or `topology.path`.
    """
    degree = topology.degree
    if topology.path is not None and topology.kind != "file":
        raise ConfigError("topology.path", f"means nothing with kind '{topology.kind}'", ["kind = 'file'"])
    if topology.islands > 1 and (topology.kind != "discover" or topology.islands > nodes):
        raise ConfigError(
            "topology.islands",
            f"{topology.islands} make no sense with {nodes} nodes and kind '{topology.kind}'",
            ["kind = 'discover'", f"up to {nodes}"],
        )
    if topology.kind == "full" and nodes > MAX_FULL_NODES:
        raise ConfigError(
            "topology.kind",
            f"{nodes} nodes all linked with each other are {nodes * (nodes - 1) // 2} links",
            [f"full up to {MAX_FULL_NODES} nodes", "regular"],
        )
    if (
        topology.kind == "regular"
        and nodes > 1
        and (degree >= nodes or (nodes * degree) % 2 or (degree == 1 and nodes > 2))
    ):
        raise ConfigError(
            "topology.degree",
            f"there is no connected graph of {nodes} nodes with {degree} links each",
            [f"{min(2, nodes - 1)} to {nodes - 1}" + (", even" if nodes % 2 else "")],
        )


def read_edges(path: str | None, nodes: int, base: Path) -> list[Edge]:
    """The edges of a CSV file with the header `a,b`. An edge that stands there twice, either way round, counts once.

    Raises:
        ConfigError: at `topology.path`, with the line.
    """
    edges = []
    for row in read_rows("topology.path", path, base, EDGE_COLUMNS):
        a, b = row.node(0, nodes), row.node(1, nodes)
        if a == b:
            raise row.wrong(f"node {a} is linked with itself")
        edges.append((a, b))
    return _in_order(edges)


def _regular(degree: int, nodes: int, rng: random.Random) -> list[Edge]:
    if nodes == 1:
        return []
    if degree == 2:
        # Nearly every random 2-regular graph falls into several cycles; the connected ones are the shuffled rings.
        return _cycle(rng.sample(range(nodes), nodes))
    if 2 * degree >= nodes:
        # Pairing rarely ends where nearly everybody is linked; who is not linked with whom is then the thin graph.
        # What is left over is connected: two nodes that are not linked have a neighbour in common.
        missing = set(_in_order(_pairing(nodes - 1 - degree, nodes, rng).edges))
        return [edge for edge in combinations(range(nodes), 2) if edge not in missing]
    from networkx import is_connected  # here: whoever only reads a scenario does not wait for it

    while not is_connected(graph := _pairing(degree, nodes, rng)):
        pass
    return _in_order(graph.edges)


def _pairing(degree: int, nodes: int, rng: random.Random) -> Any:
    from networkx import random_regular_graph

    return random_regular_graph(degree, nodes, seed=rng.getrandbits(32))


def _cycle(order: Sequence[int]) -> list[Edge]:
    """Each linked with the next and the last with the first; two nodes share one link, one node has none."""
    return _in_order((a, b) for a, b in zip(order, [*order[1:], order[0]], strict=True) if a != b)


def _in_order(edges: Iterable[Edge]) -> list[Edge]:
    return sorted({(min(edge), max(edge)) for edge in edges})
