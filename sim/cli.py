"""`covey sim`: a network in one process, in virtual time."""

import json
import time
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from protocols.errors import ConfigError

_err = Console(stderr=True)


def register(app: typer.Typer) -> None:
    """Add the simulator's commands to `covey`. Called through the entry point `covey.commands`."""
    app.command("sim")(sim)


def sim(
    task: Annotated[str, typer.Argument(help="A built-in task, or `my_task.py:make_task`.")] = "digits",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Learning rounds of each node.")] = 40,
    seed: Annotated[int, typer.Option(help="Decides everything; the same seed gives the same trace.")] = 0,
    topology: Annotated[str, typer.Option(help="regular, ring, full or discover.")] = "regular",
    degree: Annotated[
        int | None, typer.Option(min=1, help="Links of each node; 4, or fewer in a smaller network.")
    ] = None,
    start: Annotated[str, typer.Option(help="different or common first models.")] = "different",
    partitioner: Annotated[str, typer.Option(help="iid, dirichlet or shard.")] = "iid",
    alpha: Annotated[float, typer.Option(help="Of the Dirichlet split; smaller is more unequal.")] = 0.5,
    rule: Annotated[list[str] | None, typer.Option(help="Merge rules in order; may be repeated.")] = None,
    hidden: Annotated[str, typer.Option(help="Hidden layers of a built-in task, as 64,64.")] = "64",
    option: Annotated[
        list[str] | None, typer.Option("--option", help="A task option as key=value; may be repeated.")
    ] = None,
    local_steps: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option()] = 0.1,
    latency_ms: Annotated[float, typer.Option(min=0, help="One way.")] = 20.0,
    loss: Annotated[float, typer.Option(min=0, help="Share of link messages lost.")] = 0.0,
    mean_online_s: Annotated[
        float | None, typer.Option(help="Mean session; left out, nobody crashes.")
    ] = None,
    mean_offline_s: Annotated[float, typer.Option(help="Mean absence after a crash.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Run many real node cores in one process and virtual time; print how well they learned together."""
    options: dict[str, Any] = _parse_options(option or [])
    if task in ("digits", "csv", "npz", "libsvm"):
        options.setdefault("hidden", _parse_hidden(hidden))
    tables = {
        "task": task,
        "options": options,
        "nodes": nodes,
        "seed": seed,
        "topology": topology,
        "degree": max(1, min(4, nodes - 1)) if degree is None else degree,
        "start": start,
        "partitioner": partitioner,
        "alpha": alpha,
        "training": {"local_steps": local_steps, "batch_size": batch_size, "learning_rate": learning_rate},
        "gossip": {"rounds": rounds, "quorum": 1.0, "deadline_s": 5.0, "pause_s": 0.0},
        "links": {"latency_s": latency_ms / 1e3, "loss": loss},
        "churn": {"mean_online_s": mean_online_s, "mean_offline_s": mean_offline_s},
        **({"rule": rule} if rule else {}),
    }
    print_run(tables, as_json)


def print_run(tables: dict[str, Any], as_json: bool) -> None:
    """Check the scenario, run it with a progress line, print its result."""
    import torch

    from sim.world import Scenario, World

    try:
        scenario = msgspec.convert(tables, Scenario)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise ConfigError(path.rstrip("`") or "scenario", problem) from error
    torch.set_num_threads(1)  # one thread count, one rounding
    began = time.perf_counter()
    with _err.status("starting") as line:

        def progress(world: World) -> None:
            line.update(
                f"{world.clock.now():.0f} virtual s, {world.events} events, {world.num_finished}/{scenario.nodes} nodes done"
            )

        result = World(scenario).run(progress)
    data = {**msgspec.to_builtins(result), "wall_s": round(time.perf_counter() - began, 3)}
    if as_json:
        typer.echo(json.dumps(data))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in (
        "accuracy_mean",
        "accuracy_min",
        "finished",
        "events",
        "bytes_sent",
        "virtual_s",
        "wall_s",
        "trace_hash",
    ):
        value = data[name]
        table.add_row(f"[bold]{name}[/bold]", f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def _parse_options(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError("--option", f"'{pair}' is not key=value")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _parse_hidden(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise ConfigError("--hidden", f"'{text}' is not a list of whole numbers", ["64,64"]) from None
