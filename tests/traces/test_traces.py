"""Transcripts: commands, a line of dashes, what the cores answered. Read them; they are the tests.

`COVEY_REWRITE_TRACES=1` writes the answers anew. Commit the difference only where you can say why it changed
and that it should have.

    node A [task=mnist bootstrap=B quorum=0.5 rounds=2 ...]   a core, started
    start A                             the same again after a crash: a fresh core
    link A B                            a link comes up between the two, dialled by A
    cut A B [reason]                    it goes down
    crash A                             A is gone: the others lose their links to it
    deliver [A]                         messages under way [to A] arrive, and what they cause, until none is left
    fetched A | fail A reason           the oldest fetch of A succeeds or fails
    work A | workfail A                 the training, merging or evaluating that A awaits ends
    timer A name                        the newest timer of that name fires, and the clock moves to it
    reject A B reason                   A's adapter threw away bytes of B
    stop A                              the operator wants out
    status A
"""

import os
import random
from collections import deque
from pathlib import Path

import pytest

from node.core import CoreSettings, NodeCore
from protocols.events import (
    Aggregate,
    Aggregated,
    Dial,
    Disconnect,
    Effect,
    Emit,
    Evaluate,
    Evaluated,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Forget,
    Halt,
    Keep,
    KeepPeer,
    LinkChanged,
    LinkDown,
    LinkUp,
    Penalise,
    Received,
    Rejected,
    RoundDone,
    Send,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
    Train,
    Trained,
    Trouble,
    WorkFailed,
)
from protocols.gossip import GossipSettings
from protocols.messages import Decline, Heartbeat, Hello, LinkMessage, Offer, Peers, Refuse, Shuffle
from protocols.view import ViewSettings
from protocols.vocabulary import ModelRef, PeerId, Reason, SchemaHash
from tests.protocols.identities import FakeSignatures

HERE = Path(__file__).parent
REWRITE = os.environ.get("COVEY_REWRITE_TRACES") == "1"
DASHES = "----"
HIDDEN_TIMERS = ("beat",)


def address(peer: str) -> str:
    return f"/ip4/10.0.0.1/tcp/4001/p2p/{peer}"


