"""Shared folders: the list of files that stands for one, and which names may be made of a stranger's words.

A folder travels as a list, which is a blob like any other: a MessagePack array of `[parts of the relative path, size in
bytes, digest]`, ascending by path. There is one list for one folder, to the byte. The files are blobs of their own.

Belongs here: what a list may say, and what of a directory goes into one. Nothing here opens a file.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from node.identity import KEY_FILE
from protocols.errors import LocalError, PeerError
from protocols.vocabulary import BREAKS_LINE, MAX_CONTENT_BYTES, Reason, WireDigest

MAX_FILES = 100_000
MAX_SUBFOLDERS = 100_000
"""Without it a list of 16 MiB could name millions."""
MAX_DEPTH = 32
MAX_LIST_BYTES = 16 * 1024**2
MAX_FOLDER_BYTES = 2**40
"""Of all files together, so often as each is named."""
MAX_NAME_BYTES = 255
"""In UTF-8: what the usual file systems take."""
MAX_SAFE_NAME_BYTES = 200
"""Leaves room for a number and for the endings of half-done files."""

# Windows takes these for devices, whatever follows the first dot.
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{device}{number}" for device in ("COM", "LPT") for number in "0123456789¹²³"
}
_HOSTILE = re.compile(rf"[/\\:]|{BREAKS_LINE.pattern}")
"""Separators and drive letters; control characters, and those that turn the order of what is shown; half characters."""
_ODD = re.compile(rf'[<>"|?*]|{_HOSTILE.pattern}')
_Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_BYTES)]
_encoder = msgspec.msgpack.Encoder()


class FolderFile(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, order=True):
    """One file of a folder."""

    parts: Annotated[tuple[_Name, ...], Meta(min_length=1, max_length=MAX_DEPTH)]
    """Its path from the folder down."""
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_CONTENT_BYTES)]
    digest: WireDigest


_decoder = msgspec.msgpack.Decoder(
    Annotated[tuple[FolderFile, ...], Meta(min_length=1, max_length=MAX_FILES)]
)


class Folder(NamedTuple):
    """A folder's files, ascending by path."""

    files: tuple[FolderFile, ...]

    @property
    def total_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """The list, as it travels."""
        return _encoder.encode(self.files)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Folder":
        """Read the list of a stranger.

        Raises:
            PeerError: WRONG_FORMAT or TOO_LARGE; nothing of it is to be trusted then.
        """
        if len(data) > MAX_LIST_BYTES:
            raise PeerError(
                Reason.TOO_LARGE, f"a folder's list of {len(data)} bytes, allowed {MAX_LIST_BYTES}"
            )
        try:
            folder = cls(_decoder.decode(data))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PeerError(Reason.WRONG_FORMAT, f"not the list of a folder: {error}") from error
        if problem := _problem_of(folder):
            raise PeerError(Reason.WRONG_FORMAT, f"a folder's list: {problem}")
        if folder.total_bytes > MAX_FOLDER_BYTES:
            raise PeerError(
                Reason.TOO_LARGE, f"a folder of {folder.total_bytes} bytes, allowed {MAX_FOLDER_BYTES}"
            )
        if folder.to_bytes() != data:
            raise PeerError(Reason.WRONG_FORMAT, "a folder's list is not in its only right form")
        return folder


def _problem_of(folder: Folder) -> str | None:
    names, sizes = Names(), dict[bytes, int]()
    last: tuple[str, ...] = ()
    for file in folder.files:
        if file.parts <= last:
            return "its files are not in order"
        if problem := names.add(file.parts):
            return problem
        if sizes.setdefault(file.digest, file.size_bytes) != file.size_bytes:
            return "one digest has two sizes"
        last = file.parts
    return None


# --- names ----------------------------------------------------------------------------------------------
class Names:
    """The paths of one folder: each may be written on any usual file system, and no two are one on any of them."""

    _FILE = -1

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], tuple[str, int]] = {}
        """By the number of the folder and the folded name: the name, and the number of the folder that it is."""

    def add(self, parts: tuple[str, ...]) -> str | None:
        """Take in a file's path; what is wrong with it, if anything. It is not to be used then."""
        if len(parts) > MAX_DEPTH:
            return f"a path is more than {MAX_DEPTH} folders deep"
        for part in parts:
            if problem := problem_of_name(part):
                return f"the name {part!a} {problem}"
        if len(self._seen) > MAX_FILES + MAX_SUBFOLDERS - len(parts):
            return f"more than {MAX_SUBFOLDERS} folders"
        parent = 0
        for part in parts[:-1]:
            name, parent = self._seen.setdefault((parent, _folded(part)), (part, len(self._seen) + 1))
            if name != part or parent == self._FILE:
                return f"the name {part!a} is that of another file or folder here, but for case or accents"
        place = (parent, _folded(parts[-1]))
        if place in self._seen:
            return f"the name {parts[-1]!a} is that of another file or folder here, but for case or accents"
        self._seen[place] = parts[-1], self._FILE
        return None


