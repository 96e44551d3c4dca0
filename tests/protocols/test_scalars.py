"""Learning by scalars among whole cores: whatever comes in which order, whoever falls out, all end with one state."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from protocols.events import (
    Emit,
    KeepScalars,
    LearningDone,
    LinkUp,
    Phase,
    Received,
    RoundDone,
    Send,
)
from protocols.messages import (
    Heartbeat,
    Holding,
    LinkMessage,
    Marks,
    Pull,
    Ranges,
    RoundRange,
    Scalars,
    Terms,
)
from protocols.scalar_flood import RECORDS_PER_S
from protocols.scalar_log import signed_bytes
from protocols.scalar_terms import ScalarSettings, misfit, round_scalars, terms_digest, terms_of
from protocols.scalars import MAX_AHEAD
from protocols.vocabulary import (
    MAX_RECORDS_PER_MESSAGE,
    PeerId,
    Reason,
    ScalarRecord,
)
from tests.protocols.identities import FakeSignatures, hello_of
from tests.protocols.scalar_network import BASE, Node, ScalarNetwork, everyone_equal

SEEDS = range(3)


def node(network: ScalarNetwork, name: str) -> Node:
    return network.nodes[PeerId(name)]


# --- one state ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_all_end_with_one_state_that_counts_every_scalar(num: int, seed: int) -> None:
    network = ScalarNetwork(num, seed)
    network.run_to_end()
    state = everyone_equal(network)
    assert [each[0] for each in state] == list(range(1, 31)), f"seed {seed}"  # type: ignore[index]
    assert all(len(each[3]) == num for each in state), f"seed {seed}: a record is missing"  # type: ignore[index]
    for each in network.nodes.values():
        assert each.done == 1
        assert each.learning.phase is Phase.DONE
        assert not each.troubles
        assert not each.penalties
        sealed = each.learning.status().sealed
        assert sealed is not None
        assert (sealed.round, sealed.num_records) == (30, 30 * num)


def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        network = ScalarNetwork(4, 5)
        network.run_to_end()
        runs.append([(now, peer, repr(effect)) for now, peer, effect in network.log])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sparse_network_floods(seed: int) -> None:
    edges = [(number, (number + 1) % 8) for number in range(8)]
    network = ScalarNetwork(8, seed, edges=edges)
    network.run_to_end()
    state = everyone_equal(network)
    assert sum(len(each[3]) for each in state) >= 8 * 30 - 8  # type: ignore[index]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_straggler_counts_where_the_round_is_open(seed: int) -> None:
    """Its records come after their rounds were replayed; these are replayed anew, and nobody waits."""
    network = ScalarNetwork(4, seed, slow={"n2": 3.0}, quorum=0.5, checkpoint_every=10, late_rounds=6)
    network.run_to_end()
    state = everyone_equal(network)
    author = FakeSignatures("n2").author
    from_it = [each[0] for each in state if author in dict(each[3])]  # type: ignore[index]
    assert len(from_it) >= 5, f"seed {seed}: {from_it}"
    assert node(network, "n0").learning.status().counts["replays"] > 2
    lateness = [
        effect.record.staleness_max
        for _, _, effect in network.log
        if isinstance(effect, Emit) and isinstance(effect.record, RoundDone)
    ]
    assert max(lateness) > 0


@pytest.mark.parametrize("seed", range(6))
def test_a_fast_node_does_not_part_from_slow_ones(seed: int) -> None:
    """Alone ahead of them it may not seal rounds of which they still have records."""
    network = ScalarNetwork(3, seed, slow={"n1": 25.0, "n2": 40.0}, rounds=60, deadline_s=1.0)
    network.slow_until = 90
    network.run(60)
    assert node(network, "n0").learning.round > 20
    sealed = node(network, "n0").learning.status().sealed
    assert sealed is not None
    assert sealed.round <= max(node(network, name).learning.round for name in ("n1", "n2"))
    network.run_to_end()
    everyone_equal(network)


# --- coming and going -----------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", SEEDS)
def test_a_late_joiner_begins_at_a_checkpoint_and_ends_equal(seed: int) -> None:
    network = ScalarNetwork(3, seed, rounds=60)
    network.run(25)
    assert node(network, "n0").learning.round >= 15
    late = network.add("late")
    network.run_to_end()
    state = everyone_equal(network)
    counts = late.learning.status().counts
    assert counts["adopted"] >= 1, "the log before it was cut: only a checkpoint leads there"
    assert late.fetches >= 1
    mine = [each[0] for each in state if late.signatures.author in dict(each[3])]  # type: ignore[index]
    assert mine, f"seed {seed}: it took no part"
    assert mine[0] > 10, "it began where the others were"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_late_joiner_replays_the_whole_log_where_it_is_there(seed: int) -> None:
    network = ScalarNetwork(3, seed, checkpoint_every=100, rounds=30)
    network.run(15)
    late = network.add("late")
    network.run_to_end()
    everyone_equal(network)
    assert late.fetches == 0
    assert late.learning.status().counts["pulled"] > 10


@pytest.mark.parametrize("fetch_s", [2.0, 5.0, 8.0])
def test_a_joiner_behind_a_slow_line_still_joins(fetch_s: float) -> None:
    """Checkpoints come every four seconds or so, and the two before the newest are still served."""
    network = ScalarNetwork(3, 4, rounds=0)
    network.run(30)
    network.fetch_s = fetch_s
    late = network.add("late")
    network.run(140)
    status = late.learning.status()
    assert late.fetches <= 3
    assert status.counts["adopted"] >= 1
    assert status.round > node(network, "n0").learning.round - 3
    own = [record.round for record in late.disk_records if record.author == late.signatures.author]
    assert own
    assert min(own) > 25, "it measured nothing at a state that nobody else has"


def test_a_joiner_of_an_old_network_invents_no_checkpoints() -> None:
    """Its links come up after it has begun alone."""
    network = ScalarNetwork(2, 4, rounds=0, checkpoint_every=1)
    network.run(100)
    network.fetch_s = 5.0
    late = network.add("late", start=False)
    network.isolate([["late"], ["n0", "n1"]])
    network.start(late)
    network.run(104)
    network.isolate([])
    network.run(160)
    counts = late.learning.status().counts
    assert counts["adopted"] >= 1
    assert counts["sealed"] < 80, "only those that it took part in"
    assert late.learning.round > node(network, "n0").learning.round - 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crash_loses_nothing(seed: int) -> None:
    network = ScalarNetwork(4, seed)
    rng = random.Random(seed)
    for _ in range(4):
        network.run(network.now + rng.uniform(2, 6))
        victim = node(network, f"n{rng.randrange(1, 4)}")
        network.crash(victim)
        network.run(network.now + rng.uniform(0.1, 6))
        network.start(victim)
    network.run_to_end()
    everyone_equal(network)
    assert_nobody_contradicts_itself(network)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lost_disk_is_a_late_joiner(seed: int) -> None:
    network = ScalarNetwork(4, seed)
    network.run(14)
    network.crash(node(network, "n1"), wiped=True)
    network.run(16)
    network.start(node(network, "n1"))
    network.run_to_end()
    everyone_equal(network)
    assert_nobody_contradicts_itself(network)


def test_the_first_node_may_leave_for_good() -> None:
    network = ScalarNetwork(5, 1)
    network.run(10)
    network.crash(node(network, "n0"))
    network.run_to_end()
    everyone_equal(network)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_short_partition_heals_without_a_loss(seed: int) -> None:
    network = ScalarNetwork(6, seed, rounds=60, checkpoint_every=20)
    network.run(8)
    network.isolate([["n0", "n1", "n2"], ["n3", "n4", "n5"]])
    network.run(14)
    network.isolate([])
    network.run_to_end()
    state = everyone_equal(network)
    assert sum(len(each[3]) for each in state) > 6 * 60 - 40, f"seed {seed}"  # type: ignore[index]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("parts", [[2, 4], [3, 3], [1, 5]])
def test_a_long_partition_ends_with_one_side_taking_over_the_other(parts: list[int], seed: int) -> None:
    names = [f"n{number}" for number in range(6)]
    network = ScalarNetwork(6, seed, rounds=80, checkpoint_every=5)
    network.run(8)
    network.isolate([names[: parts[0]], names[parts[0] :]])
    network.run(50)
    network.isolate([])
    network.run_to_end()
    everyone_equal(network)


@pytest.mark.parametrize("seed", range(12))
def test_everything_at_once(seed: int) -> None:
    """Crashes, wiped disks, late joiners, stragglers, lost messages, a partition: one state in the end."""
    rng = random.Random(seed)
    names = [f"n{number}" for number in range(7)]
    slow = {name: rng.choice([1, 1, 1, 3]) for name in names}
    members = frozenset(FakeSignatures(name).author for name in [*names, "late"])
    every = rng.choice([3, 7, 15])
    network = ScalarNetwork(
        7, seed, slow=slow, members=members, rounds=60, checkpoint_every=every, quorum=0.6
    )
    network.tamper = lambda a, b, message: (
        None if isinstance(message, Scalars) and rng.random() < 0.1 else message
    )
    for step in range(6):
        network.run(network.now + rng.uniform(2, 6))
        victim = node(network, rng.choice(names[1:]))
        if victim.core is not None:
            network.crash(victim, wiped=rng.random() < 0.3)
        network.run(network.now + rng.uniform(0.1, 8))
        network.start(victim)
        if step == 2:
            network.isolate([names[:3], names[3:]])
        if step == 4:
            network.isolate([])
            network.add("late")
    network.tamper = lambda a, b, message: message
    network.run_to_end()
    everyone_equal(network)
    for each in network.nodes.values():
        assert not each.penalties[Reason.MALFORMED], f"seed {seed}: nobody here says what it should not"


def assert_nobody_contradicts_itself(network: ScalarNetwork) -> None:
    said: dict[tuple[bytes, int], bytes] = {}
    for _, _, effect in network.log:
        for record in effect.records if isinstance(effect, KeepScalars) else ():
            assert said.setdefault((record.author, record.round), record.codes) == record.codes
    assert all(not each.penalties[Reason.EQUIVOCATION] for each in network.nodes.values())


def test_a_record_is_durable_before_it_is_sent() -> None:
    network = ScalarNetwork(3, 2)
    network.run_to_end()
    kept: dict[PeerId, set[ScalarRecord]] = {peer: set() for peer in network.nodes}
    num_sent = 0
    for _, peer, effect in network.log:
        if isinstance(effect, KeepScalars):
            kept[peer] |= set(effect.records)
        elif isinstance(effect, Send) and isinstance(effect.message, Scalars):
            assert set(effect.message.records) <= kept[peer]
            num_sent += len(effect.message.records)
    assert num_sent > 90


def test_the_log_is_cut_one_checkpoint_behind_the_sealed_one() -> None:
    network = ScalarNetwork(3, 0, rounds=0, checkpoint_every=5)
    network.run(60)
    for each in network.nodes.values():
        status = each.learning.status()
        assert status.sealed is not None
        assert status.round > 30
        assert status.cut >= status.sealed.round - 15 > 0
        assert status.num_records <= 3 * (status.round + 1 - status.cut)


def test_nobody_downloads_a_model_after_the_join() -> None:
    network = ScalarNetwork(3, 0)
    network.run_to_end()
    assert all(each.fetches == 0 for each in network.nodes.values())
    assert all(each.sent["offer"] == 0 for each in network.nodes.values())


# --- hostile --------------------------------------------------------------------------------------------
class Liar:
    """A link of its own to one honest node, under the right terms; what it sends is up to the test."""

    def __init__(self, network: ScalarNetwork, target: str, name: str = "liar") -> None:
        self.network, self.target = network, node(network, target)
        self.signatures = FakeSignatures(name)
        self.peer = PeerId("n1")
        terms = terms_of(network.settings, BASE, ())
        self.terms = terms_digest(terms)

    def record(self, round_: int, codes: bytes = b"\x40\x41", **changes: object) -> ScalarRecord:
        signature = self.signatures.sign(signed_bytes(self.terms, round_, codes, bytes(16)))
        return replace(ScalarRecord(self.signatures.author, round_, codes, bytes(16), signature), **changes)

    def say(self, *messages: LinkMessage) -> None:
        for message in messages:
            self.network.push(0.0, self.target.peer, Received(self.peer, message))
        self.network.run(self.network.now + 0.001)


def running(**scalars: object) -> tuple[ScalarNetwork, Liar]:
    network = ScalarNetwork(3, 3, **scalars)
    network.run(6)
    return network, Liar(network, "n0")


def test_a_forged_signature_is_refused_and_three_end_the_link() -> None:
    network, liar = running()
    round_ = liar.target.learning.round + 1
    before = liar.target.learning.status().num_records
    forged = [liar.record(round_ + i, signature=bytes(64)) for i in range(3)]
    liar.say(Scalars(0, tuple(forged)))
    assert liar.target.penalties[Reason.FORGED] == 3
    assert (PeerId("n0"), liar.peer) not in network.links
    assert liar.target.learning.status().num_records == before
    network.run_to_end()
    state = everyone_equal(network)
    assert all(liar.signatures.author not in dict(each[3]) for each in state)  # type: ignore[index]


def test_a_signature_of_another_network_is_worth_nothing() -> None:
    _, liar = running()
    liar.terms = terms_digest(terms_of(ScalarSettings(rounds=7), BASE, ()))
    liar.say(Scalars(0, (liar.record(liar.target.learning.round + 1),)))
    assert liar.target.penalties[Reason.FORGED] == 1


@pytest.mark.parametrize("field", ["codes", "round", "author", "built_on"])
def test_a_changed_byte_breaks_the_signature(field: str) -> None:
    _, liar = running()
    good = liar.record(liar.target.learning.round + 1)
    others = {
        "codes": b"\x40\x42",
        "round": good.round + 1,
        "author": FakeSignatures("n2").author,
        "built_on": b"x" * 16,
    }
    liar.say(Scalars(0, (replace(good, **{field: others[field]}),)))
    assert liar.target.penalties[Reason.FORGED] == 1
    liar.say(Scalars(0, (good,)))
    assert liar.target.penalties[Reason.FORGED] == 1


@pytest.mark.parametrize("apart", [False, True])
def test_two_records_for_one_round_count_for_nobody(apart: bool) -> None:
    """Told to the same node, or to two nodes at the same moment."""
    network, liar = running(checkpoint_every=15)
    round_ = liar.target.learning.round + 1
    one, other = liar.record(round_, b"\x40"), liar.record(round_, b"\x50")
    honest = liar.record(round_ + 1, b"\x60")
    liar.say(Scalars(0, (one, honest)))
    second = Liar(network, "n1" if apart else "n0")
    second.peer = PeerId("n2")
    second.say(Scalars(0, (other,)))
    network.run_to_end()
    state = everyone_equal(network)
    counted = {each[0]: dict(each[3]) for each in state}  # type: ignore[index]
    assert liar.signatures.author not in counted[round_]
    assert counted[round_ + 1][liar.signatures.author] == b"\x60", "what it said once still counts"
    for each in network.nodes.values():
        assert each.penalties[Reason.EQUIVOCATION] == 1
        assert {one, other} <= set(each.disk_records), "the proof is kept"


def test_two_contradictions_and_three_are_the_same() -> None:
    network, liar = running(checkpoint_every=15)
    round_ = liar.target.learning.round + 1
    records = [liar.record(round_, bytes([0x40 + i])) for i in range(3)]
    for name, pair in (("n0", (0, 1)), ("n1", (1, 2)), ("n2", (0, 2))):
        other = Liar(network, name)
        other.peer = PeerId("n1" if name == "n0" else "n0")
        other.say(Scalars(0, tuple(records[i] for i in pair)))
    network.run_to_end()
    everyone_equal(network)


def test_duplicates_and_replays_change_nothing() -> None:
    network, liar = running()
    seen = tuple(list(node(network, "n1").disk_records)[:50])
    before = liar.target.learning.status()
    liar.say(*[Scalars(0, seen)] * 20)
    after = liar.target.learning.status()
    assert (after.num_records, after.log) == (before.num_records, before.log)
    assert not liar.target.penalties
    network.run_to_end()
    everyone_equal(network)


def test_shuffled_and_doubled_delivery_ends_with_the_same_log() -> None:
    network = ScalarNetwork(4, 9)
    rng = random.Random(9)

    def shuffle(source: PeerId, target: PeerId, message: LinkMessage) -> LinkMessage | None:
        if not isinstance(message, Scalars):
            return message
        for _ in range(2):
            records = rng.sample(message.records, len(message.records))
            network.push(rng.uniform(0, 3), target, Received(source, Scalars(message.round, tuple(records))))
        return None

    network.tamper = shuffle
    network.run_to_end()
    everyone_equal(network)


def test_a_round_far_in_the_future_is_not_kept() -> None:
    _, liar = running()
    before = liar.target.learning.status().num_records
    far = liar.target.learning.round + 10 * MAX_AHEAD
    liar.say(Scalars(2**40, tuple(liar.record(far + i) for i in range(100))))
    status = liar.target.learning.status()
    assert status.num_records == before
    assert status.counts["future"] == 100
    assert not liar.target.penalties, "an honest neighbour may be ahead of a slow node"
    assert status.round < far


def test_a_record_without_scalars_moves_nothing() -> None:
    """And does not stand in the way of the rounds that have some."""
    network, liar = running(deadline_s=1.0)
    for name in ("n1", "n2"):
        network.crash(node(network, name))
    liar.say(*[Scalars(0, (liar.record(liar.target.learning.round + 1 + i, b""),)) for i in range(4)])
    for name in ("n1", "n2"):
        network.start(node(network, name))
    network.run_to_end()
    state = everyone_equal(network)
    assert all(any(codes for _, codes in each[3]) for each in state)  # type: ignore[index]


def test_one_liar_does_not_move_the_round() -> None:
    network, liar = running()
    liar.say(Scalars(10**9, ()))
    network.run(network.now + 3)
    assert liar.target.learning.round < 30


def test_one_key_cannot_make_every_round_wait() -> None:
    """It speaks now and then, just often enough to be expected."""

    def rounds_after(speaks: bool) -> int:
        network, liar = running(rounds=0, deadline_s=20.0)
        for _ in range(8):
            if speaks:
                liar.say(Scalars(0, (liar.record(liar.target.learning.round + 1),)))
            network.run(network.now + 25)
        return liar.target.learning.round

    assert rounds_after(True) > 0.5 * rounds_after(False)


def test_more_scalars_than_the_terms_allow_are_refused() -> None:
    _, liar = running(max_samples=4)
    liar.say(Scalars(0, (liar.record(liar.target.learning.round + 1, b"\x40" * 5),)))
    assert liar.target.penalties[Reason.MALFORMED] == 1


def test_a_lie_about_the_round_silences_a_fresh_node_only_for_a_while() -> None:
    network = ScalarNetwork(0)
    victim = network.add("n0")
    network.run(0.25)
    network.add("n1", start=False)
    network.links |= {(PeerId("n0"), PeerId("n1")), (PeerId("n1"), PeerId("n0"))}
    hello = hello_of("n1", learning="scalars")
    terms = terms_of(network.settings, BASE, ())
    for event in (
        LinkUp(PeerId("n1"), False, ""),
        *(Received(PeerId("n1"), each) for each in (hello, terms, Heartbeat(2**48, True))),
    ):
        network.push(0.0, PeerId("n0"), event)
    network.run(20)
    assert victim.learning.round < 100
    assert any(record.author == victim.signatures.author for record in victim.disk_records)


def test_marks_that_no_log_leads_to_are_refused() -> None:
    network, liar = running()
    good = node(network, "n1").learning.status().sealed
    assert good is not None
    odd = [
        replace(good, round=good.round + 1),
        replace(good, ref=replace(good.ref, round=good.round + 5)),
        replace(good, round=10_000, ref=replace(good.ref, round=10_000)),
    ]
    for number, checkpoint in enumerate(odd, 1):
        liar.say(Marks(20, 0, checkpoint, None))
        assert liar.target.penalties[Reason.MALFORMED] == number
    network.run_to_end()
    everyone_equal(network)


def test_a_flood_of_strangers_is_bounded() -> None:
    network, liar = running(max_authors=8, checkpoint_every=5)
    for wave in range(60):
        round_ = liar.target.learning.round + 1
        records = [
            Liar(network, "n0", f"stranger {wave} {i}").record(round_) for i in range(MAX_RECORDS_PER_MESSAGE)
        ]
        liar.say(Scalars(0, tuple(records)))
        status = liar.target.learning.status()
        assert status.num_records <= 8 * (status.round + 1 - status.cut)
    assert liar.target.learning.status().counts["flood"] > 0
    assert liar.target.penalties[Reason.FLOOD] > 0
    assert 60 * MAX_RECORDS_PER_MESSAGE > 3 * RECORDS_PER_S, "or the flood is none"
    network.run_to_end()
    everyone_equal(network)


def test_only_members_count_where_there_are_members() -> None:
    members = frozenset(FakeSignatures(f"n{i}").author for i in range(3))
    network = ScalarNetwork(3, members=members)
    network.run(6)
    liar = Liar(network, "n0")
    liar.terms = terms_digest(terms_of(network.settings, BASE, members))
    liar.say(Scalars(0, (liar.record(liar.target.learning.round + 1),)))
    assert liar.target.penalties[Reason.STRANGER] == 1
    network.run_to_end()
    everyone_equal(network)


def test_odd_questions_are_harmless() -> None:
    network, liar = running()
    huge = RoundRange(0, 2**48, 2**40, bytes(32))
    liar.say(
        Ranges((huge,) * 32),
        Ranges((RoundRange(liar.target.learning.round, 2**48, 0, bytes(32)),) * 32),
        Holding(0, 2**48, b"x" * 31),
        Holding(1, 2**48, hashlib.sha512(b"").digest() * 100),
        Pull(0, 2**48, hashlib.sha512(b"").digest() * 500),
        Pull(5, 1, bytes(16)),
    )
    liar.say(Ranges((RoundRange(9, 3, 0, bytes(32)),)))
    assert liar.target.penalties[Reason.MALFORMED] == 1
    network.run_to_end()
    everyone_equal(network)


def test_a_pull_serves_each_record_once_and_within_the_budget() -> None:
    _, liar = running(checkpoint_every=100)
    learning = liar.target.learning
    ids = list(learning._log.ids(1, learning.round))
    liar.target.sent.clear()
    liar.say(*[Pull(1, learning.round, b"".join(ids))] * 400)
    served = learning.status().counts["served"]
    assert len(ids) <= served <= 2 * RECORDS_PER_S + 1


# --- terms ----------------------------------------------------------------------------------------------
def test_every_term_is_compared_and_told() -> None:
    ours = terms_of(ScalarSettings(rounds=10), BASE, ())
    assert misfit(ours, ours) is None
    reasons = Counter()
    for name in Terms.__struct_fields__:
        value = getattr(ours, name)
        other = (
            b"x" * 32 if isinstance(value, bytes) else f"not {value}" if isinstance(value, str) else value + 1
        )
        problem = misfit(ours, replace(ours, **{name: other}))
        assert problem is not None
        reasons[problem[0]] += 1
        assert terms_digest(ours) != terms_digest(replace(ours, **{name: other}))
        if problem[0] is Reason.TERMS:
            assert f"scalars.{name}" in problem[1]
    assert reasons[Reason.BASE] == reasons[Reason.GENERATOR] == 1


@pytest.mark.parametrize(
    ("change", "reason"), [({"base": b"y" * 32}, Reason.BASE), ({"generator": "mt19937"}, Reason.GENERATOR)]
)
def test_a_node_of_another_base_is_turned_away_with_a_reason(
    change: dict[str, object], reason: Reason
) -> None:
    network = ScalarNetwork(2, 0)

    def change_terms(source: PeerId, target: PeerId, message: LinkMessage) -> LinkMessage:
        return replace(message, **change) if isinstance(message, Terms) and source == "n1" else message

    network.tamper = change_terms
    network.run(10)
    assert node(network, "n0").penalties[reason] >= 1
    assert node(network, "n0").learning.status().counts.get("new", 0) == 0
    (status,) = [row for row in node(network, "n1").core.peers() if row.peer == "n0"]  # type: ignore[union-attr]
    assert reason.value in status.last_reason


def test_scale_and_decay_are_data_of_the_round() -> None:
    def of(*lengths: int, **options: object) -> tuple[float, float]:
        records = tuple(ScalarRecord(bytes(32), 5, bytes(length), bytes(16), bytes(64)) for length in lengths)
        found = round_scalars(ScalarSettings(**options), 5, records)  # type: ignore[arg-type]
        return found.scale, found.decay

    assert of(3, 5, learning_rate=0.5) == (0.5 / 8, 0)
    assert of(4, learning_rate=0.5, normalise="sqrt") == (0.25, 0)
    assert of(4, learning_rate=1.0, schedule="linear", rounds=10, weight_decay=0.1) == (0.6 / 4, 0.6 * 0.1)
    assert of(learning_rate=1.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "linear"},
        {"pool": 8, "weight_decay": 0.1},
        {"private_noise": 1.0},
        {"learning_rate": 10.0, "weight_decay": 0.1},
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|cannot"):
        ScalarSettings(**options)  # type: ignore[arg-type]


# --- work that fails ------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", SEEDS)
def test_work_that_fails_is_tried_again(seed: int) -> None:
    network = ScalarNetwork(3, seed)
    rng = random.Random(seed)
    perform: Callable[..., None] = network.perform

    def fail_often(each: Node, effect: object) -> None:
        from protocols.events import Estimate, Evaluate, Replay, WorkFailed

        if isinstance(effect, Estimate | Evaluate | Replay) and rng.random() < 0.1:
            if isinstance(effect, Replay):
                each.current = (b"broken", ())
            network.push(0.1, each.peer, WorkFailed(effect.token, "no"))
        else:
            perform(each, effect)

    network.perform = fail_often  # type: ignore[method-assign]
    network.run_to_end()
    everyone_equal(network)
    assert any(each.troubles for each in network.nodes.values())


def test_learning_is_done_once() -> None:
    network = ScalarNetwork(3, 1)
    network.run_to_end()
    network.run(network.now + 100)
    done = [
        peer
        for _, peer, effect in network.log
        if isinstance(effect, Emit) and isinstance(effect.record, LearningDone)
    ]
    assert sorted(done) == ["n0", "n1", "n2"]
