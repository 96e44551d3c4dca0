"""`covey sim`: one JSON object with the promised keys, and every mistake by its path."""

import json
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner, Result

from protocols.errors import ConfigError
from sim.cli import register

QUICK = ["--nodes", "4", "--degree", "2", "--rounds", "3", "--hidden", "8", "--local-steps", "1"]


def sim(*arguments: str) -> Result:
    app = Typer()
    register(app)
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, list(arguments))
    finally:
        torch.set_num_threads(threads)


def run_json(*arguments: str) -> dict[str, Any]:
    result = sim("digits", *QUICK, "--json", *arguments)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    data: dict[str, Any] = json.loads(line)
    return data


def refused(*arguments: str) -> str:
    result = sim("digits", *QUICK, *arguments)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def test_the_json_has_what_was_promised() -> None:
    data = run_json("--seed", "7")
    promised = {
        "trace_hash",
        "accuracy_mean",
        "accuracy_min",
        "accuracy_by_round",
        "events",
        "bytes_sent",
        "wall_s",
    }
    assert promised <= set(data)
    assert len(data["trace_hash"]) == 64
    assert len(data["accuracy_by_round"]) == 3
    assert 0 <= data["accuracy_min"] <= data["accuracy_mean"] <= 1
    assert data["events"] > 0
    assert data["bytes_sent"] > 0
    assert data["finished"] == 4


def test_the_same_seed_prints_the_same_but_for_the_wall_time() -> None:
    first, again, other = run_json("--seed", "1"), run_json("--seed", "1"), run_json("--seed", "2")
    for data in (first, again, other):
        del data["wall_s"]
    assert first == again
    assert first["trace_hash"] != other["trace_hash"]


def test_options_reach_the_run() -> None:
    data = run_json("--topology", "discover", "--start", "common", "--mean-online-s", "2", "--loss", "0.1")
    assert data["messages_sent"]["ask"] > 0
    small, large = run_json(), run_json("--option", "hidden=[64, 64]")
    assert large["bytes_sent"] > 3 * small["bytes_sent"]
    assert run_json("--rule", "mean")["trace_hash"] == small["trace_hash"], (
        "the rule moves weights, not messages"
    )


def test_text_for_people_names_the_same_numbers() -> None:
    result = sim("digits", *QUICK)
    assert result.exit_code == 0
    for name in ("accuracy_mean", "accuracy_min", "events", "bytes_sent", "virtual_s", "trace_hash"):
        assert name in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "star"], "topology: Invalid enum value 'star'"),
        (["--start", "same"], "start: Invalid enum value 'same'"),
        (["--degree", "3", "--nodes", "5"], "degree: no connected 3-regular graph of 5 nodes (allowed: 2 to"),
        (["--learning-rate", "0"], "training.learning_rate: Expected `float` > 0.0"),
        (["--loss", "1"], "links.loss: Expected `float` < 1.0"),
        (["--mean-online-s", "0"], "churn.mean_online_s: Expected `float` > 0.0"),
        (["--rule", "meen"], "rule: "),
        (["--hidden", "64,x"], "--hidden: '64,x' is not a list of whole numbers (allowed: 64,64)"),
        (["--option", "hidden"], "--option: 'hidden' is not key=value"),
        (["--option", "depth=3"], "task.options.depth: not an option of the task `digits`"),
        (["--partitioner", "shard", "--nodes", "2000"], "task.shard: "),
    ],
)
def test_a_mistake_is_told_by_its_path(arguments: list[str], message: str) -> None:
    assert refused(*arguments).startswith(message)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    result = sim("mnist", *QUICK)
    assert isinstance(result.exception, ConfigError)
    assert "allowed: digits, csv, npz, libsvm" in str(result.exception)


@pytest.mark.parametrize(
    "arguments", [["--nodes", "0"], ["--rounds", "0"], ["--loss", "-1"], ["--nodes", "x"]]
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    assert sim("digits", *arguments).exit_code == 2
