"""What a world keeps beside its nodes where they learn by scalars: whose record stands for which estimate, what the
log costs on the wire, and how soon who came late is where the others are.

Belongs here: the facts and figures. Performing the effects is the world's affair.

What a scalar is worth is computed later than the core is told of it. So the codes that a core is told are names: bytes
of the right length that stand for one estimate and no other. The core never looks into them, and the trace depends on
no rounding.
"""

import hashlib
import statistics
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import msgspec

from node.core import NodeCore
from protocols.events import Received, RoundScalars
from protocols.messages import Holding, LinkMessage, Marks, Pull, Ranges, Scalars, Terms
from protocols.scalars import ScalarLearning
from protocols.vocabulary import Checkpoint, ModelRef, ScalarRecord
from sim import graph
from sim.graph import Codes
from sim.results import ScalarFigures

SETTLES_WITHIN_S = 120.0
"""Virtual time after the last node's end."""
MAX_STATES = 100_000
"""Whose names are known. An older one is as good as a state of its own."""


def name_codes(node: int, number: int, num_samples: int) -> bytes:
    """The codes that stand for a node's estimate of this number."""
    return hashlib.shake_256(f"{node} {number}".encode()).digest(num_samples)


class ScalarDisk:
    """What one node has of the log on its disk."""

    __slots__ = ("checkpoint", "records")

    def __init__(self) -> None:
        self.checkpoint: Checkpoint | None = None
        self.records: list[ScalarRecord] = []

    def keep(self, records: Sequence[ScalarRecord], checkpoint: Checkpoint | None, cut: int) -> None:
        """As `protocols.events.KeepScalars` says."""
        self.records += records
        if checkpoint is not None:
            self.checkpoint = checkpoint
            self.records = [record for record in self.records if record.round > cut]

    def after_checkpoint(self) -> tuple[ScalarRecord, ...]:
        """What a node needs to go on."""
        sealed = self.checkpoint.round if self.checkpoint is not None else 0
        return tuple(record for record in self.records if record.round > sealed)


class ScalarSide:
    """Of one world. base: what all nodes begin with."""

    def __init__(self, base: ModelRef) -> None:
        self.base = base
        self._estimates: dict[int, dict[tuple[bytes, bytes], Codes]] = {}
        """By round, then by author and codes."""
        self._states: dict[bytes, bytes] = {}
        """What was applied to get to a state, by the name that cores have for it."""
        self._rounds_of: dict[int, dict[int, tuple[tuple[ScalarRecord, ...], bytes]]] = {}
        """Of each node the rounds of its last replay, and their digests."""
        self._signed = [0, 0]
        """Records that were signed here, and their bytes."""
        self._bytes = {"flooded": 0, "served": 0, "compared": 0, "marks": 0}
        self._catching_up: dict[int, float] = {}
        """Nodes that began late or again, and when."""
        self._took_s: list[float] = []
        self._done_at: float | None = None

    # --- estimates --------------------------------------------------------------------------------------
    def remember(self, author: bytes, round_: int, named: bytes, codes: Codes) -> None:
        """These codes stand for this estimate. Where two have one name, by the poverty of few bytes, the first counts."""
        self._estimates.setdefault(round_, {}).setdefault((author, named), codes)

    def applied(
        self, node: int, source: bytes, name: bytes, rounds: Sequence[RoundScalars]
    ) -> list[graph.Applied]:
        """The rounds of a replay, each with a digest of all that was applied until then.

        source, name: digests of the state that is replayed from, and of the one that comes of it.
        """
        state, found = self._states.get(source, source), []
        before, told = self._rounds_of.get(node, {}), {}
        for each in rounds:
            known = before.get(each.round)
            # A core hands out the same tuple as long as nothing came for the round.
            digest = known[1] if known is not None and known[0] is each.records else _digest_of(each)
            told[each.round] = each.records, digest
            state = hashlib.sha256(state + digest).digest()
            found.append(graph.Applied(state, partial(self._round, each)))
        self._rounds_of[node] = told
        self._states[name] = state
        while len(self._states) > MAX_STATES:
            del self._states[next(iter(self._states))]
        return found

    def _round(self, each: RoundScalars) -> graph.Round:
        """With estimates for records. A record that no estimate stands for is taken at its word."""
        known = self._estimates.get(each.round, {})
        scalars = [
            graph.Scalars(record.author, known.get((record.author, record.codes), record.codes))
            for record in each.records
        ]
        return graph.Round(each.round, each.scale, each.decay, scalars)

    def forget(self, cut: int) -> None:
        """Nobody has records of the rounds up to this one any more."""
        for number in [number for number in self._estimates if number <= cut]:
            del self._estimates[number]

    # --- what it costs ----------------------------------------------------------------------------------
    def signed(self, records: Iterable[ScalarRecord], author: bytes) -> None:
        """Records are kept by this author's node: count its own."""
        for record in records:
            if record.author == author:
                self._signed[0] += 1
                self._signed[1] += len(msgspec.msgpack.encode(record))

    def sent(self, message: LinkMessage, num_bytes: int, event: object) -> None:
        """A message went out, and what made its node send it."""
        kind = type(message)
        if kind is Scalars:
            asked = type(event) is Received and type(event.message) in (Holding, Pull)
            self._bytes["served" if asked else "flooded"] += num_bytes
        elif kind in (Ranges, Holding, Pull):
            self._bytes["compared"] += num_bytes
        elif kind in (Marks, Terms):
            self._bytes["marks"] += num_bytes

    # --- who comes late ---------------------------------------------------------------------------------
    def began(self, node: int, now: float, others: Iterable[NodeCore]) -> None:
        """A node began or began again. It comes late where others have a round behind them."""
        if any(core.round for core in others):
            self._catching_up[node] = now

    def ended(self, node: int) -> None:
        """It is gone before it was where the others are."""
        self._catching_up.pop(node, None)

    def went_on(
        self, node: int, now: float, core: NodeCore, others: Callable[[], Sequence[NodeCore]]
    ) -> None:
        """A node goes into a round, or is done: it has caught up if it is where most are, with their log."""
        if node in self._catching_up and _has_caught_up(core, others()):
            self._took_s.append(now - self._catching_up.pop(node))

    # --- the end ----------------------------------------------------------------------------------------
    def has_settled(self, now: float, finished: Sequence[NodeCore]) -> bool:
        """All nodes are done. Those that had parted from the others may take over their state even then: whether there
        is one state, or was time enough to come to it."""
        if _num_states(finished) <= 1:
            return True
        self._done_at = now if self._done_at is None else self._done_at
        return now - self._done_at > SETTLES_WITHIN_S

    def figures(self, finished: Sequence[NodeCore], live: Sequence[NodeCore]) -> ScalarFigures:
        """finished: of the live ones, those that did all their rounds."""
        logs = [core.learning._log for core in live if isinstance(core.learning, ScalarLearning)]
        counted = max(
            (log.num_counted(max(core.round, log.sealed)) for core, log in zip(live, logs, strict=True)),
            default=0,
        )
        signed, signed_bytes = self._signed
        return ScalarFigures(
            num_states=_num_states(finished),
            log_records=counted,
            log_bytes=round(counted * signed_bytes / signed) if signed else 0,
            held_records=statistics.fmean(log.num_records for log in logs) if logs else 0.0,
            signed_records=signed,
            flooded_bytes=self._bytes["flooded"],
            served_bytes=self._bytes["served"],
            compared_bytes=self._bytes["compared"],
            marks_bytes=self._bytes["marks"],
            caught_up=len(self._took_s),
            catch_up_median_s=statistics.median(self._took_s) if self._took_s else None,
            catch_up_max_s=max(self._took_s, default=None),
            behind=len(self._catching_up),
        )


