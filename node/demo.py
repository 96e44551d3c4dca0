"""The demo: real daemons on this machine learn the digits together; one is killed and comes back."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from node.cluster import Cluster, LocalNode, local_settings
from protocols.errors import LocalError

HIDDEN = [64]
CLOSE = 0.02
"""A node is back once its accuracy is this close to the others' mean."""
STARTUP_TIMEOUT_S = 90.0


def run_demo(num_nodes: int, rounds: int, seed: int, keep: Path | None, console: Console) -> dict[str, Any]:
    """Run the whole demo; progress goes to `console`.

    Returns one JSON-ready object: `alone`, `together` (accuracy of each node), `killed_and_back` (rounds until
    it was within 0.02 of the others' mean), `bytes_per_node`, and the settings.

    Raises:
        LocalError: a daemon failed, with the end of its log.
    """
    if keep is not None:
        return _run_in(keep, num_nodes, rounds, seed, console)
    with tempfile.TemporaryDirectory(prefix="covey-demo-") as folder:
        return _run_in(Path(folder), num_nodes, rounds, seed, console)


def _settings(index: int, num_nodes: int, rounds: int, seed: int, bootstrap: Sequence[str]) -> dict[str, Any]:
    return local_settings(
        network={"name": "demo", "bootstrap": list(bootstrap), "target_degree": min(6, num_nodes - 1)},
        learning={"rounds": rounds, "quorum": 1.0, "wait_for_peers": min(6, num_nodes - 1)},
        task={
            "name": "digits",
            "options": {"hidden": HIDDEN},
            "shard": {
                "index": index,
                "count": num_nodes,
                "partitioner": "dirichlet",
                "alpha": 0.5,
                "seed": seed,
            },
        },
    )


