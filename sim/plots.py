"""The drawings of a run and of a sweep, as SVG text in the page's colours.

Belongs here: what is drawn and how it looks. matplotlib is loaded only when something is drawn, and none of its
globals is touched for longer than one drawing.
"""

import io
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from protocols.errors import ConfigError
from sim.results import MESSAGE_KINDS, NoteRow, Overlay, OverlayNode, RoundRow, Run, SampleRow
from sim.sweep import GridPoint

Floats = np.ndarray[Any, np.dtype[np.float64]]

MAX_POINTS = 400
"""Of one line: more than a screen can tell apart only makes the file heavy."""
MAX_BINS = 120
SILENT_GAPS = 5
MAX_DRAWN_NODES = 400
"""Beyond it the overlay's drawing shows a neighbourhood."""
MAX_KAMADA_NODES = 120
"""Up to here the slower and better layout."""
LONELY_RADIUS = 0.45
NEIGHBOURHOOD = 160
MAX_LABELS = 12
"""Timeline marks that are written out in a plot; the page lists more below."""

FULL_PX, HALF_PX = 1048, 508
"""Widths of plots: drawn at 72 dots an inch, so that one point is one pixel of the page."""

LIGHT = {
    "page": "#f4f3ef",
    "card": "#fcfcfb",
    "ink": "#0b0b0b",
    "soft": "#52514e",
    "axis": "#a9a79e",
    "grid": "#e1e0d9",
    "c1": "#2a78d6",
    "c2": "#eb6834",
    "c3": "#1baf7a",
    "c4": "#e8a200",
    "c5": "#4a3aa7",
    "c6": "#e34948",
    "c7": "#e87ba4",
    "c8": "#008300",
    "c9": "#00838f",
    "c10": "#8d5a2b",
    "c11": "#6b7280",
    "c12": "#7a8b00",
    "c13": "#b3589a",
    "c14": "#d9a5c9",
    "c15": "#5f7fa3",
    "c16": "#a9bdd4",
    "c17": "#173f73",
}
DARK = {
    "page": "#0d0d0d",
    "card": "#1a1a19",
    "ink": "#f6f5f1",
    "soft": "#c3c2b7",
    "axis": "#6d6b64",
    "grid": "#31302d",
    "c1": "#4b95ee",
    "c2": "#ee7440",
    "c3": "#22b47f",
    "c4": "#d69a12",
    "c5": "#9b90f0",
    "c6": "#ec6f6f",
    "c7": "#dd6190",
    "c8": "#3fa53f",
    "c9": "#2bb3c4",
    "c10": "#b98a5e",
    "c11": "#9ca3af",
    "c12": "#a9b935",
    "c13": "#c877b2",
    "c14": "#e0b7d4",
    "c15": "#7f9cc0",
    "c16": "#b9cbe0",
    "c17": "#8fb8ff",
}
SERIES = [f"c{number}" for number in range(1, 9)]
KIND_COLOURS = {
    "offer": "c1",
    "beat": "c3",
    "hello": "c2",
    "peers": "c5",
    "decline": "c4",
    "shuffle": "c7",
    "bye": "c8",
    "refuse": "c6",
    # Who is there and who is not.
    "ping": "c13",
    "pong": "c14",
    "probe": "c15",
    "probed": "c16",
    "suspects": "c11",
    # Of networks that learn by sampling.
    "census": "c9",
    "trained": "c4",
    "aggregated": "c17",
    "receipt": "c10",
    "closed": "c12",
    # Of networks that learn by scalars, in which nothing is offered.
    "scalars": "c1",
    "ranges": "c4",
    "marks": "c9",
    "terms": "c10",
    "holding": "c11",
    "pull": "c12",
    # Of shared content, whatever else a network does.
    "ask": "c9",
    "entries": "c17",
    "seek": "c10",
    "found": "c12",
}
"""A kind has its colour whichever others there are."""


class Plot(NamedTuple):
    """A drawing with its words. `alt` says in one sentence what is to be seen."""

    title: str
    caption: str
    alt: str
    svg: str
    wide: bool = False


