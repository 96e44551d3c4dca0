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

from node.randomness import stream, torch_seed, torch_seeded

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
