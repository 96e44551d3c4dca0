"""Where what was got finally comes to lie: whole, under a harmless name, over nothing that was there."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from node.content_blobs import ContentBlob, problem_since, stamp_of
from node.content_tables import ContentTables, path_of
from node.folders import Folder, safe_name
from protocols.entries import Kind
from protocols.errors import LocalError

MAX_NUMBERED = 10_000
"""Downloads of one name."""


class Downloads:
    """The folder of what was got.

    open_blob, open_list: a content, or the list of a folder, that is held.
    check_disk: raises LocalError where a folder's disk has no room for so many bytes, or the node stops.
    """

    def __init__(
        self,
        folder: Path,
        tables: ContentTables,
        open_blob: Callable[[bytes], ContentBlob | None],
        open_list: Callable[[bytes], Folder],
        check_disk: Callable[[int, Path], None],
    ) -> None:
        self.folder = folder
        self._tables = tables
        self._open_blob = open_blob
        self._open_list = open_list
        self._check_disk = check_disk

    def place(self, digest: bytes, kind: Kind, name: str) -> Path:
        """Give a place to something wanted that is all here. See `ContentStore.place`."""
        try:
            path = self._lies_at(digest, kind) or self._placed_at(digest, kind)
            return path or self._put_in_place(digest, kind, name)
        except OSError as error:
            raise LocalError(f"cannot be put into {self.folder}: {error}") from error

    def give_up(self, digest: bytes) -> None:
        """Remove what is half done."""
        clear(self._staging(digest))

    def _staging(self, digest: bytes) -> Path:
        return self.folder / f".{digest.hex()}.partial"

    def _lies_at(self, digest: bytes, kind: Kind) -> Path | None:
        """Where an item lies that was got before, or is the operator's own, if all of it is as it was."""
        is_folder = kind is Kind.FOLDER
        item = self._tables.row(
            "SELECT path FROM items WHERE digest = ? AND (kind = 'folder') = ?", digest, is_folder
        )
        files = self._tables.rows(
            "SELECT path, stamp, changed, origin FROM files WHERE item = ? AND origin != 'arrived'", digest
        )
        whole = all(
            not changed and origin != "copied" and not problem_since(path_of(path), stamp)
            for path, stamp, changed, origin in files
        )
        if not (item and files and whole):
            return None
        self._done(digest, kind)
        return path_of(item[0])

    def _placed_at(self, digest: bytes, kind: Kind) -> Path | None:
        """Where it was put just before a crash."""
        row = self._tables.row("SELECT placed FROM wants WHERE digest = ?", digest)
        if not row or not row[0] or os.path.lexists(self._staging(digest)):
            return None
        return self._settle(digest, kind, path_of(row[0]))

    def _put_in_place(self, digest: bytes, kind: Kind, name: str) -> Path:
        """All of it is made ready beside its place and gets its name at once, so that a crash leaves no half of a folder."""
        staging = self._staging(digest)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            self._tables.change() as db
        ):  # before that goes which tells that an earlier attempt did not get so far
            db.execute("UPDATE wants SET placed = NULL WHERE digest = ?", (digest,))
        clear(staging)
        linked = set[bytes]()
        for parts, file in self._files_of(digest, kind):
            target = staging.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._put_file(file, target, may_link=file not in linked)
            linked.add(file)
        final = _claim(self.folder, safe_name(name), is_folder=kind is Kind.FOLDER)
        with self._tables.change() as db:
            db.execute("UPDATE wants SET placed = ? WHERE digest = ?", (os.fsencode(final), digest))
        staging.rename(final)  # over the empty one that was just made
        return self._settle(digest, kind, final)

    def _put_file(self, digest: bytes, target: Path, may_link: bool) -> None:
        """Link what has arrived to its place, where nobody else will have it; copy anything else."""
        blob = self._open_blob(digest)
        if blob is None:
            raise LocalError(f"content {digest.hex()[:12]} is not held any more; get it again")
        has_arrived = "SELECT 1 FROM files WHERE path = ? AND origin = 'arrived'"
        if may_link and self._tables.row(has_arrived, os.fsencode(blob.path)):
            with suppress(OSError):  # another disk, or a file system without hard links
                target.hardlink_to(blob.path)
                return
        self._check_disk(blob.size_bytes, self.folder)
        with target.open("xb") as file:
            for index in range(len(blob.chunk_hashes)):
                chunk = blob.read(index)
                self._check_disk(len(chunk), self.folder)
                file.write(chunk)

    def _settle(self, digest: bytes, kind: Kind, final: Path) -> Path:
        """Serve it from its place, and forget that it was wanted."""
        copies: list[tuple[bytes, bytes, str, bytes]] = []
        for parts, file in self._files_of(digest, kind):
            path = final.joinpath(*parts)
            with suppress(OSError):  # the operator was quick to remove it
                copies.append((digest, os.fsencode(path), stamp_of(path.lstat()), file))
        with self._tables.change() as db:
            db.execute(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?, TRUE)", (digest, kind, os.fsencode(final))
            )
            before = self._tables.rows("SELECT path FROM files WHERE item = ? AND origin = 'got'", digest)
            db.executemany(_PUT_COPY, copies)
            gone = {path for (path,) in before} - {path for _, path, _, _ in copies}
            db.executemany("DELETE FROM files WHERE item = ? AND path = ?", ((digest, path) for path in gone))
        self._done(digest, kind)
        return final

    def _done(self, digest: bytes, kind: Kind) -> None:
        """It lies where it belongs: it is wanted no more, and of what has arrived a folder's list alone stays."""
        with self._tables.change() as db:
            if kind is Kind.FOLDER:
                db.execute("UPDATE files SET origin = 'listed' WHERE item = ? AND digest = item", (digest,))
            parts = self._tables.rows("SELECT digest FROM parts WHERE root = ?", digest)
            arrived = self._tables.forget_arrived(part for (part,) in parts)
            self._tables.forget_want(digest)
        self._tables.remove_unused(arrived)

    def _files_of(self, digest: bytes, kind: Kind) -> list[tuple[tuple[str, ...], bytes]]:
        """Relative path and digest of each file."""
        if kind is Kind.FOLDER:
            return [(file.parts, file.digest) for file in self._open_list(digest).files]
        return [((), digest)]


def _claim(folder: Path, name: str, is_folder: bool) -> Path:
    """Make an empty file or folder of a name that is free."""
    stem, ending = (name, "") if is_folder else (Path(name).stem, Path(name).suffix)
    for number in range(1, MAX_NUMBERED):
        path = folder / (name if number == 1 else f"{stem} ({number}){ending}")
        with suppress(FileExistsError):  # a link counts, wherever it leads
            if is_folder:
                path.mkdir()
            else:
                path.open("xb").close()
            return path
    raise LocalError(f"{folder} holds too many of the name {name}")


def clear(path: Path) -> None:
    """Remove a half-done download."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_PUT_COPY = """
INSERT OR REPLACE INTO files SELECT ?, ?, digest, size_bytes, ?, hashes, 'got', 0 FROM files
    WHERE digest = ? AND NOT changed LIMIT 1
"""
