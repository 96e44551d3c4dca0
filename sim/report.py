"""A finished run, or a sweep of them, as one page that anybody can open: no network, no scripts, light and dark.

Belongs here: the words and numbers of the page, and its look. The drawings are `plots.py`'s affair.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from protocols.errors import ConfigError
from sim.plots import (
    DARK,
    LIGHT,
    Plot,
    bytes_text,
    count_text,
    draw_overlay,
    draw_run,
    draw_sweep,
    need_matplotlib,
)
from sim.results import Run
from sim.scenario_files import flat
from sim.scenarios import Scenario
from sim.sweep import Table, measured, summarise, value_text

MAX_LISTED_NOTES = 40


def write_report(run: Run, path: Path) -> None:
    """Draw a run.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    need_matplotlib()
    title = run.scenario_toml.get("name") or run.folder.name or "run"
    body = [_header(run, title), _banner(run), _tiles(run), *_plots(run), _notes(run), _settings(run)]
    write_page(path, title, body)


def _plots(run: Run) -> list[str]:
    sections = []
    if not any(row.metrics for row in run.rounds):
        sections.append(f'<p class="missing">{_why_no_accuracy(run)}</p>')
    if len(run.samples) < 2:
        sections.append(
            '<p class="missing">The run was too short for plots of its nodes and traffic over time.</p>'
        )
    sections.append(f'<section class="plots">{"".join(map(html_figure, draw_run(run)))}</section>')
    if run.overlay is not None and len(run.overlay.nodes) > 1:
        drawn = "".join(map(html_figure, draw_overlay(run.overlay, run.scenario_toml.get("seed", 0))))
        sections.append(f'<h2>Overlay at the end</h2><section class="plots">{drawn}</section>')
    return sections


def _why_no_accuracy(run: Run) -> str:
    if run.scenario_toml.get("dry_run"):
        return "A dry run: nothing was learned, so there is no accuracy to draw."
    return "No node was evaluated, so there is no accuracy to draw."


# --- words ----------------------------------------------------------------------------------------------
def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"


def _header(run: Run, title: str) -> str:
    result = run.result
    facts = [
        f"seed {run.scenario_toml.get('seed', Scenario().seed)}",
        f"trace {result['trace_hash'][:16]}" if "trace_hash" in result else "",
        *(f"{name} {version}" for name, version in result.get("versions", {}).items()),
    ]
    summary = run.scenario_toml.get("summary", "")
    return (
        f"<header><h1>{escape(str(title))}</h1>"
        + (f"<p>{escape(str(summary))}</p>" if summary else "")
        + f'<p class="facts">{escape(" · ".join(fact for fact in facts if fact))}</p></header>'
    )


def _banner(run: Run) -> str:
    if not run.partial:
        return ""
    why = "was interrupted" if run.result else "ended without a result, as after a crash"
    return f'<p class="banner"><strong>Partial.</strong> The run {why}: what follows is what there was by then.</p>'


def _tiles(run: Run) -> str:
    return '<section class="tiles">' + "".join(html_tile(*tile) for tile in _headline(run)) + "</section>"


def html_tile(label: str, value: str, under: str = "") -> str:
    """A large number with a word above and a line below."""
    small = f"<small>{escape(under)}</small>" if under else ""
    return f"<div><span>{escape(label)}</span><b>{escape(value)}</b>{small}</div>"


