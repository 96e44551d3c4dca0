"""Every chunk is asked for, none for nothing, whatever becomes of those that were asked."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.chunk_queue import MAX_ASKED, ChunkQueue
from protocols.vocabulary import PeerId

A, B, C = PeerId("A"), PeerId("B"), PeerId("C")


def bring(queue: ChunkQueue, *chunks: int) -> None:
    for index in chunks:
        assert queue.bring(index)
        queue.settle(index, right=True)


def test_one_peer_is_asked_for_everything_in_order() -> None:
    queue, asked = ChunkQueue(range(9), 1), []
    while chunks := queue.take(A, 2):
        asked += chunks
    assert asked == list(range(9))
    assert not queue.finished
    bring(queue, *asked)
    assert queue.finished


def test_what_is_held_already_is_not_asked_for() -> None:
    queue = ChunkQueue([1, 2, 5, 9], 1)
    assert [list(queue.take(A, 2)) for _ in range(3)] == [[1, 2], [5], [9]]


def test_nothing_wanted_is_finished_at_once() -> None:
    assert ChunkQueue([], 3).finished
    assert not ChunkQueue([], 3).has_work(A)


def test_peers_share_small_models_too() -> None:
    queue = ChunkQueue(range(4), 3)
    assert [list(queue.take(peer, 2)) for peer in (A, B, C, A)] == [[0], [1], [2], [3]]


def test_who_owes_nothing_helps_with_the_chunk_that_comes_last() -> None:
    queue = ChunkQueue(range(3), 2)
    for peer in (A, A, B):
        queue.take(peer, 1)
    assert not queue.has_work(A), "it owes some itself"
    bring(queue, 2)
    assert list(queue.take(B, 2)) == [1]
    assert not queue.has_work(B), "it owes that now"
    assert not queue.has_work(A)
    bring(queue, 1)
    assert not queue.bring(1), "the other was quicker"
    assert list(queue.take(B, 2)) == [0]


def test_one_chunk_is_asked_of_few() -> None:
    queue = ChunkQueue([0], 4)
    takers = [peer for peer in (A, B, C, PeerId("D")) if queue.take(peer, 1)]
    assert takers == [A, B]
    assert len(takers) == MAX_ASKED


def test_a_wrong_chunk_is_wanted_again() -> None:
    queue = ChunkQueue([0, 1], 1)
    queue.take(A, 1)
    queue.bring(0)
    queue.settle(0, right=False)
    queue.drop(A)
    assert list(queue.take(B, 2)) == [0]


def test_what_a_lost_peer_owes_is_asked_of_others() -> None:
    queue = ChunkQueue(range(2), 1)
    queue.take(A, 1)
    queue.take(A, 1)
    queue.take(B, 1)  # the last one too
    queue.drop(A)
    bring(queue, 1)
    assert list(queue.take(B, 4)) == [0]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(0, 2**32))
def test_peers_that_come_and_go_bring_every_chunk_once(num_chunks: int, num_peers: int, seed: int) -> None:
    rng = random.Random(seed)
    peers = [PeerId(str(number)) for number in range(num_peers)]
    queue, owed = ChunkQueue(range(num_chunks), num_peers), {peer: [] for peer in peers}
    right: list[int] = []
    for _ in range(10_000):
        if queue.finished:
            break
        peer = rng.choice(peers)
        if rng.random() < 0.05:
            queue.drop(peer)
            owed[peer].clear()
        elif owed[peer] and rng.random() < 0.6:
            index = owed[peer].pop(0)
            if queue.bring(index):
                is_right = rng.random() < 0.9
                queue.settle(index, is_right)
                right += [index] if is_right else []
        else:
            has_work, chunks = queue.has_work(peer), queue.take(peer, rng.randint(1, 3))
            assert has_work == bool(chunks)
            assert not set(chunks) & set(right)
            owed[peer] += chunks
    assert queue.finished
    assert sorted(right) == list(range(num_chunks))


@pytest.mark.parametrize("num_peers", [1, 3])
def test_little_is_asked_for_twice(num_peers: int) -> None:
    """Peers of one speed, in turn."""
    queue, num_asked = ChunkQueue(range(100), num_peers), 0
    owed: list[list[int]] = [[] for _ in range(num_peers)]
    while not queue.finished:
        for number in range(num_peers):
            if not owed[number]:
                owed[number] += queue.take(PeerId(str(number)), 2)
                num_asked += len(owed[number])
            if owed[number] and queue.bring(index := owed[number].pop(0)):
                queue.settle(index, right=True)
    assert num_asked <= 100 + num_peers
