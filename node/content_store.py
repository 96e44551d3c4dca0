"""Shared content on disk: what is served from where it lies, what is on its way in, and where it finally comes to lie.

In the home: `content.db`, what is shared and wanted; `content/`, lists of folders, copies, and what is on its way
(`<digest>.part` with the hashes of its chunks in `<digest>.header`, so that it outlives a crash); `downloads/`, unless the
operator named another folder.

A file that is shared stays where it is. It is read once to learn the hash of each chunk, and each chunk is hashed again
before it leaves: a file that has changed is not served.
"""

import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from node.config import ContentConfig
from node.content_blobs import GONE, ContentBlob, IncomingContent, open_file, problem_since, stamp_of
from node.content_downloads import Downloads
from node.content_tables import ContentTables, Hashed, Origin, path_of
from node.folders import (
    MAX_LIST_BYTES,
    Folder,
    FolderFile,
    Skipped,
    find_files,
    holds_key,
    problem_of_file,
)
from node.store import Blob, BlobStore, Incoming, hash_pieces
from protocols.blob import hash_blob
from protocols.entries import Kind
from protocols.errors import LocalError, PeerError
from protocols.vocabulary import CHUNK_BYTES, ContentRef, Digest, ModelRef, Reason

Told = Callable[[int, int], None]
"""Called with the bytes read so far and with all. What it raises ends the reading."""


class Wanted(NamedTuple):
    """Something that is to be got: a file, or a folder, which is its list first."""

    ref: ContentRef
    kind: Kind
    title: str


class Item(NamedTuple):
    """Something that is served: a file or a folder."""

    digest: Digest
    kind: Kind
    path: Path
    is_got: bool
    """From others; else it is the operator's own."""
    num_files: int
    num_changed: int
    """Of its files: changed or gone, so not served any more."""
    total_bytes: int


class FolderShare(NamedTuple):
    """A folder that is shared now."""

    ref: ContentRef
    """Of its list."""
    folder: Folder
    skipped: tuple[Skipped, ...]

    @property
    def digests(self) -> tuple[Digest, ...]:
        """Of all that is served for it: the list and the files."""
        return tuple(
            dict.fromkeys(map(Digest, (self.ref.digest, *(file.digest for file in self.folder.files))))
        )