def draw_run(run: Run) -> list[Plot]:
    """All plots over time that there is something to draw of, the most telling first."""
    canvas = Canvas(run)
    return [
        *_accuracy_plots(run, canvas),
        *_consensus_plot(run, canvas),
        *_alive_plot(run, canvas),
        *_progress_plot(run, canvas),
        *_traffic_plots(run, canvas),
        *_round_plots(run, canvas),
    ]


# --- drawing --------------------------------------------------------------------------------------------
def need_matplotlib() -> None:
    """Raises ConfigError, with the remedy, where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("--report", "matplotlib is not installed", ["pip install 'covey[plot]'"]) from error


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """The house's look, put back afterwards. The salt keeps the ids of several drawings on one page apart."""
    import matplotlib as mpl

    look = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",  # the page's own font, and a small file
        "font.family": "DejaVu Sans",  # wide: what fits in it fits in any font of the page
        "font.size": 10.5,
        "text.color": LIGHT["ink"],
        "axes.facecolor": "none",
        "axes.edgecolor": LIGHT["axis"],
        "axes.labelcolor": LIGHT["soft"],
        "axes.labelsize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.xmargin": 0.0,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-3, 6),
        "grid.color": LIGHT["grid"],
        "grid.linewidth": 0.8,
        "xtick.color": LIGHT["axis"],
        "ytick.color": LIGHT["axis"],
        "xtick.labelcolor": LIGHT["soft"],
        "ytick.labelcolor": LIGHT["soft"],
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.labelcolor": LIGHT["soft"],
        "legend.fontsize": 10.5,
        "legend.handlelength": 1.2,
        "legend.columnspacing": 1.4,
    }
    with mpl.rc_context(look):
        yield


def draw_svg(salt: str, width_px: int, height_px: int, draw: Callable[[Any], None]) -> str:
    """SVG text whose colours are the page's variables. `draw` is given the axes; the salt is the drawing's own on its page."""
    from matplotlib.figure import Figure

    with _style(salt):
        figure = Figure(figsize=(width_px / 72, height_px / 72), layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _themed(out.getvalue())


def draw_png(width_px: int, height_px: int, draw: Callable[[Any], None]) -> bytes:
    """The same drawing in light colours, at twice the dots of the page."""
    return draw_panels(width_px, height_px, lambda figure: draw(figure.add_subplot()))


def draw_panels(width_px: int, height_px: int, draw: Callable[[Any], None]) -> bytes:
    """PNG like `draw_png`, of which `draw` is given the whole figure."""
    from matplotlib.figure import Figure

    with _style("png"):
        figure = Figure(
            figsize=(width_px / 72, height_px / 72), layout="constrained", facecolor=LIGHT["card"]
        )
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=144, metadata={"Software": None})
    return out.getvalue()


def _themed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="[A-Za-z.]+(2d)?_\d+"', "", svg
    )  # names of matplotlib's groups: nothing refers to them
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--font)", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg)


