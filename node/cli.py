"""The `covey` command. Exit codes: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted."""

import json
import os
import shutil
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from node import api
from node.config import CONFIG_FILE, Config, Setting, load_config, parse_setting, to_toml, toml_value
from node.identity import KEY_FILE, create_key, load_key, peer_id_of
from protocols.errors import ConfigError, CoveyError, LocalError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A peer-to-peer learning node: trains on its own data, exchanges what it learned, merges what it receives.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted.",
)
config_app = typer.Typer(no_args_is_help=True, help="Check or show the node's config.")
app.add_typer(config_app, name="config")

Home = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar="COVEY_HOME",
        help="The node's folder: config, key, checkpoints.",
        show_default="~/.covey",
    ),
]
Protocol = Annotated[
    str | None,
    typer.Option(
        help="How to learn: `gossip` exchanges models, `scalars` one byte a gradient estimate, `none` only introduces.",
        show_default="gossip, or what the config says",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="An option of the task, as <name>=<value>; may be repeated."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the config, as <table>.<name>=<value>; may be repeated."),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="A built-in task, or `my_task.py:make_task`.",
        show_default="digits, or what the config says",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
_HOME = Path("~/.covey").expanduser()

out = Console()
err = Console(stderr=True)


@app.command()
def init(
    home: Home = _HOME,
    task: TaskName = None,
    network: Annotated[str, typer.Option(help="The network's name; others refuse to link.")] = "covey",
    bootstrap: Annotated[list[str] | None, typer.Option(help="A peer to ask first; may be repeated.")] = None,
    listen: Annotated[str, typer.Option(help="Where to listen.")] = "/ip4/0.0.0.0/tcp/4001",
    protocol: Protocol = None,
    option: Options = None,
    set_: Settings = None,
    as_json: Json = False,
) -> None:
    """Make a home: a key that is this node's identity, and a config to edit."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalError(f"{home} cannot be made: {error.strerror}") from error
    if (home / CONFIG_FILE).exists():
        raise LocalError(f"{home / CONFIG_FILE} exists already; edit it, or choose another --home")
    from node.config import parse_config
    from node.first_config import first_config

    told = _settings(task, protocol, option, set_)
    addresses = {"name": network, "listen": [listen], "bootstrap": bootstrap or []}
    own = [Setting(("network", name), value) for name, value in addresses.items()]
    chosen = next((each.value for each in reversed(told) if each.path == ("learning", "protocol")), "gossip")
    text = first_config(chosen, [*own, *told])
    parse_config(text, {})
    key = load_key(home / KEY_FILE) if (home / KEY_FILE).exists() else create_key(home / KEY_FILE)
    (home / CONFIG_FILE).write_text(text, encoding="utf-8")
    peer = peer_id_of(key)
    if as_json:
        _print_json({"home": str(home), "peer": peer, "config": str(home / CONFIG_FILE)})
        return
    out.print(f"Home    {home}\nPeer    {peer}\nConfig  {home / CONFIG_FILE}\n", highlight=False)
    out.print(f"Start it with: covey run --home {home}", highlight=False)
    out.print(
        f"Others join with: --bootstrap /ip4/<your address>/tcp/<port>/p2p/{peer}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def run(
    home: Home = _HOME,
    task: TaskName = None,
    protocol: Protocol = None,
    option: Options = None,
    set_: Settings = None,
) -> None:
    """Run the node in the foreground. Ctrl-C or SIGTERM stops it; nothing is lost.

    What is given here is for this run alone, and goes on top of the config and the environment.
    """
    config = load_config(home, os.environ, _settings(task, protocol, option, set_))
    _check_rule(config)
    from node.telemetry import configure_logging

    configure_logging(config.log.level, config.log.json)
    import asyncio

    from node.daemon import Daemon

    daemon = Daemon(config, home)
    code = 0
    try:
        asyncio.run(daemon.run())
    except (CoveyError, OSError) as error:
        code = _report(error)
    if daemon.working:
        # Python would unwind the training thread through torch's C++ and abort. All is flushed: leave at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise typer.Exit(code)


@app.command()
def status(home: Home = _HOME, as_json: Json = False) -> None:
    """What the running node is doing."""
    data = api.call(home, "/status")
    if as_json:
        _print_json(data)
        return
    metrics = "  ".join(
        f"{name} not finite" if value is None else f"{name} {value:.4f}"
        for name, value in data["metrics"].items()
    )
    rows = [
        ("peer", data["peer"]),
        ("address", " ".join(data["addresses"])),
        ("network", data["network"]),
        ("task", f"{data['task']} ({data['learning']})"),
        ("round", f"{data['round']} ({data['phase']}), merged {data['merged']} {_merged(data)} last"),
        *(("merge", f"{name}: {_figure(value)}") for name, value in data["report"].items()),
        ("model", metrics or "not evaluated yet"),
        *([("log", _log_line(data["log"]))] if "log" in data else []),
        ("links", str(data["live_peers"])),
        ("traffic", f"{_bytes(data['bytes_sent'])} sent, {_bytes(data['bytes_received'])} received"),
        ("refused", ", ".join(f"{n} {reason}" for reason, n in sorted(data["refused"].items())) or "nothing"),
        ("up", f"{data['uptime_s']:.0f} s, process {data['pid']}"),
    ]
    for name, value in rows:
        # Not a table: it would cut what people copy from here.
        out.print(f"[bold]{name:8}[/bold] {escape(value)}", highlight=False, soft_wrap=True)


@app.command()
def peers(home: Home = _HOME, as_json: Json = False) -> None:
    """Whom the running node knows, and why a link failed."""
    rows = api.call(home, "/peers")
    if as_json:
        _print_json(rows)
        return
    if not rows:
        out.print("no peer known yet")
    for row in sorted(rows, key=lambda row: (row["state"] != "live", row["peer"])):
        state = row["state"] + (", bootstrap" if row["bootstrap"] else "")
        failed = f", {row['failures']} failures" if row["failures"] else ""
        reason = f", last: {escape(row['last_reason'])}" if row["last_reason"] else ""
        where = " ".join(map(escape, row["addresses"]))
        out.print(
            f"[bold]{escape(row['peer'])}[/bold] {state}, round {row['round']}{failed}{reason}\n    {where}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def log(home: Home = _HOME, as_json: Json = False) -> None:
    """The log of a node that learns by scalars: records, authors, gaps, checkpoints. It may run or not."""
    data = _log_of(home)
    if as_json:
        _print_json(data)
        return
    disk = data["on_disk"]
    where = f", from after round {disk['cut']}; what was before is gone" if disk["cut"] else ""
    held = f"{data['records']} in memory, " if data["running"] else ""
    rows = [
        ("round", f"{data['round']}" + ("" if data["running"] else " (not running)")),
        ("digest", data["log"]),
        ("records", f"{held}{disk['records']} on the disk{where}"),
        *([("void", f"{data['void']}: their authors contradicted themselves")] if data["void"] else []),
        ("sealed", _checkpoint_line(data["sealed"]) or "nothing yet"),
        *([("proposed", line)] if (line := _checkpoint_line(data["proposed"])) else []),
        ("missing", ", ".join(_rounds(*each) for each in data["missing"]) or "no round"),
        *(("author", f"{peer} up to round {last}") for peer, last in data["authors"].items()),
    ]
    for name, value in rows:
        out.print(f"[bold]{name:9}[/bold] {escape(value)}", highlight=False, soft_wrap=True)


def _log_of(home: Path) -> dict[str, Any]:
    if (home / api.API_FILE).exists():
        try:
            running: dict[str, Any] = api.call(home, "/log")
        except LocalError as error:
            if "does not answer" not in str(error):
                raise
        else:
            return running
    from node.replica import describe_stopped

    return describe_stopped(home)


def _checkpoint_line(data: dict[str, Any] | None) -> str:
    return f"round {data['round']}, {data['records']} records, state {data['digest']}" if data else ""


def _rounds(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


@app.command()
def verify(
    home: Home = _HOME,
    task: TaskName = None,
    protocol: Protocol = None,
    option: Options = None,
    set_: Settings = None,
    as_json: Json = False,
) -> None:
    """Replay the log of scalars from the base model, and compare with every checkpoint. Fails where one differs.

    The node may run meanwhile. What `covey run` was given on its command line has to be given here too.
    """
    config = load_config(home, os.environ, _settings(task, protocol, option, set_))
    if config.learning.protocol != "scalars":
        raise ConfigError("learning.protocol", f"'{config.learning.protocol}' keeps no log", ["scalars"])
    from node.replica import verify_log

    with err.status("checking the base model") as line:
        found = verify_log(config, home, lambda done, of: line.update(f"{done} of {of} records replayed"))
    if as_json:
        _print_json(msgspec.to_builtins(found))
    else:
        start = "the base model"
        if found.started_at:
            start = f"the checkpoint of round {found.started_at}, since the log before it was cut"
        what = f"{found.num_records} records checked, replayed from {start} up to round {found.round}"
        out.print(f"{what}; {found.num_checkpoints} checkpoints compared", highlight=False, soft_wrap=True)
        out.print(f"log     {found.log}\nstate   {found.state}", highlight=False, soft_wrap=True)
    if not found.ok:
        err.print(f"[red]covey:[/red] {escape(found.problem)}", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_FAILED)


@app.command()
def stop(home: Home = _HOME) -> None:
    """Stop the running node."""
    api.call(home, "/stop", method="POST")
    out.print("stopping")


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="The file to write, in safetensors format.")],
    home: Home = _HOME,
    as_json: Json = False,
) -> None:
    """Write the newest whole checkpoint to a file. Works while the node runs, and when it does not."""
    from node.store import newest_checkpoints, verify_checkpoint

    for path in newest_checkpoints(home):
        try:
            ref, _ = verify_checkpoint(path)
        except (CoveyError, OSError) as error:
            err.print(
                f"[yellow]{path.name} is damaged ({escape(str(error))}); trying the one before[/yellow]"
            )
            continue
        draft = target.with_name(target.name + ".draft")
        try:
            shutil.copyfile(path, draft)
            draft.replace(target)
        except OSError as error:
            raise LocalError(f"{target} cannot be written: {error.strerror}") from error
        data = {
            "path": str(target),
            "round": ref.round,
            "size_bytes": ref.size_bytes,
            "digest": ref.digest.hex(),
        }
        if as_json:
            _print_json(data)
        else:
            out.print(f"{target}: model after round {ref.round}, {_bytes(ref.size_bytes)}", highlight=False)
        return
    raise LocalError(f"no whole checkpoint in {home}; has the node finished a round?")


@config_app.command("check")
def config_check(home: Home = _HOME, as_json: Json = False) -> None:
    """Check the config, the environment's overrides and the merge rule."""
    config = load_config(home)
    _check_rule(config)
    _print_json({"ok": True}) if as_json else out.print(f"{home / CONFIG_FILE} is fine")


@config_app.command("show")
def config_show(home: Home = _HOME, as_json: Json = False) -> None:
    """Show every setting in force, defaults and environment included."""
    config = load_config(home)
    if as_json:
        _print_json(msgspec.to_builtins(config))
    else:
        typer.echo(to_toml(config))


@app.command()
def rules(
    name: Annotated[str | None, typer.Argument(help="One rule, in full.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the merge rules for `rule = [...]` in the config, or say all of one: its arguments and its source."""
    from aggregation.rules import RULES
    from node.rule_docs import describe

    if name is not None and name not in RULES:
        raise ConfigError("rule", f"no rule is called '{name}'", RULES)
    if as_json:
        _print_json(describe(name) if name else [describe(each) for each in RULES])
    elif name:
        _print_rule(describe(name))
    else:
        width = max(map(len, RULES))
        for each, entry in RULES.items():
            out.print(
                f"[bold]{each:{width}}[/bold]  {escape(entry.summary)}", highlight=False, soft_wrap=True
            )


def _print_rule(data: dict[str, Any]) -> None:
    rows = [
        ("what", data["summary"]),
        ("when", data["when"]),
        ("leaves", data["leaves"]),
        ("needs", ", ".join(data["needs"]) or "nothing but the models"),
        ("common start", data["common_start"]),
        ("costs", f"time {data['time']}; memory {data['memory']}"),
        ("source", data["source"]),
        ("in the config", _spec(data)),
    ]
    for label, text in rows:
        out.print(f"[bold]{label:13}[/bold]  {escape(text)}", highlight=False, soft_wrap=True)
    typer.echo("\n" + data["text"])


def _spec(data: dict[str, Any]) -> str:
    arguments = {key: value for key, value in data["arguments"].items() if value is not None}
    return "rule = [..., " + toml_value({"name": data["name"], **arguments}) + ", ...]"


@app.command()
def doctor(home: Home = _HOME, as_json: Json = False) -> None:
    """Go through the steps of joining; say which one fails and what to do."""
    from node.doctor import examine

    findings = examine(home)
    if as_json:
        _print_json([msgspec.to_builtins(finding) for finding in findings])
    else:
        marks = {"ok": "[green]ok  [/green]", "failed": "[red]FAIL[/red]", "skipped": "[dim]skip[/dim]"}
        for finding in findings:
            out.print(
                f"{marks[finding.outcome]} {finding.step}: {escape(finding.detail)}",
                highlight=False,
                soft_wrap=True,
            )
            if finding.remedy:
                out.print(f"     do: {escape(finding.remedy)}", highlight=False, soft_wrap=True)
    if any(finding.outcome == "failed" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def demo(
    nodes: Annotated[int, typer.Option(min=2, max=16, help="Daemons to start.")] = 4,
    rounds: Annotated[int, typer.Option(min=10, max=10_000, help="Rounds of each.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the way the data is shared out.")] = 2,
    keep: Annotated[Path | None, typer.Option(help="Keep the nodes' homes in this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Start real daemons on this machine, let them learn together, kill one and see it come back."""
    from node.demo import print_summary, run_demo

    result = run_demo(nodes, rounds, seed, keep, err)
    if as_json:
        _print_json(result)
    else:
        print_summary(result, out)


def _version(show: bool) -> None:
    if show:
        typer.echo(version("covey"))
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _settings(
    task: str | None, protocol: str | None, options: list[str] | None, settings: list[str] | None
) -> list[Setting]:
    """What the command line sets; `--task` comes first, since options belong to it."""
    found = [Setting(("task", "name"), task)] if task is not None else []
    if protocol is not None:
        found.append(Setting(("learning", "protocol"), protocol))
    found += [parse_setting(text, "--option", ("task", "options")) for text in options or ()]
    return found + [parse_setting(text) for text in settings or ()]


def _check_rule(config: Config) -> None:
    if config.learning.protocol != "gossip":
        return
    from node.merging import build_rules, rule_error

    learning = config.learning
    try:
        build_rules(learning.rule, None if learning.final_merge == "none" else learning.final_rule)
    except ValueError as error:
        raise rule_error(error) from error


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data))


def _merged(data: dict[str, Any]) -> str:
    return "authors' scalars" if data["learning"] == "scalars" else "models"


def _log_line(log: dict[str, Any]) -> str:
    sealed = f"sealed up to round {log['sealed']['round']}" if log["sealed"] else "nothing sealed yet"
    return f"{log['on_disk']['records']} records, {sealed}, digest {log['log'][:16]}"


def _figure(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _add_plugins() -> None:
    """Commands of the packages above this one, by entry point: `sim` is one."""
    for entry in entry_points(group="covey.commands"):
        entry.load()(app)


def _report(error: CoveyError | OSError) -> int:
    """Say what is wrong; the exit code."""
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or 'input or output'}: {error.strerror or error}; who owns it, and is the disk full?"
    err.print(f"[red]covey:[/red] {escape(text)}", highlight=False, soft_wrap=True)
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED


def main() -> None:
    """The command's entry point."""
    _add_plugins()
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CoveyError, OSError) as error:
        sys.exit(_report(error))
