"""Streams depend on seed and purpose alone."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from node.randomness import FEW_OF_MANY, RoundStreams, stream, torch_seed, torch_seeded

PATHS = st.lists(st.one_of(st.text(max_size=5), st.integers(-3, 3)), max_size=3)
REPOSITORY = Path(__file__).parents[2]


def test_the_same_seed_and_path_give_the_same_numbers() -> None:
    first, second = stream(1, "node", 3), stream(1, "node", 3)
    assert np.array_equal(first.random(100), second.random(100))


def test_streams_are_philox_keyed_by_sha256_and_never_change() -> None:
    digest = hashlib.sha256(b'[7, "a", "batches", 0]').digest()
    expected = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    found = stream(7, "a", "batches", 0)
    assert found.bit_generator.state["state"]["key"].tolist() == (
        expected.bit_generator.state["state"]["key"].tolist()
    )
    assert found.integers(0, 1000, 5).tolist() == [290, 280, 752, 317, 737]
    assert torch_seed(7, "a", "batches", 0) == int.from_bytes(digest[16:24], "little") >> 1


def test_streams_do_not_depend_on_the_process_hash_seed() -> None:
    code = "from node.randomness import torch_seed; print(torch_seed(7, 'a'))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1")
    }
    assert printed == {f"{torch_seed(7, 'a')}\n"}


@settings(derandomize=True, max_examples=200)
@given(PATHS, PATHS)
def test_different_paths_give_different_streams(one: list[str | int], other: list[str | int]) -> None:
    same = [(type(x), x) for x in one] == [(type(x), x) for x in other]
    assert (torch_seed(0, *one) == torch_seed(0, *other)) == same
    assert (stream(0, *one).random() == stream(0, *other).random()) == same


@settings(derandomize=True, max_examples=100)
@given(st.integers(), PATHS)
def test_torch_accepts_every_seed(seed: int, path: list[str | int]) -> None:
    number = torch_seed(seed, *path)
    assert 0 <= number < 2**63
    torch.Generator().manual_seed(number)


def test_the_global_torch_generator_is_put_back_even_after_an_error() -> None:
    before = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        try:
            with torch_seeded(5):
                drawn.append(torch.rand(3))
                raise KeyError
        except KeyError:
            pass
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*drawn)


# --- words by round -------------------------------------------------------------------------------------
def test_a_round_begins_where_its_counter_says_and_never_changes() -> None:
    key = int.from_bytes(hashlib.sha256(b'[7, "a", "batches"]').digest()[:16], "little")
    expected = np.random.Philox(key=key, counter=[0, 0, 5, 0]).random_raw(9)
    streams = RoundStreams(7, ["b", "a"], "batches")
    streams.words(0, 5, 3)
    assert np.array_equal(streams.words(1, 5, 9), expected)
    assert streams.random_orders([(1, 5)], 6, 6).tolist() == [[4, 1, 3, 5, 0, 2]]
    assert streams.random_orders([(1, 5)], 1000, 5).tolist() == [[443, 763, 537, 680, 911]]


def test_drawing_more_or_elsewhere_changes_nothing() -> None:
    streams = RoundStreams(0, ["a", "b"], "batches")
    alone = streams.words(0, 1, 50)
    streams.words(1, 1, 7)
    streams.words(0, 2, 7)
    assert np.array_equal(streams.words(0, 1, 50), alone)
    assert np.array_equal(streams.words(0, 1, 13), alone[:13])


def test_names_rounds_seeds_and_purposes_have_words_of_their_own() -> None:
    drawn = [
        int(RoundStreams(seed, ["a", "b"], purpose).words(index, round_, 1)[0])
        for seed in (0, 1)
        for purpose in ("batches", "train")
        for index in (0, 1)
        for round_ in (0, 1, 2**32, 2**63)
    ]
    assert len(set(drawn)) == len(drawn)


@settings(derandomize=True, max_examples=200)
@given(st.data(), st.integers(1, 600))
def test_an_order_holds_no_item_twice_and_a_shorter_one_is_its_beginning(data: st.DataObject, n: int) -> None:
    count = data.draw(st.integers(1, n))
    streams = RoundStreams(3, ["a"], "batches")
    (order,) = streams.random_orders([(0, 4)], n, count)
    assert len(set(order.tolist())) == count
    assert 0 <= order.min() <= order.max() < n
    fewer = data.draw(st.integers(1, count))
    if (n >= FEW_OF_MANY * count) == (n >= FEW_OF_MANY * fewer):
        assert streams.random_orders([(0, 4)], n, fewer)[0].tolist() == order[:fewer].tolist()


def test_every_item_is_as_likely_in_every_place() -> None:
    streams = RoundStreams(0, ["a"], "batches")
    for num_items, count in ((5, 3), (48, 3)):
        orders = streams.random_orders([(0, round_) for round_ in range(20_000)], num_items, count)
        for place in orders.T:
            seen = np.bincount(place, minlength=num_items)
            expected = 20_000 / num_items
            assert ((seen - expected) ** 2 / expected).sum() < 2 * num_items + 20  # chi-squared, generously