def legend(axes: Any, columns: int = 3) -> None:
    """Above the plot, on the left."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, borderpad=0.2)


class Scale(NamedTuple):
    """A unit that suits the largest value: what to divide by, and its name."""

    by: float
    unit: str


def _time_scale(end_s: float) -> Scale:
    return next(
        scale
        for limit, scale in (
            (600, Scale(1, "s")),
            (4 * 3600, Scale(60, "min")),
            (96 * 3600, Scale(3600, "h")),
            (math.inf, Scale(86400, "days")),
        )
        if end_s <= limit
    )


def _byte_scale(largest: float) -> Scale:
    power = 0 if largest < 1 else min(4, int(math.log10(largest) // 3))
    return Scale(1000.0**power, ("bytes", "kB", "MB", "GB", "TB")[power])


class Canvas:
    """What all plots over virtual time share: the axis, its unit and the timeline's marks."""

    def __init__(self, run: Run) -> None:
        times = [run.result.get("virtual_s") or 0.0]
        series = (run.rounds, run.samples, run.consensus, run.merged, run.notes)
        times += [rows[-1].at_s for rows in series if rows]
        self.end_s = max(times) or 1.0
        self.scale = _time_scale(self.end_s)
        self.marks = [note for note in run.notes if note.node is None]

    def x(self, times_s: Sequence[float] | Floats) -> Floats:
        return np.asarray(times_s, dtype=float) / self.scale.by

    def frame(self, axes: Any, label: str, written: bool = False) -> None:
        axes.set_xlim(0, self.end_s / self.scale.by)
        axes.set_xlabel(f"virtual time ({self.scale.unit})")
        axes.set_ylabel(label)
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_formatter("{x:,.6g}")
        shown_marks = self.marks if len(self.marks) <= 3 * MAX_LABELS else []
        for note in shown_marks:
            axes.axvline(
                note.at_s / self.scale.by, color=LIGHT["axis"], linewidth=1, linestyle=(0, (4, 3)), zorder=1
            )
        if written:
            self._write(axes, shown_marks[:MAX_LABELS])

    def _write(self, axes: Any, marks: Sequence[NoteRow]) -> None:
        """Texts above the plot, each in the lowest line that has room."""
        ends: list[float] = []
        for note in marks:
            text = note.text if len(note.text) <= 34 else note.text[:33] + "…"
            at = note.at_s / self.end_s
            width = 6.4 * len(text) / (FULL_PX - 60)
            right = at + width > 1
            begin = at - width if right else at
            line = next((index for index, end in enumerate(ends) if end <= begin), len(ends))
            ends[line : line + 1] = [begin + width + 0.01]
            axes.annotate(
                text,
                (note.at_s / self.scale.by, 1),
                (-2 if right else 2, 4 + 14 * line),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right" if right else "left",
                color=LIGHT["soft"],
                fontsize=10,
            )


# --- accuracy -------------------------------------------------------------------------------------------
class Band(NamedTuple):
    """The evaluated nodes' latest values at each of `times_s`: arrays of one length."""

    times_s: Floats
    mean: Floats
    low: Floats
    high: Floats


def _first_metric(row: RoundRow) -> float:
    return next(iter(row.metrics.values()), math.nan)


def _finite_rounds(rows: Sequence[RoundRow]) -> list[RoundRow]:
    return [row for row in rows if math.isfinite(_first_metric(row))]


def latest_values(rows: Sequence[RoundRow]) -> Band:
    """Mean and extremes over the evaluated nodes' newest first metric, at up to `MAX_POINTS` moments.

    Values that are not finite are left out: the node keeps the one it had. A node counts until it has been silent
    for `SILENT_GAPS` of its usual times between evaluations, so that the dead do not hide what the survivors learn;
    one that did the last round of all counts to the end. NaN where nobody counts.
    """
    rows = sorted(_finite_rounds(rows), key=lambda row: row.at_s)
    moments = np.unique([row.at_s for row in rows])
    if len(moments) > MAX_POINTS:
        moments = np.linspace(moments[0], moments[-1], MAX_POINTS)
    place = {node: index for index, node in enumerate(dict.fromkeys(row.node for row in rows))}
    patience = _patience(rows)
    last_round = max((row.round for row in rows), default=0)
    newest = np.full(len(place), np.nan)
    until = np.full(len(place), -np.inf)
    band = np.full((3, len(moments)), np.nan)
    done = 0
    for index, moment in enumerate(moments):
        while done < len(rows) and rows[done].at_s <= moment:
            row = rows[done]
            newest[place[row.node]] = _first_metric(row)
            until[place[row.node]] = np.inf if row.round == last_round else row.at_s + patience[row.node]
            done += 1
        heard = newest[until >= moment]
        if len(heard):
            band[:, index] = heard.mean(), heard.min(), heard.max()
    return Band(moments, *band)


def _of_network(rows: Sequence[RoundRow]) -> list[RoundRow]:
    """Where a round's model is made by a few for all: of each new round the first that was measured, as if by one node."""
    latest: list[RoundRow] = []
    for row in sorted(rows, key=lambda row: row.at_s):
        if not latest or row.round > latest[-1].round:
            latest.append(replace(row, node=0))
    return latest


