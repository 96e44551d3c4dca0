"""The `covey` command. Exit codes: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted."""

import os
import shutil
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape

from node import api, content_cli, network_cli
from node.cli_common import (
    DEFAULT_HOME,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Home,
    Json,
    Options,
    Protocol,
    Settings,
    TaskName,
    check_rule,
    err,
    out,
    print_json,
    report,
    run_node,
    settings_of,
    size_text,
)
from node.config import CONFIG_FILE, Setting, load_config, shown, shown_as_toml, toml_value
from node.identity import KEY_FILE, create_key, load_key, peer_id_of
from protocols.errors import ConfigError, CoveyError, LocalError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A peer-to-peer learning node: trains on its own data, exchanges what it learned, merges what it receives.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted.",
)
config_app = typer.Typer(no_args_is_help=True, help="Check or show the node's config.")
app.add_typer(config_app, name="config")


@app.command()
def init(
    home: Home = DEFAULT_HOME,
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

    told = settings_of(task, protocol, option, set_)
    addresses = {"name": network, "listen": [listen], "bootstrap": bootstrap or []}
    own = [Setting(("network", name), value) for name, value in addresses.items()]
    chosen = next((each.value for each in reversed(told) if each.path == ("learning", "protocol")), "gossip")
    text = first_config(chosen, [*own, *told])
    parse_config(text, {})
    key = load_key(home / KEY_FILE) if (home / KEY_FILE).exists() else create_key(home / KEY_FILE)
    (home / CONFIG_FILE).write_text(text, encoding="utf-8")
    peer = peer_id_of(key)
    if as_json:
        print_json({"home": str(home), "peer": peer, "config": str(home / CONFIG_FILE)})
        return
    out.print(
        f"Home    {home}\nPeer    {peer}\nConfig  {home / CONFIG_FILE}\n", highlight=False, soft_wrap=True
    )
    out.print(f"Start it with: covey run --home {home}", highlight=False, soft_wrap=True)
    out.print(
        f"Others join with: --bootstrap /ip4/<your address>/tcp/<port>/p2p/{peer}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def run(
    home: Home = DEFAULT_HOME,
    task: TaskName = None,
    protocol: Protocol = None,
    option: Options = None,
    set_: Settings = None,
) -> None:
    """Run the node in the foreground. Ctrl-C or SIGTERM stops it; nothing is lost.

    What is given here is for this run alone, and goes on top of the config and the environment.
    """
    run_node(load_config(home, os.environ, settings_of(task, protocol, option, set_)), home)


@app.command()
def status(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """What the running node is doing."""
    data = api.call(home, "/status")
    if as_json:
        print_json(data)
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
        *([("content", _content_line(data["content"]))] if "content" in data else []),
        ("links", str(data["live_peers"])),
        *([("waiting", data["waiting"])] if data["waiting"] else []),
        ("traffic", f"{_traffic(data)}, {size_text(data['month_bytes'])} this month"),
        ("refused", ", ".join(f"{n} {reason}" for reason, n in sorted(data["refused"].items())) or "nothing"),
        ("up", f"{data['uptime_s']:.0f} s, process {data['pid']}"),
    ]
    for name, value in rows:
        # Not a table: it would cut what people copy from here.
        out.print(f"[bold]{name:8}[/bold] {escape(value)}", highlight=False, soft_wrap=True)


@app.command()
def peers(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Whom the running node knows: state, round, latency, bytes on its link, and why the last one failed."""
    rows = api.call(home, "/peers")
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print("no peer known yet")
    for row in sorted(rows, key=lambda row: (row["state"] != "live", row["peer"])):
        state = row["state"] + (", bootstrap" if row["bootstrap"] else "")
        latency = "" if row["latency_ms"] is None else f", {row['latency_ms']:.1f} ms"
        moved = f", {_traffic(row)}" if row["bytes_sent"] or row["bytes_received"] else ""
        failed = f", {row['failures']} failures" if row["failures"] else ""
        reason = f", last: {escape(row['last_reason'])}" if row["last_reason"] else ""
        where = " ".join(map(escape, row["addresses"]))
        out.print(
            f"[bold]{escape(row['peer'])}[/bold] {state}, round {row['round']}{latency}{moved}{failed}{reason}\n    {where}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def log(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """The log of a node that learns by scalars: records, authors, gaps, checkpoints. It may run or not."""
    data = _log_of(home)
    if as_json:
        print_json(data)
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
    home: Home = DEFAULT_HOME,
    task: TaskName = None,
    protocol: Protocol = None,
    option: Options = None,
    set_: Settings = None,
    as_json: Json = False,
) -> None:
    """Replay the log of scalars from the base model, and compare with every checkpoint. Fails where one differs.

    The node may run meanwhile. What `covey run` was given on its command line has to be given here too.
    """
    config = load_config(home, os.environ, settings_of(task, protocol, option, set_))
    if config.learning.protocol != "scalars":
        raise ConfigError("learning.protocol", f"'{config.learning.protocol}' keeps no log", ["scalars"])
    from node.replica import verify_log

    with err.status("checking the base model") as line:
        found = verify_log(config, home, lambda done, of: line.update(f"{done} of {of} records replayed"))
    if as_json:
        print_json(msgspec.to_builtins(found))
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
def stop(home: Home = DEFAULT_HOME) -> None:
    """Stop the running node."""
    api.call(home, "/stop", method="POST")
    out.print("stopping")


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="The file to write, in safetensors format.")],
    home: Home = DEFAULT_HOME,
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
            print_json(data)
        else:
            out.print(
                f"{target}: model after round {ref.round}, {size_text(ref.size_bytes)}",
                highlight=False,
                soft_wrap=True,
            )
        return
    raise LocalError(f"no whole checkpoint in {home}; has the node finished a round?")


@config_app.command("check")
def config_check(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Check the config, the environment's overrides and the merge rule."""
    config = load_config(home)
    check_rule(config)
    print_json({"ok": True}) if as_json else out.print(f"{home / CONFIG_FILE} is fine", soft_wrap=True)


@config_app.command("show")
def config_show(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Show every setting in force, defaults and environment included."""
    config = load_config(home)
    if as_json:
        print_json(shown(config))
    else:
        typer.echo(shown_as_toml(config))


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
        print_json(describe(name) if name else [describe(each) for each in RULES])
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
def doctor(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Go through the steps of joining; say which one fails and what to do."""
    from node.doctor import examine

    findings = examine(home)
    if as_json:
        print_json([msgspec.to_builtins(finding) for finding in findings])
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
        print_json(result)
    else:
        print_summary(result, out)


network_cli.register(app)
content_cli.register(app)


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


def _merged(data: dict[str, Any]) -> str:
    return "authors' scalars" if data["learning"] == "scalars" else "models"


def _log_line(log: dict[str, Any]) -> str:
    sealed = f"sealed up to round {log['sealed']['round']}" if log["sealed"] else "nothing sealed yet"
    return f"{log['on_disk']['records']} records, {sealed}, digest {log['log'][:16]}"


def _content_line(content: dict[str, int]) -> str:
    return f"{content['shared']} shared, {content['known']} known, {content['clicks']} clicks heard"


def _traffic(data: dict[str, Any]) -> str:
    return f"{size_text(data['bytes_sent'])} sent, {size_text(data['bytes_received'])} received"


def _figure(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _add_plugins() -> None:
    """Commands of the packages above this one, by entry point: `sim` is one."""
    for entry in entry_points(group="covey.commands"):
        entry.load()(app)


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
        sys.exit(report(error))
