"""Shared content on one node: what its operator shares, searches, opens and gets, between the disk and the core.

Belongs here: the asyncio side. What blocks is done in threads by `Sharing`, `Shelf` and the stores below them. What is said to
all goes through the driver, which signs and spreads it.
"""

import asyncio
import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec

from node.config import ContentConfig
from node.content_api import OpenBody, ShareBody
from node.content_entries import day_of, entry_facts
from node.content_gets import Gets
from node.content_sharing import ModelSource, Sharing, Told
from node.content_shelf import Shelf
from node.content_store import ContentStore, Wanted
from node.library import Library
from node.telemetry import Telemetry
from protocols.entries import Click, Entry, Feed, Head, Kind, Shared, Withdrawn
from protocols.errors import ConfigError, CoveyError, LocalError
from protocols.events import (
    BeginAnew,
    ContentHeld,
    ContentMissing,
    Event,
    Hold,
    KeepEntries,
    LinkChanged,
    Publish,
    Recall,
    Recalled,
    Record,
)
from protocols.terms import hashed, query_terms
from protocols.vocabulary import Digest

MAX_HASHING = 2
"""Things that are hashed at once. More would be no faster, and take the threads that answer everything else."""
KEPT_S = 30.0
"""What takes the disk longer to write than this is not waited for."""
RENEW_EVERY_S = 6 * 3600.0


class Handles(Protocol):
    """What is needed of a driver."""

    def handle(self, event: Event) -> None: ...


class _Unkept:
    """Somebody waits until entries of one's own are on the disk."""

    def __init__(self, left: int, kept: "asyncio.Future[None]") -> None:
        self.left = left
        self.kept = kept


