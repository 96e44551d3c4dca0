"""The simulator's commands: `covey sim`, `sweep`, `replay` and `diff`.

Belongs here: reading options, telling of progress, printing what came of it. Torch is imported by what runs, not by what
only lists or shows.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from protocols.errors import ConfigError

if TYPE_CHECKING:
    from sim.grank import Row, Settings
    from sim.grank_running import Results as GrankResults
    from sim.learning import MakeComputer
    from sim.results import Run
    from sim.running import Outcome
    from sim.world import World

RUNS_FOLDER = Path("covey-runs")
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
P = ParamSpec("P")
TOLD_EVERY_S = 10.0
"""Between two lines of progress, where the terminal cannot rewrite one."""

_err = Console(stderr=True)
_out = Console()


class _RunByDefault(TyperGroup):
    """`covey sim mass-failure` means `covey sim run mass-failure`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h")):
            args = ["run", *args]
        return super().parse_args(ctx, args)


sim_app = typer.Typer(
    cls=_RunByDefault,
    help="Many real node cores in one process and virtual time. `covey sim SCENARIO` runs one; `covey sim --list` "
    "says which there are; the options are in `covey sim run --help`.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting as links.loss=0.1; may be repeated.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Ray = Annotated[
    str | None,
    typer.Option("--ray", help="Compute on Ray: `local`, `auto`, or a cluster's address. Needs covey[ray]."),
]


def register(app: typer.Typer) -> None:
    """Add the simulator's commands to `covey`. Called through the entry point `covey.commands`."""
    app.add_typer(sim_app, name="sim")
    app.command("sweep")(sweep)
    app.command("replay")(replay)
    app.command("diff")(diff)


