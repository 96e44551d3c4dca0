"""The shell of a core: each effect does its one thing, and what comes of it returns. The core here is a script."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import pytest

from node import driver as driver_module
from node.compute import WorkOrder, WorkResult
from node.driver import Driver
from node.manners import Conditions, DeviceSettings, Manners
from protocols.entries import Batch, Begun, Feed, Head
from protocols.errors import LocalError
from protocols.events import (
    Aggregate,
    Aggregated,
    Dial,
    Disconnect,
    Effect,
    Emit,
    Estimate,
    Estimated,
    Evaluate,
    Evaluated,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Halt,
    HeadsRead,
    Input,
    Keep,
    KeepEntries,
    KeepPeer,
    KeepScalars,
    LearningDone,
    LinkUp,
    Penalise,
    Recall,
    Recalled,
    Received,
    Record,
    Replay,
    Replayed,
    RoundDone,
    Send,
    SetTimer,
    Started,
    StopRequested,
    Timer,
    TimerFired,
    Train,
    Trained,
    WorkFailed,
)
from protocols.messages import Bye, Heartbeat, Offer, Pong
from protocols.vocabulary import (
    SIGNATURE_BYTES,
    STATE_ID_BYTES,
    Checkpoint,
    ModelRef,
    PeerId,
    PeerRecord,
    Reason,
    ScalarRecord,
)

A, B = PeerId("a"), PeerId("b")
REF = ModelRef(b"r" * 32, 100, 3, 10)
WALL = 1_700_000_000.0
BEGIN = Started((), (), None)


class ScriptedView:
    """Greets with these beats."""

    def __init__(self) -> None:
        self.beats: list[Send] = []

    def heartbeat(self) -> list[Send]:
        return self.beats


class ScriptedCore:
    """Answers each event with the effects prepared for it, and notes all it was told."""

    def __init__(self) -> None:
        self.script: dict[Event, Sequence[Effect]] = {}
        self.heard: list[tuple[float, Event]] = []
        self.changed = asyncio.Event()
        self.view = ScriptedView()

    def step(self, now: float, event: Event) -> list[Effect]:
        self.heard.append((now, event))
        self.changed.set()
        return list(self.script.get(event, ()))

    @property
    def events(self) -> list[Event]:
        return [event for _, event in self.heard]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class Recorder:
    """Stands for the network, the store, the history and the telemetry: notes every call, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.errors: dict[str, Exception] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        def note(*args: object, **options: object) -> None:
            self.calls.append((name, *args, *options.values()))
            if name in self.errors:
                raise self.errors[name]

        return note


HEADS = ((Feed.CLICKS, (Head(b"a" * 32, 1, 1, 2, bytes(16), 3),)),)
BATCH = Batch(b"a" * 32, 1, 1, bytes(16), (Begun(1),), bytes(64))


