"""Scenarios on disk: found by name or path, inherited, overridden, checked, and written again.

Belongs here: from TOML to a `Scenario`, and everything that can be said against one before it runs. The fields are in
`scenarios.py`. Nothing here imports torch, except for `validate_rule`, which has to.
"""

import difflib
import math
import random
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from protocols.errors import ConfigError
from protocols.view import NO_LEARNING
from sim import field_docs
from sim.churn import check_churn, read_trace
from sim.latency import read_matrix
from sim.nat import Nat
from sim.scenarios import Scenario, rule_specs
from sim.timeline import parse_line
from sim.topology import check_topology, read_edges

Tables = dict[str, Any]
"""A scenario as TOML tables, not yet checked."""

BUILTIN = files("sim") / "builtin"
OWNED = {
    "view.bootstrap": "topology.kind",
    "view.static": "topology.kind",
    "view.target_degree": "topology.degree",
    "view.max_degree": "topology.degree",
    "gossip.evaluate_every": "evaluation.every",
    "sampled.evaluate_every": "evaluation.every",
    "scalars.evaluate_every": "evaluation.every",
}
"""Fields of a daemon that a scenario sets by another one."""
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_DIAL_LATENCIES = 8


# --- finding --------------------------------------------------------------------------------------------
def names() -> list[tuple[str, str]]:
    """The built-in scenarios and what each shows, by name."""
    return [(name, _tables(name, "scenario")[0].get("summary", "")) for name in _builtin_names()]


def show(name: str) -> str:
    """The text of a built-in scenario.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in _builtin_names():
        raise ConfigError(
            "scenario", f"there is no built-in scenario '{name}'", _likely(name, _builtin_names())
        )
    return (BUILTIN / f"{name}.toml").read_text(encoding="utf-8")


def load(source: str | Path, overrides: Sequence[str] = ()) -> tuple[Scenario, Path]:
    """A scenario and the folder that its relative paths start from. `validate` is not called.

    source: a built-in's name, or the path of a TOML file.
    overrides: `links.loss=0.1`, on top of the file, in order. The value is TOML, or else plain text; an empty one takes
        the field's default back; a table is merged into what there is.

    A file that says `extends = "baseline"`, or the path of another file from its own folder, changes what that one says:
    tables are merged, everything else is replaced. Name and summary are not inherited, and paths start at the folder of
    the file that was asked for.

    Raises:
        ConfigError: no such file, no TOML, inheritance in a circle, an unknown field, a wrong type or value.
    """
    tables, base = _tables(source, "scenario")
    for text in overrides:
        _override(tables, text)
    return convert(tables), base


def convert(tables: Tables) -> Scenario:
    """Tables to a scenario.

    Raises:
        ConfigError: at the field's path, with what is allowed there.
    """
    try:
        # What a table leaves out is as in a scenario without that table, not as in the struct by itself.
        scenario = msgspec.convert(_merged(msgspec.to_builtins(Scenario()), tables), Scenario)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error
    for path, value in _numbers(scenario):
        if not math.isfinite(value):
            raise ConfigError(
                path, f"{value} is no number to reckon with", field_docs.allowed_at(Scenario, path)
            )
    return scenario


def describe_fields() -> str:
    """The tables of `docs/scenarios.md`, made from the structs."""
    return field_docs.page(field_docs.describe(Scenario, Scenario()), OWNED)


def to_toml(scenario: Scenario) -> str:
    """The whole scenario, defaults included; it loads back to an equal one."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(scenario)), multiline_strings=False)


# --- checking -------------------------------------------------------------------------------------------
def validate(scenario: Scenario, base: Path) -> None:
    """Everything that can be known before the run, but for the task and its data, and the rule (`validate_rule`).

    base: the folder that relative paths start from. The files that the scenario names are read.

    Raises:
        ConfigError: the first mistake found, by its field's path.
    """
    check_topology(scenario.topology, scenario.nodes)
    if scenario.topology.kind == "file":
        read_edges(scenario.topology.path, scenario.nodes, base)
    check_churn(scenario.churn, scenario.nodes)
    if scenario.churn.model == "trace":
        read_trace(scenario.churn.trace_path, scenario.nodes, base)
    _check_timeline(scenario)
    _check_data(scenario, base)
    _check_owned(scenario)
    _check_devices(scenario)
    _check_pace(scenario)
    _check_links(scenario, base)
    Nat(scenario.nat, (), random.Random(0), base)
    if not _DEVICE.fullmatch(scenario.compute.device):
        raise ConfigError(
            "compute.device", f"'{scenario.compute.device}' is no device", ["auto", "cpu", "cuda", "cuda:0"]
        )


