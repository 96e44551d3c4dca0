"""The page of a run: what is on it, for whole, partial, dry, tiny and large runs."""

import math
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import networkx as nx
import pytest

from protocols.errors import ConfigError
from sim.plots import KIND_COLOURS, latest_values
from sim.report import changed_settings, write_report, write_sweep_report
from sim.results import (
    MESSAGE_KINDS,
    ConsensusRow,
    MergedRow,
    NoteRow,
    Overlay,
    OverlayNode,
    Result,
    ResultsWriter,
    RoundRow,
    SampleRow,
    TraceBlock,
    read_run,
)
from sim.sweep import Failure, Row, Table

ALL = 10**9


def make_run(
    folder: Path,
    nodes: int = 60,
    rounds: int = 40,
    seed: int = 0,
    dry: bool = False,
    partial: bool = False,
    samples: int = ALL,
    share: float = 1.0,
    finish: bool = True,
    timeline: Sequence[tuple[float, str]] = ((0.33, "crash 80 %"), (0.6, "return 50 % of the crashed")),
    devices: Sequence[str] = ("phone", "laptop"),
) -> None:
    """A results folder like one of a run with a mass failure, without the run: one round a virtual second."""
    rng = random.Random(seed)
    scenario = (
        f'name = "mass failure"\nsummary = "80 % of the nodes stop answering at a third of the run; half come back."\n'
        f"seed = {seed}\nnodes = {nodes}\ndry_run = {str(dry).lower()}\n"
        'rule = "corrected"\n[data]\npartitioner = "dirichlet"\nalpha = 0.1\n[gossip]\nrounds = 40\n'
    )
    writer = ResultsWriter(folder, scenario)
    evaluated = sorted(rng.sample(range(nodes), max(1, round(share * nodes))))
    end_s = rounds * 1.3
    crash_s, back_s = 0.33 * end_s, 0.6 * end_s
    gone = {node for node in range(nodes) if rng.random() < 0.8}
    back = {node for node in gone if rng.random() < 0.5}
    skill = {node: rng.gauss(0, 0.02) for node in range(nodes)}
    messages = dict.fromkeys(MESSAGE_KINDS, 0)
    total_rounds = model_bytes = control_bytes = 0
    values: list[float] = []
    for step in range(rounds):
        at = (step + 1) * 1.3
        alive = [
            node
            for node in range(nodes)
            if not crash_s <= at or node not in gone or (at >= back_s and node in back)
        ]
        level = 0.1 + 0.85 * (1 - math.exp(-step / 9)) - (0.08 if crash_s <= at < back_s + 2 else 0)
        for node in evaluated if not dry else ():
            if node in alive:
                value = min(0.99, max(0.05, level + skill[node] + rng.gauss(0, 0.01)))
                values.append(value)
                writer.round(
                    RoundRow(
                        at + rng.random(),
                        node,
                        step,
                        rng.choice([2, 3, 4, 4]) if len(alive) == nodes else rng.choice([0, 0, 1, 2]),
                        rng.choice([0, 0, 0, 1, 2]),
                        1.2 + rng.random() / 5,
                        {"accuracy": value, "loss": 2 * (1 - value)},
                    )
                )
        total_rounds += len(alive)
        model_bytes += len(alive) * 4 * 20_000
        sent = len(alive) * 4
        for kind, share_of in (
            ("offer", 1.0),
            ("beat", 0.5),
            ("decline", 0.2),
            ("peers", 0.05),
            ("shuffle", 0.05),
        ):
            messages[kind] += round(sent * share_of)
        messages["hello"] += 4 * nodes if step == 0 else (len(back) * 4 if at - 1.3 < back_s <= at else 0)
        control_bytes = 60 * sum(messages.values())
        if step < samples:
            done = nodes // 5 if step == rounds - 1 else 0
            writer.sample(
                SampleRow(
                    at, len(alive), done, len(alive) * 2, total_rounds, 40 * total_rounds, dict(messages),
                    control_bytes, model_bytes,
                )
            )  # fmt: skip
        if not dry:
            writer.consensus(ConsensusRow(at, len(evaluated), 30 * math.exp(-step / 6) + 0.4))
    for when, text in timeline:
        writer.note(NoteRow(when * end_s, text))
    writer.note(NoteRow(0.8 * end_s, "training failed: loss is not finite", 3))
    writer.block(TraceBlock(1000, 10.0, "ab" * 32))
    if not finish:
        writer.close()
        return
    alive_now = {node for node in range(nodes) if node not in gone or node in back}
    graph = nx.random_regular_graph(4, nodes, seed=seed) if nodes > 4 else nx.path_graph(nodes)
    links = [(a, b) for a, b in sorted(graph.edges) if a in alive_now and b in alive_now]
    overlay = Overlay(
        [OverlayNode(n, n in alive_now, devices[n % len(devices)], "public", rounds) for n in range(nodes)],
        links,
    )
    writer.finish(
        Result(
            trace_hash="0123456789abcdef" * 4,
            partial=partial,
            accuracy_mean=None if dry else sum(values[-nodes:]) / len(values[-nodes:]),
            accuracy_min=None if dry else min(values[-nodes:]),
            accuracy_max=None if dry else max(values[-nodes:]),
            accuracy_by_round=[],
            evaluated_rounds=[],
            consensus_distance=None if dry else 0.4,
            events=40 * total_rounds,
            node_rounds=total_rounds,
            bytes_sent=model_bytes + control_bytes,
            messages_sent=messages,
            fetches=4 * total_rounds,
            refused={"silent": 120, "timeout": 31, "gone": 7, "link": 3},
            failed_work=1,
            virtual_s=end_s,
            nodes=nodes,
            alive=len(alive_now),
            finished=nodes // 5,
            timeline_left=0,
        ),
        {
            "wall_s": 3.21,
            "events_per_s": 123_456.7,
            "node_rounds_per_s": 10_234.5,
            "engine": {
                "device": "cpu",
                "threads": 2,
                "batching": "vmap",
                "why": "measured: 3.1 ms against 9.8 ms",
            },
        },
        overlay,
    )


