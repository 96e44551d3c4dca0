"""A good guest on its device: when it may work, how long, how many bytes, and that its data are heard all the same."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from datetime import datetime, time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import torch
from torch import nn

from aggregation.base import Contribution
from aggregation.rules import build, merge
from node import manners
from node.compute import StoredModels, Work
from node.manners import (
    WRITE_EVERY_S,
    Conditions,
    DeviceSettings,
    Machine,
    Manners,
    Meter,
    is_on_ac_power,
    lower_priority,
    may_move,
    may_work,
    parse_hours,
    rounds_to_sit_out,
)
from node.settings import TrainingSettings
from node.store import BlobStore, History
from node.tasks import Task, initial_params, regression_metrics
from node.training import MAX_FACTOR, fair_weight, train
from protocols.events import Aggregate, Aggregated, Input, Train, Trained
from protocols.vocabulary import MAX_SAMPLES, ModelRef, PeerId

GB = 10**9


class FakeClock:
    def __init__(self) -> None:
        self.at_s = 0.0

    def now(self) -> float:
        return self.at_s


# --- may it work? ---------------------------------------------------------------------------------------
def test_without_settings_nothing_holds_a_node_back() -> None:
    worst = Conditions(time(3, 0), False, 100.0, 0, 10**15, 10**15)
    assert may_work(DeviceSettings(), worst) is None
    assert may_work(DeviceSettings(), Conditions()) is None


@pytest.mark.parametrize(
    ("settings", "conditions", "reason"),
    [
        ({"on_ac_power": True}, {"on_ac_power": False}, "on battery power"),
        ({"on_ac_power": True}, {"on_ac_power": True}, None),
        ({"others_busy_at_most": 20}, {"others_busy_percent": 20.0}, None),
        (
            {"others_busy_at_most": 20},
            {"others_busy_percent": 20.1},
            "other programs use more than 20 % of the CPU",
        ),
        ({"free_memory_bytes": GB}, {"free_memory_bytes": GB}, None),
        (
            {"free_memory_bytes": GB},
            {"free_memory_bytes": GB - 1},
            "less than 1000000000 bytes of memory are free",
        ),
        ({"month_bytes": 1000}, {"month_bytes": 949}, None),
        ({"month_bytes": 1000}, {"month_bytes": 950}, "the 1000 bytes of this month are spent"),
        ({"month_bytes": 1000}, {"month_bytes": 500, "round_bytes": 449}, None),
        (
            {"month_bytes": 1000},
            {"month_bytes": 500, "round_bytes": 450},
            "the 1000 bytes of this month are spent",
        ),
        ({"hours": "22:00-07:00"}, {"at": time(12, 0)}, "outside of 22:00-07:00"),
        ({}, {"sits_out": True}, "sits a round out"),
    ],
)
def test_each_limit_has_its_reason(
    settings: dict[str, Any], conditions: dict[str, Any], reason: str | None
) -> None:
    assert may_work(DeviceSettings(**settings), Conditions(**conditions)) == reason


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("22:00-07:00", ["22:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "21:59"]),
        ("09:30-17:00", ["09:30", "12:00", "16:59"], ["09:29", "17:00", "00:00"]),
        ("00:00-12:00", ["00:00", "11:59"], ["12:00", "23:59"]),
        ("12:00-00:00", ["12:00", "23:59"], ["00:00", "11:59"]),
    ],
)
def test_hours_may_run_over_midnight(hours: str, inside: list[str], outside: list[str]) -> None:
    settings = DeviceSettings(hours=hours)
    for text in [*inside, *outside]:
        reason = may_work(settings, Conditions(at=time.fromisoformat(text)))
        assert reason == (None if text in inside else f"outside of {hours}"), text


@pytest.mark.parametrize("text", ["22-7", "24:00-07:00", "22:60-07:00", "22:00", "22:00-07:00 ", "2:00-7:00"])
def test_hours_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="are not written as"):
        parse_hours(text)
    with pytest.raises(ValueError, match="are not written as"):
        DeviceSettings(hours=text)


def test_no_hours_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="begin when they end"):
        DeviceSettings(hours="07:00-07:00")


@pytest.mark.parametrize("name", ["upload_bytes_per_s", "download_bytes_per_s"])
def test_a_rate_at_which_peers_give_up_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 1000 is below 32768"):
        DeviceSettings(**{name: 1000})
    assert getattr(DeviceSettings(**{name: 32768}), name) == 32768


def test_a_model_has_to_fit_into_what_the_month_has_left() -> None:
    settings = DeviceSettings(month_bytes=1000)
    assert may_move(settings, 900, 49)
    assert not may_move(settings, 900, 50)
    assert may_move(DeviceSettings(), 10**18, 10**18)


# --- rounds that are sat out ----------------------------------------------------------------------------
def test_every_third_round_sits_out_two() -> None:
    settings = DeviceSettings(train_every=3)
    assert {rounds_to_sit_out(settings, draw) for draw in (1e-9, 0.5, 1.0)} == {2}
    assert rounds_to_sit_out(DeviceSettings(), 1e-9) == 0


def test_the_rounds_skipped_are_geometric() -> None:
    rng = random.Random(7)
    settings = DeviceSettings(skip=0.8)
    skipped = [rounds_to_sit_out(settings, 1 - rng.random()) for _ in range(20_000)]
    assert sum(skipped) / len(skipped) == pytest.approx(0.8 / 0.2, rel=0.05)
    counts = Counter(skipped)
    assert counts[0] / len(skipped) == pytest.approx(0.2, abs=0.01)
    assert counts[1] / counts[0] == pytest.approx(0.8, abs=0.03)


def test_a_node_sits_out_as_long_as_its_own_last_round_took() -> None:
    clock = FakeClock()
    guest = Manners(DeviceSettings(train_every=3, look_every_s=5), clock)
    guest.round_due()
    assert guest.look() is None, "nobody knows yet how long a round takes"
    guest.round_begins()
    clock.at_s = 4.0
    guest.round_due()
    assert guest.look() == "sits a round out"
    assert guest.next_look_s() == 5.0
    clock.at_s = 11.0
    assert (guest.look(), guest.next_look_s()) == ("sits a round out", 1.0)
    clock.at_s = 12.0
    assert guest.look() is None
    assert guest.next_look_s() == 5.0


def test_a_round_is_not_begun_that_the_month_has_no_bytes_for() -> None:
    moved = 0
    guest = Manners(DeviceSettings(month_bytes=1000), FakeClock(), month_bytes=lambda: moved)
    guest.round_due()
    guest.round_begins()
    moved = 400
    guest.round_due()
    assert guest.look() is None
    guest.round_begins()
    moved = 800
    guest.round_due()
    assert guest.look() == "the 1000 bytes of this month are spent"
    moved = 0
    assert guest.look() is None, "it is the first of the month"


# --- fewer steps ----------------------------------------------------------------------------------------
def test_training_ends_at_its_limits_and_when_it_has_to_wait() -> None:
    clock = FakeClock()
    assert Manners(DeviceSettings(), clock).pace()(10**6)
    few = Manners(DeviceSettings(steps_at_most=3), clock).pace()
    assert [few(2), few(3), few(4)] == [True, False, False]
    guest = Manners(DeviceSettings(train_at_most_s=2.0), clock)
    clock.at_s = 10.0
    short = guest.pace()
    clock.at_s = 11.9
    assert short(1)
    clock.at_s = 12.0
    assert not short(1)
    conditions = Conditions()
    guest = Manners(DeviceSettings(on_ac_power=True), clock, lambda: conditions)
    pace = guest.pace()
    assert pace(1)
    conditions = Conditions(on_ac_power=False)
    guest.look()
    assert not pace(1)


def bias(target: float) -> Task:
    """One number is learnt: each node would have its own target."""
    data = torch.zeros(8, 1), torch.full((8, 1), target)
    return Task(
        "bias",
        lambda: nn.Linear(1, 1),
        data,
        data,
        loss=nn.functional.mse_loss,
        metrics=regression_metrics,
    )


def test_a_round_that_ends_early_is_that_of_so_many_steps() -> None:
    task, settings = bias(1.0), TrainingSettings(local_steps=10, batch_size=4)
    start = initial_params(task, 0)
    few, weight = train(
        task, start, settings, round=2, seed=1, node="a", goes_on=lambda num_steps: num_steps < 4
    )
    same, samples = train(
        task, start, msgspec.structs.replace(settings, local_steps=4), round=2, seed=1, node="a"
    )
    assert all(torch.equal(few[name], same[name]) for name in few)
    assert (weight, samples) == (20, 8)
    one, weight = train(task, start, settings, round=2, seed=1, node="a", goes_on=lambda num_steps: False)
    assert not torch.equal(one["bias"], start["bias"]), "one step is always made"
    assert weight == 80


@pytest.mark.parametrize(
    ("made", "weight"), [(10, 100), (5, 200), (3, 333), (1, 1000), (0.5, 100 * MAX_FACTOR)]
)
def test_the_weight_makes_up_for_steps_left_out(made: int, weight: int) -> None:
    assert fair_weight(100, 10, made) == weight


def test_the_weight_is_one_that_peers_accept() -> None:
    assert fair_weight(MAX_SAMPLES, 10, 1) == MAX_SAMPLES


# --- fairness -------------------------------------------------------------------------------------------
def shared_bias(home: Path, steps: tuple[int, int], weighs: bool) -> float:
    """Where two nodes with targets 1 and -1 meet that merge after every round of so many of 10 steps each."""
    nodes, refs = [], []
    for index, (target, at_most) in enumerate(zip((1.0, -1.0), steps, strict=True)):
        task = bias(target)
        (home / str(index)).mkdir()
        models = StoredModels(BlobStore(home / str(index), lambda path: None), 8)
        guest = Manners(DeviceSettings(steps_at_most=at_most), FakeClock())
        settings = TrainingSettings(learning_rate=0.02)
        nodes.append((Work(task, settings, ("fedavg",), models, 0, str(index), pace=guest.pace), models))
        refs.append(models.save(initial_params(task, 0), 0, 8))
    for round_ in range(60):
        trained: list[ModelRef] = []
        for (work, _), ref in zip(nodes, refs, strict=True):
            result = work.perform(Train(0, ref, round_))
            assert isinstance(result, Trained)
            trained.append(result.ref if weighs else msgspec.structs.replace(result.ref, num_samples=8))
        for index, (work, models) in enumerate(nodes):
            other = 1 - index
            params = nodes[other][1].load(trained[other])
            models.save(params, round_, 8)
            merged = work.perform(
                Aggregate(0, trained[index], (Input(PeerId(str(other)), trained[other], 0),))
            )
            assert isinstance(merged, Aggregated)
            assert merged.ref.num_samples == 8, "what made up for steps does so once"
            refs[index] = merged.ref
    return float(nodes[0][1].load(refs[0])["bias"])


def test_a_node_that_makes_fewer_steps_is_neither_drowned_nor_overcounted(tmp_path: Path) -> None:
    for name in ("weighed", "unweighed"):
        (tmp_path / name).mkdir()
    unweighed = shared_bias(tmp_path / "unweighed", (10, 2), weighs=False)
    weighed = shared_bias(tmp_path / "weighed", (10, 2), weighs=True)
    assert unweighed > 0.5, "the slow node's target is -1, and is hardly heard"
    assert abs(weighed) < 0.15


def gossip_of_guests(rule: tuple[str, ...], probability: float, seed: int) -> float:
    """The mean model of 24 nodes, all linked, averaged over time. Half of them take part in all rounds and have the
    target -1; the others take part with this probability and have 1. Who is away trains and merges nothing, comes back
    with the model that it had, and merges the newest of each that came meanwhile."""
    num_nodes, num_rounds = 24, 120
    rng = random.Random(seed)
    often = range(num_nodes // 2)
    rules = [build(rule) for _ in range(num_nodes)]
    models = [{"w": torch.zeros(1, dtype=torch.float64)} for _ in range(num_nodes)]
    states = [each.init(model) for each, model in zip(rules, models, strict=True)]
    inboxes: list[dict[str, Contribution]] = [{} for _ in range(num_nodes)]
    total = 0.0
    for round_ in range(num_rounds):
        present = [node for node in range(num_nodes) if node in often or rng.random() < probability]
        for node in present:
            target = -1.0 if node in often else 1.0
            models[node] = {"w": target + 0.6 * (models[node]["w"] - target)}
            for other in range(num_nodes):
                if other != node:
                    inboxes[other][str(node)] = Contribution(models[node], 100.0, 0, str(node))
        for node in present:
            local = Contribution(models[node], 100.0, 0, str(node))
            received = [inboxes[node][source] for source in sorted(inboxes[node])]
            models[node], states[node] = merge(rules[node], received, states[node], local)
            inboxes[node] = {}
        if round_ >= num_rounds // 2:
            total += sum(float(model["w"]) for model in models) / num_nodes
    return total / (num_rounds - num_rounds // 2)


@pytest.mark.parametrize("last", ["mean", "fedavg"])
def test_nodes_that_come_to_one_round_in_five_are_heard_if_participation_is_weighed(last: str) -> None:
    unweighed = gossip_of_guests((last,), 0.2, seed=5)
    weighed = gossip_of_guests(("weight.participation", last), 0.2, seed=5)
    assert unweighed < -0.35
    assert abs(weighed) < 0.12
    assert abs(weighed) < abs(unweighed) / 3


# --- the machine ----------------------------------------------------------------------------------------
NOON = datetime(2026, 11, 30, 12, 34).astimezone().timestamp()


def test_the_machine_is_read() -> None:
    machine = Machine(lambda: NOON)
    found = machine.read()
    assert (found.at, machine.month()) == (time(12, 34), "2026-11")
    assert 0 < found.free_memory_bytes <= psutil.virtual_memory().total
    assert found.others_busy_percent == 100.0, "nothing is measured yet"
    assert isinstance(found.on_ac_power, bool)


def test_other_programs_are_measured_and_this_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = {"user": 0.0, "system": 0.0, "idle": 0.0, "iowait": 0.0, "guest": 0.0}
    own = {"user": 0.0, "system": 0.0}
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(_asdict=lambda: dict(cores)))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(cpu_times=lambda: SimpleNamespace(**own)))
    machine = Machine(lambda: NOON)
    cores.update(user=5.0, system=1.0, idle=3.0, iowait=1.0, guest=4.0)
    own.update(user=3.0, system=1.0)
    # of 10 seconds 6 were busy, and 4 of those were ours; what a guest used is in `user` too
    assert machine.read().others_busy_percent == pytest.approx(20.0)
    cores["user"] += 0.5
    assert machine.read().others_busy_percent == pytest.approx(20.0), "too soon to tell"
    cores["idle"] += 99.5
    assert machine.read().others_busy_percent == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answer", "on_ac_power"),
    [
        (None, True),
        (SimpleNamespace(power_plugged=True), True),
        (SimpleNamespace(power_plugged=None), True),
        (SimpleNamespace(power_plugged=False), False),
        (AttributeError("no such call here"), True),
        (FileNotFoundError("no battery here"), True),
    ],
)
def test_what_cannot_tell_of_a_battery_is_plugged_in(
    answer: object, on_ac_power: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def battery() -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(psutil, "sensors_battery", battery, raising=False)
    assert is_on_ac_power() is on_ac_power


def test_a_system_without_the_call_is_plugged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil, "sensors_battery", raising=False)
    assert is_on_ac_power()


def test_priority_is_lowered_in_a_process_of_its_own() -> None:
    script = (
        "import os, threading; from node.manners import lower_priority; lower_priority(0, print); "
        "before = os.nice(0); lower_priority(3, print); print(os.nice(0) - before); "
        "thread = threading.Thread(target=lambda: print(os.nice(0) - before)); thread.start(); thread.join()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split() == ["3", "3"]


def test_a_priority_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nice: int) -> int:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(manners.os, "nice", refuse)
    warnings: list[str] = []
    lower_priority(0, warnings.append)
    assert warnings == []
    lower_priority(5, warnings.append)
    assert warnings == [
        "device.nice = 5 cannot be had ([Errno 1] not permitted); the node goes on at the priority it has"
    ]


# --- the month ------------------------------------------------------------------------------------------
class Counted:
    """A meter over a real history, and all it reads."""

    def __init__(self, home: Path) -> None:
        self.clock, self.moved, self.month = FakeClock(), 0, "2026-11"
        self.warnings: list[str] = []
        self.history = History(home)
        self.meter = self.start()

    def start(self) -> Meter:
        """As a process begins: it has moved nothing yet."""
        self.moved = 0
        return Meter(self.history, lambda: self.moved, lambda: self.month, self.clock, self.warnings.append)


def test_bytes_are_counted_over_restarts_and_begin_anew_on_the_first(tmp_path: Path) -> None:
    counted = Counted(tmp_path)
    counted.moved = 100
    assert counted.meter.month_bytes() == 100
    counted.moved = 150
    assert counted.meter.month_bytes() == 150
    counted.meter.close()
    meter = counted.start()
    assert meter.month_bytes() == 150
    counted.moved = 7
    assert meter.month_bytes() == 157
    counted.month = "2026-12"
    counted.moved = 10
    assert meter.month_bytes() == 0, "the last 3 were November's"
    counted.moved = 14
    assert meter.month_bytes() == 4
    meter.close()
    assert (counted.history.traffic("2026-11"), counted.history.traffic("2026-12")) == (160, 4)
    counted.history.close()


def test_what_was_counted_is_on_the_disk_before_long(tmp_path: Path) -> None:
    counted = Counted(tmp_path)
    counted.moved = 100
    counted.meter.month_bytes()
    assert counted.history.traffic("2026-11") == 0, "not at every look"
    counted.clock.at_s = WRITE_EVERY_S
    counted.moved = 120
    counted.meter.month_bytes()
    assert counted.history.traffic("2026-11") == 120
    counted.history.close()


def test_a_share_of_the_limit_is_on_the_disk_at_once(tmp_path: Path) -> None:
    counted = Counted(tmp_path)
    meter = Meter(
        counted.history, lambda: counted.moved, lambda: counted.month, counted.clock, print, limit_bytes=1000
    )
    for moved, kept in ((9, 0), (10, 10), (19, 10), (25, 25)):
        counted.moved = moved
        assert meter.month_bytes() == moved
        assert counted.history.traffic("2026-11") == kept
    counted.history.close()


def test_a_disk_that_refuses_is_told_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(month: str, num_bytes: int) -> None:
        raise sqlite3.OperationalError("disk full")

    counted = Counted(tmp_path)
    counted.moved = 100
    with monkeypatch.context() as broken:
        broken.setattr(counted.history, "add_traffic", refuse)
        counted.clock.at_s = WRITE_EVERY_S
        assert counted.meter.month_bytes() == 100
    assert counted.warnings == ["the bytes of this month are not written: disk full"]
    counted.meter.close()
    assert counted.history.traffic("2026-11") == 100
    counted.history.close()


def test_the_count_survives_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib; from node.store import History; "
        "history = History(pathlib.Path(sys.argv[1])); history.add_traffic('2026-11', 5); "
        "history.add_traffic('2026-11', 6); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ,
    )
    assert done.returncode == -signal.SIGKILL
    history = History(tmp_path)
    assert history.traffic("2026-11") == 11
    assert history.traffic("2026-10") == 0
    history.close()
