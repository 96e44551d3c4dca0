"""The asyncio shell of a core: performs effects, brings back what comes of them. Decides nothing.

Events are handled on the loop, one after another. Work runs on one thread of its own, so that training never
delays a message; what touches the disk for long runs on another.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, assert_never

import msgspec

from node.compute import WorkOrder, WorkResult
from node.core import NodeCore
from node.manners import DeviceSettings, Manners
from node.ports import Clock, Contents, Network, NetworkEvent
from node.scalar_store import ScalarStore
from node.store import BlobStore, History
from node.telemetry import Telemetry
from protocols.errors import LocalError
from protocols.events import (
    Aggregate,
    Dial,
    Disconnect,
    Effect,
    Emit,
    Estimate,
    Evaluate,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Halt,
    HeadsRead,
    Keep,
    KeepEntries,
    KeepPeer,
    KeepScalars,
    Penalise,
    Recall,
    Recalled,
    Received,
    Record,
    Replay,
    RoundDone,
    Send,
    SetTimer,
    StopRequested,
    TimerFired,
    Train,
)
from protocols.messages import Heartbeat, LinkMessage, Offer, Pong
from protocols.vocabulary import ModelRef, PeerId, Reason

REFUSE_AFTER_S = 1.0
"""Wait before a fetch is refused for want of bytes: whoever asks again at once does not spin."""
Perform = Callable[[WorkOrder], WorkResult]
T = TypeVar("T")


class WorkerThread:
    """One thread that does one order after another. A daemon thread: a long training never holds up the exit."""

    def __init__(self, perform: Perform, reply: Callable[[WorkResult], None]) -> None:
        self._perform = perform
        self._reply = reply
        self._orders: queue.SimpleQueue[WorkOrder] = queue.SimpleQueue()
        self.busy = False
        threading.Thread(target=self._run, name="work", daemon=True).start()

    def submit(self, order: WorkOrder) -> None:
        self._orders.put(order)

    def _run(self) -> None:
        while True:
            order = self._orders.get()
            self.busy = True
            result = self._perform(order)
            self.busy = False
            self._reply(result)


class Driver:
    """Runs one core until it halts.

    scalars: where a node that learns by scalars keeps its log.
    manners: what holds back the beginning of a round; left out, nothing does.
    contents: where a node that shares content keeps what is said of it.
    """

    def __init__(
        self,
        core: NodeCore,
        clock: Clock,
        wall_clock: Callable[[], float],
        store: BlobStore,
        history: History,
        telemetry: Telemetry,
        perform: Perform,
        scalars: ScalarStore | None = None,
        manners: Manners | None = None,
        contents: Contents | None = None,
    ) -> None:
        self.core = core
        self._clock = clock
        self._wall_clock = wall_clock
        self._store = store
        self._history = history
        self._telemetry = telemetry
        self._scalars = scalars
        self._contents = contents
        self._loop = asyncio.get_running_loop()
        self._worker = WorkerThread(perform, self._from_worker)
        self._manners = manners or Manners(DeviceSettings(), clock)
        self._held: deque[WorkOrder] = deque()
        self._stands_still = False
        self._look_timer: asyncio.TimerHandle | None = None
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._network: Network | None = None
        self._fetch_began_at: dict[int, float] = {}
        self.failure: BaseException | None = None
        self.halted = asyncio.Event()

    def attach(self, network: Network) -> None:
        """The network needs `handle` and the driver needs the network: the network comes second."""
        self._network = network
        self._look()

    def handle(self, event: Event) -> None:
        """One event in, its effects out. Called on the loop only."""
        if self.halted.is_set():
            return
        self._count(event)
        try:
            for effect in self.core.step(self._clock.now(), event):
                self._do(effect)
        except Exception as error:  # the task boundary: a node with half of a step done must not go on
            self.fail(error)

    def request_stop(self) -> None:
        """The operator wants out."""
        self.handle(StopRequested())

    def fail(self, error: BaseException) -> None:
        """Something broke that should not: halt, and say why."""
        self.failure = self.failure or error
        self.halted.set()

    @property
    def working(self) -> bool:
        """Whether the worker is in the middle of an order."""
        return self._worker.busy

    def close(self) -> None:
        """Wait until all that was to be kept is on the disk."""
        self._disk.shutdown(wait=True)

    def _from_worker(self, result: WorkResult) -> None:
        self._on_loop(self.handle, result)

    def _on_loop(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            self._loop.call_soon_threadsafe(function, *args)

    def _do(self, effect: Effect) -> None:
        assert self._network is not None
        match effect:
            case Send(peer, message):
                self._send(peer, message)
            case SetTimer(timer, after_s):
                self._loop.call_later(after_s, self.handle, TimerFired(timer))
            case Train() | Estimate() | Aggregate() | Evaluate() | Replay():
                self._work(effect)
            case KeepScalars(records, checkpoint, cut):
                assert self._scalars is not None
                # Here and now: what a node has signed must be on its disk before anybody hears of it. If the disk
                # refuses, the node halts rather than contradict itself after a restart.
                self._scalars.keep(records, checkpoint, cut)
            case Keep() | Forget() | KeepEntries():
                self._disk.submit(self._on_disk, effect)
            case Recall():
                self._recall(effect)
            case Fetch():
                self._fetch(effect)
            case Emit(record):
                self._write(self._record, record)
                self._tell_contents(record)
            case Penalise(peer, reason, detail):
                self._telemetry.refusal(peer, reason, detail)
            case KeepPeer(record):
                self._write(self._history.remember, record)
            case Dial(address):
                self._network.dial(address)
            case Disconnect(peer, reason):
                self._network.disconnect(peer, reason)
            case Halt():
                self.halted.set()
            case _:
                assert_never(effect)

    def _on_disk(self, effect: Keep | Forget | KeepEntries) -> None:
        """Runs on the thread of the disk."""
        match effect:
            case Keep(ref):
                self._keep(ref)
            case Forget(ref):
                self._store.forget(ref.digest)
            case KeepEntries():
                self._keep_entries(effect)

    # --- manners ----------------------------------------------------------------------------------------
    @property
    def waiting(self) -> str | None:
        """Why no round may begin now."""
        return self._manners.waiting

    def _work(self, order: WorkOrder) -> None:
        """What begins a round waits for its time; what ends it does not, so that nobody waits for half of one."""
        if not isinstance(order, Train | Estimate):
            self._worker.submit(order)
            return
        self._held.append(order)
        self._manners.round_due()
        self._look()

    def _look(self) -> None:
        """See whether rounds may begin, let go what was held, and look again later."""
        if self.halted.is_set():
            return
        before, waiting = self._manners.waiting, self._manners.look()
        if waiting != before:
            self._telemetry.info("waiting" if waiting else "working again", reason=waiting or before)
        while self._held and waiting is None:
            self._manners.round_begins()
            self._worker.submit(self._held.popleft())
        if self._stands_still != bool(self._held):
            self._stands_still = bool(self._held)
            for beat in self.core.view.heartbeat():  # or neighbours would wait for it up to the next one
                assert isinstance(beat, Send)
                self._send(beat.peer, beat.message)
        if self._look_timer is not None:
            self._look_timer.cancel()
        self._look_timer = self._loop.call_later(self._manners.next_look_s(), self._look_on_time)

    def _look_on_time(self) -> None:
        try:
            self._look()
        except Exception as error:  # the task boundary: a node that looks no more may be held for ever
            self.fail(error)

    def _send(self, peer: PeerId, message: LinkMessage) -> None:
        """A message; but no model is offered that the month has no bytes for, and nobody need wait for a node that waits."""
        assert self._network is not None
        if isinstance(message, Offer) and not self._manners.may_move(message.ref.size_bytes):
            return
        if isinstance(message, Pong) and self.waiting is not None:
            return  # its beats say that it is there; who draws a sample passes it over
        if isinstance(message, Heartbeat) and self._stands_still:
            message = msgspec.structs.replace(message, active=False)
        self._telemetry.message("out", str(type(message).__struct_config__.tag))
        self._network.send(peer, message)

    def _fetch(self, effect: Fetch) -> None:
        assert self._network is not None
        token, peer, ref, others = effect.token, effect.peer, effect.ref, effect.others
        self._fetch_began_at[token] = self._clock.now()
        if not self._manners.may_move(ref.size_bytes):
            refused = FetchFailed(token, Reason.GONE, "this node has spent its bytes of the month")
            self._loop.call_later(REFUSE_AFTER_S, self.handle, refused)
            return
        # Behind every `Forget` before it: one of this very model may still wait for the disk.
        self._disk.submit(self._on_loop, self._network.fetch, token, peer, ref, others)

    def _record(self, record: Record, at_s: float) -> None:
        self._telemetry.record(record, at_s)
        if isinstance(record, RoundDone):
            self._history.add_round(record, at_s)

    def _tell_contents(self, record: Record) -> None:
        if self._contents is not None:
            self._contents.on_record(record)

    def _write(self, action: Callable[[T, float], None], record: T) -> None:
        """A full disk loses a record, not the effects that come after it."""
        try:
            action(record, self._wall_clock())
        except (OSError, sqlite3.Error) as error:
            self._telemetry.warning("record not written", reason=str(error))

    def _keep(self, ref: ModelRef) -> None:
        try:
            self._store.keep(ref)
        except LocalError as error:
            self._telemetry.warning("checkpoint not kept", reason=str(error))

    def _keep_entries(self, effect: KeepEntries) -> None:
        assert self._contents is not None
        try:
            self._contents.keep(effect)
        except (OSError, sqlite3.Error, LocalError) as error:
            # What is not kept is never served, so that no number of the own feed is given away twice.
            self._telemetry.warning("entries not kept", reason=str(error))
            with contextlib.suppress(
                OSError, sqlite3.Error, LocalError
            ):  # the next one that fails tries again
                self._on_loop(self.handle, HeadsRead(self._contents.heads()))
            self._contents.refused(effect, str(error))

    def _recall(self, effect: Recall) -> None:
        if self._manners.may_move(effect.max_bytes):
            self._disk.submit(self._recall_from_disk, effect)
        else:
            self._loop.call_soon(self.handle, Recalled(effect.token, ()))

    def _recall_from_disk(self, effect: Recall) -> None:
        assert self._contents is not None
        try:
            recalled = self._contents.recall(effect)
        except (OSError, sqlite3.Error, LocalError) as error:
            self._telemetry.warning("entries not read", reason=str(error))
            recalled = Recalled(effect.token, ())
        self._on_loop(self.handle, recalled)

    def _fetch_took(self, token: int) -> float:
        now = self._clock.now()
        return now - self._fetch_began_at.pop(token, now)

    def _count(self, event: Event | NetworkEvent) -> None:
        match event:
            case Received(_, message):
                self._telemetry.message("in", str(type(message).__struct_config__.tag))
            case Fetched(token):
                self._telemetry.fetch("ok", self._fetch_took(token))
            case FetchFailed(token, reason):
                self._telemetry.fetch(reason.value, self._fetch_took(token))
            case _:
                pass