class Page(HTMLParser):
    """What a reader meets: titles, figures with their words, tiles, tables, and whether all tags are closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: list[str] = []
        self.alts: list[str] = []
        self.tags: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        if tag == "svg":
            self.alts.append(dict(attrs).get("aria-label") or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h3"]:
            self.figures.append(data)

    def words(self) -> str:
        return re.sub(r"\s+", " ", re.sub(r"<(style|svg).*?</\1>|<[^>]+>", " ", self.html, flags=re.DOTALL))


def page_of(folder: Path) -> Page:
    write_report(read_run(folder), folder / "report.html")
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def failure(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return page_of(folder)


def test_the_page_has_every_plot(failure: Page) -> None:
    assert failure.figures == [
        "Accuracy over virtual time",
        "Accuracy over traffic",
        "Consensus distance",
        "Nodes",
        "Progress",
        "Traffic",
        "Messages by kind",
        "Models merged in a round",
        "Staleness",
        "Who is linked with whom",
        "Links of a node",
    ]
    assert len(failure.alts) == len(failure.figures)
    assert all(failure.alts), "every drawing has its words"


def test_the_page_needs_nothing_from_elsewhere(failure: Page) -> None:
    assert not {"script", "link", "img", "iframe"} & set(failure.tags)
    linked = set(re.findall(r"""(?:href|src)=["']([^"'#]+)|url\((?!#)([^)]+)\)""", failure.html))
    assert linked == set()


def test_every_colour_of_a_drawing_follows_the_readers_theme(failure: Page) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", failure.html, flags=re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawn)) == set()
    assert "var(--c1)" in drawn
    assert "prefers-color-scheme: dark" in failure.html


def test_ids_are_told_apart(failure: Page) -> None:
    ids = re.findall(r'\bid="([^"]+)"', failure.html)
    assert sorted(ids) == sorted(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', failure.html)) <= set(ids)


def test_the_headline_is_the_results(failure: Page) -> None:
    words = failure.words()
    for told in (
        "mass failure",
        "seed 0",
        "trace 0123456789abcdef",
        "10,234 per second",
        "123,457 per second",
        "12 finished, 35 online at the end",
        "52.0 s",
        "3.2 s of real time",
        "120 silent, 31 timeout, 7 gone, …",
        "measured: 3.1 ms against 9.8 ms",
        "training failed: loss is not finite",
    ):
        assert told in words, told
    assert "Partial" not in words


def test_the_timeline_stands_in_the_plots(failure: Page) -> None:
    first = failure.html[failure.html.index("<svg") : failure.html.index("</svg>")]
    assert "crash 80 %" in first
    assert "return 50 % of the crashed" in first
    assert "not finite" not in first, "a node's trouble is no mark"


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    make_run(tmp_path, nodes=8, rounds=5, samples=0)
    first = page_of(tmp_path).html
    assert page_of(tmp_path).html == first


def test_a_partial_run_is_marked(tmp_path: Path) -> None:
    make_run(tmp_path, nodes=8, rounds=5, dry=True, samples=0, partial=True)
    assert "Partial. The run was interrupted" in page_of(tmp_path).words()


def test_a_crashed_run_is_drawn_as_far_as_it_came(tmp_path: Path) -> None:
    make_run(tmp_path, nodes=8, rounds=5, samples=0, finish=False)
    page = page_of(tmp_path)
    assert "ended without a result" in page.words()
    assert "Accuracy over virtual time" in page.figures
    assert "Who is linked with whom" not in page.figures


def test_a_dry_run_says_why_it_has_no_accuracy(tmp_path: Path) -> None:
    make_run(tmp_path, nodes=30, rounds=5, dry=True)
    page = page_of(tmp_path)
    assert "A dry run: nothing was learned" in page.words()
    assert not [title for title in page.figures if "Accuracy" in title or "Consensus" in title]
    assert "Traffic" in page.figures


@pytest.mark.parametrize(("nodes", "samples"), [(1, 0), (2, 1), (2, 2)])
def test_a_tiny_run_is_drawn(tmp_path: Path, nodes: int, samples: int) -> None:
    make_run(tmp_path, nodes=nodes, rounds=2, samples=samples, timeline=())
    page = page_of(tmp_path)
    assert ("too short" in page.words()) == (samples < 2)
    assert ("Who is linked with whom" in page.figures) == (nodes > 1)


def test_an_empty_run_is_drawn(tmp_path: Path) -> None:
    ResultsWriter(tmp_path, "").close()
    assert "No node was evaluated" in page_of(tmp_path).words()


def test_the_mean_of_the_models_is_drawn_beside_their_accuracy(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path, "") as writer:
        for at in range(4):
            writer.round(RoundRow(float(at), 0, at, 0, 0, 1.0, {"accuracy": 0.2}))
            writer.merged(MergedRow(float(at), 2, 0.8 + at / 100))
    page = page_of(tmp_path)
    assert "the mean of their models ended at 0.830" in " ".join(page.alts)
    assert "Dashed: the mean of all their models, which no node has." in page.words()


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path, "") as writer:
        for at, value in enumerate([0.1, math.nan, 0.3]):
            writer.round(RoundRow(float(at), 0, at, 0, 0, 1.0, {"accuracy": value}))
            writer.consensus(ConsensusRow(float(at), 1, value - 0.1))
    assert "accuracy went from 0.100 to 0.300" in " ".join(page_of(tmp_path).alts)


def test_what_others_wrote_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&"
    with ResultsWriter(tmp_path, f'name = "{evil}"\nsummary = "{evil}"\n[data]\ntask = "{evil}"\n') as writer:
        writer.round(RoundRow(1.0, 0, 1, 0, 0, 1.0, {evil: 0.5}))
        writer.note(NoteRow(0.5, evil))
    assert "script" not in page_of(tmp_path).tags


def test_a_large_run_stays_a_small_file(tmp_path: Path) -> None:
    make_run(tmp_path, nodes=2_000, rounds=20, share=0.1, devices=("laptop",))
    page = page_of(tmp_path)
    assert len(page.html) < 600_000
    assert "Drawn: 160 nodes around one drawn by lot" in page.words()


def row(at_s: float, node: int, round_: int, value: float) -> RoundRow:
    return RoundRow(at_s, node, round_, 0, 0, 1.0, {"accuracy": value})


def test_the_band_is_over_each_nodes_latest_value() -> None:
    band = latest_values([row(1, 0, 1, 0.2), row(2, 1, 1, 0.6), row(3, 0, 2, 0.4), row(4, 1, 2, 0.8)])
    assert band.times_s.tolist() == [1, 2, 3, 4]
    assert band.mean.tolist() == pytest.approx([0.2, 0.4, 0.5, 0.6])
    assert band.low.tolist() == pytest.approx([0.2, 0.2, 0.4, 0.4])
    assert band.high.tolist() == pytest.approx([0.2, 0.6, 0.6, 0.8])


def test_the_dead_leave_the_band_and_the_finished_stay() -> None:
    rows = [row(float(at), 0, at, 0.9) for at in range(1, 31)]
    rows += [row(float(at), 1, at, 0.1) for at in range(1, 6)]  # dies at 5 s, with a gap of 1 s
    rows += [row(at / 10, 2, at, 0.5) for at in range(1, 31)]  # does its 30 rounds within 3 s
    band = latest_values(rows)
    low = dict(zip(band.times_s.tolist(), band.low.tolist(), strict=True))
    assert low[10.0] == 0.1
    assert low[11.0] == 0.5
    assert low[30.0] == 0.5


def test_many_moments_are_thinned_to_a_bound() -> None:
    rng = random.Random(3)
    rows = [row(rng.random() * 100, node, at, rng.random()) for at in range(300) for node in range(3)]
    band = latest_values(rows)
    assert len(band.times_s) == 400
    assert (band.low <= band.mean).all()
    assert (band.mean <= band.high).all()


def test_settings_at_their_defaults_are_not_listed() -> None:
    changed = changed_settings(
        {"name": "x", "nodes": 16, "data": {"alpha": 0.1}, "links": {}, "gossip": {"rounds": 40}}
    )
    assert changed == [("data.alpha", 0.1, 0.5)]


def test_the_style_is_put_back(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    make_run(tmp_path, nodes=2, rounds=2, dry=True, samples=0)
    page_of(tmp_path)
    assert dict(mpl.rcParams) == before


def test_without_matplotlib_there_is_a_remedy(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\nfrom sim.report import write_report\nfrom sim.results import ResultsWriter, read_run\n"
        "folder = Path(sys.argv[1]); ResultsWriter(folder, '').close()\n"
        "write_report(read_run(folder), folder / 'report.html')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert "matplotlib is not installed (allowed: pip install 'covey[plot]')" in ended.stderr


def test_pyplot_and_torch_stay_out() -> None:
    script = (
        "import sys, sim.report\n"
        "print([name for name in ('torch', 'matplotlib', 'matplotlib.pyplot', 'networkx') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert ended.stdout.strip() == "[]", ended.stderr


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    ResultsWriter(tmp_path, "").close()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(read_run(tmp_path), tmp_path / "nowhere" / "report.html")


# --- a sweep --------------------------------------------------------------------------------------------
def make_table(learned: bool = True, seeds: int = 3) -> Table:
    rows = [
        Row(
            (rule, hidden),
            seed,
            f"{rule}-{hidden}-{seed}",
            {
                "bytes_sent": 1000,
                "virtual_s": 10.0 + seed,
                **(
                    {"accuracy_mean": 0.5 + seed / 10, "accuracy_by_round": [0.1, 0.5 + seed / 10]}
                    if learned
                    else {}
                ),
            },
        )
        for rule in ("mean", "corrected")
        for hidden in ([32], [64, 64])
        for seed in range(seeds)
    ]
    return Table("non-iid", ("rule", "data.options.hidden"), rows, [Failure("cell", "exit code 1")])


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_sweep_is_drawn_as_page_and_picture(tmp_path: Path, seeds: int) -> None:
    write_sweep_report(make_table(seeds=seeds), tmp_path / "sweep.html")
    page = Page(tmp_path / "sweep.html")
    assert page.figures == ["Accuracy over rounds"]
    assert "rule corrected, hidden [64, 64]" in page.html
    assert ("0.6000 ± 0.1000" if seeds == 3 else "0.5000") in page.words()
    assert "1 cell failed" in page.words()
    assert (tmp_path / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_sweep_without_accuracy_is_a_table(tmp_path: Path) -> None:
    write_sweep_report(make_table(learned=False), tmp_path / "sweep.html")
    page = Page(tmp_path / "sweep.html")
    assert page.figures == []
    assert "accuracy_mean" not in page.words()
    assert "1,000 ± 0" in page.words()


def test_a_sweep_of_which_nothing_finished_is_written(tmp_path: Path) -> None:
    write_sweep_report(Table("x", ("rule",), [], [Failure("cell", "exit code 1")]), tmp_path / "sweep.html")
    assert "No cell has an accuracy to draw" in Page(tmp_path / "sweep.html").words()


def test_every_kind_of_message_has_a_colour() -> None:
    assert set(KIND_COLOURS) == set(MESSAGE_KINDS)
