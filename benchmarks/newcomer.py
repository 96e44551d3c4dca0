"""How soon a newcomer takes part in a network of real daemons whose model weighs 40 MB.

    python benchmarks/newcomer.py gossip sampled [--nodes N] [--newcomers N] [--json]

The network begins with a checkpoint of round 500 on every node, and has done a round before the first newcomer comes. Its
nodes are forked from one process that has torch loaded, or their starts alone would keep two cores busy for a minute. Each
newcomer is a process from scratch, with an empty home and two addresses; the next comes when the last has left. All daemons
note when what happened. The figures are medians over the newcomers, in seconds from the start of the newcomer's process:

started       python and torch are loaded, the task is made, the node listens
linked        it has greeted its first neighbour
has_model     the network's model is its own
known         most nodes know it, and draw it like any other (`sampled`)
contributed   it has trained on it, and offers the result to others; under `sampled` once it is drawn
held          another node has the result
merged        another node merges it, when its own round says so

`in_time` counts the newcomers that take part within 15 seconds: have contributed, or under `sampled` are known.
`cpu_s` is what the newcomer's process had worked by each of these moments: on a busy machine it says more than the clock.
`--up` limits what each node of the network sends, in bytes a second: else loopback's speed decides.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from node.cluster import Cluster, LocalNode, local_settings

HIDDEN = [3100, 3100]
"""The digits MLP with 9.8 million parameters, 39.4 MB of float32."""
ROUND = 500
SEED = 1
TIMELINE = "timeline.jsonl"
PROGRAM = (sys.executable, __file__, "daemon")
TARGET_S = 15.0
TAKES_PART = {"gossip": "contributed", "sampled": "known"}
CPU_AT = ("started", "linked", "model")
STEPS = ("imported", "started", "linked", "has_model", "known", "contributed", "held", "merged")
LEARNING: dict[str, dict[str, Any]] = {
    # So few models and so long pauses that two cores can serve sixteen daemons.
    "gossip": {
        "learning": {
            "pause_s": 60.0,
            "fanout": 1.0,
            "quorum": 0.0,
            "evaluate_every": 1000,
            "wait_for_peers": 1,
        }
    },
    "sampled": {
        "learning": {"protocol": "sampled"},
        "sampled": {"sample_size": 4, "pause_s": 15.0, "stall_s": 2.0, "evaluate_every": 1000},
    },
}

Row = dict[str, Any]


# --- a daemon that notes what happens -------------------------------------------------------------------
def run_daemon() -> None:
    """`covey` that writes moments of its life to a file in its home."""
    from node.cli import main
    from node.driver import Driver
    from protocols.events import Aggregate, Effect, Emit, Event, Fetch, Fetched, LinkChanged, Send, Started
    from protocols.messages import Offer, TrainedModel
    from protocols.sampling import Sampling

    home = Path(sys.argv[sys.argv.index("--home") + 1])
    with (home / TIMELINE).open("w", buffering=1) as file:

        def note(what: str, **fields: Any) -> None:
            moment = {"at_s": time.monotonic(), "cpu_s": time.process_time()}
            file.write(json.dumps({**moment, "what": what, **fields}) + "\n")

        note("imported")
        do, handle = Driver._do, Driver.handle
        round_ = num_known = 0
        coming: dict[int, str] = {}

        def doing(self: Driver, effect: Effect) -> None:
            match effect:
                case Emit(LinkChanged(peer, True)):
                    note("linked", peer=peer)
                case Fetch(token, _, ref, others):
                    coming[token] = ref.digest.hex()
                    note("fetch", digest=ref.digest.hex(), sources=1 + len(others))
                case Send(_, Offer(ref) | TrainedModel(ref)) if round_:
                    note("offered", digest=ref.digest.hex(), round=ref.round)
                case Aggregate(_, own, inputs):
                    note("merge", digests=[ref.digest.hex() for ref in (own, *(each.ref for each in inputs))])
                case _:
                    pass
            do(self, effect)

        def handling(self: Driver, event: Event) -> None:
            nonlocal round_, num_known
            match event:
                case Started():
                    note("started")
                case Fetched(token):
                    note("held", digest=coming.get(token))
                case _:
                    pass
            handle(self, event)
            learning = self.core.learning
            if isinstance(learning, Sampling) and len(learning.population) != num_known:
                num_known = len(learning.population)
                note("population", size=num_known)
            model = self.core.model
            if model is not None and model.round > round_:
                round_ = model.round
                note("model", round=round_, digest=model.digest.hex())

        Driver._do = doing  # type: ignore[method-assign]
        Driver.handle = handling  # type: ignore[method-assign]
        main()


class ForkedProcess:
    """As much of `subprocess.Popen` as a `LocalNode` needs, of a daemon that is forked from this process."""

    def __init__(self, home: Path, log_path: Path) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=run_forked, args=(home, log_path))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("daemon", timeout_s or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(home: Path, log_path: Path) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.argv = ["covey", "run", "--home", str(home)]
    run_daemon()


class Member(LocalNode):
    """A node of the network that newcomers find."""

    def start(self, *command: str) -> None:
        self._process = ForkedProcess(self.home, self.log_path)  # type: ignore[assignment]


def timeline(node: LocalNode) -> list[Row]:
    """What a node has noted so far, in order."""
    path = node.home / TIMELINE
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


# --- the network ----------------------------------------------------------------------------------------
def seed_checkpoint() -> tuple[str, bytes]:
    """Name and bytes of a checkpoint that a whole network can begin with."""
    from node.store import hash_pieces
    from node.task_loading import make_task
    from node.tasks import initial_params
    from node.weights import encode_params

    data = encode_params(initial_params(make_task("digits", {"hidden": HIDDEN}, Path()), SEED))
    digest, _, _ = hash_pieces([data])
    return f"{ROUND:010d}-80-{digest.hex()}.safetensors", data


def settings(protocol: str, index: int, count: int, bootstrap: list[str], up: int = 0) -> dict[str, Any]:
    tables = LEARNING[protocol]
    found = local_settings(
        task={
            "name": "digits",
            "options": {"hidden": HIDDEN},
            "shard": {"index": index, "count": count, "seed": SEED},
        },
        training={"local_steps": 1, "learning_rate": 0.01},
        device={"upload_bytes_per_s": up},
        **tables,
    )
    # The network's timings as they come, and neighbours that are found by word alone.
    found["network"] = {
        "listen": ["/ip4/127.0.0.1/tcp/0"],
        "bootstrap": bootstrap,
        "mdns": False,
        "dht": False,
    }
    found["learning"].pop("deadline_s", None)
    return found


def start_network(cluster: Cluster, folder: Path, protocol: str, num_nodes: int, up: int) -> list[str]:
    """Start so many nodes and wait until they learn together. Where the first two can be dialled."""
    name, data = seed_checkpoint()
    bootstrap: list[str] = []
    for index in range(num_nodes):
        tables = settings(protocol, index, num_nodes + 1, bootstrap[:], up)
        # Each link that comes up moves a model either way: with six a node they would begin with 4 GB.
        tables["network"]["target_degree"] = 2
        node: LocalNode = Member(folder / str(index), tables)
        cluster.nodes.append(node)
        checkpoints = node.home / "checkpoints"
        checkpoints.mkdir()
        (checkpoints / name).write_bytes(data)
        node.start()
        if index < 2:
            node.wait_until_up()
            bootstrap.append(node.address())
    for node in cluster.nodes:
        node.wait_for(lambda s: s["live_peers"] >= min(2, num_nodes - 1), "links with others", timeout_s=100)
    for node in cluster.nodes if protocol == "gossip" else cluster.nodes[:1]:
        node.wait_for(lambda s: s["round"] > ROUND, "a round with others", timeout_s=100)
    return bootstrap


def first(rows: Iterable[Row]) -> float | None:
    return min((row["at_s"] for row in rows), default=None)


def watch(
    newcomer: LocalNode, others: list[LocalNode], num_known: int, began_s: float, limit_s: float
) -> Row:
    """Wait until another node has merged what the newcomer offers, or time is up; the moments of all steps.

    num_known: the size of a population that has the newcomer in it.
    """
    while True:
        rows, seen = timeline(newcomer), [timeline(node) for node in others]
        found = moments(rows, seen, num_known)
        if found["merged"] is not None or time.monotonic() - began_s > limit_s:
            break
        assert newcomer.running, newcomer.log()[-2000:]
        time.sleep(0.3)
    has_model = found["has_model"] or began_s
    cpu_s = {row["what"]: round(row["cpu_s"], 2) for row in reversed(rows) if row["what"] in CPU_AT}
    status = newcomer.status() or {}
    return {
        **{what: None if at is None else round(at - began_s, 2) for what, at in found.items()},
        "cpu_s": cpu_s,
        "fetches": [row["sources"] for row in rows if row["what"] == "fetch" and row["at_s"] <= has_model],
        "held_at": [round(row["at_s"] - began_s, 2) for row in rows if row["what"] == "held"][:6],
        "received_mb": round(status.get("bytes_received", 0) / 1e6, 1),
        "links": sum(row["what"] == "linked" for row in rows),
        "load": round(os.getloadavg()[0], 1),
    }


def moments(rows: list[Row], others: list[list[Row]], num_known: int) -> dict[str, float | None]:
    """When each step was taken, by the newcomer's timeline and those of the others."""
    models = [row for row in rows if row["what"] == "model" and row["round"] >= ROUND]
    has_model = first(models)
    offers = [row for row in rows if row["what"] == "offered" and models and row["at_s"] >= models[0]["at_s"]]
    own = {row["digest"] for row in offers} - {row["digest"] for row in models}
    theirs = [row for each in others for row in each]
    populations = [
        [row for row in each if row["what"] == "population" and row["size"] >= num_known] for each in others
    ]
    known = sorted(each[0]["at_s"] for each in populations if each)
    return {
        **{what: first(row for row in rows if row["what"] == what) for what in STEPS[:3]},
        "has_model": has_model,
        "known": known[len(others) // 2] if len(known) > len(others) // 2 else None,
        "contributed": first(row for row in offers if row["digest"] in own),
        "held": first(row for row in theirs if row["what"] == "held" and row["digest"] in own),
        "merged": first(row for row in theirs if row["what"] == "merge" and own & set(row["digests"])),
    }


def measure(protocol: str, num_nodes: int, num_newcomers: int, limit_s: float, up: int) -> Row:
    """One network, and newcomers to it one after another."""
    with tempfile.TemporaryDirectory() as name, Cluster() as cluster:
        folder = Path(name)
        load_before = round(os.getloadavg()[0], 1)
        began_s = time.monotonic()
        bootstrap = start_network(cluster, folder, protocol, num_nodes, up)
        report(f"{protocol}: {num_nodes} nodes after {time.monotonic() - began_s:.0f} s")
        rows = []
        members = list(cluster.nodes)
        for number in range(num_newcomers):
            tables = settings(protocol, num_nodes, num_nodes + 1, bootstrap)
            newcomer = cluster.add(folder / f"new{number}", tables, PROGRAM)
            began_s = time.monotonic()
            newcomer.start()
            rows.append(watch(newcomer, members, num_nodes + number + 1, began_s, limit_s))
            report(f"  newcomer {number}: {rows[-1]}")
            newcomer.stop()
    return {
        "nodes": num_nodes,
        "load_before": load_before,
        **medians(rows, TAKES_PART[protocol]),
        "runs": rows,
    }


def medians(rows: list[Row], part: str) -> Row:
    """Of each step over all newcomers; None where half of them had not come so far when time was up.

    part: the step by which a newcomer takes part.
    """

    def reached(step: str) -> list[float]:
        return [math.inf if row[step] is None else row[step] for row in rows]

    middle = {step: statistics.median(reached(step)) for step in STEPS}
    return {
        **{step: None if math.isinf(at) else round(at, 2) for step, at in middle.items()},
        "in_time": sum(at < TARGET_S for at in reached(part)),
        "newcomers": len(rows),
    }


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("protocols", nargs="+", choices=[*LEARNING])
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--newcomers", type=int, default=3)
    parser.add_argument("--limit", type=float, default=40.0, help="seconds that each newcomer is watched")
    parser.add_argument("--up", type=int, default=0, help="bytes a second that each node sends; 0: no limit")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    found = {
        protocol: measure(protocol, args.nodes, args.newcomers, args.limit, args.up)
        for protocol in args.protocols
    }
    print(json.dumps(found, indent=None if args.json else 1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["daemon"]:
        del sys.argv[1]
        run_daemon()
    else:
        main()
