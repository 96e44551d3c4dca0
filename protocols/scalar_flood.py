"""How records spread: flooded once over each link, compared by ranges, pulled where they are missing.

Belongs here: who is told which record, and what of a neighbour's records is let in. What a record means for the rounds
is said in `scalars.py`. Sources: flooding SeedFlood, arXiv 2602.18181; range digests arXiv 2212.13567.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil

from protocols.budget import Budget
from protocols.events import Penalise, Send
from protocols.machine import Output
from protocols.messages import Holding, Marks, Pull, Ranges, RoundRange, Scalars
from protocols.scalar_log import Outcome, ScalarLog, signed_bytes
from protocols.scalar_votes import Votes
from protocols.signing import Signatures
from protocols.view import View
from protocols.vocabulary import (
    MAX_IDS_PER_MESSAGE,
    MAX_RANGES_PER_MESSAGE,
    MAX_RECORDS_PER_MESSAGE,
    RECORD_ID_BYTES,
    PeerId,
    Reason,
    RecordId,
    ScalarRecord,
)

MAX_STRIKES = 3
"""Refused records after which a link is closed."""
FEW = 256
"""Ids that are told rather than digests of smaller ranges."""
SPLIT = 8
RECORDS_PER_S = 2000
"""New records looked at from one neighbour, and records sent to it for the asking, after a burst of twice as many."""


QUESTION = 20
"""Records that a question costs: the log has to be gone through for it."""


class Fellow:
    """A neighbour under the same terms."""

    __slots__ = ("counts", "marks", "round", "served", "strikes", "taken")

    def __init__(self, counts: bool) -> None:
        self.counts = counts
        """Whether its word on what is settled does."""
        self.marks: Marks | None = None
        self.round = 0
        """That it last said to have behind it."""
        self.strikes = 0
        self.taken = Budget(RECORDS_PER_S)
        self.served = Budget(RECORDS_PER_S)


class Flood:
    """The records of one node on their way in and out.

    terms: digest of the terms that signatures are bound to. members: authors that are admitted; none admits all.
    max_samples: scalars that a record may hold.
    """

    def __init__(
        self,
        log: ScalarLog,
        votes: Votes,
        view: View,
        signatures: Signatures,
        terms: bytes,
        members: frozenset[bytes],
        max_samples: int,
    ) -> None:
        self._max_samples = max_samples
        self._log = log
        self._votes = votes
        self._view = view
        self._signatures = signatures
        self._terms = terms
        self._members = members
        self._fresh: dict[ScalarRecord, set[PeerId]] = {}
        """Records that go out with the next flush, and who has them already."""
        self.fellows: dict[PeerId, Fellow] = {}
        self.counts: Counter[str] = Counter()
        """Records by what became of them."""

    def marks(self) -> dict[PeerId, Marks]:
        """Of the neighbours that have told theirs, and are members where there are members."""
        return {
            peer: fellow.marks
            for peer, fellow in self.fellows.items()
            if fellow.marks is not None and fellow.counts
        }

    def welcome(self, peer: PeerId) -> None:
        """A neighbour has the same terms."""
        author = self._signatures.author_of(peer)
        self.fellows[peer] = Fellow(counts=not self._members or author in self._members)

    # --- in ---------------------------------------------------------------------------------------------
    def take(
        self, now: float, peer: PeerId, records: Iterable[ScalarRecord], horizon: int
    ) -> tuple[list[Output], list[ScalarRecord]]:
        """Check a neighbour's records and put into the log what belongs there: which that were, new ones and those that
        prove a contradiction. horizon: the last round from which records are taken."""
        fellow, log = self.fellows[peer], self._log
        out: list[Output] = []
        taken: list[ScalarRecord] = []
        for record in records:
            where = "late" if record.round <= log.sealed else "future" if record.round > horizon else ""
            if where:
                # An honest neighbour may be far ahead of a slow node: counted, not punished, and repaired later.
                self.counts[where] += 1
                if not self._votes.is_news(record):
                    continue
            elif log.holds(record):
                self.counts["known"] += 1
                if record in self._fresh:
                    self._fresh[record].add(peer)
                continue
            if not fellow.taken.take(now):
                self.counts["flood"] += 1
                detail = f"more than {RECORDS_PER_S} new records a second"
                out.append(Penalise(peer, Reason.FLOOD, detail))
                break
            if problem := self._problem(record):
                out += self.strike(peer, *problem)
                if peer not in self.fellows:
                    break
                continue
            # Where its author stands counts in any case: those who parted have to hear of each other.
            self._votes.hear(now, record)
            if not where:
                out += self._put(record, taken)
        return out, taken

    def _problem(self, record: ScalarRecord) -> tuple[Reason, str] | None:
        author = record.author.hex()[:12]
        if len(record.codes) > self._max_samples:
            return (
                Reason.MALFORMED,
                f"{len(record.codes)} scalars of author {author}, allowed {self._max_samples}",
            )
        if self._members and record.author not in self._members:
            return Reason.STRANGER, f"author {author} is no member"
        data = signed_bytes(self._terms, record.round, record.codes, record.built_on)
        if not self._signatures.verify(record.author, data, record.signature):
            return Reason.FORGED, f"signature of author {author}, round {record.round}"
        return None

    def _put(self, record: ScalarRecord, taken: list[ScalarRecord]) -> list[Output]:
        outcome = self._log.add(record)
        self.counts[outcome.name.lower()] += 1
        if outcome in (Outcome.NEW, Outcome.VOIDED):
            taken.append(record)
        if outcome is not Outcome.VOIDED:
            return []
        # The neighbour that brings the proof is not the one that it convicts.
        detail = f"author {record.author.hex()[:12]} signed two records of round {record.round}"
        return [Penalise(PeerId(""), Reason.EQUIVOCATION, detail)]

    def strike(self, peer: PeerId, reason: Reason, detail: str) -> list[Output]:
        """Count a refusal; the third on one link ends it."""
        self.counts[reason.value] += 1
        fellow = self.fellows[peer]
        fellow.strikes += 1
        out: list[Output] = [Penalise(peer, reason, detail)]
        if fellow.strikes == MAX_STRIKES:
            del self.fellows[peer]
            if self._view.is_live(peer):
                out += self._view.close(peer, reason, detail)
        return out

    # --- out --------------------------------------------------------------------------------------------
    def spread(self, records: Sequence[ScalarRecord], source: PeerId | None) -> bool:
        """Pass records on with the next flush; whether there was none ahead."""
        first = not self._fresh
        for record in records:
            self._fresh[record] = {source} if source is not None else set()
        return first and bool(records)

    def flush(self, round_: int) -> list[Output]:
        """Tell every neighbour what it may not have yet."""
        fresh, self._fresh = self._fresh, {}
        out: list[Output] = []
        for peer in self.fellows:
            out += _scalars(peer, round_, [record for record, known in fresh.items() if peer not in known])
        return out

    # --- repair -----------------------------------------------------------------------------------------
    def compare(self, peer: PeerId, last: int) -> list[Output]:
        """Ask whether this neighbour has the same records, up to a round."""
        marks = self.fellows[peer].marks
        first = max(self._log.sealed, marks.cut if marks else 0) + 1
        if marks is None or last < first:
            return []
        return [Send(peer, Ranges((self._log.range(first, last),)))]

    def answer_ranges(
        self, now: float, peer: PeerId, ranges: Sequence[RoundRange]
    ) -> tuple[list[Output], bool]:
        """Where a neighbour's digests differ, tell it what is here, or finer digests; whether it asked for rounds that
        are gone here."""
        fellow = self.fellows[peer]
        out: list[Output] = []
        finer: list[RoundRange] = []
        for theirs in ranges:
            first, last = theirs.first, theirs.last
            if last < first:
                return self.strike(peer, Reason.MALFORMED, f"rounds {first} to {last}"), False
            if first <= self._log.cut:
                return out, True
            if not fellow.served.take(now, QUESTION):
                break
            mine = self._log.range(first, last)
            if mine.digest == theirs.digest:
                continue
            if first == last or mine.count + theirs.count <= FEW:
                ids = list(self._log.ids(first, last))[:MAX_IDS_PER_MESSAGE]
                out.append(Send(peer, Holding(first, last, b"".join(ids))))
            else:
                step = ceil((last - first + 1) / SPLIT)
                starts = range(first, last + 1, step)
                finer += [self._log.range(start, min(start + step - 1, last)) for start in starts]
        size = MAX_RANGES_PER_MESSAGE
        out += [Send(peer, Ranges(tuple(finer[at : at + size]))) for at in range(0, len(finer), size)]
        return out, False

    def answer_holding(self, now: float, peer: PeerId, round_: int, message: Holding) -> list[Output]:
        """Send what the neighbour lacks, pull what is missing here."""
        if message.first <= self._log.cut or not self.fellows[peer].served.take(now, QUESTION):
            return []
        theirs, mine = set(_split(message.ids)), set(self._log.ids(message.first, message.last))
        out = self._serve(now, peer, round_, message.first, message.last, mine - theirs)
        lacking = sorted(theirs - mine)
        if lacking and message.last > self._log.sealed:
            self.counts["pulled"] += len(lacking)
            out.append(Send(peer, Pull(message.first, message.last, b"".join(lacking))))
        return out

    def answer_pull(self, now: float, peer: PeerId, round_: int, message: Pull) -> list[Output]:
        """Send what is asked for."""
        if not self.fellows[peer].served.take(now, QUESTION):
            return []
        return self._serve(now, peer, round_, message.first, message.last, set(_split(message.ids)))

    def _serve(
        self, now: float, peer: PeerId, round_: int, first: int, last: int, ids: set[RecordId]
    ) -> list[Output]:
        served = self.fellows[peer].served
        records = self._log.select(first, last, ids.__contains__, len(ids)) if ids else []
        allowed = [record for record in records if served.take(now)]
        self.counts["served"] += len(allowed)
        return _scalars(peer, round_, allowed)


def _scalars(peer: PeerId, round_: int, records: Sequence[ScalarRecord]) -> list[Output]:
    size = MAX_RECORDS_PER_MESSAGE
    return [
        Send(peer, Scalars(round_, tuple(records[start : start + size])))
        for start in range(0, len(records), size)
    ]


def _split(ids: bytes) -> list[RecordId]:
    """What is left over at the end is no id, and names nothing."""
    size = RECORD_ID_BYTES
    return [RecordId(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]