class Trace:
    """The cluster of one transcript. Nothing moves unless a command says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cores: dict[str, NodeCore] = {}
        self.options: dict[str, dict[str, str]] = {}
        self.lives: dict[str, int] = {}
        self.wires: deque[tuple[str, str, LinkMessage]] = deque()
        self.work: dict[str, Train | Aggregate | Evaluate] = {}
        self.fetches: dict[str, list[Fetch]] = {}
        self.timers: dict[tuple[str, str], tuple[float, SetTimer]] = {}
        self.names: dict[bytes, str] = {}
        self.lines: list[str] = []

    def run(self, command: str) -> list[str]:
        self.lines = []
        verb, *rest = command.split()
        getattr(self, "do_" + verb)(*rest)
        return self.lines or ["nothing"]

    # --- commands ---------------------------------------------------------------------------------------
    def do_node(self, me: str, *options: str) -> None:
        self.options[me] = dict(option.split("=") for option in options)
        self.do_start(me)

    def do_start(self, me: str) -> None:
        given = {"task": "digits", "schema": "0", "rounds": "0", "quorum": "1", **self.options[me]}
        names = [name for name in given.get("bootstrap", "").split(",") if name]
        settings = CoreSettings(
            network=given.get("network", "net"),
            task=given["task"],
            schema=SchemaHash(given["schema"].encode().ljust(32, b"\0")),
            max_model_bytes=1_000,
            view=ViewSettings(bootstrap=tuple(map(address, names))),
            gossip=GossipSettings(
                rounds=int(given["rounds"]), quorum=float(given["quorum"]), deadline_s=30, pause_s=60
            ),
        )
        self.cores[me] = NodeCore(settings, PeerId(me), random.Random(me), FakeSignatures(me))
        self.fetches[me] = []
        self.lives[me] = self.lives.get(me, 0) + 1
        self.step(me, Started((address(me),), (), self.model(me, f"{me}0", 0), unix_s=self.lives[me]))

    def do_link(self, a: str, b: str) -> None:
        self.step(a, LinkUp(PeerId(b), True, address(b)))
        self.step(b, LinkUp(PeerId(a), False, ""))

    def do_cut(self, a: str, b: str, reason: str = "link") -> None:
        self.wires = deque(wire for wire in self.wires if {a, b} != set(wire[:2]))
        self.step(a, LinkDown(PeerId(b), Reason(reason)))
        self.step(b, LinkDown(PeerId(a), Reason(reason)))

    def do_crash(self, gone: str) -> None:
        self.wires = deque(wire for wire in self.wires if gone not in wire[:2])
        del self.cores[gone]
        for peer in self.cores:
            self.step(peer, LinkDown(PeerId(gone), Reason.LINK))

    def do_deliver(self, to: str = "") -> None:
        while wire := next((wire for wire in self.wires if to in ("", wire[1])), None):
            self.wires.remove(wire)
            self.step(wire[1], Received(PeerId(wire[0]), wire[2]))

    def do_fetched(self, me: str) -> None:
        self.step(me, Fetched(self.fetches[me].pop(0).token))

    def do_fail(self, me: str, reason: str) -> None:
        self.step(me, FetchFailed(self.fetches[me].pop(0).token, Reason(reason)))

    def do_work(self, me: str) -> None:
        match self.work.pop(me):
            case Train(token, _, round_):
                self.step(me, Trained(token, self.model(me, f"{me}{round_}'", round_)))
            case Aggregate(token, own, inputs):
                parts = "+".join([self.name(own), *(self.name(item.ref) for item in inputs)])
                self.step(me, Aggregated(token, self.model(me, f"({parts})", own.round)))
            case Evaluate(token):
                self.step(me, Evaluated(token, {"accuracy": 0.5}))

    def do_workfail(self, me: str) -> None:
        self.step(me, WorkFailed(self.work.pop(me).token, "out of memory"))

    def do_timer(self, me: str, name: str) -> None:
        at, effect = self.timers.pop((me, name))
        self.now = max(self.now, at)
        self.step(me, TimerFired(effect.timer))

    def do_reject(self, me: str, peer: str, reason: str) -> None:
        self.step(me, Rejected(PeerId(peer), Reason(reason), "bytes"))

    def do_stop(self, me: str) -> None:
        self.step(me, StopRequested())

    def do_status(self, me: str) -> None:
        core = self.cores[me]
        model = self.name(core.model) if core.model else "no model"
        self.lines.append(f"{me} {core.phase.value}, round {core.round}, {model}")
        for row in core.peers():
            note = f" ({row.last_reason})" if row.last_reason else ""
            self.lines.append(f"  {row.peer} {row.state}, failures {row.failures}{note}")

    # --- what comes of it -------------------------------------------------------------------------------
    def model(self, me: str, name: str, round_: int) -> ModelRef:
        digest = name.encode().ljust(32, b"\0")[:32]
        self.names[digest] = name
        return ModelRef(digest, 100, round_, 10)

    def name(self, ref: ModelRef) -> str:
        return f"{self.names[ref.digest]}/r{ref.round}"

    def step(self, me: str, event: Event) -> None:
        for effect in self.cores[me].step(self.now, event):
            if line := self.told(me, effect):
                self.lines.append(f"{me} {line}")

    def told(self, me: str, effect: Effect) -> str:  # noqa: C901 - one line an effect
        match effect:
            case Send(peer, message):
                self.wires.append((me, peer, message))
                return f"-> {peer} {self.said(message)}"
            case Train() | Aggregate() | Evaluate():
                self.work[me] = effect
                inputs = [
                    f" + {self.name(item.ref)} of {item.peer} late by {item.staleness}"
                    for item in getattr(effect, "inputs", ())
                ]
                ref = effect.own if isinstance(effect, Aggregate) else effect.ref
                return f"{type(effect).__name__} {self.name(ref)}{''.join(inputs)}"
            case Fetch(_, peer, ref):
                self.fetches[me].append(effect)
                return f"Fetch {self.name(ref)} from {peer}"
            case SetTimer(timer, after_s):
                self.timers[me, timer.name] = (self.now + after_s, effect)
                return "" if timer.name in HIDDEN_TIMERS else f"SetTimer {timer.name} {after_s:.1f}s"
            case Forget(ref) | Keep(ref):
                return f"{type(effect).__name__} {self.name(ref)}"
            case Dial(where):
                return f"Dial {where.rpartition('/')[2]}"
            case Disconnect(peer, reason):
                return f"Disconnect {peer} {reason.value}"
            case Penalise(peer, reason, detail):
                return f"Penalise {peer} {reason.value}: {detail}"
            case Emit(RoundDone() as record):
                return (
                    f"Emit RoundDone {record.round}, merged {record.num_merged}, late {record.staleness_max}"
                )
            case Emit(LinkChanged() as record):
                return f"Emit link to {record.peer} {'up' if record.up else 'down'} {record.reason}".rstrip()
            case Emit(Trouble() as record):
                return f"Emit Trouble {record.what}: {record.detail}"
            case Emit(record):
                return f"Emit {type(record).__name__} {record.round}"
            case KeepPeer(record):
                return f"KeepPeer {record.peer}"
            case Halt():
                return "Halt"

    def said(self, message: LinkMessage) -> str:
        match message:
            case Hello():
                return f"Hello {message.network} {message.task}"
            case Refuse(reason, detail):
                return f"Refuse {reason.value}: {detail}"
            case Heartbeat(round_, active):
                return f"Heartbeat round {round_}{'' if active else ', finished'}"
            case Peers(records) | Shuffle(records):
                told = ", ".join(record.peer + " left" * record.left for record in records)
                return f"{type(message).__name__} [{told}]"
            case Offer(ref):
                return f"Offer {self.name(ref)}"
            case Decline(digest, reason):
                return f"Decline {self.names[digest]} {reason.value}"
            case _:
                return type(message).__name__


def replay(text: str) -> str:
    """The transcript with its answers as they are now. Comments and commands stay."""
    trace, out = Trace(), []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        asked = lines[: lines.index(DASHES)] if DASHES in lines else lines
        commands = [line for line in asked if line and not line.startswith("#")]
        answers = [answer for command in commands for answer in trace.run(command)]
        out.append("\n".join([*asked, *([DASHES, *answers] if commands else [])]))
    return "\n\n".join(out) + "\n"


@pytest.mark.parametrize("path", sorted(HERE.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    before = path.read_text()
    after = replay(before)
    if REWRITE:
        path.write_text(after)
    assert REWRITE or after == before


def test_replaying_a_transcript_twice_gives_the_same() -> None:
    for path in HERE.glob("*.txt"):
        assert replay(replay(path.read_text())) == replay(path.read_text())
