"""What an operator sees: a line a round, the metrics by their names, and no peer in any label."""

import json
import logging
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from node.telemetry import Telemetry, configure_logging
from protocols.events import FinalMergeDone, LearningDone, LinkChanged, RoundDone, Trouble
from protocols.vocabulary import PeerId, Reason

PEER = PeerId("12D3KooWSecretPeer")


def samples(telemetry: Telemetry) -> dict[str, float]:
    """`name{label,label}` -> value of every sample."""
    values = {}
    for family in text_string_to_metric_families(telemetry.render().decode()):
        for name, labels, value, *_ in family.samples:
            shown = ",".join(labels[key] for key in sorted(labels))
            values[f"{name}{{{shown}}}" if shown else name] = value
    return values


def round_of(number: int, **metrics: float) -> RoundDone:
    return RoundDone(number, num_merged=3, staleness_max=1, metrics=metrics, duration_s=0.25)


@pytest.fixture
def telemetry(tmp_path: Path) -> Telemetry:
    configure_logging("info", as_json=True)
    return Telemetry(tmp_path)


def test_every_round_is_one_json_line(telemetry: Telemetry, tmp_path: Path) -> None:
    telemetry.record(round_of(0, accuracy=0.5), 100.0004)
    telemetry.record(LearningDone(1), 100.5)
    telemetry.record(round_of(1, accuracy=0.75, loss=1.5), 101.25)
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "at_s": at_s,
            "type": "RoundDone",
            "round": number,
            "num_merged": 3,
            "staleness_max": 1,
            "metrics": metrics,
            "duration_s": 0.25,
        }
        for at_s, number, metrics in (
            (100.0, 0, {"accuracy": 0.5}),
            (101.25, 1, {"accuracy": 0.75, "loss": 1.5}),
        )
    ]
    assert telemetry.last_round == round_of(1, accuracy=0.75, loss=1.5)


@pytest.mark.parametrize(("kept", "now"), [("own", 0.5), ("merged", 0.75)])
def test_the_final_merge_is_one_json_line_and_says_what_the_node_has(
    telemetry: Telemetry, tmp_path: Path, kept: Literal["own", "merged"], now: float
) -> None:
    telemetry.record(round_of(1, accuracy=0.5), 1.0)
    record = FinalMergeDone(8, 3, 800, {"accuracy": 0.5}, {"accuracy": 0.75}, kept, 2.5)
    telemetry.record(record, 2.0)
    line = json.loads((tmp_path / "rounds.jsonl").read_text().splitlines()[-1])
    assert line == {"at_s": 2.0, "type": "FinalMergeDone", **msgspec.structs.asdict(record)}
    assert f'covey_model_metric{{metric="accuracy"}} {now}' in telemetry.render().decode()
    assert telemetry.last_round is not None
    assert telemetry.last_round.metrics == {"accuracy": now}


def test_a_second_run_appends_its_rounds(telemetry: Telemetry, tmp_path: Path) -> None:
    telemetry.record(round_of(0), 1.0)
    Telemetry(tmp_path).record(round_of(1), 2.0)
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1]


def test_a_metric_that_is_not_finite_keeps_the_line_valid_json(telemetry: Telemetry, tmp_path: Path) -> None:
    telemetry.record(round_of(0, loss=float("nan"), rmse=float("inf")), 1.0)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    line = json.loads((tmp_path / "rounds.jsonl").read_text(), parse_constant=refuse)
    assert line["metrics"] == {"loss": None, "rmse": None}


def test_metrics_carry_the_last_of_everything(telemetry: Telemetry) -> None:
    telemetry.record(round_of(7, accuracy=0.5, loss=1.5), 1.0)
    telemetry.record(LinkChanged(PEER, True, "", 2), 1.0)
    telemetry.record(Trouble("training", "ValueError: no"), 1.0)
    telemetry.message("out", "offer")
    telemetry.message("in", "offer")
    telemetry.message("in", "offer")
    telemetry.fetch("ok", 0.3)
    telemetry.fetch("gone", 9.0)
    telemetry.bytes_moved(1000, 500)
    telemetry.lateness(0.012)
    hidden = ("_created", "_bucket")
    found = {name: value for name, value in samples(telemetry).items() if not any(h in name for h in hidden)}
    assert found == {
        "covey_round": 7,
        "covey_merged_models": 3,
        "covey_model_metric{accuracy}": 0.5,
        "covey_model_metric{loss}": 1.5,
        "covey_live_peers": 2,
        "covey_trouble_total{training}": 1,
        "covey_messages_total{out,offer}": 1,
        "covey_messages_total{in,offer}": 2,
        "covey_fetches_total{ok}": 1,
        "covey_fetches_total{gone}": 1,
        "covey_fetch_seconds_count": 1,
        "covey_fetch_seconds_sum": 0.3,
        "covey_bytes_sent": 1000,
        "covey_bytes_received": 500,
        "covey_loop_lateness_seconds_max": 0.012,
    }
    telemetry.record(LearningDone(8), 2.0)
    telemetry.record(LinkChanged(PEER, False, "silent", 1), 2.0)
    assert samples(telemetry)["covey_round"] == 8
    assert samples(telemetry)["covey_live_peers"] == 1