class UnfitError(LocalError):
    """A file that cannot be shared."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} {why}")
        self.why = why


class ContentStore:
    """Contents by digest. Used from the loop, the network's thread and the disk's: each call is whole.

    changed: told, on any thread and once, of a content that is not served any more, since its file has changed or gone.

    Raises:
        LocalError: `content.db` is damaged.
    """

    def __init__(
        self,
        home: Path,
        settings: ContentConfig,
        changed: Callable[[Digest, str], None] = lambda digest, problem: None,
    ) -> None:
        self._home = home.resolve()
        self._folder = self._home / "content"
        self._settings = settings
        self._tell_changed = changed
        self._incoming: dict[Digest, IncomingContent] = {}
        self._stopping = threading.Event()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._tables = ContentTables(self._home / "content.db", self._folder)
        downloads = Path(settings.downloads or self._home / "downloads").expanduser().resolve()
        self._downloads = Downloads(downloads, self._tables, self.get, self.listing, self._check_write)
        self._sweep()

    def stop(self) -> None:
        """Whatever copies a file leaves off, and is begun anew after the next start."""
        self._stopping.set()

    def close(self) -> None:
        """No call comes after this one."""
        self._tables.close()

    # --- sharing ----------------------------------------------------------------------------------------
    def share_file(self, path: Path, told: Told = lambda done, total: None) -> ContentRef:
        """Serve a file from where it lies. Reads it whole, unless it was read before and is as it was.

        Raises:
            LocalError: it cannot be shared, and why.
        """
        path = _absolute(path)
        hashed = self._hash(path, path.parent, told)
        self._put_own(hashed.digest, Kind.FILE, path, [(path, hashed, "shared")])
        return ContentRef(hashed.digest, hashed.size_bytes)

    def share_copy(self, path: Path, told: Told = lambda done, total: None) -> ContentRef:
        """Serve a copy of a file that will not stay, such as a checkpoint. It may lie anywhere in the home.

        Raises:
            LocalError: it cannot be shared, and why, or the disk is full.
        """
        path = _absolute(path)
        draft = self._folder / f"{threading.get_ident()}.draft"
        try:
            with self._opened(path, root=None) as original, draft.open("wb") as file:
                digest, size_bytes, hashes = hash_pieces(self._written(_read(path, original, told), file))
            copy = draft.replace(self._path(digest))
            hashed = Hashed(digest, size_bytes, stamp_of(copy.lstat()), b"".join(hashes))
        except OSError as error:
            raise LocalError(f"{path} cannot be copied: {error}") from error
        finally:
            draft.unlink(missing_ok=True)
        self._put_own(digest, Kind.FILE, copy, [(copy, hashed, "copied")])
        return ContentRef(digest, size_bytes)

    def share_folder(self, path: Path, told: Told = lambda done, total: None) -> FolderShare:
        """Serve a folder's files from where they lie, and their list. What cannot be shared is skipped and named.

        Raises:
            LocalError: there is nothing in it that can be shared, or too much.
        """
        path = _absolute(path)
        found, skipped = find_files(path)
        total_bytes = sum(file.size_bytes for file in found)
        files: list[FolderFile] = []
        rows: list[tuple[Path, Hashed, Origin]] = []
        done_bytes = 0
        for parts, file, size_bytes in found:
            try:
                hashed = self._hash(file, path, lambda done, _: told(done_bytes + done, total_bytes))  # noqa: B023
            except UnfitError as error:
                skipped.append(Skipped(file, error.why))
            else:
                files.append(FolderFile(parts, hashed.size_bytes, hashed.digest))
                rows.append((file, hashed, "shared"))
            done_bytes += size_bytes
            told(done_bytes, total_bytes)
        if not files:
            raise LocalError(f"{path} holds no file that can be shared")
        folder = Folder(tuple(files))
        ref, row = self._keep_list(folder)
        self._put_own(Digest(ref.digest), Kind.FOLDER, path, [*rows, row])
        return FolderShare(ref, folder, tuple(skipped))

    def unshare(self, digest: bytes) -> tuple[Digest, ...]:
        """Serve an item no more; what is not served at all any more. Files stay, but for copies of the store's own."""
        with self._tables.change() as db:
            rows = self._tables.rows(
                "SELECT path, digest FROM files WHERE item = ? AND origin != 'arrived'", digest
            )
            db.execute("DELETE FROM files WHERE item = ? AND origin != 'arrived'", (digest,))
            db.execute("DELETE FROM items WHERE digest = ?", (digest,))
        self._tables.remove_unused(path for path, _ in rows)
        return tuple(dict.fromkeys(Digest(found) for _, found in rows if not self._tables.is_held(found)))

    def _keep_list(self, folder: Folder) -> tuple[ContentRef, tuple[Path, Hashed, Origin]]:
        data = folder.to_bytes()
        if len(data) > MAX_LIST_BYTES:
            raise LocalError(
                f"its list has {len(data)} bytes, allowed {MAX_LIST_BYTES}; share its folders one by one"
            )
        digest, hashes = hash_blob(data)
        path = self._path(digest)
        draft = path.with_suffix(".draft")
        draft.write_bytes(data)
        draft.replace(path)
        hashed = Hashed(digest, len(data), stamp_of(path.lstat()), b"".join(hashes))
        return ContentRef(digest, len(data)), (path, hashed, "listed")

    def _hash(self, path: Path, root: Path, told: Told) -> Hashed:
        """root: the folder that is shared, or the one that a shared file lies in. Raises UnfitError."""
        with self._opened(path, root) as file:
            stamp = stamp_of(os.fstat(file.fileno()))
            known = self._tables.row(
                "SELECT digest, size_bytes, stamp, hashes FROM files WHERE path = ? AND stamp = ? AND NOT changed",
                os.fsencode(path),
                stamp,
            )
            if known:
                return Hashed(*known)
            digest, size_bytes, hashes = hash_pieces(_read(path, file, told))
            if stamp_of(os.fstat(file.fileno())) != stamp:
                raise UnfitError(path, "was changed while it was read; share it when it is at rest")
        return Hashed(digest, size_bytes, stamp, b"".join(hashes))

    @contextmanager
    def _opened(self, path: Path, root: Path | None) -> Iterator[BinaryIO]:
        """A file that can be shared; with a `root`, and may be: no folder from there on is a node's home. Raises UnfitError."""
        downloads = self._downloads.folder
        is_download = self._home in downloads.parents and path.is_relative_to(downloads)

        def enter(folder: int, depth: int) -> None:
            # Told by the key and not by the path: a home may be moved while another file is read.
            if root is not None and depth >= len(root.parts) and holds_key(folder):
                raise UnfitError(path, _PRIVATE)

        try:
            if root is not None and not is_download and path.is_relative_to(self._home):
                raise UnfitError(path, _PRIVATE)
            if problem := problem_of_file(path.lstat()):
                raise UnfitError(path, problem)
            with open_file(path, enter) as file:
                if problem := problem_of_file(os.fstat(file.fileno())):
                    raise UnfitError(path, problem)
                yield file
        except OSError as error:
            raise UnfitError(path, f"cannot be read: {error.strerror or error}") from error

    def _written(self, pieces: Iterable[bytes], file: BinaryIO) -> Iterator[bytes]:
        for piece in pieces:
            self._check_write(len(piece))
            file.write(piece)
            yield piece

    def _put_own(
        self, item: Digest, kind: Kind, path: Path, rows: Iterable[tuple[Path, Hashed, Origin]]
    ) -> None:
        """It lies here from now on, and no more where it did."""
        with self._tables.change() as db:
            db.execute("DELETE FROM files WHERE item = ? AND origin != 'arrived'", (item,))
            db.execute(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?, FALSE)", (item, kind, os.fsencode(path))
            )
            self._tables.put_files(item, rows)

    # --- serving ----------------------------------------------------------------------------------------
    def get(self, digest: bytes) -> ContentBlob | None:
        """The content, if it is held whole and lies as it was left."""
        rows = self._tables.rows(
            "SELECT path, size_bytes, hashes, stamp FROM files WHERE digest = ? AND NOT changed", digest
        )
        for raw_path, size_bytes, hashes, stamp in rows:
            mark = partial(self._mark, Digest(digest), path_of(raw_path), stamp)
            with suppress(OSError):  # not now, at least
                if (problem := problem_since(path_of(raw_path), stamp)) is None:
                    return ContentBlob(path_of(raw_path), size_bytes, hashes, stamp, mark)
                mark(GONE, problem)
        return None

    def recheck(self) -> None:
        """Look at every file that is served: whether it is where it was and as it was, or has come back."""
        self._recheck(self._tables.rows("SELECT digest, path, stamp, changed FROM files"))

    def _recheck(self, rows: Iterable[tuple[bytes, bytes, str, int]]) -> None:
        for digest, raw_path, stamp, changed in rows:
            with suppress(OSError):  # what cannot be looked at now is as it was
                problem = problem_since(path_of(raw_path), stamp)
                if problem and not changed:
                    self._mark(Digest(digest), path_of(raw_path), stamp, GONE, problem)
                elif changed == GONE and not problem:
                    with self._tables.change() as db:
                        back = "UPDATE files SET changed = 0 WHERE path = ? AND stamp = ? AND changed = ?"
                        db.execute(back, (raw_path, stamp, GONE))

    def holds(self, ref: ContentRef) -> bool:
        """Whether the content is here, whole."""
        return self.get(ref.digest) is not None

    def digests(self) -> tuple[Digest, ...]:
        """Of all that is served, unless its file turns out to have changed."""
        return tuple(
            Digest(digest)
            for (digest,) in self._tables.rows("SELECT DISTINCT digest FROM files WHERE NOT changed")
        )

    def items(self, among: Collection[bytes] | None = None) -> tuple[Item, ...]:
        """All that is shared and all that was got and is served, or only what is among some digests; by path."""
        only = "" if among is None else f"AND items.digest IN ({', '.join('?' * len(among))}) "
        rows = self._tables.rows(
            "SELECT items.digest, kind, items.path, is_got, count(*), sum(changed != 0), sum(size_bytes) FROM items "  # noqa: S608 - marks alone
            f"JOIN files ON item = items.digest WHERE origin IN ('shared', 'copied', 'got') {only}"
            "GROUP BY items.digest ORDER BY items.path",
            *(among or ()),
        )
        return tuple(
            Item(Digest(digest), Kind(kind), path_of(path), bool(is_got), num_files, num_changed, total_bytes)
            for digest, kind, path, is_got, num_files, num_changed, total_bytes in rows
        )

    def listing(self, digest: bytes) -> Folder:
        """The files of a folder whose list is held.

        Raises:
            LocalError: it is not held.
            PeerError: WRONG_FORMAT or TOO_LARGE, it is no list that may be trusted.
        """
        blob = self.get(digest)
        if blob is None:
            raise LocalError(f"the list of folder {digest.hex()[:12]} is not held")
        if blob.size_bytes > MAX_LIST_BYTES:
            raise PeerError(
                Reason.TOO_LARGE, f"a folder's list of {blob.size_bytes} bytes, allowed {MAX_LIST_BYTES}"
            )
        try:
            return Folder.from_bytes(b"".join(map(blob.read, range(len(blob.chunk_hashes)))))
        except OSError as error:
            raise LocalError(f"the list of folder {digest.hex()[:12]} cannot be read: {error}") from error

    def _mark(self, digest: Digest, path: Path, stamp: str, how: int, problem: str) -> None:
        with self._tables.change() as db:
            marked = db.execute(
                "UPDATE files SET changed = ? WHERE path = ? AND stamp = ? AND NOT changed",
                (how, os.fsencode(path), stamp),
            ).rowcount
        if marked and not self._tables.is_held(digest):
            self._tell_changed(
                digest, f"{path} is not served any more: {problem}; share it again as it is now"
            )

    # --- what is wanted ---------------------------------------------------------------------------------
    def want(self, ref: ContentRef, kind: Kind, title: str) -> None:
        """Begin to get something. It is remembered until it is placed, or given up by `unwant`.

        Raises:
            LocalError: it is larger than is allowed, or there is no room for it.
        """
        digest = Digest(ref.digest)
        if kind is Kind.LINK:
            raise LocalError("a link has no bytes to get")
        if kind is Kind.FOLDER and ref.size_bytes > MAX_LIST_BYTES:
            raise LocalError(f"its list is said to have {ref.size_bytes} bytes, allowed {MAX_LIST_BYTES}")
        self._check_item(ref.size_bytes)
        with self._tables.change() as db:
            found = self._tables.row("SELECT size_bytes FROM wants WHERE digest = ?", digest)
            incoming = self._incoming.get(digest)
            if found and (found[0] == ref.size_bytes or (incoming and incoming.chunk_hashes)):
                return
            if found:  # one of two that spoke of it lied about its size
                self.unwant(digest)
            if not self._tables.is_held(digest):
                self._check_room(ref.size_bytes)
            db.execute("INSERT INTO wants VALUES (?, ?, ?, ?, NULL)", (digest, ref.size_bytes, kind, title))
            db.execute("INSERT INTO parts VALUES (?, ?, ?, 1)", (digest, digest, ref.size_bytes))

    def want_as_file(self, digest: bytes) -> None:
        """What was wanted as a folder is none."""
        with self._tables.change() as db:
            db.execute("UPDATE wants SET kind = ? WHERE digest = ?", (Kind.FILE, digest))

    def wanted(self) -> tuple[Wanted, ...]:
        """All that is to be got, in the order in which it was asked for."""
        rows = self._tables.rows("SELECT digest, size_bytes, kind, title FROM wants ORDER BY rowid")
        return tuple(
            Wanted(ContentRef(digest, size), Kind(kind), title) for digest, size, kind, title in rows
        )

    def missing(self, digest: bytes) -> tuple[ContentRef, ...]:
        """What is still to be fetched of something wanted, each once; nothing: it can be placed. Of a folder first its list.

        Raises:
            LocalError: it is not wanted; or a folder, whose size its list tells, is larger than is allowed.
            PeerError: WRONG_FORMAT or TOO_LARGE, a folder's list may not be trusted. To be given up.
        """
        ref, kind, _ = self._want(digest)
        if not self.holds(ref):
            return (ref,)
        if kind is not Kind.FOLDER:
            return ()
        self._want_files(ref)
        held = "SELECT digest, path, stamp, changed FROM files WHERE digest IN (SELECT digest FROM parts WHERE root = ?)"
        self._recheck(self._tables.rows(held, digest))
        rows = self._tables.rows(
            "SELECT digest, size_bytes FROM parts WHERE root = ? AND digest NOT IN "
            "(SELECT digest FROM files WHERE NOT changed) ORDER BY rowid",
            digest,
        )
        return tuple(ContentRef(file, size_bytes) for file, size_bytes in rows)

    def _want_files(self, ref: ContentRef) -> None:
        """Once, when a folder's list has come: what it names is wanted from now on."""
        with self._tables.change() as db:
            if self._tables.row("SELECT 1 FROM parts WHERE root = ? AND digest != root", ref.digest):
                return
            folder = self.listing(ref.digest)
            self._check_item(folder.total_bytes)
            self._check_room(folder.total_bytes)
            copies = Counter((file.digest, file.size_bytes) for file in folder.files)
            db.executemany(
                "INSERT OR IGNORE INTO parts VALUES (?, ?, ?, ?)",
                ((ref.digest, digest, size, count) for (digest, size), count in copies.items()),
            )

    def unwant(self, digest: bytes) -> tuple[Digest, ...]:
        """Give up getting something: what has come of it goes. What nobody here wants any more, so that no fetch needs go on."""
        with self._tables.change():
            rows = self._tables.rows(
                "SELECT digest FROM parts WHERE root = ?1 AND digest NOT IN "
                "(SELECT digest FROM parts WHERE root != ?1)",
                digest,
            )
            self._tables.forget_want(digest)
            dropped = tuple(Digest(part) for (part,) in rows)
            paths = self._tables.forget_arrived(dropped)
            for part in dropped:
                incoming = self._incoming.pop(part, None) or self._incoming_of(ContentRef(part, 1))
                incoming.drop()
        self._tables.remove_unused(paths)
        self._downloads.give_up(digest)
        return dropped

    def progress(self, digest: bytes) -> tuple[int, int] | None:
        """Bytes held and bytes in all, of something wanted or held. Of a folder without its list, those of the list."""
        parts = self._tables.rows(
            "SELECT digest, size_bytes, digest IN (SELECT digest FROM files WHERE NOT changed) "
            "FROM parts WHERE root = ?",
            digest,
        ) or self._tables.rows("SELECT digest, size_bytes, FALSE FROM parts WHERE digest = ? LIMIT 1", digest)
        if not parts:
            whole = "SELECT sum(size_bytes) FROM files WHERE item = ? AND NOT changed AND origin != 'listed'"
            row = self._tables.row(whole, digest)
            return (row[0], row[0]) if row and row[0] else None
        begun = {path.stem for path in self._folder.glob("*.part")}
        held_bytes = sum(
            size if is_held else self._held_of_part(part, size) if part.hex() in begun else 0
            for part, size, is_held in parts
        )
        return held_bytes, sum(size for _, size, _ in parts)

    def _held_of_part(self, digest: bytes, size_bytes: int) -> int:
        """Until it is read again after a crash, what the disk says of it."""
        incoming = self._incoming.get(Digest(digest))
        if incoming and incoming.chunk_hashes:
            return incoming.held_bytes
        with suppress(FileNotFoundError):
            return min(self._part(digest).stat().st_blocks * 512, size_bytes)
        return 0

    def _want(self, digest: bytes) -> Wanted:
        row = self._tables.row("SELECT size_bytes, kind, title FROM wants WHERE digest = ?", digest)
        if row is None:
            raise LocalError(f"content {digest.hex()[:12]} is not wanted")
        return Wanted(ContentRef(digest, row[0]), Kind(row[1]), row[2])

    # --- on the way in ----------------------------------------------------------------------------------
    def incoming(self, ref: ContentRef) -> IncomingContent:
        """Begin to take in something wanted, or a file of it, or go on where an earlier attempt broke off.

        ref: its size may turn out to be another; what is told of it here is what is known by now.

        Raises:
            LocalError: nobody here wants it, or it is on its way with another size; or the disk is full.
        """
        digest = Digest(ref.digest)
        with self._tables.change():  # nobody gives it up in between
            sizes = self._tables.rows("SELECT size_bytes FROM parts WHERE digest = ?", digest)
            if not sizes:
                raise LocalError(f"content {digest.hex()[:12]} is not wanted any more")
            if (ref.size_bytes,) not in sizes:
                ref = ContentRef(digest, sizes[0][0])
            found = self._incoming.get(digest)
            if found is not None and found.ref != ref and (found.busy or found.chunk_hashes):
                raise LocalError(f"it is on its way with {found.ref.size_bytes} bytes, not {ref.size_bytes}")
            if found is None or found.ref != ref:
                self.check_disk(CHUNK_BYTES)
                found = self._incoming[digest] = self._incoming_of(ref)
            return found

    def _incoming_of(self, ref: ContentRef) -> IncomingContent:
        resize = partial(self._resize, Digest(ref.digest))
        return IncomingContent(self._part(ref.digest), ref, self.check_disk, resize)

    def _resize(self, digest: Digest, size_bytes: int) -> None:
        """Its bytes prove another size than whoever shares it, or a folder with it, has told. Raises LocalError."""
        with self._tables.change() as db:
            db.execute("UPDATE parts SET size_bytes = ? WHERE digest = ?", (size_bytes, digest))
            db.execute("UPDATE wants SET size_bytes = ? WHERE digest = ?", (size_bytes, digest))
            for (total,) in self._tables.rows(
                "SELECT sum(size_bytes * copies) FROM parts WHERE root IN (SELECT root FROM parts WHERE digest = ?) "
                "GROUP BY root",
                digest,
            ):
                self._check_item(total)
            self._check_room(0)

    def admit(self, incoming: Incoming) -> None:
        """What has come whole is held and served from now on. Every chunk of it was checked.

        Raises:
            LocalError: nobody here wants it any more.
        """
        assert incoming.complete
        digest, path = Digest(incoming.ref.digest), self._path(incoming.ref.digest)
        with self._tables.change():
            if self._incoming.get(digest) is not incoming:
                raise LocalError(f"content {digest.hex()[:12]} is not wanted any more")
            incoming.path.replace(path)
            incoming.path.with_suffix(".header").unlink(missing_ok=True)
            hashes = b"".join(incoming.chunk_hashes)
            hashed = Hashed(digest, incoming.ref.size_bytes, stamp_of(path.lstat()), hashes)
            self._tables.put_files(digest, [(path, hashed, "arrived")])
            del self._incoming[digest]

    # --- where it finally lies ----------------------------------------------------------------------------
    def place(self, digest: bytes, name: str) -> Path:
        """Put something wanted of which nothing is missing into the downloads; it is served from there, and wanted no more.

        What lies there already, or is the operator's own, stays where it is. Nothing is ever overwritten: a number is added to
        the name. One call for one digest at a time.

        name: for people, such as the title; made safe.

        Raises:
            LocalError: something is missing, or the disk refuses. Nothing is lost: it can be tried again.
        """
        return self._downloads.place(digest, self._want(digest).kind, name)

    # --- room -------------------------------------------------------------------------------------------
    def used_bytes(self) -> int:
        """Of what was got and is served, and of all that is wanted."""
        (used,) = self._tables.rows(
            "SELECT (SELECT total(size_bytes) FROM files WHERE origin = 'got' AND NOT changed) "
            "+ (SELECT total(size_bytes * copies) FROM parts)"
        )[0]
        return int(used)

    def _check_item(self, size_bytes: int) -> None:
        allowed = self._settings.max_item_bytes
        if size_bytes > allowed:
            raise LocalError(
                f"it has {size_bytes} bytes, allowed {allowed}; raise content.max_item_bytes to get it"
            )

    def _check_room(self, size_bytes: int) -> None:
        allowed = self._settings.max_total_bytes
        if self.used_bytes() + size_bytes > allowed:
            self.recheck()  # what the operator has removed takes no room
        used = self.used_bytes()
        if used + size_bytes > allowed:
            raise LocalError(
                f"it has {size_bytes} bytes, and {used} of {allowed} are used; remove downloads, "
                "give up what is wanted, or raise content.max_total_bytes"
            )
        self.check_disk(size_bytes)
        if self._downloads.folder.exists():
            self.check_disk(size_bytes, self._downloads.folder)

    def _check_write(self, size_bytes: int, folder: Path | None = None) -> None:
        if self._stopping.is_set():
            raise LocalError("the node stops")
        self.check_disk(size_bytes, folder)

    def check_disk(self, size_bytes: int, folder: Path | None = None) -> None:
        """Whether so much may be written, into the home where no folder is named.

        Raises:
            LocalError: no.
        """
        folder = folder or self._folder
        free, keep = shutil.disk_usage(folder).free, self._settings.min_free_bytes
        if free - size_bytes < keep:
            raise LocalError(
                f"the disk of {folder} has {free} bytes free, and {keep} are to stay so; "
                "make room, or lower content.min_free_bytes"
            )

    # --- files and rows -----------------------------------------------------------------------------------
    def _path(self, digest: bytes) -> Path:
        return self._folder / digest.hex()

    def _part(self, digest: bytes) -> Path:
        return self._folder / f"{digest.hex()}.part"

    def _sweep(self) -> None:
        """Remove what a crash has left and nothing speaks of."""
        known = {
            path_of(path).name
            for (path,) in self._tables.rows("SELECT path FROM files WHERE origin != 'shared'")
        }
        for (digest,) in self._tables.rows("SELECT digest FROM parts"):
            part = self._part(digest)
            known |= {part.name, part.with_suffix(".header").name}
        for path in self._folder.iterdir():
            if path.name not in known and _OWN_NAME.fullmatch(path.name):  # nobody else's
                path.unlink(missing_ok=True)


