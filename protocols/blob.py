"""How a blob is named and cut, so that each chunk can be checked on its own as it arrives.

digest = SHA-256("covey-blob-1" | size as 8 bytes big-endian | SHA-256 of every chunk in order)
"""

import hashlib
from collections.abc import Iterable, Iterator

from protocols.errors import PeerError
from protocols.messages import FetchHeader
from protocols.vocabulary import CHUNK_BYTES, ContentRef, Digest, ModelRef, Reason

_DOMAIN = b"covey-blob-1"


def num_chunks(size_bytes: int) -> int:
    """Chunks in a blob; the last may be short."""
    return -(-size_bytes // CHUNK_BYTES)


def chunk_length(size_bytes: int, index: int) -> int:
    """Bytes in chunk `index` of a blob."""
    return min(CHUNK_BYTES, size_bytes - index * CHUNK_BYTES)


def chunks_of(data: bytes | memoryview) -> Iterator[memoryview]:
    """A blob's chunks in order."""
    view = memoryview(data)
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def digest_of(size_bytes: int, chunk_hashes: Iterable[bytes]) -> Digest:
    """The name of a blob from its size and its chunks' hashes."""
    root = hashlib.sha256(_DOMAIN + size_bytes.to_bytes(8, "big"))
    for chunk_hash in chunk_hashes:
        root.update(chunk_hash)
    return Digest(root.digest())


def hash_blob(data: bytes | memoryview) -> tuple[Digest, tuple[bytes, ...]]:
    """A blob's digest and its chunks' hashes."""
    hashes = tuple(hashlib.sha256(chunk).digest() for chunk in chunks_of(data))
    return digest_of(len(data), hashes), hashes


def check_header(ref: ModelRef | ContentRef, header: FetchHeader) -> None:
    """The header is the one that the offer promised.

    Raises:
        PeerError: WRONG_SIZE or WRONG_HASH.
    """
    if header.size_bytes != ref.size_bytes or len(header.chunk_hashes) != num_chunks(ref.size_bytes):
        raise PeerError(
            Reason.WRONG_SIZE,
            f"offered {ref.size_bytes} bytes, header says {header.size_bytes} in {len(header.chunk_hashes)} chunks",
        )
    if digest_of(header.size_bytes, header.chunk_hashes) != ref.digest:
        raise PeerError(Reason.WRONG_HASH, "the header's chunk hashes do not make the offered digest")


def check_chunk(chunk: bytes | memoryview, expected: bytes, index: int) -> None:
    """One chunk is what its hash says.

    Raises:
        PeerError: WRONG_HASH.
    """
    if hashlib.sha256(chunk).digest() != expected:
        raise PeerError(Reason.WRONG_HASH, f"chunk {index}")