def _headline(run: Run) -> Iterator[tuple[str, str, str]]:
    """Label, value and a line below, of each tile. What a run does not have gets no tile."""
    result = run.result or _result_of_samples(run)

    def have(*names: str) -> bool:
        return all(result.get(name) is not None for name in names)

    if have("accuracy_mean", "accuracy_min", "accuracy_max"):
        low, high = result["accuracy_min"], result["accuracy_max"]
        yield "Accuracy", f"{result['accuracy_mean']:.3f}", f"{low:.3f} to {high:.3f} over the nodes"
    if have("merged_accuracy"):
        yield "Mean of the models", f"{result['merged_accuracy']:.3f}", "accuracy at the end; no node has it"
    if have("final_merged_accuracy"):
        yield "Final merge", f"{result['final_merged_accuracy']:.3f}", "accuracy, mean over the nodes"
    if have("nodes", "finished"):
        yield (
            "Nodes",
            count_text(result["nodes"]),
            f"{result['finished']:,} finished"
            + (f", {result['alive']:,} online at the end" if have("alive") else ""),
        )
    if have("node_rounds"):
        pace = f"{count_text(result['node_rounds_per_s'])} per second" if have("node_rounds_per_s") else ""
        yield "Node-rounds", count_text(result["node_rounds"]), pace
    if have("events"):
        pace = f"{count_text(result['events_per_s'])} per second" if have("events_per_s") else ""
        yield "Events", count_text(result["events"]), pace
    if have("bytes_sent"):
        fetches = f"{result['fetches']:,} models fetched" if have("fetches") else ""
        yield "Sent", bytes_text(result["bytes_sent"]), fetches
    if have("virtual_s"):
        wall = f"{_duration(result['wall_s'])} of real time" if have("wall_s") else ""
        yield "Virtual time", _duration(result["virtual_s"]), wall
    if have("scalars"):
        scalars = result["scalars"]
        yield "Final states", str(scalars["num_states"]), "different ones among the nodes that finished"
        yield "Log", f"{count_text(scalars['log_records'])} records", bytes_text(scalars["log_bytes"])
        repair = scalars["compared_bytes"] + scalars["served_bytes"]
        yield (
            "Repair",
            bytes_text(repair),
            f"beside {bytes_text(scalars['flooded_bytes'])} of flooded records",
        )
        if scalars["catch_up_median_s"] is not None:
            yield (
                "Caught up",
                _duration(scalars["catch_up_median_s"]),
                f"median of {scalars['caught_up']:,} late starts, {_duration(scalars['catch_up_max_s'])} at most",
            )
    if have("failed_work"):
        kinds = "estimates and replays" if have("scalars") else "trainings and merges"
        yield "Failed work", count_text(result["failed_work"]), kinds
    if have("refused"):
        refused = sorted(result["refused"].items(), key=lambda item: (-item[1], item[0]))
        most = ", ".join(f"{count:,} {reason}" for reason, count in refused[:3])
        yield (
            "Refused",
            count_text(sum(count for _, count in refused)),
            (f"{most}, …" if len(refused) > 3 else most) or "nothing",
        )


def _result_of_samples(run: Run) -> dict[str, Any]:
    """What the last sample of a crashed run still tells."""
    if not run.samples:
        return {}
    last = run.samples[-1]
    return {
        "nodes": run.scenario_toml.get("nodes", last.alive),
        "alive": last.alive,
        "finished": last.done,
        "node_rounds": last.rounds,
        "events": last.events,
        "bytes_sent": last.control_bytes + last.model_bytes,
        "virtual_s": last.at_s,
    }