class Holdings:
    """Models and contents as one: what a network serves from and fetches into."""

    def __init__(self, models: BlobStore, contents: ContentStore) -> None:
        self._models = models
        self._contents = contents

    def get(self, digest: bytes) -> Blob | None:
        """The blob, if it is held whole."""
        return self._models.get(digest) or self._contents.get(digest)

    def holds(self, ref: ModelRef | ContentRef) -> bool:
        """Whether it is held as what it is to be."""
        return self._models.holds(ref) if isinstance(ref, ModelRef) else self._contents.holds(ref)

    def incoming(self, ref: ModelRef | ContentRef) -> Incoming:
        """Begin to take in a blob, or go on where an earlier attempt broke off.

        Raises:
            LocalError: a content that is not wanted, or has no room.
        """
        return self._models.incoming(ref) if isinstance(ref, ModelRef) else self._contents.incoming(ref)

    def admit(self, incoming: Incoming) -> None:
        """The gate: a model is checked to be one of this node's task, a content is as it is.

        Raises:
            PeerError: not a model of this task.
            LocalError: a content that is not wanted any more.
        """
        store = self._models if isinstance(incoming.ref, ModelRef) else self._contents
        store.admit(incoming)


_OWN_NAME = re.compile(r"[0-9a-f]{64}(\.part|\.header|\.draft)?|[0-9]+\.draft")
_PRIVATE = "is a node's own: its key lies there too"


def _read(path: Path, file: BinaryIO, told: Told) -> Iterator[bytes]:
    size_bytes, done = os.fstat(file.fileno()).st_size, 0
    while chunk := file.read(CHUNK_BYTES):
        done += len(chunk)
        if done > size_bytes:
            raise UnfitError(path, "grew while it was read; share it when it is at rest")
        yield chunk
        told(done, size_bytes)


def _absolute(path: Path) -> Path:
    """The folder's real place; a link at the end stays, to be refused."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.absolute keeps ".." at the end
    return path.parent.resolve() / path.name