class ContentService:
    """All that a node does with content. Its methods are for the loop, but for `keep`, `refused` and `recall`, which are for the
    disk's thread.

    me: the node's author key. wall_clock: Unix seconds. model: None for a node that does not learn.
    """

    def __init__(
        self,
        config: ContentConfig,
        network: str,
        me: bytes,
        library: Library,
        store: ContentStore,
        wall_clock: Callable[[], float],
        telemetry: Telemetry,
        model: ModelSource | None = None,
    ) -> None:
        self._config = config
        self._network = network
        self._me = me
        self._library = library
        self._store = store
        self._wall_clock = wall_clock
        self._telemetry = telemetry
        self._sharing = Sharing(store, me, model)
        self._shelf = Shelf(library, store, me, config.max_items_per_author)
        self._gets = Gets(store, telemetry, self._handle, self._spawn)
        self._loop = asyncio.get_running_loop()
        self._driver: Handles | None = None
        self._hashing: dict[int, dict[str, Any]] = {}
        self._may_hash = asyncio.Semaphore(MAX_HASHING)
        self._unkept: dict[Feed, deque[_Unkept]] = {feed: deque() for feed in Feed}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = threading.Event()

    def attach(self, driver: Handles) -> None:
        """The driver needs this and this needs the driver: the driver comes second."""
        self._driver = driver

    # --- for the driver: see `node.ports.Contents` ------------------------------------------------------
    def heads(self) -> tuple[tuple[Feed, tuple[Head, ...]], ...]:
        """Where the feeds stand, for `Started`."""
        return self._library.heads()

    def keep(self, effect: KeepEntries) -> None:
        """Write entries. On the disk's thread. What is not written is never told to others. Those of others are not, where so
        little of the disk is free that it is to stay so.

        Raises:
            LocalError, OSError, sqlite3.Error: they are not written.
        """
        if any(batch.author != self._me for batch in effect.batches):
            self._store.check_disk(0)
        self._library.keep(effect)
        self._tell_kept(effect, None)

    def refused(self, effect: KeepEntries, problem: str) -> None:
        """Tell whoever waits. On the disk's thread."""
        self._tell_kept(effect, problem)

    def _tell_kept(self, effect: KeepEntries, problem: str | None) -> None:
        own = sum(len(batch.entries) for batch in effect.batches if batch.author == self._me)
        if own:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
                self._loop.call_soon_threadsafe(self._on_kept, effect.feed, own, problem)

    def recall(self, effect: Recall) -> Recalled:
        """Bring entries for a peer. On the disk's thread. Raises as `keep` does."""
        return self._library.recall(effect)

    def on_record(self, record: Record) -> None:
        """What the core says. It may come in the middle of a step, so what follows from it comes after that."""
        match record:
            case ContentHeld(digest, sources):
                self._loop.call_soon(self._gets.on_held, digest, sources)
            case ContentMissing(digest, detail):
                self._loop.call_soon(self._gets.on_missing, digest, detail)
            case LinkChanged(up=True):
                self._loop.call_soon(self._gets.on_link)
            case _:
                pass

    def on_changed(self, digest: Digest, problem: str) -> None:
        """A shared file has changed or gone, says the store on whatever thread."""
        self._telemetry.warning("not served any more", item=digest.hex(), reason=problem)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._look_after, digest)

    def _look_after(self, digest: Digest) -> None:
        if not self._stopping.is_set():
            self._spawn(self._serve_no_more(digest))

    async def _serve_no_more(self, digest: Digest) -> None:
        """Unless there is another copy of it."""
        if await asyncio.to_thread(self._store.get, digest) is None:
            self._handle(Hold((digest,), held=False))

    # --- its life ---------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Serve what is held, go on with what was under way. The core has been told that it has started."""
        await asyncio.to_thread(
            self._store.recheck
        )  # files may have changed, or come back, while nothing ran here
        digests = await asyncio.to_thread(self._store.digests)
        if digests:
            self._handle(Hold(digests))
        for wanted in await asyncio.to_thread(self._store.wanted):
            await self._begin(wanted)
        self._spawn(self._renew_now_and_then())

    async def stop(self) -> None:
        """Leave off. What is under way is taken up at the next start."""
        self._stopping.set()
        self._store.stop()
        self._gets.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _renew_now_and_then(self) -> None:
        while True:
            try:
                await self._renew()
            except (CoveyError, OSError, sqlite3.Error) as error:
                self._telemetry.warning("shared items were not renewed", reason=str(error))
            await asyncio.sleep(RENEW_EVERY_S)

    async def _renew(self) -> None:
        """Say again what was said long ago, before others forget it."""
        today = day_of(self._wall_clock())
        oldest = today - self._config.expire_days // 2
        old = [entry for entry in await asyncio.to_thread(self._shelf.own_entries) if entry.day < oldest]
        if old:
            await self._publish(Feed.CATALOGUE, *(msgspec.structs.replace(each, day=today) for each in old))

    # --- sharing ----------------------------------------------------------------------------------------
    async def share(self, body: ShareBody) -> dict[str, Any]:
        """Hash what is to be shared, say so to all, and serve it. Cancelled, it is hashed no further and not shared.

        Raises:
            ConfigError, LocalError: it is no such thing, its entry is too long, it cannot be read.
        """
        number = max(self._hashing, default=0) + 1
        progress = self._hashing[number] = {"path": body.path, "done_bytes": 0, "total_bytes": 0}
        day, rounds = day_of(self._wall_clock()), self._sharing.rounds()
        try:
            async with self._may_hash:
                found = await asyncio.to_thread(
                    self._sharing.take_up, body, rounds, day, self._progress(number, progress)
                )
        finally:
            del self._hashing[number]
        await self._publish(Feed.CATALOGUE, found.entry)
        if found.digests:
            self._handle(Hold(found.digests))
        self._telemetry.info("shared", title=found.entry.title, item=found.entry.item.hex())
        return {**entry_facts(found.entry), "path": found.path, "skipped": found.skipped}

    def _progress(self, number: int, progress: dict[str, Any]) -> Told:
        def told(done_bytes: int, total_bytes: int) -> None:
            if self._stopping.is_set():
                raise LocalError("the node stops")
            if self._hashing.get(number) is not progress:
                raise LocalError("nobody waits for it any more")
            progress.update(done_bytes=done_bytes, total_bytes=total_bytes)

        return told

    async def unshare(self, item: str) -> dict[str, Any]:
        """Serve an item no more, and say so to all where it is one's own. Files stay where they are."""
        digest, title, is_own = await asyncio.to_thread(self._shelf.served, item)
        if is_own:
            await self._publish(Feed.CATALOGUE, Withdrawn(digest, day_of(self._wall_clock())))
        gone = await asyncio.to_thread(self._store.unshare, digest)
        if gone:
            self._handle(Hold(gone, held=False))
        return {"item": digest.hex(), "title": title, "withdrawn": is_own}

    # --- looking ----------------------------------------------------------------------------------------
    async def library(self, mine: bool, limit: int) -> dict[str, Any]:
        """What is shared by whom as far as known, and what is under way."""
        rows = await asyncio.to_thread(self._shelf.rows, mine, limit)
        return {"items": rows, **await self.counts(), "gets": await self._gets.rows()}

    async def counts(self) -> dict[str, int]:
        """What is shared here, what is known, how many clicks were heard."""
        return await asyncio.to_thread(self._shelf.count)

    async def search(self, text: str, limit: int, ranker: str | None) -> dict[str, Any]:
        """Ranked results with why. Nothing leaves the node for it."""
        terms = query_terms(text)
        if not terms:
            raise ConfigError("q", "holds no word to search for", ["letters or digits of any script"])
        results = await asyncio.to_thread(self._shelf.find, text, limit, ranker)
        return {
            "query": text,
            "terms": list(terms),
            "ranker": ranker or self._config.ranker,
            "results": results,
        }

    # --- choosing ---------------------------------------------------------------------------------------
    async def open(self, body: OpenBody) -> dict[str, Any]:
        """Record that a result was chosen, say so where the operator wishes it, and get the item."""
        entry = await asyncio.to_thread(self._shelf.known, body.item)
        item = Digest(entry.item)
        now_s = self._wall_clock()
        await asyncio.to_thread(self._library.click, body.terms, item, body.rank, now_s)
        if self._config.share_clicks != "off":
            terms = body.terms
            if self._config.share_clicks == "hashed":
                terms = tuple(hashed(term, self._network) for term in terms)
            await self._publish(Feed.CLICKS, Click(item, day_of(now_s), terms, body.rank))
        if not body.fetch:
            return {**entry_facts(entry), "state": "link" if entry.kind is Kind.LINK else "chosen"}
        return await self._get(entry)

    async def forget(self) -> dict[str, Any]:
        """Forget the operator's own clicks, and take back what was said of them."""
        count, said = await asyncio.to_thread(self._shelf.own_clicks)
        await asyncio.to_thread(self._library.forget)
        if said:
            await self._said(Feed.CLICKS, BeginAnew(Feed.CLICKS), 1)
            # What was said is not in the file's old pages either.
            await asyncio.to_thread(self._library.forget)
        return {"clicks": count, "taken_back": said}

    # --- getting ----------------------------------------------------------------------------------------
    async def get(self, item: str, cancel: bool) -> dict[str, Any]:
        """Begin to get an item, or leave off. How far it is stands in `gets`."""
        if cancel:
            return await self._gets.leave_off(item)
        return await self._get(await asyncio.to_thread(self._shelf.known, item))

    async def _get(self, entry: Shared) -> dict[str, Any]:
        item = Digest(entry.item)
        under_way = await self._gets.again(item)
        if under_way is not None:
            return under_way
        if (at_hand := await asyncio.to_thread(self._shelf.at_hand, entry)) is not None:
            return at_hand
        wanted = await asyncio.to_thread(self._want, entry)
        if wanted is None:
            return {**entry_facts(entry), "state": "link"}
        return await self._begin(wanted)

    def _want(self, entry: Shared) -> Wanted | None:
        """As the likeliest of its sharers describes it for whom there is room. None of a link."""
        problem: LocalError | None = None
        for wanted in self._shelf.wanted(entry):
            try:
                self._store.want(*wanted)
            except LocalError as error:
                problem = problem or error
            else:
                return wanted
        if problem is None and entry.kind is not Kind.LINK:
            problem = LocalError("its sharer says that it has no bytes: there is nothing to get")
        if problem is not None:
            raise problem
        return None

    async def _begin(self, wanted: Wanted) -> dict[str, Any]:
        item = wanted.ref.digest
        hints = await asyncio.to_thread(self._shelf.hints, item)
        return await self._gets.begin(wanted, hints, await asyncio.to_thread(self._shelf.may_be_file, item))

    async def gets(self) -> dict[str, Any]:
        """What is under way, what has just ended, and what is being hashed."""
        return {"gets": await self._gets.rows(), "sharing": list(self._hashing.values())}

    # --- saying it --------------------------------------------------------------------------------------
    async def _publish(self, feed: Feed, *entries: Entry) -> None:
        """Say entries to all. They are on the disk when this returns.

        Raises:
            LocalError: the disk refuses, or takes too long.
        """
        await self._said(feed, Publish(feed, entries), len(entries))

    async def _said(self, feed: Feed, event: Publish | BeginAnew, num_entries: int) -> None:
        unkept = _Unkept(num_entries, self._loop.create_future())
        self._unkept[feed].append(unkept)
        self._handle(event)
        try:
            async with asyncio.timeout(KEPT_S):
                await unkept.kept
        except TimeoutError:
            raise LocalError("the disk takes too long to keep it; is it full, or broken?") from None

    def _on_kept(self, feed: Feed, num_entries: int, problem: str | None) -> None:
        """So many entries of one's own are on the disk, in the order in which they were said."""
        waiting = self._unkept[feed]
        while num_entries and waiting:
            first = waiting[0]
            taken = min(first.left, num_entries)
            first.left -= taken
            num_entries -= taken
            if problem is not None and not first.kept.done():
                first.kept.set_exception(LocalError(f"it could not be kept: {problem}"))
            if not first.left:
                waiting.popleft()
                if not first.kept.done():
                    first.kept.set_result(None)

    def _handle(self, event: Event) -> None:
        assert self._driver is not None
        self._driver.handle(event)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._telemetry.warning("work on shared content broke", reason=repr(error))