def problem_of_name(name: str) -> str | None:
    """Why a file or folder may not be called so, if it may not."""
    if not name or name in (".", ".."):
        return "is none"
    if _HOSTILE.search(name):
        return "holds a character that no name should"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    if name[-1] in ". ":
        return "ends in a dot or a blank"
    if name.split(".")[0].rstrip().upper() in _DEVICES:
        return "is that of a device on Windows"
    return None


def _folded(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def safe_name(title: str) -> str:
    """A title as the name of a file or folder: visible, harmless on any usual file system, and never empty."""
    clean = " ".join(unicodedata.normalize("NFC", _ODD.sub("_", title)).split()).strip(". ")
    clean = _shortened(clean)
    if clean.split(".")[0].rstrip().upper() in _DEVICES:
        clean = f"_{clean}"
    return clean or "content"


def _shortened(name: str) -> str:
    """Cut to length, before its ending if it has a short one."""
    data = name.encode()
    if len(data) <= MAX_SAFE_NAME_BYTES:
        return name
    ending = Path(name).suffix.encode()
    ending = ending if len(ending) <= 16 else b""
    stem = data[: MAX_SAFE_NAME_BYTES - len(ending)].decode(errors="ignore").rstrip(". ")
    return (stem + ending.decode()).strip(". ")


# --- own folders ----------------------------------------------------------------------------------------
class FoundFile(NamedTuple):
    """A file of a directory that can be shared."""

    parts: tuple[str, ...]
    path: Path
    size_bytes: int


class Skipped(NamedTuple):
    """Something in a directory that is not shared, and why."""

    path: Path
    why: str


def find_files(root: Path) -> tuple[list[FoundFile], list[Skipped]]:
    """What of a directory can be shared, ascending by path, and what not. Links are never followed.

    Names that begin with a dot are skipped: what is hidden was seldom meant to be shared.

    Raises:
        LocalError: it is not a directory, or holds too many files.
    """
    if root.is_symlink():
        raise LocalError(f"{root} is a symbolic link; share the folder that it points to")
    if not root.is_dir():
        raise LocalError(f"{root} is not a folder")
    found: list[FoundFile] = []
    skipped: list[Skipped] = []
    names = Names()
    for parts, path in _walk(root, (), skipped):
        try:
            at = path.lstat()
        except OSError as error:
            skipped.append(Skipped(path, f"cannot be read: {error.strerror}"))
            continue
        problem = problem_of_file(at) or names.add(parts)
        if problem:
            skipped.append(Skipped(path, problem))
        elif len(found) == MAX_FILES:
            raise LocalError(
                f"{root} holds more than {MAX_FILES} files; share its folders one by one, or an archive"
            )
        else:
            found.append(FoundFile(parts, path, at.st_size))
    return sorted(found), skipped


def holds_key(folder: Path | int) -> bool:
    """Whether this is the home of a node, which nobody but that node should read. folder: a path, or a descriptor."""
    try:
        if isinstance(folder, int):
            os.stat(KEY_FILE, dir_fd=folder, follow_symlinks=False)
        else:
            (folder / KEY_FILE).lstat()
    except FileNotFoundError:
        return False
    return True


def _walk(
    folder: Path, above: tuple[str, ...], skipped: list[Skipped]
) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Everything in a directory that is neither hidden nor a directory itself, in order; nothing of a node's home."""
    try:
        if holds_key(folder):
            skipped.append(Skipped(folder, "is the home of a node: its key lies there"))
            return
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        skipped.append(Skipped(folder, f"cannot be read: {error.strerror}"))
        return
    for entry in entries:
        path, parts = Path(entry.path), (*above, entry.name)
        if entry.name.startswith("."):
            skipped.append(Skipped(path, "hidden"))
        elif not entry.is_dir(follow_symlinks=False):
            yield parts, path
        elif len(parts) == MAX_DEPTH:
            skipped.append(Skipped(path, f"more than {MAX_DEPTH} folders deep"))
        else:
            yield from _walk(path, parts, skipped)


def problem_of_file(found: os.stat_result) -> str | None:
    """Why what was found cannot be shared as a file, if it cannot."""
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link; share what it points to"
    if stat.S_ISDIR(found.st_mode):
        return "is a folder"
    if not stat.S_ISREG(found.st_mode):
        return "is a pipe, a device or a socket"
    if not found.st_size:
        return "is empty"
    if found.st_size > MAX_CONTENT_BYTES:
        return f"has {found.st_size} bytes, more than the {MAX_CONTENT_BYTES} of a content; share it in parts"
    return None
