"""What it costs to hold a network together, how soon the dead are found, and how parts of a network find each other.

    python benchmarks/membership.py scale --nodes 100 1000
    python benchmarks/membership.py scale --nodes 10000     # some minutes, 0.7 GB of memory
    python benchmarks/membership.py detect                  # without loss, and with 5 % of all messages lost
    python benchmarks/membership.py islands --seeds 3       # two networks of 100 nodes that touch at one link
    python benchmarks/membership.py partition --seeds 3     # one network, cut in two halves for five minutes
    python benchmarks/membership.py draw

The built-in scenarios `membership` and `islands`: the deployed core, in virtual time, and nobody learns. Each part prints
what it found and puts it into `docs/membership.json`; `draw` makes `docs/membership.png` of that.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx

from node.core import NodeCore
from protocols.events import Effect, Event, LinkChanged, Record, Send
from protocols.messages import Suspects
from protocols.vocabulary import Reason
from sim import scenario_files
from sim.learning import peer_name
from sim.results import SampleRow
from sim.scenarios import Scenario
from sim.world import Observer, World

DOCS = Path(__file__).resolve().parent.parent / "docs"
STEADY_FROM_S, STEADY_TO_S = 180.0, 300.0
SILENT_AT_S = 240.0
TOUCH_AT_S = 240.0
CUT_AT_S, HEALED_AT_S = 240.0, 540.0
MANY_LINKS = 10
"""Across a gap, no two of one node: then no single node's loss parts the network again, nor that of nine."""
FLAT = 0.20

Row = dict[str, Any]


def load(name: str, *overrides: str) -> World:
    """A world of the built-in scenario with some fields changed."""
    return World(scenario(name, *overrides))


def scenario(name: str, *overrides: str) -> Scenario:
    found, base = scenario_files.load(name, overrides)
    scenario_files.validate(found, base)
    return found


class Watch:
    """Asked after every event, as the simulator's checkers are."""

    def __init__(self) -> None:
        self.started_at: dict[int, float] = {}

    def started(self, node: int, core: NodeCore, now: float, epoch: int) -> None:
        self.started_at[node] = now

    def gone(self, node: int, wiped: bool = False) -> None: ...

    def after(self, node: int, now: float, event: Event, effects: Sequence[Effect]) -> None: ...

    def finish(self, now: float) -> None: ...


# --- scale ----------------------------------------------------------------------------------------------
class Joining(Observer):
    """When each node had its first links, and what all have sent by then and later."""

    def __init__(self, degree: int) -> None:
        self.degree = degree
        self.linked_at: dict[int, float] = {}
        self.samples: dict[float, SampleRow] = {}

    def record(self, at_s: float, node: int, record: Record) -> None:
        if isinstance(record, LinkChanged) and record.up and record.num_live >= self.degree:
            self.linked_at.setdefault(node, at_s)

    def sample(self, row: SampleRow) -> None:
        self.samples[row.at_s] = row


def scale(num_nodes: int) -> Row:
    """Joining, and two minutes of a network to which nothing happens."""
    chosen = scenario("membership", f"nodes={num_nodes}", "timeline=[]")
    joining, watch = Joining(chosen.topology.degree), Watch()
    world = World(chosen, observer=joining, checkers=watch)
    world.clock.at(STEADY_TO_S + 1, world.stop)
    began_at = time.perf_counter()
    world.run()
    wall_s = time.perf_counter() - began_at
    before, after = joining.samples[STEADY_FROM_S], joining.samples[STEADY_TO_S]
    first, last = Counter(before.messages), Counter(after.messages)
    node_minutes = num_nodes * (STEADY_TO_S - STEADY_FROM_S) / 60
    graph = graph_of(world)
    degrees = [degree for _, degree in graph.degree()]
    views = [node.core.view for node in world.nodes if node.core is not None]
    held = Counter(record.peer for view in views for record in view.known_records())
    # Until the bootstrap node is there, nobody can join.
    open_at_s = watch.started_at[0]
    joined_s = sorted(
        at_s - max(open_at_s, watch.started_at[node]) for node, at_s in joining.linked_at.items()
    )
    return {
        "nodes": num_nodes,
        "per_node_minute": {kind: (last[kind] - first[kind]) / node_minutes for kind in sorted(last)},
        "messages_per_node_minute": (last - first).total() / node_minutes,
        "bytes_per_node_minute": (after.control_bytes - before.control_bytes) / node_minutes,
        "join_messages_per_node": first.total() / num_nodes,
        "join_hellos_per_node": first["hello"] / num_nodes,
        "join_refusals_per_node": world.refused[Reason.FULL.value] / num_nodes,
        "joined": len(joined_s),
        "joined_median_s": statistics.median(joined_s),
        "joined_p99_s": joined_s[int(0.99 * (len(joined_s) - 1))],
        "joined_last_s": joined_s[-1],
        "links_mean": statistics.fmean(degrees),
        "links_min": min(degrees),
        "links_max": max(degrees),
        "parts": nx.number_connected_components(graph),
        "biconnected": nx.is_biconnected(graph),
        "known_mean": statistics.fmean(view.num_known() for view in views),
        "held_by_min": min(held.get(node.peer, 0) for node in world.nodes),
        "held_by_median": statistics.median(held.values()),
        "held_by_max": max(held.values()),
        "wall_s": wall_s,
    }