def _run_in(folder: Path, num_nodes: int, rounds: int, seed: int, console: Console) -> dict[str, Any]:
    if (folder / "node-0").exists():
        raise LocalError(f"{folder} holds an earlier demo; choose an empty folder")
    began = time.monotonic()  # noqa: TID251 - a demo in real time
    with Cluster() as cluster:
        first = cluster.add(folder / "node-0", _settings(0, num_nodes, rounds, seed, []))
        console.print(
            f"Starting {num_nodes} daemons; node 0 is the bootstrap peer. Their homes: {folder}",
            highlight=False,
        )
        first.start()
        first.wait_until_up(STARTUP_TIMEOUT_S)
        for index in range(1, num_nodes):
            node = cluster.add(
                folder / f"node-{index}", _settings(index, num_nodes, rounds, seed, [first.address()])
            )
            node.start()
        victim = cluster.nodes[-1]
        note: list[str] = []
        with Live(console=console, refresh_per_second=4, transient=False) as live:

            def show() -> list[dict[str, Any] | None]:
                statuses = [node.status() for node in cluster.nodes]
                live.update(_table(cluster.nodes, statuses, rounds, note))
                return statuses

            _watch(cluster, show, lambda rows: (rows[-1] or {}).get("round", 0) >= rounds * 2 // 5)
            killed_after = len(victim.rounds())
            victim.kill()
            note.append(f"node {num_nodes - 1} was killed with SIGKILL")
            show()
            killed_at = time.time()  # noqa: TID251 - to compare with the records' own times
            victim.start()
            note.append("and started again from its checkpoint")
            _watch(cluster, show, lambda rows: all(row and row["phase"] == "done" for row in rows))
        final = [node.status() or {} for node in cluster.nodes]
        records = [node.rounds() for node in cluster.nodes]
    if not console.is_terminal:
        console.print()  # the last frame of a live table ends without a line break there
    console.print("Training each node alone, for the same number of local steps ...")
    together = [row["metrics"]["accuracy"] for row in final]
    alone, steps = _train_alone(cluster.nodes, records)
    return {
        "nodes": num_nodes,
        "rounds": rounds,
        "alone": alone,
        "together": together,
        "alone_mean": statistics.mean(alone),
        "together_mean": statistics.mean(together),
        "together_min": min(together),
        "killed_and_back": rounds_to_return(records[-1][killed_after:], records[:-1], killed_at),
        "bytes_per_node": [row["bytes_sent"] for row in final],
        "local_steps": steps,
        "seed": seed,
        "wall_s": round(time.monotonic() - began, 1),  # noqa: TID251
    }


def _watch(
    cluster: Cluster,
    show: Callable[[], list[dict[str, Any] | None]],
    done: Callable[[list[dict[str, Any] | None]], bool],
    timeout_s: float = 300.0,
) -> None:
    deadline = time.monotonic() + timeout_s  # noqa: TID251
    while not done(show()):
        for node in cluster.nodes:
            if not node.running:
                raise LocalError(f"the daemon of {node.home} ended by itself:\n{node.log()[-2000:]}")
        if time.monotonic() > deadline:  # noqa: TID251
            raise LocalError(
                f"the demo did not get on within {timeout_s:.0f} s; logs are in the nodes' homes"
            )
        time.sleep(0.25)


def rounds_to_return(
    returned: Sequence[Mapping[str, Any]], others: Sequence[Sequence[Mapping[str, Any]]], since: float
) -> int | None:
    """Rounds a restarted node needed to be within 0.02 of the others' mean accuracy; None if it never was.

    returned: its round records since the restart. others: the records of each other node. since: Unix time.
    """
    for count, record in enumerate(returned, start=1):
        if record["at_s"] < since:
            continue
        present = [
            [row["metrics"]["accuracy"] for row in rows if row["at_s"] <= record["at_s"]][-1:]
            for rows in others
        ]
        accuracies = [values[0] for values in present if values]
        if accuracies and record["metrics"]["accuracy"] >= statistics.mean(accuracies) - CLOSE:
            return count
    return None


def _train_alone(
    nodes: Sequence[LocalNode], records: Sequence[Sequence[object]]
) -> tuple[list[float], list[int]]:
    """Each node's own start and own shard, no peers: as many rounds as it trained in the demo."""
    import torch

    from node.identity import key_seed
    from node.task_loading import make_task
    from node.tasks import build_model, initial_params
    from node.training import evaluate, train

    torch.set_num_threads(1)
    accuracies, steps = [], []
    for node, rows in zip(nodes, records, strict=True):
        config = node.config
        task = make_task(
            config.task.name, config.task.options, node.home, config.task.shard, config.task.probe
        )
        seed, model = key_seed(node.peer), build_model(task)
        params = initial_params(task, seed)
        for number in range(len(rows)):
            params, _ = train(
                task, params, config.training, round=number, seed=seed, node=node.peer, model=model
            )
        accuracies.append(evaluate(task, params, model=model)["accuracy"])
        steps.append(len(rows) * config.training.local_steps)
    return accuracies, steps


def _table(
    nodes: Sequence[LocalNode], statuses: Sequence[dict[str, Any] | None], rounds: int, note: Sequence[str]
) -> Table:
    table = Table("node", "peer", "links", "round", "accuracy", "phase", caption=", ".join(note) or None)
    for index, (node, status) in enumerate(zip(nodes, statuses, strict=True)):
        if status is None:
            table.add_row(str(index), node.peer[-8:], "", "", "", "[yellow]starting[/yellow]")
            continue
        accuracy = status["metrics"].get("accuracy")
        table.add_row(
            str(index),
            node.peer[-8:],
            str(status["live_peers"]),
            f"{status['round']}/{rounds}",
            "" if accuracy is None else f"{accuracy:.3f}",
            status["phase"],
        )
    return table


def print_summary(result: Mapping[str, Any], console: Console) -> None:
    """The result, for people."""
    table = Table("node", "alone", "together", "sent", title="Test accuracy")
    for index, (alone, together, sent) in enumerate(
        zip(result["alone"], result["together"], result["bytes_per_node"], strict=True)
    ):
        table.add_row(str(index), f"{alone:.3f}", f"{together:.3f}", f"{sent / 1e6:.2f} MB")
    table.add_section()
    table.add_row("mean", f"{result['alone_mean']:.3f}", f"{result['together_mean']:.3f}", "")
    console.print(table)
    back = result["killed_and_back"]
    console.print(
        f"The killed node was within {CLOSE} of the others "
        + (
            f"{back} round{'s' if back != 1 else ''} after its restart."
            if back
            else "at no time after its restart."
        )
    )
    console.print(f"{result['rounds']} rounds, {result['wall_s']} s in all.", highlight=False)
