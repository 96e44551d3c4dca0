"""Which state a node takes over, and whom it believes."""

from collections.abc import Mapping

import pytest

from protocols.messages import Marks
from protocols.scalar_votes import Votes, agreed, lower_median
from protocols.vocabulary import Checkpoint, ModelRef, PeerId, ScalarRecord, state_id

ME = b"m" * 32


def checkpoint(round_: int, name: str, num_records: int = 10) -> Checkpoint:
    letter = name.encode() * 32
    return Checkpoint(round_, letter, num_records, ModelRef(letter, 9, round_, 1))


OURS, THEIRS, OTHERS = checkpoint(20, "a"), checkpoint(20, "b"), checkpoint(20, "c")


def votes_for(states: Mapping[Checkpoint, int], closed: bool = False) -> Votes:
    """Authors on these states, heard in round 25 at 0 s."""
    votes = Votes(ME, 30.0, 1000, closed)
    votes.remember(OURS)
    number = 0
    for state, count in states.items():
        for _ in range(count):
            number += 1
            votes.hear(0.0, ScalarRecord(number.to_bytes(32, "big"), 25, b"", state_id(state), bytes(64)))
    return votes


def fellows(*states: Checkpoint) -> dict[PeerId, Marks]:
    return {PeerId(f"p{i}"): Marks(25, 0, state, None) for i, state in enumerate(states)}


def test_the_state_of_most_authors_is_taken_where_neighbours_have_it() -> None:
    votes = votes_for({OURS: 3, THEIRS: 4})
    assert votes.better(1, OURS, fellows(THEIRS, THEIRS, OURS), None, False) == (THEIRS, True)
    assert votes.better(1, OURS, fellows(OURS, OURS, OURS), None, False) is None, "nobody here has it"


def test_a_part_that_is_not_most_is_better_where_it_is_larger_and_no_older() -> None:
    older = checkpoint(10, "o")
    assert votes_for({OURS: 2, THEIRS: 3, OTHERS: 3}).better(
        1, OURS, fellows(THEIRS, THEIRS), None, False
    ) == (
        THEIRS,
        False,
    )
    assert (
        votes_for({OURS: 2, older: 3, OTHERS: 3}).better(1, OURS, fellows(older, older), None, False) is None
    )
    assert votes_for({OURS: 3, THEIRS: 2}).better(1, OURS, fellows(THEIRS, THEIRS), None, False) is None


def test_of_two_halves_the_one_with_more_records_wins_and_only_one_does() -> None:
    heavy = checkpoint(20, "h", num_records=11)
    assert votes_for({OURS: 3, heavy: 3}).better(1, OURS, fellows(heavy, heavy), None, False) == (
        heavy,
        False,
    )
    light = checkpoint(20, "l", num_records=9)
    assert votes_for({OURS: 3, light: 3}).better(1, OURS, fellows(light, light), None, False) is None


def test_keys_alone_move_nobody_where_anyone_may_be_an_author() -> None:
    """A thousand keys and one link."""
    votes = votes_for({OURS: 5, THEIRS: 900})
    honest = [OURS] * 4
    assert votes.better(1, OURS, fellows(THEIRS, *honest), None, False) is None
    assert votes.better(1, OURS, fellows(THEIRS, THEIRS, *honest), None, False) == (THEIRS, True), (
        "two links of six do"
    )
    closed = votes_for({OURS: 5, THEIRS: 900}, closed=True)
    assert closed.better(1, OURS, fellows(THEIRS, *honest), None, False) == (THEIRS, True), (
        "members are counted, not links"
    )


def test_states_on_the_way_here_speak_for_nobody() -> None:
    votes = Votes(ME, 30.0, 1000, closed=True)
    before = checkpoint(10, "o")
    for state in (before, OURS):
        votes.remember(state)
    for number in range(5):
        votes.hear(0.0, ScalarRecord(bytes([number]) * 32, 25, b"", state_id(before), bytes(64)))
    votes.hear(0.0, ScalarRecord(b"z" * 32, 25, b"", state_id(THEIRS), bytes(64)))
    assert votes.better(1, OURS, fellows(before, THEIRS), None, False) == (THEIRS, False)
    assert votes.better(1, OURS, fellows(before, before), None, False) is None