@pytest.mark.parametrize("reason", Reason)
def test_every_refusal_is_counted_by_its_reason(telemetry: Telemetry, reason: Reason) -> None:
    telemetry.refusal(PEER, reason, "detail")
    telemetry.refusal(PeerId(""), reason, "detail")
    assert samples(telemetry)[f"covey_refused_total{{{reason.value}}}"] == 2
    assert telemetry.refused == {reason.value: 2}


def test_no_label_holds_a_peer(telemetry: Telemetry) -> None:
    telemetry.record(LinkChanged(PEER, True, "dialled by " + PEER, 1), 1.0)
    telemetry.record(LinkChanged(PEER, False, PEER, 0), 1.0)
    telemetry.record(round_of(1, accuracy=1.0), 1.0)
    telemetry.record(Trouble("merging", f"the model of {PEER}"), 1.0)
    telemetry.refusal(PEER, Reason.NON_FINITE, f"{PEER} sent NaN")
    telemetry.message("in", "hello")
    telemetry.fetch(Reason.GONE.value, 1.0)
    assert PEER not in telemetry.render().decode()
    labels = set()
    for family in text_string_to_metric_families(telemetry.render().decode()):
        labels |= {key for sample in family.samples for key in sample.labels}
    assert labels == {"direction", "kind", "le", "metric", "outcome", "reason", "what"}


def test_two_nodes_in_one_process_count_apart(telemetry: Telemetry, tmp_path: Path) -> None:
    other = Telemetry(tmp_path)
    telemetry.fetch("ok", 0.3)
    assert "covey_fetches_total{ok}" not in samples(other)


# --- the log --------------------------------------------------------------------------------------------
def test_log_lines_are_json_on_standard_error_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("info", as_json=True)
    telemetry = Telemetry(tmp_path)
    telemetry.refusal(PeerId(""), Reason.SECURITY, "plaintext")
    telemetry.record(Trouble("training", "boom"), 1.0)
    telemetry.info("running", round=0)
    captured = capsys.readouterr()
    refused, trouble, running = (json.loads(line) for line in captured.err.splitlines())
    assert captured.out == ""
    assert (refused["event"], refused["peer"], refused["reason"]) == ("refused", "unknown", "security")
    assert (trouble["level"], trouble["what"], trouble["detail"]) == ("warning", "training", "boom")
    assert (running["event"], running["round"]) == ("running", 0)


@pytest.mark.parametrize(("level", "shown"), [("debug", 2), ("info", 2), ("warning", 1), ("error", 0)])
def test_the_level_decides_what_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], level: str, shown: int
) -> None:
    assert level.upper() in logging.getLevelNamesMapping()
    configure_logging(level, as_json=False)
    telemetry = Telemetry(tmp_path)
    telemetry.info("one")
    telemetry.warning("two")
    assert len(capsys.readouterr().err.splitlines()) == shown


def test_the_log_of_scalars_is_measured(telemetry: Telemetry) -> None:
    log = {
        "round": 31,
        "cut": 20,
        "records": 12,
        "sealed": {"round": 28},
        "counts": {"new": 40, "late": 2},
        "on_disk": {"records": 75, "cut": 0},
    }
    telemetry.scalar_log(log)
    telemetry.scalar_log({**log, "sealed": None})
    found = {name: value for name, value in samples(telemetry).items() if name.startswith("covey_log")}
    assert found == {
        "covey_log_round{newest}": 31,
        "covey_log_round{sealed}": 0,
        "covey_log_round{cut}": 20,
        "covey_log_records{held}": 12,
        "covey_log_records{on_disk}": 75,
        "covey_log_records{new}": 40,
        "covey_log_records{late}": 2,
    }
