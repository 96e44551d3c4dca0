"""Which sealed state a network stands on, where parts of it have parted.

Every record says on which sealed state its author stands. Belongs here: who was heard saying what, where the authors are
in their rounds, and which state a node ought to take over. Where anybody may be an author, keys cost nothing: what they
say then moves a node only where a part of its own neighbours stands behind it too.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from protocols.messages import Marks
from protocols.vocabulary import Checkpoint, PeerId, ScalarRecord, StateId, state_id

ROUNDS_OF_TRUST = 10
MAX_IMPATIENT = 4096
MAX_REMEMBERED = 64
"""Sealed states that a node knows as its own."""


class _Voice:
    """The last that was heard of an author, whether its record was taken or not."""

    __slots__ = ("at", "built_on", "round")

    def __init__(self, at: float, record: ScalarRecord) -> None:
        self.at = at
        self.round = record.round
        self.built_on = StateId(record.built_on)


class Patience:
    """Which authors a round waits for: those that spoke lately, but not one that it lately waited for in vain."""

    def __init__(self) -> None:
        self._vain: dict[bytes, int] = {}

    def awaited(self, authors: Iterable[bytes]) -> set[bytes]:
        """Of these, the ones that are worth a wait."""
        return {author for author in authors if author not in self._vain}

    def waited(self, awaited: Iterable[bytes], came: Collection[bytes]) -> None:
        """A round is over: who was not there in time has to be so for some rounds before it is awaited again."""
        for author in came:
            if author in self._vain:
                self._vain[author] -= 1
                if not self._vain[author]:
                    del self._vain[author]
        for author in sorted(awaited):
            if author not in came:
                self._vain[author] = ROUNDS_OF_TRUST
        while len(self._vain) > MAX_IMPATIENT:
            del self._vain[next(iter(self._vain))]


class Votes:
    """What one node has heard of where the others stand.

    me: its own author key. heard_for_s: how long a word counts. max_voices: authors that are remembered. closed: whether
        only members are authors.
    """

    def __init__(self, me: bytes, heard_for_s: float, max_voices: int, closed: bool) -> None:
        self._me = me
        self._closed = closed
        self._heard_for_s = heard_for_s
        self._max_voices = max_voices
        self._voices: dict[bytes, _Voice] = {}
        self._own_states: dict[StateId, None] = {}

    # --- hearing ----------------------------------------------------------------------------------------
    def hear(self, now: float, record: ScalarRecord) -> None:
        """Its signature is good. Of an author the newest round counts."""
        if not self.is_news(record):
            return
        self._voices.pop(record.author, None)
        self._voices[record.author] = _Voice(now, record)
        while len(self._voices) > self._max_voices:
            del self._voices[next(iter(self._voices))]

    def is_news(self, record: ScalarRecord) -> bool:
        """Whether its author was not heard of this round or a later one."""
        voice = self._voices.get(record.author)
        return voice is None or record.round > voice.round

    def said(self, author: bytes) -> tuple[int, StateId] | None:
        """The author's newest round, and the state it stood on then."""
        voice = self._voices.get(author)
        return (voice.round, voice.built_on) if voice else None

    def heard(self, since: float) -> list[bytes]:
        """Authors heard of since then, this node among them."""
        return [author for author, voice in self._voices.items() if voice.at >= since]

    def num_on(self, state: StateId) -> int:
        """Authors that stood on this state when last heard."""
        return sum(voice.built_on == state for voice in self._voices.values())

    # --- own states -------------------------------------------------------------------------------------
    def remember(self, checkpoint: Checkpoint, anew: bool = False) -> None:
        """This node has sealed this state. anew: it does not come from those before it."""
        if anew:
            self._own_states.clear()
        state = state_id(checkpoint)
        self._own_states.pop(state, None)
        self._own_states[state] = None
        while len(self._own_states) > MAX_REMEMBERED:
            del self._own_states[next(iter(self._own_states))]

    # --- asking -----------------------------------------------------------------------------------------
    def median_round(self, now: float, own: int, fellows: Sequence[int]) -> int:
        """How many rounds most have behind them, by the authors heard of late; but no more than a part of the neighbours
        (`_needed`) say of themselves. Who has heard of nobody goes by the neighbours alone.

        own, fellows: rounds that this node and its neighbours have behind them.
        """
        heard = [
            voice.round - 1
            for author, voice in self._voices.items()
            if author != self._me and self._is_recent(now, voice)
        ]
        if not heard:
            return lower_median([own, *fellows])
        backed = sorted(fellows, reverse=True)[self._needed(len(fellows)) - 1] if fellows else own
        return max(own, min(lower_median([own, *heard]), backed))

    def better(
        self,
        now: float,
        sealed: Checkpoint,
        fellows: Mapping[PeerId, Marks],
        last_round: int | None,
        remembers: bool,
    ) -> tuple[Checkpoint, bool] | None:
        """The state that more authors stand on than on this node's, with enough of the neighbours; whether most do.

        Of two with as many authors the one with more records is better. A node that has heard of nobody yet believes
        most of its neighbours, and itself as much as one of them where it `remembers` anything. last_round: the network's, where this node has it behind it: authors that got so far
        count, however long ago they were heard.
        """
        holders = Counter(state_id(marks.sealed) for marks in fellows.values())
        with_us, votes, num_voices = self._count(now, sealed, last_round)
        # With nobody on its own states a node has nothing to defend, and three that have all parted could never meet.
        is_alone = num_voices >= 2 and not any(holders[state] for state in self._own_states)
        needed = 1 if is_alone else self._needed(len(fellows))
        if num_voices < 2:
            with_us = remembers + sum(holders[state] for state in self._own_states)
            votes, num_voices = holders, remembers + len(fellows)
        others = {
            state: marks.sealed
            for marks in fellows.values()
            if (state := state_id(marks.sealed)) not in self._own_states
            and votes[state] > 0
            and holders[state] >= needed
        }
        if not others:
            return None
        state, best = max(
            others.items(), key=lambda each: (votes[each[0]], each[1].num_records, each[1].log, each[0])
        )
        if 2 * votes[state] > num_voices:
            return best, True
        heavier = (votes[state], best.num_records, best.log) > (with_us, sealed.num_records, sealed.log)
        return (best, False) if heavier and best.round >= sealed.round else None

    def _count(
        self, now: float, sealed: Checkpoint, last_round: int | None
    ) -> tuple[int, Counter[StateId], int]:
        """Authors on this node's sealed state, those on others, and all that count.

        The states that it came by say nothing: whoever still stands on one of them may go either way.
        """
        heard = [
            voice
            for voice in self._voices.values()
            if (self._is_recent(now, voice) if last_round is None else voice.round >= last_round)
        ]
        votes = Counter(voice.built_on for voice in heard)
        with_us = votes.pop(state_id(sealed), 0)
        for state in self._own_states:
            votes.pop(state, 0)
        return with_us, votes, len(heard)

    def _needed(self, num_fellows: int) -> int:
        """Neighbours that must stand behind what moves a node. Where keys cost nothing, a third of them, and two at least
        where there are two."""
        return 1 if self._closed else max(min(2, num_fellows), -(-num_fellows // 3), 1)

    def _is_recent(self, now: float, voice: _Voice) -> bool:
        return now - voice.at <= self._heard_for_s


def agreed(proposed: Checkpoint, fellows: Mapping[PeerId, Marks], num_fellows: int, patient: bool) -> bool:
    """Whether most neighbours have come to the same state; where `patient` is over, whether most have come to one, and to
    no other more of them. Whoever is not so far yet may still have records of these rounds."""
    with_us = 1 + sum(proposed in (marks.sealed, marks.proposed) for marks in fellows.values())
    if 2 * with_us > 1 + num_fellows:
        return True
    so_far = sum(
        max(each.round for each in (marks.sealed, marks.proposed) if each is not None) >= proposed.round
        for marks in fellows.values()
    )
    if patient or 2 * (1 + so_far) <= 1 + num_fellows:
        return False
    others = Counter(
        state_id(each)
        for marks in fellows.values()
        for each in (marks.sealed, marks.proposed)
        if each is not None and each.round == proposed.round and each != proposed
    )
    return with_us > max(others.values(), default=0)


def lower_median(numbers: Sequence[int]) -> int:
    """Of an even count the lower of the two in the middle."""
    return sorted(numbers)[(len(numbers) - 1) // 2]