def graph_of(world: World) -> nx.Graph:
    """The nodes that are up, and the links between them."""
    overlay = world.overlay()
    graph = nx.Graph()
    graph.add_nodes_from(node.index for node in overlay.nodes if node.alive)
    graph.add_edges_from(overlay.links)
    return graph


# --- detection ------------------------------------------------------------------------------------------
class Ends(Observer):
    """Links that ended: those with the silent, by how long after, and those between nodes that were up."""

    def __init__(self, silent: Collection[str]) -> None:
        self.silent = silent
        self.links: set[tuple[int, str]] = set()
        """Kept links to them, by who has them."""
        self.found_after_s: list[float] = []
        self.others: Counter[str] = Counter()

    def record(self, at_s: float, node: int, record: Record) -> None:
        if not isinstance(record, LinkChanged) or peer_name(node) in self.silent:
            return
        if record.peer in self.silent and at_s < SILENT_AT_S:
            (self.links.add if record.up else self.links.discard)((node, record.peer))
        if record.up or at_s < STEADY_FROM_S:
            return
        if record.peer in self.silent and at_s >= SILENT_AT_S:
            self.found_after_s.append(at_s - SILENT_AT_S)
        elif at_s < SILENT_AT_S or record.peer not in self.silent:
            self.others[record.reason] += 1


