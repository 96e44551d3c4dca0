"""A results folder: what is written is read again, and what is damaged is named."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.errors import ConfigError
from sim.results import (
    MESSAGE_KINDS,
    RUN_FILES,
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

SCENARIO = 'name = "small"\nseed = 7\n'
OVERLAY = Overlay(
    [OverlayNode(0, True, "phone", "public", 3), OverlayNode(1, False, "", "open", 2)], [(0, 1)]
)
TIMING = {"wall_s": 1.5, "events_per_s": 1e5, "engine": {"device": "cpu"}}


def result(partial: bool = False) -> Result:
    return Result(
        trace_hash="ab" * 32,
        partial=partial,
        accuracy_mean=0.5,
        accuracy_min=0.25,
        accuracy_max=0.75,
        accuracy_by_round=[0.1, 0.5],
        evaluated_rounds=[0, 4],
        consensus_distance=None,
        events=1000,
        node_rounds=10,
        bytes_sent=123,
        messages_sent={"offer": 4},
        fetches=4,
        refused={},
        failed_work=0,
        virtual_s=12.5,
        nodes=2,
        alive=1,
        finished=1,
        timeline_left=0,
    )


def sample(at_s: float = 1.0, **messages: int) -> SampleRow:
    return SampleRow(at_s, 2, 0, 1, 3, 100, messages, 50, 20_000)


def round_row(at_s: float = 1.0, **metrics: float) -> RoundRow:
    return RoundRow(at_s, 0, 1, 2, 0, 0.75, metrics)


def write_some(folder: Path) -> None:
    with ResultsWriter(folder, SCENARIO) as writer:
        writer.round(round_row(1.0, accuracy=0.25))
        writer.round(round_row(2.0, accuracy=0.5))
        writer.sample(sample(1.0, offer=3))
        writer.sample(sample(2.0, offer=5, bye=1))
        writer.consensus(ConsensusRow(1.0, 2, 0.125))
        writer.consensus(ConsensusRow(2.0, 2, 0.0625))
        writer.note(NoteRow(1.5, "crash 30 %, say"))
        writer.note(NoteRow(1.75, "a line\nand another", 3))
        writer.block(TraceBlock(512, 1.25, "cd" * 32))
        writer.block(TraceBlock(1024, 2.25, "ef" * 32))


def test_a_finished_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    writer = ResultsWriter(tmp_path / "deep" / "run", SCENARIO)
    writer.round(round_row(accuracy=0.25, loss=2.0))
    writer.sample(sample(offer=3))
    writer.finish(result(), TIMING, OVERLAY)
    run = read_run(tmp_path / "deep" / "run")
    assert run.scenario_text == SCENARIO
    assert run.scenario_toml == {"name": "small", "seed": 7}
    assert run.rounds == [round_row(accuracy=0.25, loss=2.0)]
    assert run.samples == [sample(**{**dict.fromkeys(MESSAGE_KINDS, 0), "offer": 3})]
    assert run.overlay == OVERLAY
    assert not run.partial
    assert run.result["accuracy_by_round"] == [0.1, 0.5]
    assert run.result["wall_s"] == 1.5
    assert run.result["engine"] == {"device": "cpu"}
    assert {"python", "covey", "torch"} <= set(run.result["versions"])
    assert {path.name for path in run.folder.iterdir()} <= set(RUN_FILES), "no temporary file is left"


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    ResultsWriter(tmp_path, SCENARIO).finish(result(partial=True), TIMING, OVERLAY)
    assert read_run(tmp_path).partial


def test_a_crashed_run_is_read_without_its_result(tmp_path: Path) -> None:
    write_some(tmp_path)
    run = read_run(tmp_path)
    assert run.partial
    assert run.result == {}
    assert run.overlay is None
    assert [row.at_s for row in run.rounds] == [1.0, 2.0]
    assert [note.node for note in run.notes] == [None, 3]
    assert run.notes[1].text == "a line\nand another"
    assert [block.events for block in run.blocks] == [512, 1024]


def test_a_sample_brings_everything_before_it_to_the_disk(tmp_path: Path) -> None:
    writer = ResultsWriter(tmp_path, SCENARIO)
    try:
        writer.round(round_row(accuracy=0.5))
        writer.note(NoteRow(0.5, "heal"))
        writer.sample(sample(offer=1))
        run = read_run(tmp_path)  # as another process would see it after a kill
    finally:
        writer.close()
    assert (len(run.rounds), len(run.notes), len(run.samples)) == (1, 1, 1)


finite = st.floats(allow_nan=False, allow_infinity=False)
count = st.integers(0, 2**53)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rounds=st.lists(
        st.builds(
            RoundRow, finite, count, count, count, count, finite, st.dictionaries(st.text(max_size=8), finite)
        ),
        max_size=4,
    ),
    samples=st.lists(
        st.builds(
            SampleRow,
            *([finite] + [count] * 5),
            st.fixed_dictionaries(dict.fromkeys(MESSAGE_KINDS, count)),
            *([count] * 2),
        ),
        max_size=4,
    ),
    consensus=st.lists(st.builds(ConsensusRow, finite, count, finite), max_size=4),
    merged=st.lists(st.builds(MergedRow, finite, count, finite), max_size=4),
    notes=st.lists(st.builds(NoteRow, finite, st.text(max_size=20), st.none() | count), max_size=4),
)
def test_rows_come_back_exactly(
    tmp_path: Path,
    rounds: list[RoundRow],
    samples: list[SampleRow],
    consensus: list[ConsensusRow],
    merged: list[MergedRow],
    notes: list[NoteRow],
) -> None:
    with ResultsWriter(tmp_path, SCENARIO) as writer:
        for round_ in rounds:
            writer.round(round_)
        for row in samples:
            writer.sample(row)
        for distance in consensus:
            writer.consensus(distance)
        for mean in merged:
            writer.merged(mean)
        for note in notes:
            writer.note(note)
    run = read_run(tmp_path)
    assert run.merged == merged
    assert (run.rounds, run.samples, run.consensus, run.notes) == (rounds, samples, consensus, notes)


def test_a_run_from_before_there_were_measured_means_is_read(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path, SCENARIO):
        pass
    (tmp_path / "merged.csv").unlink()
    assert read_run(tmp_path).merged == []


def test_what_is_not_finite_comes_back_as_nan(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path, SCENARIO) as writer:
        writer.round(round_row(accuracy=0.5, loss=math.inf))
        writer.consensus(ConsensusRow(1.0, 2, math.nan))
    run = read_run(tmp_path)
    assert run.rounds[0].metrics["accuracy"] == 0.5
    assert math.isnan(run.rounds[0].metrics["loss"])
    assert math.isnan(run.consensus[0].distance)


@pytest.mark.parametrize(
    "name", ["rounds.jsonl", "samples.csv", "consensus.csv", "notes.jsonl", "trace.jsonl"]
)
def test_a_last_line_cut_anywhere_is_left_out(tmp_path: Path, name: str) -> None:
    write_some(tmp_path)
    whole = (tmp_path / name).read_bytes()
    last_line = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last_line + 1, (last_line + len(whole)) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:cut])
        run = read_run(tmp_path)
        rows = {
            "rounds.jsonl": run.rounds,
            "samples.csv": run.samples,
            "consensus.csv": run.consensus,
            "notes.jsonl": run.notes,
            "trace.jsonl": run.blocks,
        }[name]
        assert len(rows) == 1, f"cut at {cut} of {len(whole)}"


@pytest.mark.parametrize("name", ["samples.csv", "consensus.csv"])
def test_a_table_cut_in_its_head_is_empty(tmp_path: Path, name: str) -> None:
    write_some(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:3])
    run = read_run(tmp_path)
    assert (run.samples if name == "samples.csv" else run.consensus) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("rounds.jsonl", b'{"at_s": "soon"}'),
        ("rounds.jsonl", b"\x00\x00\x00"),
        ("rounds.jsonl", b"\xff\xfe"),
        ("rounds.jsonl", b"[1]"),
        ("samples.csv", b"1,2"),
        ("samples.csv", b"a,b,c"),
        ("consensus.csv", b"1.0,two,3.0"),
        ("consensus.csv", b"\xff,2,3.0"),
        ("notes.jsonl", b"{}"),
        ("trace.jsonl", b'{"events": 1}'),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, name: str, line: bytes) -> None:
    write_some(tmp_path)
    lines = (tmp_path / name).read_bytes().splitlines()
    lines.insert(1, line)
    (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ConfigError, match="line 2 is damaged") as caught:
        read_run(tmp_path)
    assert caught.value.path.endswith(name)


@pytest.mark.parametrize("name", ["result.json", "overlay.json"])
def test_a_damaged_result_is_named(tmp_path: Path, name: str) -> None:
    ResultsWriter(tmp_path, SCENARIO).finish(result(), TIMING, OVERLAY)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
    with pytest.raises(ConfigError, match="is damaged") as caught:
        read_run(tmp_path)
    assert caught.value.path.endswith(name)


def test_a_damaged_scenario_and_a_missing_file_are_named(tmp_path: Path) -> None:
    write_some(tmp_path)
    (tmp_path / "notes.jsonl").unlink()
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_run(tmp_path)
    assert caught.value.path.endswith("notes.jsonl")
    (tmp_path / "scenario.toml").write_text("seed = = 1")
    with pytest.raises(ConfigError, match="is damaged"):
        read_run(tmp_path)


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="is not a results folder"):
            read_run(folder)


def test_results_are_not_overwritten_unless_told_to(tmp_path: Path) -> None:
    write_some(tmp_path)
    writer = ResultsWriter(tmp_path, SCENARIO)  # a crashed run makes room
    writer.finish(result(), TIMING, OVERLAY)
    (tmp_path / "report.html").write_text("of the old run")
    (tmp_path / "mine.txt").write_text("keep")
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(ConfigError, match=r"--out: .* earlier run .*--replace"):
        ResultsWriter(tmp_path, SCENARIO)
    assert (tmp_path / "result.json").read_bytes() == before
    ResultsWriter(tmp_path, SCENARIO, replace=True).close()
    assert read_run(tmp_path).result == {}
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("replace", [False, True])
def test_a_scenario_of_ones_own_is_not_overwritten(tmp_path: Path, replace: bool) -> None:
    (tmp_path / "scenario.toml").write_text("seed = 1")
    with pytest.raises(ConfigError, match=r"--out: .*no run wrote"):
        ResultsWriter(tmp_path, SCENARIO, replace)
    assert (tmp_path / "scenario.toml").read_text() == "seed = 1"


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .* cannot be written"):
        ResultsWriter(tmp_path / "file", SCENARIO)


def test_the_result_is_plain_json_of_the_contracts_fields(tmp_path: Path) -> None:
    ResultsWriter(tmp_path, SCENARIO).finish(result(), {}, OVERLAY)
    data = json.loads((tmp_path / "result.json").read_text())
    assert set(Result.__struct_fields__) <= set(data)
    assert data["consensus_distance"] is None