def test_old_words_count_no_more_but_of_those_who_are_through() -> None:
    votes = votes_for({THEIRS: 5})
    assert votes.better(31, OURS, fellows(THEIRS, THEIRS), None, False) is None or votes.better(
        31, OURS, fellows(THEIRS, THEIRS), None, False
    ) == (THEIRS, True), "then it goes by its neighbours"
    assert votes.better(31, OURS, fellows(OURS, OURS, THEIRS), None, False) is None
    assert votes.better(1e6, OURS, fellows(THEIRS, THEIRS, OURS), 25, False) == (THEIRS, True)


def test_a_newcomer_believes_most_of_its_neighbours() -> None:
    votes = Votes(ME, 30.0, 1000, closed=False)
    start = checkpoint(0, "s")
    votes.remember(start)
    assert votes.better(1, start, fellows(THEIRS), None, False) == (THEIRS, True)
    assert votes.better(1, start, fellows(THEIRS, THEIRS, OTHERS), None, False) == (THEIRS, True)
    assert votes.better(1, start, fellows(THEIRS, OTHERS), None, False) is None


def test_three_that_have_all_parted_meet() -> None:
    """Each is alone with its state: then one neighbour is enough, and all prefer the same one."""
    heavy = checkpoint(20, "h", num_records=12)
    votes = votes_for({OURS: 1, heavy: 1, OTHERS: 1})
    assert votes.better(1, OURS, fellows(heavy, OTHERS), None, False) == (heavy, False)
    assert votes.better(1, OURS, fellows(heavy, OTHERS, OURS), None, False) is None, "it is not alone"


def test_the_newest_word_of_an_author_counts() -> None:
    votes = votes_for({})
    for round_, state in ((5, OURS), (9, THEIRS), (7, OURS)):
        votes.hear(0.0, ScalarRecord(b"q" * 32, round_, b"", state_id(state), bytes(64)))
    assert votes.said(b"q" * 32) == (9, state_id(THEIRS))
    assert votes.num_on(state_id(THEIRS)) == 1


@pytest.mark.parametrize(
    ("heard", "neighbours", "expected"),
    [
        ([], [], 3),
        ([], [9, 9], 9),
        ([10, 10, 10], [10, 10, 10], 10),
        ([10**9] * 900, [3, 3, 3, 10**9], 3),
        ([10, 10, 10], [3, 3, 10, 10, 3, 3], 10),
        ([1, 1, 1], [9, 9, 9], 3),
    ],
)
def test_the_round_is_where_most_are(heard: list[int], neighbours: list[int], expected: int) -> None:
    votes = Votes(ME, 30.0, 1000, closed=False)
    for number, round_ in enumerate(heard):
        votes.hear(0.0, ScalarRecord(number.to_bytes(32, "big"), round_ + 1, b"", bytes(16), bytes(64)))
    assert votes.median_round(1.0, 3, neighbours) == expected


def test_voices_are_bounded() -> None:
    votes = Votes(ME, 30.0, 10, closed=False)
    for number in range(100):
        votes.hear(0.0, ScalarRecord(number.to_bytes(32, "big"), 1, b"", bytes(16), bytes(64)))
    assert votes.num_on(bytes(16)) == 10  # type: ignore[arg-type]


def test_a_state_is_agreed_on_by_most_or_in_the_end_by_more_than_any_other() -> None:
    def of(*states: Checkpoint, num: int = 0, patient: bool = True) -> bool:
        return agreed(OURS, fellows(*states), num or len(states), patient)

    assert of(OURS)
    assert of(OURS, OURS, THEIRS)
    assert not of(THEIRS)
    assert not of(OURS, THEIRS, THEIRS, OTHERS)
    assert not of(OURS, num=5)
    assert not of(OURS, THEIRS, THEIRS, OTHERS, patient=False)
    assert of(OURS, THEIRS, OTHERS, checkpoint(10, "x"), patient=False)
    slow = checkpoint(10, "x")
    assert not of(slow, slow, slow, THEIRS, patient=False), "who is not so far may still have records"
    assert agreed(OURS, {PeerId("p"): Marks(25, 0, THEIRS, OURS)}, 1, True), "to propose it is enough"


def test_lower_median() -> None:
    assert [lower_median(numbers) for numbers in ([4], [1, 9], [9, 1, 5])] == [4, 1, 5]