def _num_states(cores: Iterable[NodeCore]) -> int:
    return len({core.model.digest for core in cores if core.model is not None})


def _digest_of(each: RoundScalars) -> bytes:
    said = b"".join([record.author + record.codes for record in each.records])
    numbers = struct.pack(">Qdd", each.round, each.scale, each.decay)
    return hashlib.sha256(numbers + said).digest()


def _has_caught_up(core: NodeCore, others: Sequence[NodeCore]) -> bool:
    """Of the last round's end most nodes hear a moment apart: one round less is the same place."""
    if not others:
        return True
    rounds = sorted(other.round for other in others)
    if core.round + 1 < rounds[(len(rounds) - 1) // 2]:
        return False
    return 2 * sum(_same_log(core, other) for other in others) > len(others)


def _same_log(one: NodeCore, other: NodeCore) -> bool:
    """Whether both have settled the same: compared as far as either has sealed it."""
    a, b = one.learning, other.learning
    assert isinstance(a, ScalarLearning)
    assert isinstance(b, ScalarLearning)
    round_ = max(a._log.sealed, b._log.sealed)
    return a._log.chain(round_) == b._log.chain(round_)


def lowest_cut(cores: Iterable[NodeCore], disks: Iterable[ScalarDisk]) -> int:
    """Up to which round nobody has records: neither a core nor a disk."""
    cuts = [core.learning._log.cut for core in cores if isinstance(core.learning, ScalarLearning)]
    kept = [min(record.round for record in disk.records) - 1 for disk in disks if disk.records]
    return min([*cuts, *kept], default=0)


def as_rows(figures: ScalarFigures) -> Mapping[str, str]:
    """For people: a name and what there is to say."""
    rows = {
        "log": f"{figures.log_records:,} records, {figures.log_bytes / 1e6:,.2f} MB; "
        f"{figures.held_records:,.0f} records held by a node",
        "states": f"{figures.num_states} among those that finished",
        "repair": f"{(figures.compared_bytes + figures.served_bytes) / 1e6:,.2f} MB beside "
        f"{figures.flooded_bytes / 1e6:,.2f} MB of flooded records",
    }
    if figures.catch_up_median_s is not None:
        rows["caught up"] = (
            f"{figures.caught_up:,} late ones, within {figures.catch_up_median_s:,.1f} s in the median and "
            f"{figures.catch_up_max_s:,.1f} s at most; {figures.behind:,} had not yet"
        )
    return rows