def validate_rule(scenario: Scenario) -> None:
    """Whether the merge rules exist and fit together. Imports torch.

    Raises:
        ConfigError: at `rule` or `final_rule`.
    """
    from aggregation.rules import build

    for path, rule in (("rule", scenario.rule), ("final_rule", scenario.final_rule)):
        try:
            build(rule_specs(rule))
        except ValueError as error:
            raise ConfigError(path, str(error)) from error


def _check_timeline(scenario: Scenario) -> None:
    for index, line in enumerate(scenario.timeline):
        event = parse_line(f"timeline[{index}]", line, scenario.nodes)
        if event.at_s > scenario.at_most_s:
            raise ConfigError(
                f"timeline[{index}]",
                f"at {event.at_s:g} s the run is over",
                [f"up to at_most_s, {scenario.at_most_s:g} s"],
            )


def _check_data(scenario: Scenario, base: Path) -> None:
    data = scenario.data
    if data.samples_per_node is not None and data.partitioner != "iid":
        raise ConfigError(
            "data.samples_per_node",
            f"means nothing with partitioner '{data.partitioner}'",
            ["partitioner = 'iid'"],
        )
    file, colon, _ = data.task.rpartition(":")
    if colon and not scenario.dry_run and not (base / file).is_file():
        raise ConfigError(
            "data.task", f"there is no file {base / file}", ["a built-in task", "my_task.py:make_task"]
        )


def _check_owned(scenario: Scenario) -> None:
    defaults = Scenario()
    for path, owner in OWNED.items():
        value, default = (attrgetter(path)(each) for each in (scenario, defaults))
        if value != default:
            raise ConfigError(path, f"is not set here; it follows from {owner}", [owner])


def _check_devices(scenario: Scenario) -> None:
    classes = scenario.devices.classes
    for index, device in enumerate(classes):
        if device.name in [other.name for other in classes[:index]]:
            raise ConfigError(f"devices.classes[{index}].name", f"'{device.name}' is there already")
    total = sum(device.share for device in classes)
    if classes and abs(total - 1) > 1e-6:
        raise ConfigError("devices.classes", f"the shares add up to {total:g}", ["1"])


def _check_pace(scenario: Scenario) -> None:
    """Rounds have to take time, or the clock would stand still."""
    devices, gossip, scalars = scenario.devices, scenario.gossip, scenario.scalars
    if scenario.learning == NO_LEARNING:
        return
    if scenario.learning == "scalars":
        if not (devices.estimate_s or devices.replay_s or scalars.pause_s):
            raise ConfigError(
                "devices.estimate_s", "a round would take no time", ["more than 0", "scalars.pause_s above 0"]
            )
        return
    if scenario.learning == "sampled":
        if not (devices.train_s or scenario.sampled.pause_s):
            raise ConfigError(
                "devices.train_s", "a round would take no time", ["more than 0", "sampled.pause_s above 0"]
            )
        return
    if not (devices.train_s or devices.aggregate_s or devices.evaluate_s or gossip.pause_s or gossip.quorum):
        raise ConfigError(
            "devices.train_s", "a round would take no time", ["more than 0", "gossip.pause_s above 0"]
        )


def _check_links(scenario: Scenario, base: Path) -> None:
    view = scenario.view
    if view.dead_after_s < 2 * view.heartbeat_s:
        raise ConfigError(
            "view.dead_after_s", "would take one lost heartbeat for a death", [">= 2 * heartbeat_s"]
        )
    links = scenario.links
    if links.latency == "matrix":
        if links.matrix_path is None:
            raise ConfigError("links.matrix_path", "must be given", ["the path of a CSV file"])
        read_matrix(base / links.matrix_path)
    elif links.matrix_path is not None:
        raise ConfigError(
            "links.matrix_path", f"means nothing with latency '{links.latency}'", ["latency = 'matrix'"]
        )
    elif links.dial_timeout_s <= _DIAL_LATENCIES * links.latency_s:
        raise ConfigError(
            "links.dial_timeout_s",
            f"is over before a dial at a latency of {links.latency_s:g} s can be",
            [f"more than {_DIAL_LATENCIES * links.latency_s:g}"],
        )


