"""G-Rank's experiment in small: its catalogue, what its measures say, what each attack does, and the command."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from aggregation.ranking import RANKERS, Query, rank
from aggregation.ranking_metrics import positional_distance
from protocols.errors import ConfigError
from sim.cli import EXIT_INTERRUPTED, register
from sim.grank import (
    EXPERIMENTS,
    LIBRARY_SHARE,
    WITH_ISOLATION,
    Judge,
    Run,
    Settings,
    Trial,
    plan,
    run_trial,
)
from sim.grank_catalogue import Catalogue, Release, digest_of, parse_tags, read_catalogue, synthetic
from sim.grank_running import PICTURE_FILE, REPORT_FILE, RESULTS_FILE, Results, run_all

ROOT = Path(__file__).parents[2]
CSV = """album,artist,tags
First,Nobody,"['house' 'electronic' 'garage']"
Second,"Some, One","['rock', ""drum'n'bass""]"
Third,Other,['house' 'rock']
"""
USAGE = 2


@cache
def small(
    experiment: str, ranker: str = "g-rank", isolation: float = 1.0, seed: int = 0, *, dense: bool = False
) -> Run:
    """20 nodes, 300 steps. dense: of so few items and tags that nearly everybody comes to know everything."""
    settings = Settings(experiment, ranker, isolation, nodes=20, steps=300, seed=seed, evaluate_every=10)
    run = Run(settings, [])
    run_trial(settings, synthetic(seed, 48, 8) if dense else synthetic(seed), lambda row: None, run)
    assert run.finished
    return run


def covey(*args: str) -> Result:
    app = Typer()
    register(app)
    return CliRunner().invoke(app, ["sim", "grank", *args])


# --- the catalogue --------------------------------------------------------------------------------------
def test_the_drawn_catalogue_has_the_shape_of_the_experiment() -> None:
    catalogue = synthetic(0)
    assert (len(catalogue), len(catalogue.tags)) == (256, 39)
    assert catalogue.tagged.sum(axis=0).tolist() == [3] * 256, "three different tags each"
    assert catalogue.tagged.any(axis=1).all()
    assert synthetic(0).releases == catalogue.releases
    assert synthetic(1).releases != catalogue.releases


def test_no_tag_is_without_an_item_while_there_are_enough() -> None:
    for seed in range(20):
        assert synthetic(seed, num_items=13, num_tags=39, tags_per_item=3).tagged.any(axis=1).all(), (
            f"seed {seed}"
        )


def test_a_csv_file_is_read_as_numpy_prints_it_and_as_python_does(tmp_path: Path) -> None:
    path = tmp_path / "releases.csv"
    path.write_text("\ufeff" + CSV, encoding="utf-8")
    catalogue = read_catalogue(path)
    assert catalogue.releases == (
        Release("First", "Nobody", ("house", "electronic", "garage")),
        Release("Second", "Some, One", ("rock", "drum'n'bass")),
        Release("Third", "Other", ("house", "rock")),
    )
    assert catalogue.tags == ("drum'n'bass", "electronic", "garage", "house", "rock")
    assert catalogue.tagged[catalogue.tags.index("rock")].tolist() == [False, True, True]
    assert sorted(catalogue.digests) == list(catalogue.digests), "the lowest id is the lowest index"


def test_columns_may_stand_in_any_order_among_others(tmp_path: Path) -> None:
    path = tmp_path / "releases.csv"
    path.write_text("year,Tags,album,artist\n1999,\"['a'\n 'b']\",X,Y\n\n2000,c d,Z,Y\n", encoding="utf-8")
    assert [release.tags for release in read_catalogue(path).releases] == [("a", "b"), ("c", "d")]


def test_a_list_that_nobody_quoted_may_have_commas(tmp_path: Path) -> None:
    path = tmp_path / "releases.csv"
    path.write_text("album,artist,tags\nX,Y,['a', 'b']\n", encoding="utf-8")
    assert read_catalogue(path).releases[0].tags == ("a", "b")


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("['house' 'electronic' 'garage']", ("house", "electronic", "garage")),
        ("['House', 'hip  hop' 'house']", ("house", "hip hop")),
        ("[\"a\" 'b']", ("a", "b")),
        ("a, b c", ("a", "b c")),
        ("a b", ("a", "b")),
        ("[]", ()),
        ("['' ' ']", ()),
    ],
)
def test_tags(text: str, tags: tuple[str, ...]) -> None:
    assert parse_tags(text) == tags


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1 .* no column album, artist, tags"),
        ("album,artist\nA,B\n", "line 1 .* no column tags"),
        ("album,artist,tags\n", "lists no release"),
        ("album,artist,tags\nA,B,['x']\nA,B\n", "line 3 .* has 2 columns"),
        ("album,artist,tags\nA,B,[]\n", "line 2 .* has no tags"),
        ("album,artist,tags\nA,B,['\x1b[2J']\n", "line 2 .* is no tag"),
        (f"album,artist,tags\nA,B,['{'x' * 65}']\n", "line 2 .* is no tag"),
    ],
)
def test_a_csv_file_that_is_not_like_this(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "releases.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem) as raised:
        read_catalogue(path)
    assert "\x1b" not in str(raised.value), "nothing from a file moves the operator's cursor"


def test_a_csv_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_catalogue(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"album,artist,tags\n\xe9,B,['x']\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_catalogue(tmp_path / "latin.csv")


# --- the measures ---------------------------------------------------------------------------------------
TAGGED = np.array([[1, 1, 1, 0], [0, 0, 1, 1]], dtype=bool)


def test_distance_is_that_of_the_rankings_written_out() -> None:
    judge = Judge(TAGGED)
    counts = np.array([[3.0, 5.0, 1.0, 9.0], [0.0, 0.0, 2.0, 2.0]])
    scores = np.array([[[1.0, 2.0, 7.0, 0.0], [0.0, 0.0, 1.0, 4.0]]])
    known = np.array([[[True, False, True], [True, True, False]]])
    places = judge.places(judge.table(scores), known)
    found = judge.distance(places, known, judge.global_places(counts)[0])
    assert found.tolist() == [[positional_distance([2, 0], [1, 0, 2]), positional_distance([3, 2], [2, 3])]]


def test_without_ties_equal_counts_leave_the_order_open() -> None:
    judge = Judge(TAGGED)
    counts = np.array([[3.0, 5.0, 3.0, 0.0], [0.0, 0.0, 2.0, 2.0]])
    everything = np.ones((1, 2, 3), dtype=bool)
    turned = np.array([[[1.0, 9.0, 2.0, 0.0], [0.0, 0.0, 1.0, 4.0]]])
    against = judge.against(
        judge.places(judge.table(turned), everything & judge.real), everything & judge.real, counts
    )
    assert (against.distance.mean, against.beyond_ties) == (2.0, 0.0)
    wrong = np.array([[[9.0, 1.0, 2.0, 0.0], [0.0, 0.0, 1.0, 4.0]]])
    against = judge.against(
        judge.places(judge.table(wrong), everything & judge.real), everything & judge.real, counts
    )
    assert against.beyond_ties == (1 + 2) / 2, (
        "the first is one place too far up, the second two too far down"
    )


def test_agreement_is_the_share_of_nodes_with_the_global_first() -> None:
    judge = Judge(TAGGED)
    counts = np.array([[3.0, 5.0, 1.0, 0.0], [0.0, 0.0, 2.0, 1.0]])
    scores = np.array(
        [[[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 4.0]], [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]]]
    )
    known = np.array([[[True, True, True], [True, True, False]], [[True, False, True], [True, True, False]]])
    against = judge.against(judge.places(judge.table(scores), known), known, counts)
    assert against.agreement.mean == 0.5
    assert (against.agreement.low, against.agreement.high) == (0.5, 0.5), "one node in two, for either term"


@pytest.mark.parametrize("ranker", RANKERS)
def test_the_measured_order_is_the_one_that_a_search_gives(ranker: str) -> None:
    catalogue = synthetic(3)
    trial = Trial(Settings("baseline", ranker, 0.5, nodes=6, steps=60, seed=3), catalogue)
    list(trial.rows())
    judge = Judge(catalogue.tagged)
    for user in trial.honest:
        known = user.known[judge.items] & judge.real
        places = judge.places(judge.table(trial.scores(user)), known)
        for term, tag in enumerate(catalogue.tags):
            matching = np.flatnonzero(user.known & catalogue.tagged[term])
            found = rank(ranker, user.log, Query((tag,), matching, np.ones_like(matching), seed=3), 0.5)
            listed = judge.items[term][known[term]][np.argsort(places[term][known[term]])]
            assert found.items[: len(matching)].tolist() == listed.tolist(), f"seed 3, {user.peer}, {tag}"


# --- the beginning --------------------------------------------------------------------------------------
def test_nodes_begin_with_a_library_a_click_for_every_tag_and_a_tenth_of_a_neighbours() -> None:
    catalogue = synthetic(0)
    trial = Trial(Settings(nodes=5), catalogue)
    for index, user in enumerate(trial.honest):
        assert sorted(user.held.values()) == [4, 39], "a tenth of 39, and its own"
        neighbour = trial.honest[(index + 1) % 5]
        assert user.held[neighbour.log.me] == 4
        assert user.num_entries == user.log.num_clicks == 43
        assert user.known.sum() >= round(LIBRARY_SHARE * len(catalogue))
        assert len(user.core.view.known_records()) == 4, "they know each other"


# --- what happens ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("isolation", [0.0, 1.0])
def test_nodes_come_to_agree(isolation: float) -> None:
    rows = small("baseline", isolation=isolation).rows
    assert [row.step for row in rows] == list(range(0, 301, 10))
    assert rows[-1].honest.distance.mean < rows[0].honest.distance.mean / 2
    assert rows[-1].honest.agreement.median > rows[0].honest.agreement.median
    assert rows[-1].log_entries > 0.9 * 20 * 39, "nearly all have heard nearly everything"
    assert 30 < rows[-1].log_bytes / rows[-1].log_entries < 120
    assert rows[-1].answer_bytes_max > rows[-1].answer_bytes_mean > rows[-1].ask_bytes_mean > 0


def test_popularity_ends_with_the_global_order_of_what_is_known() -> None:
    rows = small("baseline", "popularity").rows
    assert rows[-1].honest.distance.mean < small("baseline").rows[-1].honest.distance.mean


def test_a_targeted_attack_brings_the_last_item_up() -> None:
    run = small("targeted-sybil")
    assert run.target is not None
    assert all(row.target is None for row in run.rows if row.step < 150)
    last = run.rows[-1].target
    assert last is not None
    assert last.first == 1.0
    assert last.place == 0.0


def test_one_vote_each_keeps_the_attacked_item_down() -> None:
    last = small("targeted-sybil", "g-rank-capped").rows[-1].target
    assert last is not None
    assert last.first < 0.2


def test_isolation_delays_a_targeted_attack() -> None:
    def area(isolation: float) -> float:
        rows = small("targeted-sybil", isolation=isolation, seed=2).rows
        return sum(row.target.first for row in rows if row.target)

    assert area(0.0) < area(1.0), "seed 2"


@pytest.mark.parametrize("isolation", [0.0, 1.0])
def test_inflation_disturbs_all_terms_and_one_vote_each_blunts_it(isolation: float) -> None:
    def distance(experiment: str, ranker: str = "g-rank") -> float:
        return small(experiment, ranker, isolation, dense=True).rows[-1].honest.distance.mean

    assert distance("inflation") > 1.1 * distance("baseline")
    assert distance("inflation", "g-rank-capped") < distance("inflation") / 2


def test_an_epic_attack_has_three_attackers_for_each_node() -> None:
    trial = Trial(Settings("epic-sybil", isolation=1.0, nodes=20, steps=300), synthetic(0))
    rows = list(trial.rows())
    assert (len(trial.honest), len(trial.attackers)) == (20, 60)
    assert rows[-1].target is not None
    assert rows[-1].target.first == 1.0
    assert rows[-1].all.distance.mean != rows[-1].honest.distance.mean


def test_push_spreads_faster_than_pull_what_attackers_say_as_well() -> None:
    push, pull = small("push"), small("targeted-sybil")
    assert push.rows[6].log_entries > pull.rows[6].log_entries
    first = [next(row.target for row in run.rows if row.target is not None) for run in (push, pull)]
    assert first[0].first > first[1].first


def test_without_pushes_nobody_takes_what_was_not_asked_for() -> None:
    trial = Trial(Settings(nodes=3), synthetic(0))
    network, (one, other, _) = trial.network, trial.honest
    with pytest.raises(AssertionError, match="honest cores have nothing else to refuse"):
        network.push(one, other)


def test_where_nodes_run_out_of_links_some_pulls_fail_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sim.grank_network.MAX_DEGREE", 2)
    rows = list(Trial(Settings(nodes=12, steps=300), synthetic(0)).rows())
    assert 3 * rows[0].log_entries < rows[-1].log_entries < 0.9 * (12 * 39 + 300)


def test_catalogues_may_be_tiny() -> None:
    catalogue = Catalogue([Release("a", "", ("x",)), Release("b", "", ("x", "y"))])
    for experiment in EXPERIMENTS:
        trial = Trial(Settings(experiment, nodes=2, steps=20, evaluate_every=10), catalogue)
        assert [row.step for row in trial.rows()] == [0, 10, 20]


def test_an_items_name_is_its_index() -> None:
    assert digest_of(258) == bytes(30) + b"\x01\x02"


# --- a seed decides everything --------------------------------------------------------------------------
def test_a_seed_decides_everything() -> None:
    again = Run(small("inflation").settings, [])
    run_trial(again.settings, synthetic(0), lambda row: None, again)
    assert again == small("inflation")
    assert small("baseline", seed=1).rows != small("baseline").rows


def test_the_order_of_python_s_sets_decides_nothing() -> None:
    script = (
        "import msgspec; from sim.grank import *; from sim.grank_catalogue import synthetic\n"
        "for name in ('epic-sybil', 'push'):\n"
        "    trial = Trial(Settings(name, nodes=8, steps=60, evaluate_every=20), synthetic(0))\n"
        "    print(msgspec.json.encode(list(trial.rows())).decode())\n"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert len(told.pop()) > 1000


# --- many runs ------------------------------------------------------------------------------------------
def test_a_ranker_without_f_runs_once() -> None:
    planned = plan(["baseline", "push"], RANKERS, [0.0, 1.0], Settings(nodes=7))
    assert len(planned) == 2 * (2 * len(WITH_ISOLATION) + len(RANKERS) - len(WITH_ISOLATION))
    assert len({(each.experiment, each.name) for each in planned}) == len(planned)
    assert {each.nodes for each in planned} == {7}


@pytest.mark.parametrize(("experiment", "ranker"), [("none", "g-rank"), ("baseline", "none")])
def test_what_there_is_not_is_refused_before_anything_runs(experiment: str, ranker: str) -> None:
    with pytest.raises(ConfigError, match="there is no 'none'"):
        plan([experiment], [ranker], [0.0], Settings())


def _read(folder: Path) -> Results:
    return msgspec.json.decode((folder / RESULTS_FILE).read_bytes(), type=Results)


def test_interrupted_runs_leave_what_there_is(tmp_path: Path) -> None:
    planned = plan(["baseline"], ["g-rank"], [0.0, 1.0], Settings(nodes=4, steps=300))

    def tell(number: int, settings: Settings, row: Any) -> None:
        if number == 1 and row.step == 100:
            raise KeyboardInterrupt

    results = run_all(planned, synthetic(0), "drawn", tmp_path, tell)
    assert results.partial
    assert [run.finished for run in results.runs] == [True, False]
    assert [row.step for row in results.runs[1].rows] == [0, 100]
    assert _read(tmp_path) == results
    assert "Partial" in (tmp_path / REPORT_FILE).read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="holds results already"):
        run_all(planned, synthetic(0), "drawn", tmp_path, tell)


# --- the command ----------------------------------------------------------------------------------------
def test_the_command_leaves_results_a_page_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [
        "--experiment",
        "targeted-sybil",
        "--ranker",
        "g-rank",
        "--ranker",
        "bm25",
        "--nodes",
        "6",
        "--steps",
        "200",
    ]
    told = covey(*options, "--out", str(out), "--json")
    assert told.exit_code == 0, told.output
    data = json.loads(told.stdout)
    assert [(said["ranker"], said["isolation"]) for said in data["summaries"]] == [
        ("g-rank", 0.0),
        ("g-rank", 1.0),
        ("bm25", 0.0),
    ]
    assert not data["partial"]
    assert data["wall_s"] > 0
    page = (out / REPORT_FILE).read_text(encoding="utf-8")
    assert page.count("<svg") == 5
    assert "targeted-sybil" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", ""), (
        "it loads nothing"
    )
    assert (out / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")
    assert len(msgspec.json.decode((out / RESULTS_FILE).read_bytes())["runs"]) == 3


def test_the_command_reads_a_catalogue_and_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("releases.csv").write_text(CSV, encoding="utf-8")
    told = covey(
        "--catalogue", "releases.csv", "--nodes", "4", "--steps", "100", "--isolation", "0.5", "--no-out"
    )
    assert told.exit_code == 0, told.output
    assert "g-rank, F = 0.5" in told.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["releases.csv"]


def test_the_command_says_nothing_where_it_is_asked_to(tmp_path: Path) -> None:
    told = covey("--nodes", "3", "--steps", "10", "--isolation", "1", "--no-out", "--quiet")
    assert (told.exit_code, told.output) == (0, "")


def test_an_interrupted_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Trial) -> Any:
        yield from list(Trial.rows(self))[:1]
        raise KeyboardInterrupt

    class Interrupted(Trial):
        rows = interrupted

    monkeypatch.setattr("sim.grank.Trial", Interrupted)
    told = covey(
        "--nodes", "3", "--steps", "100", "--isolation", "1", "--out", str(tmp_path / "out"), "--json"
    )
    assert told.exit_code == EXIT_INTERRUPTED
    assert json.loads(told.stdout)["partial"]
    assert _read(tmp_path / "out").runs[0].rows


def test_mistakes_are_told_by_their_option(tmp_path: Path) -> None:
    told = covey("--ranker", "best", "--no-out")
    assert isinstance(told.exception, ConfigError)
    assert str(told.exception).startswith("--ranker: 'best' is none (allowed: g-rank, g-rank-capped, ")
    assert str(covey("--experiment", "nope").exception).endswith(", push, all)")
    assert covey("--isolation", "2").exit_code == USAGE
