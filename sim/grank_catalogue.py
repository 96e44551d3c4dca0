"""The releases that the nodes of `covey sim grank` search, read from a CSV file or drawn from a seed.

Belongs here: what is there to be found and under which tags. Who clicks what is said in `grank.py`.
"""

import csv
import io
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from protocols.errors import ConfigError
from protocols.vocabulary import DIGEST_BYTES, MAX_TERM_CHARS, Digest

COLUMNS = ("album", "artist", "tags")
NUM_ITEMS, NUM_TAGS, TAGS_PER_ITEM = 256, 39, 3
"""Of the experiment (arXiv 2301.12530, section 5)."""
_FIELD = "--catalogue"
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


class Release(Struct, frozen=True):
    """An item of the catalogue."""

    album: str
    artist: str
    tags: tuple[str, ...]


class Catalogue:
    """Releases in order, and their tags in alphabetical order.

    tagged: bool [tags, items], which item carries which tag.
    """

    def __init__(self, releases: Sequence[Release]) -> None:
        self.releases = tuple(releases)
        self.tags = tuple(sorted({tag for release in releases for tag in release.tags}))
        self.digests = tuple(digest_of(index) for index in range(len(self.releases)))
        place = {tag: index for index, tag in enumerate(self.tags)}
        self.tagged: NDArray[np.bool_] = np.zeros((len(self.tags), len(self.releases)), dtype=bool)
        for index, release in enumerate(self.releases):
            self.tagged[[place[tag] for tag in release.tags], index] = True

    def __len__(self) -> int:
        return len(self.releases)


def digest_of(index: int) -> Digest:
    """An item's name in the experiment: the lowest id is that of the lowest index."""
    return Digest(index.to_bytes(DIGEST_BYTES, "big"))


# --- drawn from a seed ----------------------------------------------------------------------------------
def synthetic(
    seed: int, num_items: int = NUM_ITEMS, num_tags: int = NUM_TAGS, tags_per_item: int = TAGS_PER_ITEM
) -> Catalogue:
    """A catalogue of the experiment's shape: made-up names, and for each item so many different tags, all equally likely.

    No tag is left without an item where there are enough items to go round.
    """
    rng = random.Random(f"{seed} catalogue")
    words = _words(rng)
    tags = [next(words) for _ in range(num_tags)]
    chosen = [rng.sample(tags, tags_per_item) for _ in range(num_items)]
    used = {tag for own in chosen for tag in own}
    for own, tag in zip(chosen, sorted(set(tags) - used), strict=False):
        own[0] = tag
    return Catalogue([Release(next(words), next(words), tuple(sorted(own))) for own in chosen])


def _words(rng: random.Random) -> Iterator[str]:
    """Different ones that mean nothing."""
    seen = set()
    while True:
        word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))
        if word not in seen:
            seen.add(word)
            yield word


# --- read from a file -----------------------------------------------------------------------------------
def read_catalogue(path: Path) -> Catalogue:
    """A CSV file with the columns album, artist and tags, in any order and among others.

    Tags are written as numpy prints them, `['house' 'electronic']`, or with commas, or with double quotes.

    Raises:
        ConfigError: with the line, where the file is not like this.
    """
    try:
        # Spreadsheets put a byte order mark before the header; "utf-8-sig" takes it away.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(_FIELD, f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(_FIELD, f"{path} is not UTF-8 text") from error
    try:
        releases = list(_releases(text, path.name))
    except csv.Error as error:
        raise ConfigError(_FIELD, f"{path.name} is not CSV ({error})") from error
    if not releases:
        raise ConfigError(_FIELD, f"{path.name} lists no release")
    return Catalogue(releases)


def _releases(text: str, name: str) -> Iterator[Release]:
    lines = csv.reader(io.StringIO(text, newline=""))
    header = [cell.strip().lower() for cell in next(lines, [])]
    if missing := [column for column in COLUMNS if column not in header]:
        raise _wrong(name, 1, f"the header has no column {', '.join(missing)}", ",".join(COLUMNS))
    for cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(header) and header[-1] == "tags":
            # A list with commas that nobody put into quotes.
            cells[len(header) - 1 :] = [",".join(cells[len(header) - 1 :])]
        if len(cells) != len(header):
            raise _wrong(name, lines.line_num, f"has {len(cells)} columns", ",".join(header))
        row = dict(zip(header, cells, strict=True))
        tags = parse_tags(row["tags"])
        if not tags:
            raise _wrong(name, lines.line_num, "has no tags", "['house' 'electronic' 'garage']")
        for tag in tags:
            if len(tag) > MAX_TERM_CHARS or not tag.isprintable():
                raise _wrong(
                    name, lines.line_num, f"{tag[:20]!r} is no tag", f"{MAX_TERM_CHARS} printable characters"
                )
        yield Release(row["album"].strip(), row["artist"].strip(), tags)


def parse_tags(text: str) -> tuple[str, ...]:
    """Each tag once, in small letters, in the order given."""
    inner = text.strip().removeprefix("[").removesuffix("]")
    if quoted := _QUOTED.findall(inner):
        found = [single or double for single, double in quoted]
    else:
        found = inner.split(",") if "," in inner else inner.split()
    folded = (" ".join(tag.casefold().split()) for tag in found)
    return tuple(dict.fromkeys(tag for tag in folded if tag))


def _wrong(name: str, line: int, problem: str, *allowed: str) -> ConfigError:
    return ConfigError(_FIELD, f"line {line} of {name}: {problem}", allowed)
