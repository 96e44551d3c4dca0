"""What the commands share: their options, exit codes and consoles, and running a node in the foreground."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from node.config import Config, Setting, parse_setting
from protocols.errors import ConfigError, CoveyError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

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
        help="How to learn: `gossip` exchanges models with neighbours, `sampled` those of a few nodes drawn anew in each round, `scalars` one byte a gradient estimate, `none` learns nothing: it introduces others, and shares files.",
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
DEFAULT_HOME = Path("~/.covey").expanduser()

out = Console()
err = Console(stderr=True)


def settings_of(
    task: str | None, protocol: str | None, options: list[str] | None, settings: list[str] | None
) -> list[Setting]:
    """What the command line sets; `--task` comes first, since options belong to it."""
    found = [Setting(("task", "name"), task)] if task is not None else []
    if protocol is not None:
        found.append(Setting(("learning", "protocol"), protocol))
    found += [parse_setting(text, "--option", ("task", "options")) for text in options or ()]
    return found + [parse_setting(text) for text in settings or ()]


def check_rule(config: Config) -> None:
    """Raises ConfigError where the merge rule cannot be built."""
    if config.learning.protocol not in ("gossip", "sampled"):
        return
    from node.merging import build_rules, rule_error

    learning = config.learning
    try:
        build_rules(config.rule, None if learning.final_merge == "none" else learning.final_rule)
    except ValueError as error:
        raise rule_error(error) from error


def print_json(data: Any) -> None:
    """One value, one line."""
    typer.echo(json.dumps(data))


def plain(text: str) -> str:
    """Text of strangers for the terminal: what is not printed, or turns the direction of writing, is spelt out."""
    return "".join(char if char.isprintable() or char == "\t" else f"<U+{ord(char):04X}>" for char in text)


def size_text(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def report(error: CoveyError | OSError) -> int:
    """Say what is wrong; the exit code."""
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or 'input or output'}: {error.strerror or error}; who owns it, and is the disk full?"
    err.print(f"[red]covey:[/red] {escape(plain(text))}", highlight=False, soft_wrap=True)
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED


def run_node(config: Config, home: Path) -> None:
    """Run the daemon until it is stopped; `typer.Exit` with its exit code where it failed."""
    check_rule(config)
    from node.telemetry import configure_logging

    configure_logging(config.log.level, config.log.json)
    import asyncio

    from node.daemon import Daemon

    daemon = Daemon(config, home)
    code = 0
    try:
        asyncio.run(daemon.run())
    except (CoveyError, OSError) as error:
        code = report(error)
    if daemon.working:
        # Python would unwind the training thread through torch's C++ and abort. All is flushed: leave at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise typer.Exit(code)