def html_figure(plot: Plot) -> str:
    """A drawing with its title and its caption."""
    svg = plot.svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.alt)}"', 1)
    return (
        f'<figure class="{"wide" if plot.wide else "half"}"><h3>{escape(plot.title)}</h3>{svg}'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Any values as text; wide tables scroll."""
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _notes(run: Run) -> str:
    if not run.notes:
        return ""
    told = Counter(note.node is None for note in run.notes)
    listed = sorted(run.notes, key=lambda note: (note.node is not None, note.at_s))[:MAX_LISTED_NOTES]
    rows = [
        (f"{note.at_s:,.1f} s", "" if note.node is None else note.node, note.text)
        for note in sorted(listed, key=lambda note: note.at_s)
    ]
    rest = len(run.notes) - len(listed)
    more = f"<p>and {rest:,} more in notes.jsonl</p>" if rest else ""
    count = f"{told[True]} of the timeline, {told[False]:,} of nodes"
    return f"<h2>Notes</h2><p>{count}</p>{html_table(('at', 'node', 'what'), rows)}{more}"


def _settings(run: Run) -> str:
    changed = changed_settings(run.scenario_toml)
    table = (
        html_table(
            ("setting", "value", "default"),
            [(path, _json(value), _json(old)) for path, value, old in changed],
        )
        if changed
        else "<p>All settings have their defaults.</p>"
    )
    engine = run.result.get("engine")
    computing = f"<h2>Computing</h2>{html_table(('what', 'value'), _flat_rows(engine))}" if engine else ""
    return (
        f"<h2>Settings that differ from the defaults</h2>{table}{computing}"
        f"<details><summary>The whole scenario</summary><pre>{escape(run.scenario_text)}</pre></details>"
    )


def _flat_rows(data: Any) -> list[tuple[str, str]]:
    if not isinstance(data, Mapping):
        return [("engine", _json(data))]
    return [(path, value if isinstance(value, str) else _json(value)) for path, value in flat(data)]


def _json(value: object) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def changed_settings(scenario: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Path, value and default of every setting of a scenario that is not at its default; the name and summary left out."""
    plain = msgspec.json.decode(msgspec.json.encode(scenario))
    defaults = dict(flat(msgspec.json.decode(msgspec.json.encode(Scenario()))))
    return [
        (path, value, defaults.get(path))
        for path, value in flat(plain)
        if path not in ("name", "summary") and value != defaults.get(path)
    ]


# --- a sweep --------------------------------------------------------------------------------------------
def write_sweep_report(table: Table, path: Path) -> None:
    """Draw a sweep: the accuracy over rounds of every grid point, and its table. The plot alone goes beside the page
    as PNG.

    Raises:
        ConfigError: matplotlib is not installed, or a file cannot be written.
    """
    need_matplotlib()
    points = summarise(table)
    learned = [point for point in points if point.curves]
    body = [f"<header><h1>Sweep of {escape(table.scenario)}</h1>"]
    body.append(f'<p class="facts">{len(points)} grid points, {len(table.rows)} finished cells</p></header>')
    if table.failed:
        cells = "1 cell" if len(table.failed) == 1 else f"{len(table.failed):,} cells"
        body.append(f'<p class="banner"><strong>{cells} failed</strong> and left no numbers.</p>')
    if learned:
        plot, png = draw_sweep(learned)
        body.append(f'<section class="plots">{html_figure(plot)}</section>')
        write_file(path.with_suffix(".png"), png)
    else:
        body.append('<p class="missing">No cell has an accuracy to draw.</p>')
    head = [*table.axes, "seeds", *measured(points)]
    rows = [
        [
            *(value_text(value) for value in point.values),
            point.num_seeds,
            *(point.means[name] or "" for name in measured(points)),
        ]
        for point in points
    ]
    body.append(f"<h2>Means over the seeds, ± their standard deviation</h2>{html_table(head, rows)}")
    if table.failed:
        body.append(f"<h2>Failed</h2>{html_table(('cell', 'why'), table.failed)}")
    write_page(path, f"Sweep of {table.scenario}", body)


# --- the page -------------------------------------------------------------------------------------------
def _variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


CSS = (
    f"""
:root {{ color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""
    """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1128px; padding: 28px 24px 60px; font: 15px/1.5 var(--font); color: var(--ink);
  background: var(--page); }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 10px; } h3 { font-size: 15px; margin: 0 0 6px; }
header p { margin: 4px 0 0; max-width: 75ch; }
.facts, figcaption, small, .missing { color: var(--soft); } header .facts { font-size: 13px; max-width: none; }
.banner { border-left: 5px solid var(--c6); background: var(--card); padding: 10px 16px; margin: 18px 0;
  border-radius: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 14px; margin: 20px 0; }
.tiles div, figure { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
.tiles div { padding: 12px 16px; display: flex; flex-direction: column; }
.tiles span { font-size: 13px; color: var(--soft); } .tiles b { font-size: 25px; line-height: 1.3; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px 12px; min-width: 0; } .wide { grid-column: 1 / -1; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: 13px; margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top;
  white-space: pre-line; }
th { color: var(--soft); font-weight: 600; }
details { margin-top: 28px; } summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  font-size: 13px; }
@media (max-width: 760px) { .plots { grid-template-columns: minmax(0, 1fr); } body { padding: 16px 12px 40px; } }
"""
)


def write_page(path: Path, title: str, body: Sequence[str]) -> None:
    """A whole page in the house's look. Raises ConfigError where it cannot be written."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(str(title))}</title><style>{CSS}</style></head><body>{''.join(body)}</body></html>\n"
    )
    write_file(path, page.encode())


def write_file(path: Path, content: bytes) -> None:
    """Raises ConfigError where it cannot be written."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written ({error.strerror})") from error