class FakeContents:
    """Keeps nothing, notes what it is asked for, and refuses where `error` says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def keep(self, effect: KeepEntries) -> None:
        self._note("keep", effect)

    def refused(self, effect: KeepEntries, problem: str) -> None:
        self.calls.append(("refused", effect, problem))

    def recall(self, effect: Recall) -> Recalled:
        self._note("recall", effect)
        return Recalled(effect.token, (BATCH,))

    def heads(self) -> tuple[tuple[Feed, tuple[Head, ...]], ...]:
        return HEADS

    def on_record(self, record: Record) -> None:
        self.calls.append(("on_record", record))

    def _note(self, name: str, effect: KeepEntries | Recall) -> None:
        self.calls.append((name, effect))
        if self.error is not None:
            raise self.error


class FakeClock:
    def __init__(self) -> None:
        self.at_s = 42.0

    def now(self) -> float:
        return self.at_s


class Shell:
    """A driver between a scripted core and recorders."""

    def __init__(
        self, perform: Callable[[WorkOrder], WorkResult], settings: DeviceSettings | None = None
    ) -> None:
        self.core, self.clock = ScriptedCore(), FakeClock()
        self.conditions, self.month_bytes = Conditions(), 0
        self.manners = Manners(
            settings or DeviceSettings(), self.clock, lambda: self.conditions, lambda: self.month_bytes
        )
        self.network, self.store, self.history, self.telemetry, self.scalars = (Recorder() for _ in range(5))
        self.contents = FakeContents()
        self.driver = Driver(
            self.core,  # type: ignore[arg-type]
            self.clock,
            lambda: WALL,
            self.store,  # type: ignore[arg-type]
            self.history,  # type: ignore[arg-type]
            self.telemetry,  # type: ignore[arg-type]
            perform,
            self.scalars,  # type: ignore[arg-type]
            self.manners,
            self.contents,
        )
        self.driver.attach(self.network)  # type: ignore[arg-type]

    def perform(self, *effects: Effect) -> None:
        """Have the core ask for these effects; back when the disk is through with its part."""
        self.core.script[BEGIN] = effects
        self.driver.handle(BEGIN)
        self.driver._disk.submit(lambda: None).result(timeout=10)

    def calls(self) -> dict[str, list[tuple[Any, ...]]]:
        parts = {"network": self.network, "store": self.store, "history": self.history}
        parts |= {"telemetry": self.telemetry, "scalars": self.scalars}
        return {name: part.calls for name, part in parts.items() if part.calls}


async def turn() -> None:
    """Until everything that was handed to the loop before has run."""
    done = asyncio.Event()
    asyncio.get_running_loop().call_soon(done.set)
    await done.wait()


def answer(order: WorkOrder) -> WorkResult:
    match order:
        case Train(token):
            return Trained(token, REF)
        case Aggregate(token):
            return Aggregated(token, REF)
        case Evaluate(token):
            return Evaluated(token, {"accuracy": 0.5})
        case Estimate(token, _, _, count):
            return Estimated(token, bytes(count))
        case Replay(token):
            return Replayed(token, REF)


@pytest.fixture
async def shell() -> AsyncIterator[Shell]:
    shell = Shell(answer)
    yield shell
    shell.driver.close()


ROUND = RoundDone(3, 2, 0, {"accuracy": 0.5}, 1.0)
SAID = ScalarRecord(b"a" * 32, 3, b"\x40", bytes(STATE_ID_BYTES), bytes(SIGNATURE_BYTES))
SEALED = Checkpoint(3, b"l" * 32, 1, REF)
PEER = PeerRecord(A, ("/ip4/1.1.1.1/tcp/1/p2p/a",))


# --- out ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        (
            Send(A, Heartbeat(1, True)),
            {"telemetry": [("message", "out", "beat")], "network": [("send", A, Heartbeat(1, True))]},
        ),
        (Dial("/ip4/1.1.1.1/tcp/1/p2p/a"), {"network": [("dial", "/ip4/1.1.1.1/tcp/1/p2p/a")]}),
        (Disconnect(A, Reason.TASK), {"network": [("disconnect", A, Reason.TASK)]}),
        (Fetch(7, A, REF, (B,)), {"network": [("fetch", 7, A, REF, (B,))]}),
        (Keep(REF), {"store": [("keep", REF)]}),
        (Forget(REF), {"store": [("forget", REF.digest)]}),
        (Emit(LearningDone(9)), {"telemetry": [("record", LearningDone(9), WALL)]}),
        (Emit(ROUND), {"telemetry": [("record", ROUND, WALL)], "history": [("add_round", ROUND, WALL)]}),
        (Penalise(A, Reason.TASK, "why"), {"telemetry": [("refusal", A, Reason.TASK, "why")]}),
        (KeepPeer(PEER), {"history": [("remember", PEER, WALL)]}),
        (KeepScalars((SAID,)), {"scalars": [("keep", (SAID,), None, 0)]}),
        (KeepScalars((), SEALED, 2), {"scalars": [("keep", (), SEALED, 2)]}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Effect) else "",
)
async def test_an_effect_does_exactly_its_thing(
    shell: Shell, effect: Effect, expected: dict[str, list[tuple[Any, ...]]]
) -> None:
    shell.perform(effect)
    await turn()  # a fetch comes back from the disk's queue to the loop
    assert shell.calls() == expected
    assert shell.core.heard == [(42.0, BEGIN)]
    assert not shell.driver.halted.is_set()


async def test_effects_are_performed_in_the_order_given(shell: Shell) -> None:
    shell.perform(Send(A, Heartbeat(1, True)), Send(A, Bye()), Disconnect(A, Reason.LEAVING))
    assert shell.network.calls == [
        ("send", A, Heartbeat(1, True)),
        ("send", A, Bye()),
        ("disconnect", A, Reason.LEAVING),
    ]


async def test_a_model_is_kept_before_it_is_forgotten(shell: Shell) -> None:
    shell.perform(Keep(REF), Forget(REF))
    assert [call[0] for call in shell.store.calls] == ["keep", "forget"]


async def test_a_timer_fires_with_its_own_name_and_token(shell: Shell) -> None:
    timer = Timer("learning", "pause", 17)
    shell.perform(SetTimer(timer, 0.0))
    await shell.core.until(lambda: len(shell.core.heard) == 2)
    assert shell.core.heard[1] == (42.0, TimerFired(timer))


async def test_a_later_timer_fires_later(shell: Shell) -> None:
    late, soon = Timer("view", "beat", 1), Timer("view", "redial", 2)
    shell.perform(SetTimer(late, 0.02), SetTimer(soon, 0.0))
    await shell.core.until(lambda: len(shell.core.heard) == 3)
    assert shell.core.events[1:] == [TimerFired(soon), TimerFired(late)]


# --- back -----------------------------------------------------------------------------------------------
async def test_results_of_work_come_back_in_order_with_their_tokens(shell: Shell) -> None:
    shell.perform(Train(1, REF, 3), Aggregate(2, REF, (Input(A, REF, 0),)), Evaluate(3, REF))
    await shell.core.until(lambda: len(shell.core.heard) == 4)
    assert shell.core.events[1:] == [Trained(1, REF), Aggregated(2, REF), Evaluated(3, {"accuracy": 0.5})]


async def test_scalars_are_measured_and_replayed_by_the_worker(shell: Shell) -> None:
    shell.perform(Estimate(1, REF, 3, 2), Replay(2, REF, (), b"n" * 32, save=False))
    await shell.core.until(lambda: len(shell.core.heard) == 3)
    assert shell.core.events[1:] == [Estimated(1, bytes(2)), Replayed(2, REF)]


async def test_a_record_is_on_the_disk_before_anything_is_sent(shell: Shell) -> None:
    order: list[str] = []
    shell.scalars.keep = lambda *args: order.append("kept")  # type: ignore[method-assign]
    shell.network.send = lambda *args: order.append("sent")  # type: ignore[method-assign]
    shell.perform(Send(A, Bye()), KeepScalars((SAID,)), Send(A, Bye()))
    assert order == ["sent", "kept", "sent"]


async def test_a_record_that_cannot_be_kept_is_never_sent_and_halts_the_node(shell: Shell) -> None:
    shell.scalars.errors["keep"] = LocalError("the disk is full")
    shell.perform(KeepScalars((SAID,)), Send(A, Bye()))
    assert shell.network.calls == []
    assert shell.driver.halted.is_set()
    assert str(shell.driver.failure) == "the disk is full"


async def test_entries_are_kept_and_brought_by_the_disk(shell: Shell) -> None:
    keep, recall = KeepEntries(Feed.CLICKS, (BATCH,)), Recall(7, Feed.CLICKS, (), 1000)
    shell.perform(keep, recall, Emit(LearningDone(3)))
    await turn()
    assert ("on_record", LearningDone(3)) in shell.contents.calls
    assert [call for call in shell.contents.calls if call[0] != "on_record"] == [
        ("keep", keep),
        ("recall", recall),
    ]
    assert shell.core.events[1:] == [Recalled(7, (BATCH,))]


@pytest.mark.parametrize(
    "error", [LocalError("it is full"), OSError("it is full"), sqlite3.Error("it is full")]
)
async def test_what_the_disk_refuses_the_core_hears_before_whoever_waits(
    shell: Shell, error: Exception
) -> None:
    shell.contents.error = error
    keep = KeepEntries(Feed.CLICKS, (BATCH,))
    shell.perform(keep, Recall(7, Feed.CLICKS, (), 1000))
    await turn()
    assert shell.core.events[1:] == [HeadsRead(HEADS), Recalled(7, ())]
    assert shell.contents.calls[1] == ("refused", keep, "it is full")
    assert not shell.driver.halted.is_set()


async def test_no_entries_are_brought_that_the_month_has_no_bytes_for() -> None:
    shell = Shell(lambda order: Trained(0, REF), DeviceSettings(month_bytes=10_000_000))
    shell.month_bytes = 9_999_999
    shell.perform(Recall(7, Feed.CLICKS, (), 1000))
    await turn()
    assert (shell.core.events[1:], shell.contents.calls) == ([Recalled(7, ())], [])


async def test_results_are_handed_over_on_the_loop(shell: Shell) -> None:
    threads: list[threading.Thread] = []
    real = shell.core.step

    def step(now: float, event: Event) -> list[Effect]:
        threads.append(threading.current_thread())
        return real(now, event)

    shell.core.step = step  # type: ignore[method-assign]
    shell.perform(Train(1, REF, 3))
    await shell.core.until(lambda: len(shell.core.heard) == 2)
    assert set(threads) == {threading.current_thread()}


async def test_long_work_delays_no_event() -> None:
    may_end, began = threading.Event(), threading.Event()

    def perform(order: WorkOrder) -> WorkResult:
        began.set()
        assert may_end.wait(timeout=10)
        return WorkFailed(order.token, "late")

    shell = Shell(perform)
    shell.core.script[BEGIN] = [Train(1, REF, 3)]
    try:
        shell.driver.handle(BEGIN)
        assert await asyncio.to_thread(began.wait, 10)
        up = LinkUp(A, True, "x")
        shell.core.script[up] = [SetTimer(Timer("view", "beat", 1), 0.0), Send(A, Bye())]
        shell.driver.handle(up)
        await shell.core.until(lambda: len(shell.core.heard) == 3)
        assert shell.network.calls == [("send", A, Bye())]
        assert WorkFailed(1, "late") not in shell.core.events
    finally:
        may_end.set()
    await shell.core.until(lambda: WorkFailed(1, "late") in shell.core.events)
    shell.driver.close()


@pytest.mark.parametrize(
    ("event", "call"),
    [
        (Received(A, Heartbeat(1, True)), ("message", "in", "beat")),
        (Fetched(1), ("fetch", "ok", 0.0)),
        (FetchFailed(1, Reason.GONE), ("fetch", "gone", 0.0)),
    ],
)
async def test_what_arrives_is_counted_once_and_passed_on(
    shell: Shell, event: Event, call: tuple[Any, ...]
) -> None:
    shell.driver.handle(event)
    assert shell.telemetry.calls == [call]
    assert shell.core.events == [event]


async def test_a_fetch_is_timed_from_the_order_to_its_end(shell: Shell) -> None:
    shell.perform(Fetch(7, A, REF), Fetch(8, A, REF))
    for at_s, event in ((43.5, FetchFailed(8, Reason.LINK)), (44.0, Fetched(7)), (50.0, Fetched(7))):
        shell.clock.at_s = at_s
        shell.driver.handle(event)
    assert shell.telemetry.calls == [("fetch", "link", 1.5), ("fetch", "ok", 2.0), ("fetch", "ok", 0.0)]


# --- the disk -------------------------------------------------------------------------------------------
async def test_a_checkpoint_that_cannot_be_kept_is_warned_of(shell: Shell) -> None:
    shell.store.errors["keep"] = LocalError("no space")
    shell.perform(Keep(REF), Forget(REF))
    assert shell.telemetry.calls == [("warning", "checkpoint not kept", "no space")]
    assert shell.store.calls[-1] == ("forget", REF.digest), "and the disk goes on"


@pytest.mark.parametrize(
    ("part", "name", "error", "effect"),
    [
        ("telemetry", "record", OSError(28, "No space left on device"), Emit(ROUND)),
        ("history", "add_round", sqlite3.OperationalError("disk full"), Emit(ROUND)),
        ("history", "remember", sqlite3.OperationalError("disk full"), KeepPeer(PEER)),
    ],
)
async def test_a_record_that_cannot_be_written_does_not_stop_the_learning(
    shell: Shell, part: str, name: str, error: Exception, effect: Effect
) -> None:
    getattr(shell, part).errors[name] = error
    shell.perform(effect, Train(1, REF, 4))
    assert ("warning", "record not written", str(error)) in shell.telemetry.calls
    await shell.core.until(lambda: Trained(1, REF) in shell.core.events)


async def test_close_waits_until_all_is_on_the_disk() -> None:
    shell = Shell(answer)
    may_end, kept = threading.Event(), []

    def keep(ref: ModelRef) -> None:
        assert may_end.wait(timeout=10)
        kept.append(ref)

    shell.store.keep = keep  # type: ignore[method-assign]
    shell.core.script[StopRequested()] = [Keep(REF), Halt()]
    shell.driver.request_stop()
    assert shell.driver.halted.is_set()
    closing = asyncio.create_task(asyncio.to_thread(shell.driver.close))
    may_end.set()
    await closing
    assert kept == [REF]


# --- the end --------------------------------------------------------------------------------------------
async def test_halt_is_seen_and_nothing_reaches_the_core_after_it(shell: Shell) -> None:
    timer = Timer("view", "beat", 1)
    shell.core.script[StopRequested()] = [SetTimer(timer, 0.0), Train(1, REF, 3), Send(A, Bye()), Halt()]
    shell.driver.request_stop()
    await asyncio.wait_for(shell.driver.halted.wait(), 10)
    shell.driver.handle(Received(A, Bye()))
    shell.driver.request_stop()
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(0.0, done.set)  # after the timer, which was set before
    await done.wait()
    assert shell.core.events == [StopRequested()]
    assert shell.telemetry.calls == [("message", "out", "bye")]


def test_a_result_after_the_loop_has_closed_is_dropped() -> None:
    may_end, replied = threading.Event(), threading.Event()
    errors: list[object] = []

    def perform(order: WorkOrder) -> WorkResult:
        if order.token == 2:
            replied.set()  # the first result has been through the worker's hands
        assert may_end.wait(timeout=10)
        return WorkFailed(order.token, "")

    async def run() -> None:
        shell = Shell(perform)
        shell.core.script[BEGIN] = [Train(1, REF, 0), Train(2, REF, 0)]
        shell.driver.handle(BEGIN)
        shell.driver.close()

    hook = threading.excepthook
    threading.excepthook = errors.append
    try:
        asyncio.run(run())
        may_end.set()
        assert replied.wait(timeout=10)
    finally:
        threading.excepthook = hook
    assert errors == []


async def test_a_fetch_waits_until_an_earlier_forget_of_the_same_model_is_done(shell: Shell) -> None:
    hold = threading.Event()
    shell.driver._disk.submit(hold.wait, 10)
    shell.core.script[BEGIN] = [Forget(REF), Fetch(7, A, REF)]
    shell.driver.handle(BEGIN)
    await turn()
    assert not shell.calls(), "neither before the disk is free"
    hold.set()
    shell.driver._disk.submit(lambda: None).result(timeout=10)
    await turn()
    assert shell.store.calls == [("forget", REF.digest)]
    assert shell.network.calls == [("fetch", 7, A, REF, ())]


async def test_a_step_that_breaks_in_the_middle_halts_the_node_with_the_reason(shell: Shell) -> None:
    def broken(token: int, peer: PeerId, message: object) -> None:
        raise RuntimeError("a bug")

    shell.network.send = broken  # type: ignore[method-assign]
    shell.perform(Send(A, Bye()))
    assert shell.driver.halted.is_set()
    assert isinstance(shell.driver.failure, RuntimeError | TypeError)


# --- manners --------------------------------------------------------------------------------------------
@pytest.fixture
async def guest() -> AsyncIterator[Shell]:
    """A node that only works on AC power, and finds itself on its battery."""
    shell = Shell(answer, DeviceSettings(on_ac_power=True))
    shell.conditions = Conditions(on_ac_power=False)
    yield shell
    shell.driver.close()


async def test_what_begins_a_round_is_held_while_a_reason_stands_and_what_ends_one_is_not(
    guest: Shell,
) -> None:
    replay = Replay(3, REF, (), b"n" * 32, save=False)
    guest.perform(Train(1, REF, 3), Aggregate(2, REF, ()), replay)
    await guest.core.until(lambda: len(guest.core.heard) == 3)
    assert guest.core.events[1:] == [Aggregated(2, REF), Replayed(3, REF)]
    assert guest.driver.waiting == "on battery power"
    guest.conditions = Conditions()
    guest.driver._look()
    await guest.core.until(lambda: len(guest.core.heard) == 4)
    assert guest.core.events[3:] == [Trained(1, REF)]
    assert guest.driver.waiting is None


async def test_a_node_that_waits_looks_again_by_itself(guest: Shell) -> None:
    looks = 0

    def read() -> Conditions:
        nonlocal looks
        looks += 1
        return Conditions(on_ac_power=looks > 4)

    guest.manners._read = read
    guest.manners.next_look_s = lambda: 0.001  # type: ignore[method-assign]
    guest.perform(Estimate(1, REF, 3, 2))
    await guest.core.until(lambda: Estimated(1, bytes(2)) in guest.core.events)


async def test_each_change_is_told_once(guest: Shell) -> None:
    guest.perform(Train(1, REF, 3))
    guest.driver._look()
    guest.conditions = Conditions()
    guest.driver._look()
    guest.driver._look()
    await guest.core.until(lambda: Trained(1, REF) in guest.core.events)
    assert guest.telemetry.calls == [
        ("info", "waiting", "on battery power"),
        ("info", "working again", "on battery power"),
    ]


async def test_messages_go_on_and_say_that_nobody_need_wait(guest: Shell) -> None:
    """At once when it begins to stand still, at once when it goes on, and with every beat in between."""
    beat = Heartbeat(3, True)
    still = msgspec.structs.replace(beat, active=False)
    guest.core.view.beats = [Send(B, beat)]
    guest.perform(Send(A, beat), Train(1, REF, 3), Send(A, beat), Send(A, Offer(REF)))
    guest.driver._look()
    assert guest.network.calls == [
        ("send", A, beat),
        ("send", B, still),
        ("send", A, still),
        ("send", A, Offer(REF)),
    ]
    guest.conditions = Conditions()
    guest.driver._look()
    assert guest.network.calls[4:] == [("send", B, beat)]


async def test_a_node_that_waits_is_passed_over_where_a_sample_is_drawn(guest: Shell) -> None:
    guest.driver._look()
    guest.perform(Send(A, Pong(1, 3)))
    assert guest.network.calls == []
    guest.conditions = Conditions()
    guest.driver._look()
    guest.perform(Send(A, Pong(2, 3)))
    assert guest.network.calls == [("send", A, Pong(2, 3))]


async def test_a_node_that_stops_while_it_waits_looks_no_more(guest: Shell) -> None:
    guest.perform(Train(1, REF, 3), Halt())
    guest.conditions = Conditions()
    guest.driver._look_on_time()
    await turn()
    assert guest.core.events == [BEGIN]
    assert guest.driver.failure is None


async def test_a_machine_that_cannot_be_read_halts_the_node_with_the_reason(guest: Shell) -> None:
    def broken() -> Conditions:
        raise OSError("no such sensor")

    guest.manners._read = broken
    guest.driver._look_on_time()
    assert guest.driver.halted.is_set()
    assert str(guest.driver.failure) == "no such sensor"


async def test_a_model_that_the_month_has_no_bytes_for_is_neither_offered_nor_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver_module, "REFUSE_AFTER_S", 0.0)
    shell = Shell(answer, DeviceSettings(month_bytes=1000))
    shell.month_bytes = 900
    large = msgspec.structs.replace(REF, size_bytes=100)
    small = msgspec.structs.replace(REF, size_bytes=49)
    shell.perform(
        Send(A, Offer(large)), Send(A, Offer(small)), Fetch(1, A, large), Fetch(2, A, small), Send(A, Bye())
    )
    await shell.core.until(lambda: len(shell.core.heard) == 2)
    assert shell.core.events[1] == FetchFailed(1, Reason.GONE, "this node has spent its bytes of the month")
    assert shell.network.calls == [("send", A, Offer(small)), ("send", A, Bye()), ("fetch", 2, A, small, ())]
    shell.driver.close()
