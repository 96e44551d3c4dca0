"""The catalogue entry of what an operator shares, made of a file, a folder, a checkpoint or a URI.

Belongs here: what an entry says by itself where the operator says nothing, and its bounds as sentences for the operator.
Nothing here hashes, publishes or keeps.
"""

import mimetypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from protocols.entries import Kind, Shared
from protocols.errors import ConfigError
from protocols.feeds import DAY_S
from protocols.terms import item_of_uri
from protocols.vocabulary import (
    BREAKS_LINE,
    MAX_DETAILS,
    MAX_ENTRY_BYTES,
    MAX_TAG_CHARS,
    MAX_TAGS,
    MAX_TITLE_CHARS,
    ContentRef,
    one_line,
)

UNKNOWN_TYPE = "application/octet-stream"
FOLDER_TYPE = "inode/directory"
FILES, TOTAL_BYTES = "files", "total_bytes"
"""Details of a folder: how many files it has, and what they come to."""
NAME = "name"
"""Detail of a file or folder whose title is not its name."""
WEIGHTS = ".safetensors"
_COMPRESSED = {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}
_FIELD = re.compile(r"\$\[(\d+)\]")
_BOUND = re.compile(r"Expected `(?:str|array|object)` of length (<=|>=) (\d+)")


def day_of(unix_s: float) -> int:
    """Days since 1970-01-01, UTC."""
    return int(unix_s // DAY_S)


def link_entry(uri: str, title: str, day: int) -> Shared:
    """The entry of a link, which is nothing but its URI.

    Raises:
        ConfigError: `uri` is none.
    """
    try:
        scheme = urlsplit(uri).scheme
    except ValueError as error:
        raise ConfigError("uri", f"is no URI: {error}") from error
    if not scheme:
        raise ConfigError("uri", "has no scheme", ["https://…", "magnet:?…", "any other with <scheme>:"])
    return Shared(item_of_uri(uri), day, Kind.LINK, title, "", (), "", 0, uri, ())


def file_entry(ref: ContentRef, path: Path, day: int) -> Shared:
    """The entry of a file that was hashed."""
    kind, coding = mimetypes.guess_type(path.name, strict=False)
    media_type = kind if coding is None else _COMPRESSED.get(coding)
    return Shared(
        ref.digest,
        day,
        Kind.FILE,
        title_of(path),
        "",
        (),
        media_type or UNKNOWN_TYPE,
        ref.size_bytes,
        "",
        (),
    )


def folder_entry(ref: ContentRef, path: Path, num_files: int, total_bytes: int, day: int) -> Shared:
    """The entry of a folder. ref: of the list of its files."""
    details = ((FILES, str(num_files)), (TOTAL_BYTES, str(total_bytes)))
    return Shared(
        ref.digest, day, Kind.FOLDER, title_of(path), "", (), FOLDER_TYPE, ref.size_bytes, "", details
    )


def model_entry(ref: ContentRef, task: str, round_: int, details: Mapping[str, str], day: int) -> Shared:
    """The entry of a checkpoint. task: all but its name is left out, for it tells of this machine. details: beside task and
    round."""
    known = {"task": Path(task).name, "round": str(round_), **details}
    return Shared(
        ref.digest,
        day,
        Kind.MODEL,
        one_line(f"{Path(task).name} model, round {round_}", MAX_TITLE_CHARS).strip(),
        "",
        _tags(["model", Path(task).name[:MAX_TAG_CHARS]]),
        UNKNOWN_TYPE,
        ref.size_bytes,
        "",
        tuple((name, one_line(text).strip()) for name, text in known.items() if text),
    )


def as_told(entry: Shared, title: str | None, creator: str, tags: Sequence[str]) -> Shared:
    """An entry with what the operator says of it, checked.

    title: left out, the entry's own stands. tags: beside the entry's own; case and blanks around them do not matter.
    Raises ConfigError, which names the field.
    """
    title = entry.title if title is None else title.strip()
    renamed = title != entry.title and entry.kind in (Kind.FILE, Kind.FOLDER)
    own = [tag for tag in (each.strip().lower() for each in tags) if tag]
    told = replace(
        entry,
        title=title,
        creator=creator.strip(),
        tags=tuple(dict.fromkeys((*entry.tags, *own))),
        details=(*entry.details, (NAME, entry.title)) if renamed else entry.details,
    )
    check_entry(told)
    return told


def check_entry(entry: Shared) -> None:
    """All that a peer checks of an entry, before it is signed.

    Raises:
        ConfigError: the field that no peer would accept.
    """
    for name, text in (("title", entry.title), ("creator", entry.creator), *(("tag", t) for t in entry.tags)):
        if BREAKS_LINE.search(text):
            raise ConfigError(
                name, "holds a character that moves the cursor or turns the text", ["text on one line"]
            )
    try:
        encoded = msgspec.msgpack.encode(entry)
        msgspec.msgpack.decode(encoded, type=Shared)
    except UnicodeEncodeError as error:
        raise ConfigError("entry", "holds text that is not Unicode") from error
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error
    if len(encoded) > MAX_ENTRY_BYTES:
        raise ConfigError("entry", f"comes to {len(encoded)} bytes", [f"{MAX_ENTRY_BYTES} bytes in all"])


def _explained(message: str) -> ConfigError:
    """The sentence of a `msgspec.ValidationError` on an entry: which field, what is allowed."""
    found = _FIELD.search(message)
    # The tag of the union stands before the fields.
    name = Shared.__struct_fields__[int(found[1]) - 1] if found else "entry"
    bound = _BOUND.search(message)
    if name == "tags" and bound and "[" in message.partition("$[")[2]:
        return ConfigError("tag", "is too long", [f"1 to {MAX_TAG_CHARS} characters"])
    if name == "tags":
        return ConfigError("tags", f"are more than {MAX_TAGS}")
    if name == "details" and bound and int(bound[2]) == MAX_DETAILS:
        return ConfigError(name, f"are more than {MAX_DETAILS}")
    if bound and bound[1] == ">=":
        return ConfigError(name, "must not be empty")
    if bound:
        return ConfigError(name, "is too long", [f"{bound[2]} characters"])
    if name == "uri":
        return ConfigError(name, "holds a blank, or a character beyond ASCII", ["percent-encoded text"])
    return ConfigError(name, message.partition(" - at ")[0])


def title_of(path: Path) -> str:
    """A title out of a file's name, whatever that holds. What is too long is cut before the suffix: others get the file by
    this name."""
    name = path if path.name else path.resolve()
    excess = len(name.name) - MAX_TITLE_CHARS
    cut = name.stem[:-excess] + name.suffix if 0 < excess < len(name.stem) else name.name
    return one_line(cut, MAX_TITLE_CHARS).strip() or "untitled"


def _tags(tags: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one_line(tag, MAX_TAG_CHARS).strip().lower() for tag in tags))


def name_of(entry: Shared) -> str:
    """What to call it where it is put: its sharer's word, which may be anything."""
    name = dict(entry.details).get(NAME) or entry.title
    return f"{name}{WEIGHTS}" if entry.kind is Kind.MODEL and not name.endswith(WEIGHTS) else name


def total_bytes_of(entry: Shared) -> int:
    """What an item comes to with all its files, as its sharer says; of a folder it is a claim and no more."""
    text = dict(entry.details).get(TOTAL_BYTES, "")
    told = int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else 0
    return entry.size_bytes + told if entry.kind is Kind.FOLDER else entry.size_bytes


def entry_facts(entry: Shared) -> dict[str, Any]:
    """An entry as the API tells it."""
    return {
        "item": entry.item.hex(),
        "day": entry.day,
        "kind": entry.kind.value,
        "title": entry.title,
        "creator": entry.creator,
        "tags": list(entry.tags),
        "media_type": entry.media_type,
        "size_bytes": total_bytes_of(entry),
        "uri": entry.uri,
        "details": dict(entry.details),
    }
