"""A content's bytes: read from where it lies as long as it is as it was, and taken in so that a crash costs nothing.

Belongs here: one file and what may have become of it. Which files there are is known to `content_tables.py`.
"""

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from node.store import CONTENT_LANE, Blob, Incoming
from protocols.blob import chunk_length, digest_of, num_chunks
from protocols.errors import LocalError, PeerError
from protocols.messages import FetchHeader
from protocols.vocabulary import CHUNK_BYTES, DIGEST_BYTES, ContentRef, Reason

GONE, DIFFERS = 1, 2
"""How a file has changed: so that a look at it tells, and it may come back with its disk; or unseen, so that it cannot."""


class ContentBlob(Blob):
    """A whole content where it lies. Each chunk is checked before it is given away."""

    lane = CONTENT_LANE

    def __init__(
        self, path: Path, size_bytes: int, hashes: bytes, stamp: str, on_changed: Callable[[int, str], None]
    ) -> None:
        super().__init__(path, size_bytes, _split(hashes))
        self._stamp = stamp
        self._on_changed = on_changed

    def read(self, index: int) -> bytes:
        """Chunk `index`.

        Raises:
            OSError: the file has changed or is gone, and is not served any more; or it cannot be read now.
        """
        if problem := problem_since(self.path, self._stamp):
            self._on_changed(GONE, problem)
            raise OSError(problem)
        try:
            with open_file(self.path) as file:
                file.seek(index * CHUNK_BYTES)
                chunk = file.read(chunk_length(self.size_bytes, index))
        except OSError as error:
            if error.errno in _LED_ASTRAY:
                self._on_changed(DIFFERS, "a link leads to it now")
            raise
        if hashlib.sha256(chunk).digest() != self.chunk_hashes[index]:
            problem = "its bytes are not those that were shared"
            self._on_changed(DIFFERS, problem)
            raise OSError(problem)
        return chunk


class IncomingContent(Incoming):
    """A content on its way in, which outlives a crash: its chunks' hashes lie beside it on the disk."""

    lane = CONTENT_LANE

    def __init__(
        self, path: Path, ref: ContentRef, check_disk: Callable[[int], None], resize: Callable[[int], None]
    ) -> None:
        super().__init__(path, ref)
        self._resize = resize
        self._header = path.with_suffix(".header")
        self._check_disk = check_disk
        self._lock = threading.Lock()
        self._is_dropped = False

    def recover(self) -> None:
        """Find what an earlier process has left, by reading it whole."""
        if self.chunk_hashes:
            return
        with suppress(OSError):
            hashes = _split(self._header.read_bytes())
            if not self._is_named_by(self.ref.size_bytes, hashes):
                return
            with self.path.open("rb") as file:
                for index, expected in enumerate(hashes):
                    chunk = file.read(chunk_length(self.ref.size_bytes, index))
                    if hashlib.sha256(chunk).digest() == expected:
                        self.held.add(index)
            self.chunk_hashes = hashes

    def _is_named_by(self, size_bytes: int, hashes: tuple[bytes, ...]) -> bool:
        return len(hashes) == num_chunks(size_bytes) and digest_of(size_bytes, hashes) == self.ref.digest

    def prove(self, header: FetchHeader) -> None:
        """As of any blob. But where the header is that of the digest and the size another, whoever spoke of it first has
        lied, and not the peer that serves it: the digest proves the size.

        Raises:
            PeerError: WRONG_SIZE or WRONG_HASH; BUSY, it has another size, and is to be asked for once more.
            LocalError: the size that it has is more than is allowed.
        """
        size_bytes = header.size_bytes
        if size_bytes != self.ref.size_bytes and self._is_named_by(size_bytes, header.chunk_hashes):
            self._resize(size_bytes)
            wrong = f"it has {size_bytes} bytes and not {self.ref.size_bytes}, as whoever shares it says"
            raise PeerError(Reason.BUSY, wrong)
        super().prove(header)

    def write(self, index: int, chunk: bytes) -> None:
        """As of any blob. The hashes are kept before the first chunk.

        Raises:
            PeerError: WRONG_HASH; nothing is written then.
            LocalError: it is not wanted any more, or the disk is full but for what is to stay free.
        """
        self._check_disk(len(chunk))
        with self._lock:
            if self._is_dropped:
                raise LocalError("it is not wanted any more")
            if not self.held:
                self._header.write_bytes(b"".join(self.chunk_hashes))
            super().write(index, chunk)

    def drop(self) -> None:
        """Nobody here wants it any more: what there is of it goes, and nothing is written from now on."""
        with self._lock:
            self._is_dropped = True
            self.path.unlink(missing_ok=True)
            self._header.unlink(missing_ok=True)

    @property
    def held_bytes(self) -> int:
        """Of the chunks that are here."""
        return min(len(self.held) * CHUNK_BYTES, self.ref.size_bytes)


def open_file(path: Path, enter: Callable[[int, int], None] = lambda folder, depth: None) -> BinaryIO:
    """A regular file, with no link anywhere on its path; what else may have come there meanwhile is not waited for.

    Whoever may write into a folder that is shared could else have a link lead to what only this process may read.

    path: absolute. enter: told of each folder on the way, by its descriptor, and how many parts its path has. What it raises
    ends the opening.
    """
    folder = os.open(path.anchor, _FOLDER)
    try:
        for depth, name in enumerate(path.parts[1:-1], 1):
            enter(folder, depth)
            inner = os.open(name, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        enter(folder, len(path.parts) - 1)
        descriptor = os.open(path.name, _FILE, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a file any more")
    return os.fdopen(descriptor, "rb")


# With O_PATH a folder need not be readable to be passed through; other systems than Linux have none.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LED_ASTRAY = (errno.ELOOP, errno.ENOTDIR)


def problem_since(path: Path, stamp: str) -> str | None:
    """What has happened to a file, if anything; OSError where that cannot be said."""
    try:
        return None if stamp_of(path.lstat()) == stamp else "it was changed"
    except (FileNotFoundError, NotADirectoryError):
        return "it is gone"


def stamp_of(found: os.stat_result) -> str:
    """Another one after any change of a file that a program does not hide."""
    return f"{stat.S_IFMT(found.st_mode)} {found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _split(hashes: bytes) -> tuple[bytes, ...]:
    return tuple(hashes[start : start + DIGEST_BYTES] for start in range(0, len(hashes), DIGEST_BYTES))