def _patience(rows: Sequence[RoundRow]) -> dict[int, float]:
    """How long each node may be silent, seconds: `SILENT_GAPS` times its median gap, or everybody's if that is more."""
    times: dict[int, list[float]] = {}
    for row in rows:
        times.setdefault(row.node, []).append(row.at_s)
    gaps = {node: float(np.median(np.diff(own))) for node, own in times.items() if len(own) > 1}
    usual = float(np.median(list(gaps.values()))) if gaps else math.inf
    return {node: SILENT_GAPS * max(gaps.get(node, usual), usual) for node in times}


def _accuracy_plots(run: Run, canvas: Canvas) -> Iterator[Plot]:
    rows = _finite_rounds(run.rounds)
    if not rows:
        return
    name = next(iter(rows[0].metrics))
    sampled = run.scenario_toml.get("learning") == "sampled"
    band = latest_values(_of_network(rows) if sampled else rows)
    known = band.mean[np.isfinite(band.mean)]
    count = len({row.node for row in rows})
    says = f"{name} went from {known[0]:.3f} to {known[-1]:.3f} ("
    says += "of the latest aggregate)" if sampled else f"mean of {count} evaluated nodes)"
    caption = (
        "The latest aggregate, as its maker measured it."
        if sampled
        else f"Line: mean of the {count} evaluated nodes' latest value. Band: from the worst to the best node. "
        "Nodes long silent are left out."
    )
    means = [row for row in run.merged if math.isfinite(row.accuracy)]
    if means:
        caption += " Dashed: the mean of all their models, which no node has."
        says += f"; the mean of their models ended at {means[-1].accuracy:.3f}"

    def draw_over(axes: Any, x: Floats) -> None:
        axes.fill_between(x, band.low, band.high, color=LIGHT["c1"], alpha=0.18, linewidth=0)
        axes.plot(x, band.mean, color=LIGHT["c1"], marker="o" if len(x) == 1 else None)
        if np.nanmin(band.low) >= 0 and np.nanmax(band.high) <= 1:
            axes.set_ylim(np.nanmin(band.low) // 0.1 * 0.1, 1.0)

    def over_time(axes: Any) -> None:
        draw_over(axes, canvas.x(band.times_s))
        if means:
            axes.plot(
                *_thinned(canvas.x([row.at_s for row in means]), np.array([row.accuracy for row in means])),
                color=LIGHT["c2"],
                linestyle=(0, (5, 2)),
            )
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, *(row.accuracy for row in means)), high)
        canvas.frame(axes, name, written=True)

    yield Plot(
        f"{name.capitalize()} over virtual time",
        caption,
        says,
        draw_svg("accuracy", FULL_PX, 330, over_time),
        wide=True,
    )
    if len(run.samples) < 2:
        return
    totals = np.array([row.control_bytes + row.model_bytes for row in run.samples], dtype=float)
    sent = np.interp(band.times_s, [row.at_s for row in run.samples], totals)
    scale = _byte_scale(sent[-1])

    def over_bytes(axes: Any) -> None:
        draw_over(axes, sent / scale.by)
        axes.set_xlim(0, max(sent[-1] / scale.by, 1e-9))
        axes.set_xlabel(f"sent by all nodes together ({scale.unit})")
        axes.set_ylabel(name)

    yield Plot(
        f"{name.capitalize()} over traffic",
        "What each byte bought: models and messages together.",
        f"{says} for {bytes_text(sent[-1])}",
        draw_svg("bytes", HALF_PX, 260, over_bytes),
    )