# --- one run --------------------------------------------------------------------------------------------
@sim_app.command("run")
def run(
    scenario: Annotated[str, typer.Argument(help="A built-in scenario, or a TOML file.")] = "baseline",
    list_: Annotated[bool, typer.Option("--list", help="Say which scenarios are built in.")] = False,
    settings: Set = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Short for --set nodes=N.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Short for --set gossip.rounds=N, or scalars.rounds=N.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything: one seed, one trace.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="A built-in task, or `my_task.py:make_task`, here instead of the scenario's."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The network without the learning.")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1.")] = None,
    ray: Ray = None,
    out: Annotated[
        Path | None, typer.Option(help="The results folder; left out, a new one in ./covey-runs.")
    ] = None,
    no_out: Annotated[bool, typer.Option("--no-out", help="Leave no results folder.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite the run that --out holds.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a scenario; leave a results folder with a report."""
    from sim import scenario_files

    if list_:
        _list(as_json)
        return
    learning = scenario_files.load(scenario, settings or [])[0].learning if rounds is not None else ""
    overrides = [
        # The scenario's options are those of its own task.
        *([f"data.task={json.dumps(_task_here(task))}", "data.options="] if task is not None else []),
        *(settings or []),
        *([f"nodes={nodes}"] if nodes is not None else []),
        *([f"{learning}.rounds={rounds}"] if rounds is not None else []),
        *([f"seed={seed}"] if seed is not None else []),
        *(["dry_run=true"] if dry_run else []),
        *([f"compute.device={json.dumps(device)}"] if device is not None else []),
    ]
    chosen, base = scenario_files.load(scenario, overrides)
    folder = None if no_out else out or _new_folder(chosen.name or Path(scenario).stem, chosen.seed)
    from sim.running import run_scenario

    with _progress(quiet, _status_since(time.perf_counter())) as progress:
        outcome = run_scenario(
            chosen, base, folder, replace=replace, progress=progress, make_computer=_computer(ray)
        )
    if as_json:
        data = {**msgspec.to_builtins(outcome.result), **outcome.timing}
        typer.echo(json.dumps({**data, "folder": str(folder) if folder else None}))
    elif not quiet:
        _print_outcome(outcome, folder)
    if outcome.result.partial:
        raise typer.Exit(EXIT_INTERRUPTED)


def _list(as_json: bool) -> None:
    from sim import scenario_files

    found = scenario_files.names()
    if as_json:
        typer.echo(json.dumps([{"name": name, "summary": summary} for name, summary in found]))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, summary in found:
        table.add_row(f"[bold]{name}[/bold]", summary)
    _out.print(table)


def _task_here(task: str) -> str:
    """A task's file is meant from where the command is given, not from the scenario's folder."""
    file, colon, function = task.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if colon and file.endswith(".py") else task


def _new_folder(name: str, seed: int) -> Path:
    """covey-runs/NAME-SEED, with a number where there is one already."""
    plain = RUNS_FOLDER / f"{name}-{seed}"
    folder, number = plain, 1
    while folder.exists():
        number += 1
        folder = plain.with_name(f"{plain.name}-{number}")
    return folder


def _computer(ray: str | None) -> "MakeComputer":
    if ray is not None:
        from sim.ray_computer import compute_on_ray

        return compute_on_ray(None if ray == "local" else ray)
    from sim.learning import compute_here
    from sim.other_process import compute_beside

    return compute_beside if (os.cpu_count() or 1) > 1 else compute_here


@contextmanager
def _progress(quiet: bool, line: Callable[P, str]) -> Iterator[Callable[P, None]]:
    """A line that is rewritten in a terminal, and a line now and then elsewhere."""
    told_at = time.perf_counter()

    def tell(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal told_at
        if time.perf_counter() - told_at >= TOLD_EVERY_S:
            told_at = time.perf_counter()
            _err.print(line(*args, **kwargs), highlight=False)

    if quiet:
        yield lambda *args, **kwargs: None
    elif _err.is_terminal:
        with _err.status("starting") as status:
            yield lambda *args, **kwargs: status.update(line(*args, **kwargs))
    else:
        yield tell


def _status_since(began_at: float) -> Callable[["World"], str]:
    return lambda world: _status(world, began_at)


def _status(world: "World", began_at: float) -> str:
    wall_s = time.perf_counter() - began_at
    accuracy = world.accuracy()
    parts = [
        f"{world.clock.now():,.0f} s virtual",
        f"round {world.node_rounds / len(world.nodes):,.1f}",
        f"{world.events / wall_s:,.0f} events/s",
        f"{world.num_online}/{len(world.nodes)} alive",
        f"{world.bytes_sent / 1e6:,.1f} MB",
        *([f"accuracy {accuracy:.3f}"] if accuracy is not None else []),
    ]
    return " · ".join(parts)


def _print_outcome(outcome: "Outcome", folder: Path | None) -> None:
    result, timing = outcome.result, outcome.timing
    if result.partial:
        _out.print("[bold yellow]Interrupted: this is what there was by then.[/bold yellow]")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows: dict[str, str] = {}
    if result.accuracy_mean is not None:
        low, high = result.accuracy_min, result.accuracy_max
        rows["accuracy"] = f"{result.accuracy_mean:.4f} (from {low:.4f} to {high:.4f})"
    if result.merged_accuracy is not None:
        rows["mean of models"] = f"{result.merged_accuracy:.4f}"
    if result.final_merged_accuracy is not None:
        rows["final merge"] = f"{result.final_merged_accuracy:.4f}"
    if result.consensus_distance is not None:
        rows["consensus distance"] = f"{result.consensus_distance:.4g}"
    rows["nodes"] = f"{result.nodes:,}: {result.finished:,} finished, {result.alive:,} alive at the end"
    rows["node-rounds"] = f"{result.node_rounds:,} ({timing['node_rounds_per_s']:,.0f} a second)"
    rows["events"] = f"{result.events:,} ({timing['events_per_s']:,.0f} a second)"
    rows["sent"] = f"{result.bytes_sent / 1e6:,.2f} MB, {result.fetches:,} models"
    if result.scalars is not None:
        from sim.scalar_world import as_rows

        rows.update(as_rows(result.scalars))
    if result.refused:
        rows["refused"] = ", ".join(f"{reason} {count:,}" for reason, count in result.refused.items())
    if result.failed_work:
        rows["failed work"] = f"{result.failed_work:,}"
    if result.timeline_left:
        rows["timeline"] = f"{result.timeline_left} lines come after the end: nobody was left to finish"
    rows["time"] = f"{result.virtual_s:,.1f} s virtual, {timing['wall_s']:,.2f} s here"
    rows["engine"] = _engine_line(timing["engine"])
    rows["trace"] = result.trace_hash
    if outcome.report is not None:
        rows["report"] = str(outcome.report)
    elif folder is not None:
        rows["results"] = f"{folder} (no report: {outcome.no_report})"
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    _out.print(table)


def _engine_line(engine: dict[str, Any]) -> str:
    parts = []
    for name, value in engine.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{key} {shown}" for key, shown in value.items() if not isinstance(shown, dict))
            parts.append(f"{name} ({inner})")
        else:
            parts.append(f"{name} {value}")
    return "; ".join(parts)


@sim_app.command("show")
def show(name: Annotated[str, typer.Argument(help="A built-in scenario.")]) -> None:
    """Print a built-in scenario's file: save it, change it, run it."""
    from sim import scenario_files

    typer.echo(scenario_files.show(name), nl=False)


# --- a swarm --------------------------------------------------------------------------------------------
@sim_app.command("swarm")
def swarm(
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    first: Annotated[int, typer.Option(help="The first of them.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Only this one.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes at once; 0 means one a core.")] = 0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print what each seed draws.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw adverse networks from seeds and check every promise of the core after every event."""
    from sim.faults import describe, draw_faults
    from sim.swarm import SwarmOutcome, run_many

    chosen = range(first, first + seeds) if seed is None else range(seed, seed + 1)
    num_done = num_failed = 0

    def tell(outcome: SwarmOutcome) -> None:
        nonlocal num_done, num_failed
        num_done += 1
        num_failed += not outcome.ok
        if not outcome.ok and not as_json:
            _err.print(f"[bold red]seed {outcome.seed} failed[/bold red]")
            typer.echo(outcome.violation, err=True)
        elif verbose and not as_json:
            typer.echo(describe(draw_faults(outcome.seed)))
            typer.echo(
                f"seed {outcome.seed}: {outcome.events:,} events, {outcome.virtual_s:,.0f} s virtual, all held"
            )
        elif not quiet and not as_json and (num_done % 10 == 0 or num_done == len(chosen)):
            _err.print(f"{num_done}/{len(chosen)} seeds, {num_failed} failed", highlight=False)

    outcomes = run_many(chosen, jobs or os.cpu_count() or 1, tell)
    failed = [outcome.seed for outcome in outcomes if not outcome.ok]
    if as_json:
        typer.echo(json.dumps({"failed": failed, "outcomes": msgspec.to_builtins(outcomes)}))
    elif not quiet:
        events = sum(outcome.events for outcome in outcomes)
        text = "all held" if not failed else f"failed: {', '.join(map(str, failed))}"
        typer.echo(f"{len(outcomes)} seeds, {events:,} events checked, {text}")
    if failed:
        raise typer.Exit(EXIT_FAILED)


# --- the ranking ----------------------------------------------------------------------------------------
@sim_app.command("grank")
def grank(
    catalogue: Annotated[
        Path | None,
        typer.Option(
            help="A CSV file with the columns album, artist and tags; left out, one is drawn from the seed."
        ),
    ] = None,
    experiment: Annotated[
        list[str] | None,
        typer.Option(help="baseline, targeted-sybil, inflation, epic-sybil, push or all; may be repeated."),
    ] = None,
    ranker: Annotated[
        list[str] | None,
        typer.Option(help="g-rank, g-rank-capped, popularity, panache, maay, bm25 or all; may be repeated."),
    ] = None,
    isolation: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0, max=1.0, help="F: what strangers' clicks count; may be repeated. 0 and 1 if left out."
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=2, max=1000, help="Honest ones.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Queries of all nodes together.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The results folder; left out, a new one in ./covey-runs.")
    ] = None,
    no_out: Annotated[bool, typer.Option("--no-out", help="Leave no results folder.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Let nodes search, click and gossip as in G-Rank's experiment; say how well their rankings agree, and under attack."""
    from aggregation.ranking import RANKERS
    from sim.grank import EXPERIMENTS, Settings, plan
    from sim.grank_catalogue import read_catalogue, synthetic
    from sim.grank_running import run_all

    planned = plan(
        _all_or("--experiment", experiment or ["baseline"], EXPERIMENTS),
        _all_or("--ranker", ranker or ["g-rank"], RANKERS),
        isolation or [0.0, 1.0],
        Settings(nodes=nodes, steps=steps, seed=seed),
    )
    found = read_catalogue(catalogue) if catalogue is not None else synthetic(seed)
    folder = None if no_out else out or _new_folder("grank", seed)
    began_at = time.perf_counter()

    def status(number: int, settings: Settings, row: "Row") -> str:
        return _grank_status(number, len(planned), settings, row)

    with _sigterm_as_interrupt(), _progress(quiet, status) as tell:
        results = run_all(planned, found, catalogue.name if catalogue else "drawn", folder, tell)
    wall_s = time.perf_counter() - began_at
    if as_json:
        data = {"summaries": msgspec.to_builtins(results.summaries), "partial": results.partial}
        typer.echo(
            json.dumps({**data, "wall_s": round(wall_s, 3), "folder": str(folder) if folder else None})
        )
    elif not quiet:
        _print_grank(results, folder, wall_s)
    if results.partial:
        raise typer.Exit(EXIT_INTERRUPTED)


def _all_or(option: str, names: list[str], known: Iterable[str]) -> list[str]:
    """Raises ConfigError for a name that is not known."""
    for name in names:
        if name not in (allowed := [*known, "all"]):
            raise ConfigError(option, f"'{name}' is none", allowed)
    return list(known) if "all" in names else names


def _grank_status(number: int, num_runs: int, settings: "Settings", row: "Row") -> str:
    run = f"{number + 1}/{num_runs} {settings.experiment}, {settings.name}"
    distance = row.honest.distance.mean
    return f"{run} · step {row.step:,} of {settings.steps:,} · distance {distance:.1f}"


def _print_grank(results: "GrankResults", folder: Path | None, wall_s: float) -> None:
    from sim.grank import run_name

    if results.partial:
        _out.print("[bold yellow]Interrupted: this is what there was by then.[/bold yellow]")
    table = Table(box=None, pad_edge=False)
    for name in ("experiment", "ranker"):
        table.add_column(name, no_wrap=True)
    for name in ("start", "half", "worst", "end", "agreed", "attacked"):
        table.add_column(name, justify="right")
    for said in results.summaries:
        distances = (said.distance_start, said.distance_half, said.distance_worst, said.distance_end)
        table.add_row(
            said.experiment,
            run_name(said.ranker, said.isolation),
            *(f"{distance:.1f}" for distance in distances),
            f"{100 * said.agreement:.0f} %",
            "" if said.target_first is None else f"{100 * said.target_first:.0f} %",
        )
    _out.print(
        "Places a term from the global ranking: at the start, half-way, the most since then, at the end; nodes that show "
        "first what is globally first, and what is attacked."
    )
    _out.print(table)
    _out.print(
        f"{wall_s:,.1f} s" + (f" · {folder / 'report.html'}" if folder is not None else ""), highlight=False
    )


# --- a sweep --------------------------------------------------------------------------------------------
def sweep(
    scenario: Annotated[str, typer.Argument(help="A built-in scenario, or a TOML file.")] = "baseline",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An axis as rule=mean,corrected, or one value for all; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each grid point.")] = 1,
    seed: Annotated[int, typer.Option(help="The first of the seeds.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the cells, the table and the plot go; ./covey-runs/sweep-SCENARIO."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Runs at once; 0 means one a core.")] = 0,
    ray: Ray = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a grid over a scenario. Started again with the same --out, it goes on where it stopped."""
    from functools import partial

    from sim import scenario_files
    from sim.report import write_sweep_report
    from sim.sweep import Cell, LocalProcesses, RunCells, Step, Sweep, format_table, parse_settings, run_sweep

    fixed, axes = parse_settings(settings or [])
    folder = out or RUNS_FOLDER / f"sweep-{Path(scenario).stem}"
    plan = Sweep(scenario, folder, axes, fixed, seeds, seed)

    def resolve(cell: Cell) -> str:
        chosen, base = scenario_files.load(cell.scenario, [*cell.settings, f"seed={cell.seed}"])
        scenario_files.validate(chosen, base)
        scenario_files.validate_rule(chosen)
        return scenario_files.to_toml(chosen)

    def tell(step: Step) -> None:
        if not quiet and not as_json:
            _err.print(
                f"{step.num_done}/{step.num_cells} {step.how}: {step.cell.folder.name}", highlight=False
            )

    run_cells: RunCells
    if ray is None:
        run_cells = LocalProcesses(jobs or os.cpu_count() or 1)
    else:
        from sim.sweep_ray import run_cells_on_ray

        run_cells = partial(run_cells_on_ray, address=None if ray == "local" else ray)
    with _sigterm_as_interrupt():
        table = run_sweep(plan, resolve, run_cells, tell)
    problem = ""
    try:
        write_sweep_report(table, folder / "report.html")
    except ConfigError as error:
        problem = str(error)
    if as_json:
        typer.echo(json.dumps({**msgspec.to_builtins(table), "folder": str(folder)}))
    elif not quiet:
        typer.echo(format_table(table))
        typer.echo(f"\n{problem or folder / 'report.html'}\n{folder / 'table.csv'}")
    for failure in table.failed:
        typer.echo(f"\n{failure.cell}\n{failure.why}", err=True)
    if table.failed:
        raise typer.Exit(EXIT_FAILED)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A sweep's cells are processes of their own, and must not stay behind when it is ended."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- having it again ------------------------------------------------------------------------------------
def replay(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a results folder's scenario again and compare the trace hashes. Exits with 1 where they differ."""
    from sim.replay import replay as run_again

    with _progress(quiet or as_json, _status_since(time.perf_counter())) as progress:
        found = run_again(_read(folder), progress)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(found)))
    elif found.same:
        typer.echo(f"the same: {found.events:,} events, trace {found.trace_hash}")
    else:
        typer.echo(
            f"not the same: {found.events:,} events, trace {found.trace_hash}, not {found.expected}; "
            f"they part after event {found.parted_after:,}"
        )
    if not found.same:
        raise typer.Exit(EXIT_FAILED)


def diff(
    a: Annotated[Path, typer.Argument(help="A results folder.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Name the first event in which two runs part. Exits with 1 where they do."""
    from sim.replay import diff as compare

    with _progress(quiet or as_json, _status_since(time.perf_counter())) as progress:
        found = compare(_read(a), _read(b), progress)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(found)))
    elif found is None:
        typer.echo("the same trace")
    else:
        for line in found.settings:
            typer.echo(f"setting  {line}")
        for event in found.before:
            typer.echo(f"both  {_event_line(event)}")
        typer.echo(f"a     {_event_line(found.a) if found.a else 'has ended'}")
        typer.echo(f"b     {_event_line(found.b) if found.b else 'has ended'}")
    if found is not None:
        raise typer.Exit(EXIT_FAILED)


def _event_line(event: Any) -> str:
    fields = {name: value for name, value in event.event.items() if name != "type"}
    what = json.dumps(fields, separators=(", ", "="), default=str)
    return f"#{event.number:,} at {event.at_s:.6f} s, node {event.node}: {event.event.get('type', '')} {what}"


def _read(folder: Path) -> "Run":
    from sim.results import read_run

    return read_run(folder)
