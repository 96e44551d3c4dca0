"""A blob's name, worked out here a second time from its definition, and what is refused under that name."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.blob import (
    check_chunk,
    check_header,
    chunk_length,
    chunks_of,
    digest_of,
    hash_blob,
    num_chunks,
)
from protocols.errors import PeerError
from protocols.messages import FetchHeader
from protocols.vocabulary import CHUNK_BYTES, MAX_CHUNKS, MAX_MODEL_BYTES, ModelRef, Reason

SIZES = (1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES)


def blob(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def expected(data: bytes) -> tuple[bytes, tuple[bytes, ...]]:
    """The definition in protocols/README.md, in one line each."""
    hashes = tuple(hashlib.sha256(data[at : at + 2**20]).digest() for at in range(0, len(data), 2**20))
    return hashlib.sha256(b"covey-blob-1" + len(data).to_bytes(8, "big") + b"".join(hashes)).digest(), hashes


def offer_of(data: bytes) -> tuple[ModelRef, FetchHeader]:
    digest, hashes = hash_blob(data)
    return ModelRef(digest, len(data), 3, 10), FetchHeader(len(data), hashes)


def refused(ref: ModelRef, header: FetchHeader) -> Reason:
    with pytest.raises(PeerError) as caught:
        check_header(ref, header)
    return caught.value.reason


@pytest.mark.parametrize("size", SIZES)
def test_a_digest_is_what_its_definition_says(size: int) -> None:
    data = blob(size)
    assert hash_blob(data) == expected(data)
    assert hash_blob(memoryview(data)) == expected(data)


def test_known_digests_never_change() -> None:
    assert hash_blob(b"covey")[0].hex() == "db63d20572346f93d71cb635a927c9d5f5d2e4a3e3b1eb5811550d1afa18ef37"
    assert (
        hash_blob(blob(CHUNK_BYTES + 1))[0].hex()
        == "819bd7749a5d3cd74fee82ee3de5f8ee2d72062d9a1cf1d235c1673d732ddf2b"
    )


@pytest.mark.parametrize("size", SIZES)
def test_chunks_cover_the_blob_once(size: int) -> None:
    data = blob(size)
    chunks = list(chunks_of(data))
    assert b"".join(chunks) == data
    assert len(chunks) == num_chunks(size)
    assert [len(chunk) for chunk in chunks] == [chunk_length(size, index) for index in range(len(chunks))]
    assert all(len(chunk) == CHUNK_BYTES for chunk in chunks[:-1])


@settings(derandomize=True, deadline=None)
@given(st.integers(1, MAX_MODEL_BYTES))
def test_chunk_lengths_add_up_to_the_size(size: int) -> None:
    count = num_chunks(size)
    assert 1 <= count <= MAX_CHUNKS
    assert (count - 1) * CHUNK_BYTES + chunk_length(size, count - 1) == size
    assert 1 <= chunk_length(size, count - 1) <= CHUNK_BYTES


def test_the_size_and_the_order_of_chunks_are_part_of_the_name() -> None:
    a, b = bytes(32), bytes([1]) * 32
    names = {digest_of(size, hashes) for size in (1, 2) for hashes in ([a, b], [b, a], [a], [])}
    assert len(names) == 8


@pytest.mark.parametrize("size", SIZES)
def test_an_honest_blob_is_accepted(size: int) -> None:
    ref, header = offer_of(blob(size))
    check_header(ref, header)
    for index, chunk in enumerate(chunks_of(blob(size))):
        check_chunk(chunk, header.chunk_hashes[index], index)


def test_a_header_of_another_size_is_refused() -> None:
    ref, header = offer_of(blob(CHUNK_BYTES + 1))
    assert refused(ref, FetchHeader(CHUNK_BYTES + 2, header.chunk_hashes)) is Reason.WRONG_SIZE
    assert refused(ref, FetchHeader(header.size_bytes, header.chunk_hashes[:1])) is Reason.WRONG_SIZE
    assert refused(ref, FetchHeader(header.size_bytes, header.chunk_hashes * 2)) is Reason.WRONG_SIZE


def test_a_header_that_does_not_hash_to_the_offer_is_refused() -> None:
    ref, header = offer_of(blob(CHUNK_BYTES + 1))
    swapped = FetchHeader(header.size_bytes, header.chunk_hashes[::-1])
    assert refused(ref, swapped) is Reason.WRONG_HASH
    other = ModelRef(bytes(32), ref.size_bytes, ref.round, ref.num_samples)
    assert refused(other, header) is Reason.WRONG_HASH


def test_a_damaged_chunk_is_refused_by_number() -> None:
    data = bytearray(blob(CHUNK_BYTES + 1))
    _, header = offer_of(bytes(data))
    data[-1] ^= 1
    first, last = chunks_of(bytes(data))
    check_chunk(first, header.chunk_hashes[0], 0)
    with pytest.raises(PeerError, match="wrong_hash: chunk 1"):
        check_chunk(last, header.chunk_hashes[1], 1)
    with pytest.raises(PeerError, match="wrong_hash: chunk 0"):
        check_chunk(first[:-1], header.chunk_hashes[0], 0)
