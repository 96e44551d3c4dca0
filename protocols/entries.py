"""What authors say of shared content, for good and signed: what they share, and which results they clicked.

Belongs here: the entries of the two feeds, the batches in which they travel, and their bounds. How a feed grows and how
two copies of one become the same is said in `feeds.py`; who asks whom for what, in `content.py`.
"""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from protocols.vocabulary import (
    CHAIN_BYTES,
    MAX_CONTENT_BYTES,
    MAX_DAY,
    MAX_DETAILS,
    MAX_ENTRIES_PER_BATCH,
    MAX_EPOCH,
    MAX_SEQ,
    MAX_TAG_CHARS,
    MAX_TAGS,
    MAX_TERM_CHARS,
    MAX_TERMS,
    MAX_TITLE_CHARS,
    ONE_LINE,
    SIGNATURE_BYTES,
    AuthorKey,
    Detail,
    WireDigest,
)

_PRINTABLE = r"^[!-~]*\Z"


class Feed(StrEnum):
    """The two logs of an author."""

    CATALOGUE = "catalogue"
    CLICKS = "clicks"


class Kind(StrEnum):
    """What an item is, for whoever gets it."""

    FILE = "file"
    FOLDER = "folder"  # the blob is a list of files, each a blob of its own
    MODEL = "model"  # a file of weights in safetensors form
    LINK = "link"  # nothing but the entry: the URI says where it is


Day = Annotated[int, Meta(ge=0, le=MAX_DAY)]
"""Days since 1970-01-01, UTC: fine enough for expiry, and tells little of a person's habits."""
Epoch = Annotated[int, Meta(ge=0, le=MAX_EPOCH)]
"""Unix seconds at which an author began its feed anew. A later epoch replaces all that was said before."""
Seq = Annotated[int, Meta(ge=0, le=MAX_SEQ)]
"""Number of an entry in its feed, from 1."""
Chain = Annotated[bytes, Meta(min_length=CHAIN_BYTES, max_length=CHAIN_BYTES)]
"""Running hash over a feed up to an entry."""
Term = Annotated[str, Meta(min_length=1, max_length=MAX_TERM_CHARS, pattern=ONE_LINE)]
"""A word of a query: as it is, or `#` and 16 hexadecimal digits where its author hashed it (see `terms.py`)."""
Title = Annotated[str, Meta(min_length=1, max_length=MAX_TITLE_CHARS, pattern=ONE_LINE)]
Creator = Annotated[str, Meta(max_length=100, pattern=ONE_LINE)]
Tag = Annotated[str, Meta(min_length=1, max_length=MAX_TAG_CHARS, pattern=ONE_LINE)]
DetailKey = Annotated[str, Meta(min_length=1, max_length=32, pattern=ONE_LINE)]


class _Entry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Shared(_Entry, frozen=True, tag="shared"):
    """The author shares an item. A later entry for the same item replaces the earlier one."""

    item: WireDigest
    """Of its bytes (see `blob.py`), or of the URI of a link (see `terms.item_of_uri`)."""
    day: Day
    kind: Kind
    title: Title
    creator: Creator
    """Who made it, in the sharer's words."""
    tags: Annotated[tuple[Tag, ...], Meta(max_length=MAX_TAGS)]
    media_type: Annotated[str, Meta(max_length=100, pattern=_PRINTABLE)]
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_CONTENT_BYTES)]
    """Of the blob; 0 of a link. Of a folder the list alone: what all its files come to is among the details."""
    uri: Annotated[str, Meta(max_length=1024, pattern=_PRINTABLE)]
    """Empty where there is none."""
    details: Annotated[tuple[tuple[DetailKey, Detail], ...], Meta(max_length=MAX_DETAILS)]
    """More about it, as pairs of a name and a text. A model's task, schema, metrics and lineage are here."""


class Withdrawn(_Entry, frozen=True, tag="withdrawn"):
    """The author shares this item no more."""

    item: WireDigest
    day: Day


class Click(_Entry, frozen=True, tag="click"):
    """The author chose an item among the results of a query. G-Rank's clicklog entry (arXiv 2301.12530, section 3), without
    the list of results; title and tags are the catalogue's."""

    item: WireDigest
    day: Day
    terms: Annotated[tuple[Term, ...], Meta(min_length=1, max_length=MAX_TERMS)]
    """The words of the query, each once."""
    rank: Annotated[int, Meta(ge=1, le=2**16)]
    """Where among the results the item stood, from 1."""


class Begun(_Entry, frozen=True, tag="begun"):
    """Nothing but that the author has begun its feed anew: what it said before is taken back."""

    day: Day


Entry = Shared | Withdrawn | Click | Begun
FEEDS_OF: dict[type, tuple[Feed, ...]] = {
    Shared: (Feed.CATALOGUE,),
    Withdrawn: (Feed.CATALOGUE,),
    Click: (Feed.CLICKS,),
    Begun: (Feed.CATALOGUE, Feed.CLICKS),
}
"""In which feeds an entry may stand."""


class Batch(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Consecutive entries of one author's feed, with the author's signature under the last.

    The signature is of the running hash after the last entry, so that it covers every entry up to there, and one check
    is enough for a batch of any length.
    """

    author: AuthorKey
    epoch: Epoch
    first: Annotated[int, Meta(ge=1, le=MAX_SEQ)]
    """Number of the first entry here."""
    prior: Chain
    """Running hash before it; zeros before the very first."""
    entries: Annotated[tuple[Entry, ...], Meta(min_length=1, max_length=MAX_ENTRIES_PER_BATCH)]
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]

    @property
    def last(self) -> int:
        """Number of the last entry here."""
        return self.first + len(self.entries) - 1


class FeedMark(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How far a node has an author's feed."""

    author: AuthorKey
    epoch: Epoch
    last: Seq


class Head(Struct, frozen=True):
    """Where an author's feed stands on this node: what a core is told of it when it starts."""

    author: bytes
    epoch: int
    first: int
    """The first entry that is still held; `last + 1` where none is."""
    last: int
    chain: bytes
    """Running hash after the last entry."""
    day: int
    """Of the last entry."""
    void: bool = False
    """The author has contradicted itself in this epoch: nothing of it counts."""


class Want(Struct, frozen=True, array_like=True):
    """Entries of one author that a peer lacks."""

    author: bytes
    epoch: int
    after: int
    """The peer has all up to this one."""
    limit: int


class Cut(Struct, frozen=True, array_like=True):
    """Entries of an author that are not held any more: those of earlier epochs, and those before `first`."""

    author: bytes
    epoch: int
    first: int
    void: bool = False