# --- reading --------------------------------------------------------------------------------------------
def _builtin_names() -> list[str]:
    return sorted(
        entry.name.removesuffix(".toml") for entry in BUILTIN.iterdir() if entry.name.endswith(".toml")
    )


def _tables(
    source: str | Path, field: str, folder: Path = Path(), below: tuple[str, ...] = ()
) -> tuple[Tables, Path]:
    """What a scenario and all it extends say together, and its folder.

    field: what to blame where there is no such scenario.
    folder: where a relative path starts.
    below: the scenarios that extend this one.
    """
    name, text, base = _read(source, field, folder)
    if name in below:
        raise ConfigError("extends", f"goes in a circle: {' -> '.join((*below, name))}")
    try:
        tables: Tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(name, f"is not TOML: {error}") from error
    tables.setdefault("name", Path(name).stem)
    parent = tables.pop("extends", None)
    if parent is None:
        return tables, base
    if not isinstance(parent, str):
        raise ConfigError(
            "extends", f"{parent!r} is no text", ["a built-in scenario", "the path of a .toml file"]
        )
    inherited, _ = _tables(parent, "extends", base, (*below, name))
    inherited.pop("summary", None)
    return _merged(inherited, tables), base


def _read(source: str | Path, field: str, folder: Path) -> tuple[str, str, Path]:
    """Name or path in full, text, folder for relative paths."""
    if isinstance(source, str) and source in _builtin_names():
        return source, show(source), Path.cwd()
    path = folder / source
    if path.suffix != ".toml" and not path.exists():
        allowed = _likely(str(source), _builtin_names())
        raise ConfigError(field, f"there is no scenario '{source}'", [*allowed, "the path of a .toml file"])
    try:
        return str(path.resolve()), path.read_text(encoding="utf-8"), path.parent
    except OSError as error:
        raise ConfigError(field, f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(field, f"{path} is not UTF-8 text") from error


def _override(tables: Tables, text: str) -> None:
    path, sign, value = text.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise ConfigError("--set", f"'{text}' is not field=value", ["links.loss=0.1"])
    found = read_value(value.strip())
    change: Any = value.strip() if found is None else found
    for key in reversed(keys):
        change = {key: change}
    tables.update(_merged(tables, change))
    if not value.strip():
        for key in keys[:-1]:
            tables = tables[key]
        del tables[keys[-1]]
    # An unknown field is told now, while it is clear that this override brought it.
    field_docs.check_path(Scenario, path.strip())


def read_value(text: str) -> Any:
    """The value that the text means in TOML, or None where it means none: then it is a bare word."""
    try:
        tables = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return None
    return tables["value"] if len(tables) == 1 else None


def flat(tables: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its path, as `links.loss`. An empty table has none."""
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Tables:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _likely(word: str, known: Sequence[str]) -> Sequence[str]:
    return difflib.get_close_matches(word, known) or known


def _explain(message: str) -> ConfigError:
    """msgspec's sentence as a field's path, what is wrong, and what is allowed."""
    problem, _, where = message.partition(" - at `$")
    path = where.rstrip("`").lstrip(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.+)`", problem):
        return field_docs.unknown_field(Scenario, path, unknown[1])
    if missing := re.fullmatch(r"Object missing required field `(.+)`", problem):
        return ConfigError(
            f"{path}.{missing[1]}", "must be given", field_docs.allowed_at(Scenario, f"{path}.{missing[1]}")
        )
    if choice := re.fullmatch(r"Invalid enum value (.+)", problem):
        problem = f"{choice[1]} is not one of the choices"
    return ConfigError(
        path or "scenario", problem[:1].lower() + problem[1:], field_docs.allowed_at(Scenario, path)
    )


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every float in a struct, with its path. What a task makes of its options is its affair."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{path}[{index}]")
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _numbers(getattr(value, name), f"{path}.{name}".lstrip("."))


def _without_none(value: Any) -> Any:
    """TOML has no word for nothing: such a field is left out."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


# --- the page -------------------------------------------------------------------------------------------
FIELDS_HEADING = "## Fields"


def with_fields(page: str) -> str:
    """`docs/scenarios.md` with its tables of fields made anew."""
    before, heading, after = page.partition(FIELDS_HEADING)
    introduction, _, _ = after.partition("|")
    return f"{before}{heading}{introduction}{describe_fields()}"


if __name__ == "__main__":
    _page = Path(sys.argv[1])
    _page.write_text(with_fields(_page.read_text(encoding="utf-8")), encoding="utf-8")