class Suspicions(Watch):
    """Everything that a node has told as suspected, once for each node that tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[tuple[int, str, int], float] = {}

    def after(self, node: int, now: float, event: Event, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, Suspects):
                for suspicion in effect.message.peers:
                    self.told.setdefault((node, suspicion.peer, suspicion.incarnation), now)


def detect(num_nodes: int, num_silent: int, loss: float, until_s: float) -> Row:
    """Some machines fall silent at one moment; everything else is as it was."""
    silent = [number * num_nodes // num_silent - 1 for number in range(1, num_silent + 1)]
    listed = ",".join(map(str, silent))
    chosen = scenario(
        "membership",
        f"nodes={num_nodes}",
        f"links.loss={loss}",
        f"at_most_s={until_s}",
        f'timeline=["at {SILENT_AT_S:g} s: silence nodes {listed}"]',
    )
    names = {str(peer_name(index)) for index in silent}
    ends, suspicions = Ends(names), Suspicions()
    world = World(chosen, observer=ends, checkers=suspicions)
    up = [node for node in world.nodes if node.index not in silent]
    shares: list[tuple[float, float]] = []

    def look() -> None:
        rows = [
            row.state
            for node in up
            if node.core is not None
            for row in node.core.peers()
            if row.peer in names
        ]
        shares.append((world.clock.now() - SILENT_AT_S, rows.count("suspected") / max(1, len(rows))))

    for after_s in range(41):
        world.clock.at(SILENT_AT_S + after_s, look)
    world.run()
    found = sorted(ends.found_after_s)
    node_hours = len(up) * (until_s - STEADY_FROM_S) / 3600
    false = {key for key, at_s in suspicions.told.items() if key[1] not in names and at_s >= STEADY_FROM_S}
    return {
        "nodes": num_nodes,
        "silent": num_silent,
        "loss": loss,
        "links_with_silent": len(ends.links),
        "links_found": len(found),
        "found_after_s": found,
        "median_s": statistics.median(found),
        "p99_s": found[int(0.99 * (len(found) - 1))],
        "max_s": found[-1],
        "suspected_share": shares,
        "suspected_in_half_s": next((at_s for at_s, share in shares if share >= 0.5), None),
        "suspected_share_last": shares[-1][1],
        "node_hours": node_hours,
        "false_suspicions": len({(peer, incarnation) for _, peer, incarnation in false}),
        "false_marks": len(false),
        "false_deaths": sum(count for reason, count in ends.others.items() if reason == Reason.SILENT.value),
        "other_ends": dict(ends.others.most_common()),
    }


# --- parts of a network ---------------------------------------------------------------------------------
def islands(num_nodes: int, loss: float, seed: int) -> Row:
    """Two networks that never met; at one moment two nodes hear of each other."""
    here, there = num_nodes // 12, num_nodes // 2 + num_nodes // 12
    world = load(
        "islands",
        f"nodes={num_nodes}",
        f"seed={seed}",
        f"links.loss={loss}",
        f'timeline=["at {TOUCH_AT_S:g} s: introduce nodes {here},{there}"]',
    )
    return heal(world, TOUCH_AT_S, loss)


def partition(num_nodes: int, loss: float, seed: int) -> Row:
    """One network, through which nothing passes between its halves for a while."""
    half = num_nodes // 2
    world = load(
        "membership",
        f"nodes={num_nodes}",
        f"seed={seed}",
        f"links.loss={loss}",
        f"at_most_s={HEALED_AT_S + 600}",
        f'timeline=["at {CUT_AT_S:g} s: partition nodes 0-{half - 1}|nodes {half}-{num_nodes - 1}", '
        f'"at {HEALED_AT_S:g} s: heal"]',
    )
    return heal(world, HEALED_AT_S, loss)


def heal(world: World, from_s: float, loss: float) -> Row:
    """Run it, and tell how its two halves come together after that moment."""
    rows: list[Row] = []
    until_s = world.scenario.at_most_s
    for number in range(int((until_s - from_s) / 10)):
        world.clock.at(from_s + 10 * number, lambda: rows.append(across(world, from_s)))
    world.run()
    rows.append(across(world, from_s))
    return {
        "nodes": len(world.nodes),
        "loss": loss,
        "seed": world.scenario.seed,
        "links_across_before": rows[0]["links"],
        "all_know_s": first(rows, lambda row: row["knowing"] == len(world.nodes)),
        "many_links_s": first(rows, lambda row: row["disjoint"] >= MANY_LINKS),
        "half_linked_s": first(rows, lambda row: row["linked"] >= len(world.nodes) / 2),
        "rows": rows,
    }


def first(rows: list[Row], holds: Callable[[Row], bool]) -> float | None:
    """When it came to hold and did so ever after; None where it does not at the end."""
    late = [row["after_s"] for row in rows if not holds(row)]
    return next((row["after_s"] for row in rows if not late or row["after_s"] > late[-1]), None)


def across(world: World, from_s: float) -> Row:
    """What passes between the lower half of the nodes and the upper one."""
    half = len(world.nodes) // 2
    sides: dict[str, bool] = {node.peer: node.index < half for node in world.nodes}
    graph = graph_of(world)
    links = [(a, b) for a, b in graph.edges if (a < half) != (b < half)]
    gap = nx.Graph(links)
    knowing = sum(
        any(
            sides[row.peer] != sides[node.peer] and row.state not in ("suspected", "left")
            for row in node.core.peers()
        )
        for node in world.nodes
        if node.core is not None
    )
    return {
        "after_s": world.clock.now() - from_s,
        "links": len(links),
        "share": len(links) / max(1, graph.number_of_edges()),
        "linked": gap.number_of_nodes(),
        "disjoint": len(nx.max_weight_matching(gap, maxcardinality=True)),
        "knowing": knowing,
    }


# --- the picture ----------------------------------------------------------------------------------------
def draw(found: dict[str, list[Row]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    draw_scale(grid[0][0], sorted(found.get("scale", []), key=lambda row: row["nodes"]))
    draw_detection(grid[0][1], found.get("detect", []))
    draw_healing(grid[1][0], found.get("islands", []), "two networks of 100 that touch at one link")
    draw_healing(grid[1][1], found.get("partition", []), "a network of 200, cut in two for five minutes")
    grid[1][1].legend(frameon=False, fontsize=8, loc="lower right", title="dashed: 5 % of messages lost")
    for axis in grid.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=130)


KINDS = {"beat": "heartbeats", "shuffle": "shuffles", "hello": "greetings", "other": "all else"}
COLOURS = ("#0b6e4f", "#3b5ba5", "#c1440e", "#999999")


def draw_scale(axis: Any, rows: list[Row]) -> None:
    sizes = [row["nodes"] for row in rows]
    parts: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for row in rows:
        each: Counter[str] = Counter(row["per_node_minute"])
        shuffles = each["shuffle"] + each["peers"]
        parts["beat"].append(each["beat"])
        parts["shuffle"].append(shuffles)
        parts["hello"].append(each["hello"])
        parts["other"].append(each.total() - each["beat"] - shuffles - each["hello"])
    axis.stackplot(sizes, *parts.values(), labels=KINDS.values(), colors=COLOURS, alpha=0.8)
    axis.set(title="messages a node and minute", xscale="log", xlabel="nodes", ylim=(0, 130))
    axis.legend(frameon=False, loc="upper center", ncols=len(KINDS), fontsize=8)


def draw_detection(axis: Any, rows: list[Row]) -> None:
    for row, colour in zip(rows, COLOURS, strict=False):
        times, loss = row["found_after_s"], row["loss"]
        shares = [(number + 1) / row["links_with_silent"] for number in range(len(times))]
        axis.step(times, shares, where="post", color=colour, label=f"links ended, loss {loss:.0%}")
        at_s, marked = zip(*row["suspected_share"], strict=True)
        axis.plot(at_s, marked, "--", color=colour, label=f"suspected where known, loss {loss:.0%}")
    axis.set(
        title="after a machine falls silent", xlabel="seconds", ylabel="share", ylim=(0, 1.02), xlim=(0, 40)
    )
    axis.legend(frameon=False, loc="upper left", fontsize=8)


def draw_healing(axis: Any, rows: list[Row], title: str) -> None:
    for row, style in zip([row for row in rows if row["seed"] == 0], ("-", "--", ":"), strict=False):
        at_s = [each["after_s"] for each in row["rows"]]
        names = {
            "knowing": "know somebody across",
            "linked": "have a link across",
            "disjoint": "disjoint links",
        }
        for (key, name), colour in zip(names.items(), COLOURS, strict=False):
            values = [each[key] for each in row["rows"]]
            axis.plot(at_s, values, style, color=colour, label=name if style == "-" else None)
    axis.set(title=title, xlabel="seconds since then", ylabel="nodes, or links", ylim=(0, None))


# --- the command ----------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("scale", "detect", "islands", "partition", "draw"))
    parser.add_argument("--nodes", type=int, nargs="+", help="sizes of the network")
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0, 0.05], help="but for `scale`")
    parser.add_argument("--until", type=float, default=360.0, help="of `detect`, virtual seconds")
    parser.add_argument("--seeds", type=int, default=1, help="of the last two, with the seeds from 0 on")
    parser.add_argument("--data", type=Path, default=DOCS / "membership.json")
    parser.add_argument("--out", type=Path, default=DOCS / "membership.png")
    arguments = parser.parse_args()
    found: dict[str, list[Row]] = json.loads(arguments.data.read_text()) if arguments.data.exists() else {}
    if arguments.part == "draw":
        draw(found, arguments.out)
        return
    rows = list(measure(arguments))
    for row in rows:
        print(json.dumps({key: value for key, value in row.items() if key not in LONG}))
    found[arguments.part] = [row for row in found.get(arguments.part, []) if not replaced(row, rows)] + rows
    rounded = json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 3))
    arguments.data.write_text(json.dumps(rounded) + "\n")
    if arguments.part == "scale":
        tell_flatness(found["scale"])


LONG = ("rows", "found_after_s", "suspected_share")


def measure(arguments: argparse.Namespace) -> list[Row]:
    seeds, losses = range(arguments.seeds), arguments.loss
    match arguments.part:
        case "scale":
            return [scale(nodes) for nodes in arguments.nodes or (100, 1000)]
        case "detect":
            (nodes,) = arguments.nodes or (1000,)
            return [detect(nodes, nodes // 50, loss, arguments.until) for loss in losses]
        case "islands":
            (nodes,) = arguments.nodes or (200,)
            return [islands(nodes, loss, seed) for loss in losses for seed in seeds]
        case _:
            (nodes,) = arguments.nodes or (200,)
            return [partition(nodes, loss, seed) for loss in losses for seed in seeds]


def replaced(row: Row, rows: list[Row]) -> bool:
    return any(all(row.get(key) == new.get(key) for key in ("nodes", "loss", "seed")) for new in rows)


def tell_flatness(rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: row["nodes"])
    for smaller, larger in pairwise(rows):
        ratio = larger["messages_per_node_minute"] / smaller["messages_per_node_minute"]
        print(f"{smaller['nodes']} to {larger['nodes']} nodes: messages a node and minute x {ratio:.3f}")
    each = [row["messages_per_node_minute"] for row in rows]
    print(f"largest over smallest: {max(each) / min(each):.3f} (wanted: up to {1 + FLAT:.2f})")


if __name__ == "__main__":
    main()
