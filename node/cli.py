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
from node.config import CONFIG_FILE, Config, load_config, to_toml, toml_value
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
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
_HOME = Path("~/.covey").expanduser()

out = Console()
err = Console(stderr=True)


@app.command()
def init(
    home: Home = _HOME,
    task: Annotated[str, typer.Option(help="A built-in task, or `my_task.py:make_task`.")] = "digits",
    network: Annotated[str, typer.Option(help="The network's name; others refuse to link.")] = "covey",
    bootstrap: Annotated[list[str] | None, typer.Option(help="A peer to ask first; may be repeated.")] = None,
    listen: Annotated[str, typer.Option(help="Where to listen.")] = "/ip4/0.0.0.0/tcp/4001",
    protocol: Annotated[
        str, typer.Option(help="`gossip`, or `none` for a bootstrap that only introduces.")
    ] = "gossip",
    as_json: Json = False,
) -> None:
    """Make a home: a key that is this node's identity, and a config to edit."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalError(f"{home} cannot be made: {error.strerror}") from error
    if (home / CONFIG_FILE).exists():
        raise LocalError(f"{home / CONFIG_FILE} exists already; edit it, or choose another --home")
    text = _template(task, network, bootstrap or [], listen, protocol)
    from node.config import parse_config

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
def run(home: Home = _HOME) -> None:
    """Run the node in the foreground. Ctrl-C or SIGTERM stops it; nothing is lost."""
    config = load_config(home)
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
        ("round", f"{data['round']} ({data['phase']}), merged {data['merged']} models last"),
        *(("merge", f"{name}: {_figure(value)}") for name, value in data["report"].items()),
        ("model", metrics or "not evaluated yet"),
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


def _check_rule(config: Config) -> None:
    if not config.learns:
        return
    from node.merging import build_rules, rule_error

    learning = config.learning
    try:
        build_rules(learning.rule, None if learning.final_merge == "none" else learning.final_rule)
    except ValueError as error:
        raise rule_error(error) from error


def _template(task: str, network: str, bootstrap: list[str], listen: str, protocol: str) -> str:
    return f"""\
# The settings of one covey node. What is left out has its default: `covey config show` lists all.
# Any of them can be set from the environment: COVEY_NETWORK__TARGET_DEGREE=4 sets network.target_degree.

[network]
name = {toml_value(network)}            # nodes of another network refuse each other
listen = [{toml_value(listen)}]
bootstrap = {toml_value(bootstrap)}     # peers to ask first: "/ip4/…/tcp/…/p2p/<peer id>"

[learning]
protocol = {toml_value(protocol)}       # "none": only help others find each other
rule = ["mean", "variance.corrected"]   # how received models are merged, in order
rounds = 0                              # 0: for ever

[task]
name = {toml_value(task)}               # a built-in, or "my_task.py:make_task" beside this file

[training]
local_steps = 10                        # mini-batches between two exchanges
batch_size = 16
learning_rate = 0.1
"""


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data))


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
