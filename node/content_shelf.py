"""What a node knows of content and has of it, put together for the API: library rows, search results, one item by its digest.

Belongs here: reading. It blocks, on the library's and the store's files.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from node.content_entries import entry_facts, name_of
from node.content_store import ContentStore, Item, Wanted
from node.library import Library
from node.library_search import Result
from node.signatures import peer_of_author
from protocols.entries import Feed, Kind, Shared
from protocols.errors import LocalError
from protocols.vocabulary import ContentRef, Digest, PeerId

MAX_PREFIX_MATCHES = 8
"""Digests that are named where several begin alike."""


class Shelf:
    """The library and the store of one node, as the operator sees them.

    me: the node's author key. max_own: most items of its own that are looked at.
    """

    def __init__(self, library: Library, store: ContentStore, me: bytes, max_own: int) -> None:
        self._library = library
        self._store = store
        self._me = me
        self._max_own = max_own

    # --- many items -----------------------------------------------------------------------------------------
    def rows(self, mine: bool, limit: int) -> list[dict[str, Any]]:
        """What is shared, by this node alone or by anybody; what was heard of last comes first."""
        items = self._library.items(self._me if mine else None, limit)
        held = self._held(items)
        entries = map(self._library.entry, items)
        return [self._row(entry, held) for entry in entries if entry is not None]

    def _row(self, entry: Shared, held: Mapping[Digest, Item]) -> dict[str, Any]:
        whose = self._whose(self._library.sharers(entry.item))
        return {**entry_facts(entry), **whose, **_where(held.get(Digest(entry.item)))}

    def _held(self, among: Collection[bytes] | None = None) -> dict[Digest, Item]:
        """What of these, or of all, lies on this device."""
        return {item.digest: item for item in self._store.items(among)}

    def _whose(self, sharers: Iterable[bytes]) -> dict[str, Any]:
        others = [str(peer_of_author(author)) for author in sharers if author != self._me]
        return {"mine": self._me in sharers, "sharers": others}

    def find(self, text: str, limit: int, ranker: str | None) -> list[dict[str, Any]]:
        """Results of a search, best first. Raises ConfigError where there is no such ranker."""
        results = self._library.search(text, limit, ranker)
        held = self._held([result.item for result in results])
        return [self._result(result, held) for result in results]

    def _result(self, result: Result, held: Mapping[Digest, Item]) -> dict[str, Any]:
        return {
            **entry_facts(result.entry),
            "rank": result.rank,
            "score": result.score,
            "matched": list(result.matched),
            "matched_tags": list(result.tags),
            "clicks": result.clicks,
            "clickers": result.clickers,
            "similar_clicks": result.similar_clicks,
            "similar_peers": result.similar_peers,
            "similarity": result.similarity,
            **self._whose(result.sharers),
            **_where(held.get(result.item)),
        }

    def own_entries(self) -> list[Shared]:
        """What this node shares and still has."""
        held, found = self._held(), []
        for item in self._library.items(self._me, self._max_own):
            entry = self._library.entry(item)
            if entry is not None and (entry.kind is Kind.LINK or _is_whole(held.get(item))):
                found.append(entry)
        return found

    def own_clicks(self) -> tuple[int, bool]:
        """How many the operator has made, and whether others were told of any."""
        heads = dict(self._library.heads()).get(Feed.CLICKS, ())
        said = any(head.author == self._me and head.first <= head.last for head in heads)
        return self._library.counts().own_clicks, said

    def count(self) -> dict[str, int]:
        """How much is shared here, how much is known, how many clicks were heard."""
        found = self._library.counts()
        return {
            "shared": len(self._library.items(self._me, self._max_own)),
            "known": found.items,
            "authors": found.authors,
            "clicks": found.clicks,
        }

    # --- one item -------------------------------------------------------------------------------------------
    def known(self, prefix: str) -> Shared:
        """The one item that somebody shares and whose digest begins so.

        Raises:
            LocalError: there is none, or there are several.
        """
        found = self._library.find(prefix.lower())
        if len(found) != 1:
            raise LocalError(_not_one(prefix, found))
        entry = self._library.entry(found[0])
        if entry is None:
            raise LocalError(_not_one(prefix, ()))
        return entry

    def wanted(self, entry: Shared) -> list[Wanted]:
        """What to get of an item: its bytes as its sharers describe them, the likeliest first. Nothing of a link.

        Whether it is a folder its bytes will tell, and what they come to as well.
        """
        claims = sorted(
            (claim for claim in self._library.claims(entry.item) if claim[0] is not Kind.LINK and claim[1]),
            key=lambda claim: claim[0] is not Kind.FOLDER,
        )
        return [Wanted(ContentRef(entry.item, size), kind, name_of(entry)) for kind, size in claims]

    def may_be_file(self, item: bytes) -> bool:
        """Whether somebody says that it is one, or a model."""
        return any(kind in (Kind.FILE, Kind.MODEL) for kind, _ in self._library.claims(item))

    def hints(self, item: bytes) -> tuple[PeerId, ...]:
        """Those who share it say that they have it."""
        return tuple(peer_of_author(author) for author in self._library.sharers(item) if author != self._me)

    def at_hand(self, entry: Shared) -> dict[str, Any] | None:
        """An item that is here and whole, told as if it had just been got."""
        held = self._held([entry.item]).get(Digest(entry.item))
        if held is None or not _is_whole(held):
            return None
        return {
            "item": entry.item.hex(),
            "title": entry.title,
            "kind": entry.kind.value,
            "state": "held",
            "detail": "",
            "path": str(held.path),
            "done_bytes": held.total_bytes,
            "total_bytes": held.total_bytes,
            "sources": [],
        }

    def served(self, prefix: str) -> tuple[Digest, str, bool]:
        """The one item that this node shares, or has got and serves, whose digest begins so; its title, and whether it is the
        node's own.

        Raises:
            LocalError: there is none, or there are several.
        """
        own = {
            item: "" for item in self._library.find(prefix.lower()) if self._me in self._library.sharers(item)
        }
        held = {
            item: each.path.name
            for item, each in self._held().items()
            if item.hex().startswith(prefix.lower())
        }
        found = {**held, **own}
        if len(found) != 1:
            raise LocalError(f"of what this node shares: {_not_one(prefix, list(found))}")
        ((item, name),) = found.items()
        entry = self._library.entry(item)
        return item, entry.title if entry is not None else name, item in own


def _is_whole(held: Item | None) -> bool:
    return held is not None and not held.num_changed


def _where(held: Item | None) -> dict[str, Any]:
    """Whether an item lies on this device, and where."""
    if held is None:
        return {"state": "", "path": None}
    state = "changed" if held.num_changed else "got" if held.is_got else "served"
    return {"state": state, "path": str(held.path)}


def _not_one(prefix: str, found: Sequence[bytes]) -> str:
    if not found:
        return f"no item is known whose digest begins with {prefix}; `covey library` lists what is"
    some = ", ".join(item.hex()[:16] for item in found[:MAX_PREFIX_MATCHES])
    return f"several items begin with {prefix}: {some}"