def _consensus_plot(run: Run, canvas: Canvas) -> Iterator[Plot]:
    rows = [row for row in run.consensus if math.isfinite(row.distance) and row.distance > 0]
    if not rows:
        return

    from matplotlib.ticker import LogLocator, NullLocator

    def draw(axes: Any) -> None:
        axes.plot(
            *_thinned(canvas.x([row.at_s for row in rows]), np.array([row.distance for row in rows])),
            color=LIGHT["c5"],
            marker="o" if len(rows) == 1 else None,
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_locator(NullLocator())
        canvas.frame(axes, "distance")

    yield Plot(
        "Consensus distance",
        "Root mean square distance of the evaluated nodes' models to their mean; logarithmic.",
        f"Consensus distance went from {rows[0].distance:.3g} to {rows[-1].distance:.3g}",
        draw_svg("consensus", HALF_PX, 260, draw),
    )


# --- the network ----------------------------------------------------------------------------------------
def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Every k-th point and the last."""
    if len(x) <= MAX_POINTS:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).astype(int))
    return x[keep], y[keep]


def _alive_plot(run: Run, canvas: Canvas) -> Iterator[Plot]:
    rows = run.samples
    if len(rows) < 2:
        return
    x = canvas.x([row.at_s for row in rows])

    def draw(axes: Any) -> None:
        for name, colour, values in (
            ("online", "c1", [row.alive for row in rows]),
            ("finished all rounds", "c3", [row.done for row in rows]),
        ):
            axes.step(
                *_thinned(x, np.array(values, dtype=float)), where="post", color=LIGHT[colour], label=name
            )
        axes.set_ylim(0, 1.06 * max(1, *(max(row.alive, row.done) for row in rows)))
        canvas.frame(axes, "nodes")
        legend(axes)

    fewest = min(row.alive for row in rows)
    yield Plot(
        "Nodes",
        "A node that has finished goes on serving others.",
        f"Online nodes: at least {fewest}, {rows[-1].alive} at the end; {rows[-1].done} finished",
        draw_svg("alive", HALF_PX, 260, draw),
    )


def _bins(rows: Sequence[SampleRow]) -> tuple[Floats, Callable[[Sequence[float]], Floats]]:
    """Edges of even bins, seconds, and what turns running totals into a rate per second in each."""
    times = np.array([row.at_s for row in rows])
    edges = np.linspace(times[0], times[-1], min(MAX_BINS, len(rows) - 1) + 1)

    def rate(totals: Sequence[float]) -> Floats:
        return np.asarray(np.diff(np.interp(edges, times, totals)) / np.diff(edges), dtype=float)

    return edges, rate


def _progress_plot(run: Run, canvas: Canvas) -> Iterator[Plot]:
    rows = run.samples
    if len(rows) < 2 or rows[-1].at_s <= rows[0].at_s:
        return
    edges, rate = _bins(rows)
    rates = rate([row.rounds for row in rows])

    def draw(axes: Any) -> None:
        axes.stairs(rates, canvas.x(edges), fill=True, color=LIGHT["c3"], alpha=0.3)
        axes.stairs(rates, canvas.x(edges), baseline=None, color=LIGHT["c3"], linewidth=2)
        axes.set_ylim(0, 1.08 * max(rates.max(), 1e-9))
        canvas.frame(axes, "node-rounds per second")

    mean = (rows[-1].rounds - rows[0].rounds) / (rows[-1].at_s - rows[0].at_s)
    nodes = run.result.get("nodes") or max(row.alive for row in rows) or 1
    yield Plot(
        "Progress",
        f"Rounds ended by all nodes per virtual second: {mean:,.1f} on average; "
        f"{rows[-1].rounds / nodes:,.1f} rounds a node in all.",
        f"Node-rounds per virtual second, {mean:.1f} on average",
        draw_svg("progress", HALF_PX, 260, draw),
    )


def _stacked(axes: Any, edges: Floats, layers: Sequence[tuple[str, str, Floats]], by: float = 1.0) -> None:
    """Layers of (name, colour, one value a bin) upon each other."""
    floor = np.zeros(len(edges) - 1)
    for name, colour, values in layers:
        top = floor + values / by
        axes.stairs(top, edges, baseline=floor, fill=True, color=LIGHT[colour], alpha=0.9, label=name)
        floor = top
    axes.set_ylim(0, 1.08 * max(floor.max(), 1e-9))


def _traffic_plots(run: Run, canvas: Canvas) -> Iterator[Plot]:
    rows = run.samples
    if len(rows) < 2 or rows[-1].at_s <= rows[0].at_s:
        return
    edges, rate = _bins(rows)
    models, control = rate([row.model_bytes for row in rows]), rate([row.control_bytes for row in rows])
    scale = _byte_scale((models + control).max())
    last = rows[-1]
    layers = [
        (f"messages, {bytes_text(last.control_bytes)}", "c2", control),
        (f"models, {bytes_text(last.model_bytes)}", "c1", models),
    ]

    def draw_bytes(axes: Any) -> None:
        _stacked(axes, canvas.x(edges), layers, scale.by)
        canvas.frame(axes, f"{scale.unit} per second")
        legend(axes)

    yield Plot(
        "Traffic",
        "Sent by all nodes together, per virtual second; totals in the legend.",
        f"Traffic: {bytes_text(last.model_bytes)} of models and {bytes_text(last.control_bytes)} of messages",
        draw_svg("traffic", HALF_PX, 280, draw_bytes),
    )
    kinds = [kind for kind in MESSAGE_KINDS if last.messages.get(kind)]
    if not kinds:
        return
    kinds.sort(key=lambda kind: -last.messages[kind])
    by_kind = [
        (
            f"{kind}, {count_text(last.messages[kind])}",
            KIND_COLOURS[kind],
            rate([row.messages.get(kind, 0) for row in rows]),
        )
        for kind in kinds
    ]

    def draw_kinds(axes: Any) -> None:
        _stacked(axes, canvas.x(edges), by_kind)
        canvas.frame(axes, "messages per second")
        legend(axes)

    yield Plot(
        "Messages by kind",
        "Sent by all nodes together, per virtual second; totals in the legend.",
        "Messages: " + ", ".join(f"{last.messages[kind]} {kind}" for kind in kinds),
        draw_svg("kinds", HALF_PX, 280, draw_kinds),
    )


def _round_plots(run: Run, canvas: Canvas) -> Iterator[Plot]:
    """What the evaluated rounds say of their merges. Who only takes the last aggregate has merged nothing."""
    sampled = run.scenario_toml.get("learning") == "sampled"
    rows = sorted((row for row in run.rounds if row.num_merged or not sampled), key=lambda row: row.at_s)
    if len(rows) < 2 or rows[-1].at_s <= rows[0].at_s:
        return
    edges = np.linspace(rows[0].at_s, rows[-1].at_s, min(60, max(2, len(rows) // 30)) + 1)
    which = np.clip(np.searchsorted(edges, [row.at_s for row in rows], side="right") - 1, 0, len(edges) - 2)
    filled = np.unique(which)
    x = canvas.x((edges[filled] + edges[filled + 1]) / 2)

    def per_bin(values: Sequence[int], join: Callable[[Floats], Any]) -> Floats:
        array = np.array(values, dtype=float)
        return np.array([join(array[which == index]) for index in filled])

    merged = [row.num_merged for row in rows]
    stale = [row.staleness_max for row in rows]

    def draw(values: Sequence[int], colour: str, label: str) -> Callable[[Any], None]:
        def plot(axes: Any) -> None:
            low, high = (per_bin(values, lambda part, q=q: np.quantile(part, q)) for q in (0.1, 0.9))  # type: ignore[misc]
            axes.fill_between(x, low, high, color=LIGHT[colour], alpha=0.18, linewidth=0)
            axes.plot(x, per_bin(values, np.mean), color=LIGHT[colour], marker="o" if len(x) == 1 else None)
            axes.set_ylim(0, max(1.0, 1.1 * high.max()))
            canvas.frame(axes, label)

        return plot

    yield Plot(
        "Models merged in a round",
        "Received models in a merge. Line: mean over the rounds ended then; band: the middle 80 %.",
        f"Models merged in a round: {np.mean(merged):.2f} on average",
        draw_svg("merged", HALF_PX, 260, draw(merged, "c8", "received models")),
    )
    if max(stale) > 0:
        yield Plot(
            "Staleness",
            "How many rounds the oldest merged model was behind. Line: mean; band: the middle 80 %.",
            f"Staleness: {np.mean(stale):.2f} rounds on average, {max(stale)} at most",
            draw_svg("staleness", HALF_PX, 260, draw(stale, "c7", "rounds behind")),
        )


# --- the overlay ----------------------------------------------------------------------------------------
def draw_overlay(overlay: Overlay, seed: int) -> Iterator[Plot]:
    """Who is linked with whom, and how many links nodes have. The seed draws whose neighbourhood of a large one."""
    import networkx as nx

    whole = nx.Graph()
    whole.add_nodes_from(node.index for node in overlay.nodes)
    whole.add_edges_from(sorted(overlay.links))
    by_index = {node.index: node for node in overlay.nodes}
    alive = [node.index for node in overlay.nodes if node.alive]
    parts = [len(part) for part in nx.connected_components(whole.subgraph(alive))]
    says = (
        f"{len(overlay.links):,} links between {len(alive):,} online nodes"
        f"{f' of {len(overlay.nodes):,}' if len(alive) < len(overlay.nodes) else ''}, "
        + (
            f"in {len(parts)} parts, the largest of {max(parts):,} nodes"
            if len(parts) > 1
            else "all connected"
        )
        if alive
        else "nobody is online"
    )
    graph, note = whole, ""
    if len(whole) > MAX_DRAWN_NODES:
        graph = whole.subgraph(_neighbourhood(whole, alive or list(whole), seed))
        note = f" Drawn: {len(graph)} nodes around one drawn by lot."

    def draw_graph(axes: Any) -> None:
        _draw_graph(axes, graph, by_index, seed)

    degrees = Counter(degree for _, degree in whole.subgraph(alive).degree())

    def draw_degrees(axes: Any) -> None:
        axes.bar(list(degrees), list(degrees.values()), width=0.8, color=LIGHT["c1"])
        axes.set_xlim(min(degrees) - 0.8, max(degrees) + 0.8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("links of a node")
        axes.set_ylabel("online nodes")

    yield Plot(
        "Who is linked with whom",
        f"{says[0].upper()}{says[1:]}.{note}",
        says,
        draw_svg("overlay", HALF_PX, 420, draw_graph),
    )
    if degrees:
        mean = sum(degree * count for degree, count in degrees.items()) / len(alive)
        yield Plot(
            "Links of a node",
            f"{mean:.1f} on average, from {min(degrees)} to {max(degrees)}.",
            f"Links of a node: {mean:.1f} on average, from {min(degrees)} to {max(degrees)}",
            draw_svg("degrees", HALF_PX, 420, draw_degrees),
        )


def _neighbourhood(graph: Any, candidates: Sequence[int], seed: int) -> list[int]:
    """About `NEIGHBOURHOOD` nodes, nearest first, around one with neighbours if there is any."""
    linked = [node for node in candidates if graph.degree(node)] or list(candidates)
    nearest = _breadth_first(graph, random.Random(seed).choice(linked))
    return list(itertools.islice(nearest, NEIGHBOURHOOD))


def _breadth_first(graph: Any, start: int) -> Iterator[int]:
    seen, queue = {start}, [start]
    for node in queue:
        yield node
        for other in sorted(graph[node]):
            if other not in seen:
                seen.add(other)
                queue.append(other)


def _draw_graph(axes: Any, graph: Any, by_index: Mapping[int, OverlayNode], seed: int) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    places = _layout(graph, seed)
    ends = [places[end] for link in sorted(graph.edges) for end in link]
    if ends:  # one outline for all links: a fraction of the bytes of one each
        codes = [Outline.MOVETO, Outline.LINETO] * (len(ends) // 2)
        axes.add_patch(
            PathPatch(Outline(ends, codes), facecolor="none", edgecolor=LIGHT["axis"], linewidth=0.9)
        )
    size = float(np.clip(7000 / max(1, len(graph)), 14, 130))
    devices = list(dict.fromkeys(by_index[node].device for node in sorted(graph)))
    for alive in (True, False):
        for order, device in enumerate(devices):
            colour = LIGHT[SERIES[order % len(SERIES)]]
            group = [
                node
                for node in sorted(graph)
                if by_index[node].device == device and by_index[node].alive is alive
            ]
            if group:
                axes.scatter(
                    *np.array([places[node] for node in group]).T,
                    s=size,
                    color=colour if alive else LIGHT["card"],
                    edgecolors=LIGHT["card"] if alive else colour,
                    linewidths=0.8 if alive else 1.4,
                    zorder=3,
                    label=_group_name(device if len(devices) > 1 else "", alive),
                )
    axes.set_aspect("equal")
    axes.margins(0.03)
    axes.axis("off")
    legend(axes)


def _group_name(device: str, alive: bool) -> str:
    state = "online" if alive else "offline"
    return f"{device}, {state}" if device else state


def _layout(graph: Any, seed: int) -> dict[int, Floats]:
    """Each connected part laid out by itself, the parts side by side, the lonely nodes in rows below."""
    import networkx as nx

    parts = sorted(
        (sorted(part) for part in nx.connected_components(graph)), key=lambda part: (-len(part), part)
    )
    places: dict[int, Floats] = {}
    limit = 2.4 * math.sqrt(max(1, len(graph)))
    x = y = height = 0.0
    for part in parts:
        radius = math.sqrt(len(part)) if len(part) > 1 else LONELY_RADIUS
        lonely_row = len(part) == 1 and height > 2 * LONELY_RADIUS
        if x > 0 and (x + 2 * radius > limit or lonely_row):
            x, y, height = 0.0, y - height, 0.0
        centre = np.array([x + radius, y - radius])
        spread = radius * _unit_layout(graph.subgraph(part), seed)
        places |= dict(zip(part, centre + spread, strict=True))
        x, height = x + 2 * radius, max(height, 2 * radius)
    return places


def _unit_layout(graph: Any, seed: int) -> Floats:
    """One place a node, in the order of their numbers, within a unit's reach of the origin: nodes x 2."""
    import networkx as nx

    if len(graph) == 1:
        return np.zeros((1, 2))
    if len(graph) <= MAX_KAMADA_NODES:
        at = nx.kamada_kawai_layout(graph)
    else:
        at = nx.spring_layout(graph, iterations=200, seed=seed)
    places = np.array([at[node] for node in sorted(graph)])
    return np.asarray(0.92 * places / max(float(np.abs(places).max()), 1e-9))


# --- words ----------------------------------------------------------------------------------------------
def bytes_text(count: float) -> str:
    """In the unit that suits it."""
    scale = _byte_scale(count)
    return f"{count / scale.by:.{0 if scale.by == 1 else 1}f} {scale.unit}"


def count_text(number: float) -> str:
    """Short enough for a tile: 1,234 and 1.2 million."""
    if abs(number) >= 1e9:
        return f"{number / 1e9:,.1f} billion"
    if abs(number) >= 1e6:
        return f"{number / 1e6:,.1f} million"
    return f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else f"{number:,.1f}"


# --- a sweep --------------------------------------------------------------------------------------------
def draw_sweep(points: Sequence[GridPoint]) -> tuple[Plot, bytes]:
    """The accuracy over rounds of grid points that have one; as a plot and as PNG."""

    def draw(axes: Any) -> None:
        _draw_curves(axes, points)

    height = 380 + 18 * math.ceil(len(points) / 3)
    seeds = max(len(point.curves) for point in points)
    plot = Plot(
        "Accuracy over rounds",
        f"Line: mean over the seeds. Band: from the worst to the best of {seeds}. Each seed's value is the mean over "
        "its nodes.",
        "; ".join(f"{point.name}: {np.mean([curve[-1] for curve in point.curves]):.3f}" for point in points),
        draw_svg("sweep", FULL_PX, height, draw),
        wide=True,
    )
    return plot, draw_png(FULL_PX, height, draw)


def _draw_curves(axes: Any, points: Sequence[GridPoint]) -> None:
    """One colour a grid point; a ninth begins again with a dashed line."""
    longest = 0
    for order, point in enumerate(points):
        length = min(len(curve) for curve in point.curves)
        curves = np.array([curve[:length] for curve in point.curves])
        rounds = np.array(point.rounds or range(length))[:length] + 1
        colour = LIGHT[SERIES[order % len(SERIES)]]
        dashes = ("-", "--", ":", "-.")[order // len(SERIES) % 4]
        if len(curves) > 1:
            axes.fill_between(
                rounds, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15, linewidth=0
            )
        axes.plot(rounds, curves.mean(axis=0), dashes, color=colour, label=point.name)
        longest = max(longest, int(rounds[-1]))
    axes.set_xlim(1, max(2, longest))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy")
    legend(axes)
