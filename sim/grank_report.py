"""What came of `covey sim grank`, as one page that anybody can open, and as one picture.

Belongs here: the curves of the paper, and their words. How pages and drawings look is `report.py`'s and `plots.py`'s affair.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from aggregation.ranking import RANKERS
from sim.grank import ARRIVAL, ATTACK, EXPERIMENTS, WITH_ISOLATION, Row, Run, run_name
from sim.grank_running import Results, Summary, by_experiment
from sim.plots import (
    FULL_PX,
    HALF_PX,
    LIGHT,
    SERIES,
    Plot,
    bytes_text,
    count_text,
    draw_panels,
    draw_svg,
    legend,
    need_matplotlib,
)
from sim.report import html_figure, html_table, html_tile, write_file, write_page

FLOOR = 0.5
"""Places. Distances are drawn by their logarithm, and some are 0."""
PANEL_PX = 250
MAX_BANDS = 4
"""More on one another are mud."""
DASHES = {0.0: "-", 1.0: "--"}
"""By F."""


def write_report(results: Results, page: Path, picture: Path) -> None:
    """Draw all runs of the results, of which there is at least one.

    Raises:
        ConfigError: matplotlib is not installed, or a file cannot be written.
    """
    need_matplotlib()
    settings = results.runs[0].settings
    facts = (
        f"seed {settings.seed} · {settings.nodes:,} honest nodes · {settings.steps:,} steps · "
        f"{results.num_items:,} items under {results.num_tags} tags ({results.catalogue})"
    )
    header = (
        "<header><h1>Ranking by the clicks of those like you</h1>"
        "<p>The experiment of G-Rank (arXiv 2301.12530) with the node's own core and ranking.</p>"
        f'<p class="facts">{escape(facts)}</p></header>'
    )
    body = [
        header,
        _banner(results),
        f'<section class="tiles">{"".join(_tiles(results))}</section>',
        _summary_table(results.summaries),
    ]
    for name, runs in by_experiment(results.runs):
        figures = "".join(html_figure(plot) for plot in _plots(name, runs))
        body.append(
            f"<h2>{escape(name)}</h2><p>{escape(EXPERIMENTS[name].summary)}</p>"
            f'<section class="plots">{figures}</section>'
        )
    write_page(page, "G-Rank", body)
    write_file(picture, draw_picture(results.runs))


def _banner(results: Results) -> str:
    if not results.partial:
        return ""
    return (
        '<p class="banner"><strong>Partial.</strong> It was interrupted: this is what there was by then.</p>'
    )


def _tiles(results: Results) -> Iterator[str]:
    """Of the first run."""
    run, said = results.runs[0], results.summaries[0]
    yield html_tile(
        "Distance at the end",
        f"{said.distance_end:.1f}",
        f"places a term, {said.distance_start:.0f} at the start",
    )
    yield html_tile(
        "Without ties", f"{said.beyond_ties:.1f}", "places: what equally many clicks leave open not counted"
    )
    agreed = "never by all" if said.agreed_at is None else f"by all first at step {said.agreed_at:,}"
    yield html_tile(
        "Same first result", f"{100 * said.agreement:.0f} %", f"of nodes, median over terms; {agreed}"
    )
    yield html_tile("Answer", bytes_text(said.answer_bytes), "mean of all pulls")
    yield html_tile("Clicklog", bytes_text(said.log_bytes), f"{count_text(run.rows[-1].log_entries)} entries")


def _summary_table(summaries: Sequence[Summary]) -> str:
    head = (
        "experiment",
        "ranker",
        "distance at the start",
        "half-way",
        "worst since",
        "at the end",
        "without ties",
        "same first result",
        "by all first at step",
        "attacked item first",
    )
    rows = [
        (
            said.experiment,
            run_name(said.ranker, said.isolation),
            f"{said.distance_start:.0f}",
            f"{said.distance_half:.1f}",
            f"{said.distance_worst:.1f}",
            f"{said.distance_end:.1f}",
            f"{said.beyond_ties:.1f}",
            f"{100 * said.agreement:.0f} %",
            "" if said.agreed_at is None else f"{said.agreed_at:,}",
            "" if said.target_first is None else f"{100 * said.target_first:.0f} %",
        )
        for said in summaries
    ]
    return (
        "<h2>All runs</h2><p>Distance is to the ranking by all clicks of honest nodes, in places a term: the mean over "
        f"honest nodes and terms.</p>{html_table(head, rows)}"
    )


# --- curves ---------------------------------------------------------------------------------------------
Value = Callable[[Row], float]


def _plots(name: str, runs: Sequence[Run]) -> Iterator[Plot]:
    ends = ", ".join(f"{run.settings.name} {run.rows[-1].honest.distance.mean:.1f}" for run in runs)
    yield Plot(
        "Distance to the global ranking",
        "Places that a term's items are apart from the ranking by all honest clicks, summed. Line: mean over honest nodes "
        f"and terms.{_band(runs, 'the middle 80 % of them')}",
        f"Distance at the end: {ends}",
        draw_svg(f"{name}-distance", FULL_PX, 340, lambda axes: _distance(axes, runs)),
        wide=True,
    )
    ends = ", ".join(f"{run.settings.name} {run.rows[-1].honest.agreement.median:.2f}" for run in runs)
    yield Plot(
        "Nodes whose first result is the global one",
        f"Share of honest nodes. Line: median over terms.{_band(runs, 'the middle half of the terms')}",
        f"Share at the end: {ends}",
        draw_svg(f"{name}-first", HALF_PX, 320, lambda axes: _agreement(axes, runs)),
    )
    if any(row.target for run in runs for row in run.rows):
        ends = ", ".join(
            f"{run.settings.name} {run.rows[-1].target.first:.2f}" for run in runs if run.rows[-1].target
        )
        yield Plot(
            "Nodes that show the attacked item first",
            "Share of honest nodes, for the attacked term.",
            f"Share at the end: {ends}",
            draw_svg(f"{name}-target", HALF_PX, 320, lambda axes: _target(axes, runs)),
        )
    else:
        yield Plot(
            "Distance, counting attackers' clicks",
            "The global ranking is by all clicks there are, as in the paper. Line: mean over honest nodes and terms.",
            "Distance to the ranking by all clicks",
            draw_svg(f"{name}-all", HALF_PX, 320, lambda axes: _distance_to_all(axes, runs)),
        )
    first = runs[:1]
    yield Plot(
        "Size of an answer",
        f"What a pull brings, or a push, with {first[0].settings.name}. Line: mean of the last steps. Thin: the largest.",
        f"Answers of {bytes_text(max(row.answer_bytes_max for row in first[0].rows))} at most",
        draw_svg(f"{name}-answer", HALF_PX, 260, lambda axes: _answers(axes, first[0])),
    )
    yield Plot(
        "Size of a clicklog",
        f"Entries of all authors that a node holds, as they travel, with {first[0].settings.name}; mean.",
        f"{bytes_text(first[0].rows[-1].log_bytes)} at the end",
        draw_svg(f"{name}-log", HALF_PX, 260, lambda axes: _logs(axes, first[0])),
    )


def _band(runs: Sequence[Run], what: str) -> str:
    return f" Band: {what}." if len(runs) <= MAX_BANDS else ""


def _style(run: Run) -> dict[str, Any]:
    """A ranker has its colour and an F its line, whichever others there are."""
    settings = run.settings
    line = DASHES.get(settings.isolation, "-.") if settings.ranker in WITH_ISOLATION else "-"
    return {"color": LIGHT[SERIES[list(RANKERS).index(settings.ranker)]], "linestyle": line}


def _lines(axes: Any, runs: Sequence[Run], value: Value, band: tuple[Value, Value] | None = None) -> None:
    for run in runs:
        steps = [row.step for row in run.rows]
        style = _style(run)
        if band is not None and len(runs) <= MAX_BANDS:
            low, high = ([edge(row) for row in run.rows] for edge in band)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.08, linewidth=0)
        axes.plot(steps, [value(row) for row in run.rows], label=run.settings.name, **style)


def _frame(axes: Any, runs: Sequence[Run], label: str, *, by_logarithm: bool = False) -> None:
    settings = runs[0].settings
    if by_logarithm:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.6g}")
    if EXPERIMENTS[settings.experiment].attackers:
        for share in (ARRIVAL, ATTACK):
            axes.axvline(
                share * settings.steps, color=LIGHT["axis"], linewidth=1, linestyle=(0, (4, 3)), zorder=1
            )
    axes.set_xlim(0, settings.steps)
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    axes.set_ylabel(label)


def _distance(axes: Any, runs: Sequence[Run]) -> None:
    _lines(
        axes,
        runs,
        lambda row: max(FLOOR, row.honest.distance.mean),
        (lambda row: max(FLOOR, row.honest.distance.low), lambda row: max(FLOOR, row.honest.distance.high)),
    )
    _frame(axes, runs, "places", by_logarithm=True)
    legend(axes, 4)


def _distance_to_all(axes: Any, runs: Sequence[Run]) -> None:
    _lines(axes, runs, lambda row: max(FLOOR, row.all.distance.mean))
    _frame(axes, runs, "places", by_logarithm=True)


def _agreement(axes: Any, runs: Sequence[Run]) -> None:
    _lines(
        axes,
        runs,
        lambda row: row.honest.agreement.median,
        (lambda row: row.honest.agreement.low, lambda row: row.honest.agreement.high),
    )
    axes.set_ylim(0, 1.03)
    _frame(axes, runs, "share of nodes")


def _target(axes: Any, runs: Sequence[Run]) -> None:
    _lines(axes, runs, lambda row: row.target.first if row.target else math.nan)
    axes.set_ylim(-0.02, 1.03)
    _frame(axes, runs, "share of nodes")


def _answers(axes: Any, run: Run) -> None:
    rows = run.rows[1:]
    steps = [row.step for row in rows]
    axes.plot(steps, [row.answer_bytes_mean / 1e3 for row in rows], color=LIGHT["c1"])
    axes.plot(steps, [row.answer_bytes_max / 1e3 for row in rows], color=LIGHT["c1"], linewidth=0.8)
    axes.set_ylim(bottom=0)
    _frame(axes, [run], "kB")


def _logs(axes: Any, run: Run) -> None:
    axes.plot([row.step for row in run.rows], [row.log_bytes / 1e3 for row in run.rows], color=LIGHT["c3"])
    axes.set_ylim(bottom=0)
    _frame(axes, [run], "kB")


# --- the picture ----------------------------------------------------------------------------------------
def draw_picture(runs: Sequence[Run]) -> bytes:
    """PNG: for each experiment the distance above, and below who shows first what is first, or what is attacked."""
    groups = by_experiment(runs)

    def draw(figure: Any) -> None:
        panels = figure.subplots(2, len(groups), squeeze=False)
        for column, (name, own) in enumerate(groups):
            above, below = panels[0][column], panels[1][column]
            _lines(above, own, lambda row: max(FLOOR, row.honest.distance.mean))
            _frame(above, own, "distance, places" if column == 0 else "", by_logarithm=True)
            above.set_ylim(FLOOR, 600)
            above.set_title(name, fontsize=11, color=LIGHT["ink"], pad=8)
            attacked = any(row.target for run in own for row in run.rows)
            (_target if attacked else _agreement)(below, own)
            below.set_ylabel("attacked item first" if attacked else "global first result first")
        named = {
            label: handle
            for panel in panels[0]
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(4, len(named)))

    return draw_panels(max(HALF_PX, PANEL_PX * len(groups)), 2 * PANEL_PX, draw)
