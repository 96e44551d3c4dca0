"""Items on their way: what of each is still missing, how much is asked for at once, and what is asked for again.

Belongs here: the asyncio side of getting. Who has an item is the core's matter, and where its bytes go the store's.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from node.content_store import ContentStore, Wanted
from node.telemetry import Telemetry
from protocols.budget import Budget
from protocols.content import SEEKS_PER_S
from protocols.entries import Kind
from protocols.errors import CoveyError, LocalError, PeerError
from protocols.events import Drop, Event, Get, Hold
from protocols.vocabulary import ContentRef, Digest, PeerId

WINDOW = 3
"""Blobs that are asked for at once: a peer serves another four, and one may be about to end."""
ASK_PER_S = 0.8 * SEEKS_PER_S
"""Blobs that are asked for in a second. Each is a question to many peers, who answer so many and no more."""
RETRY_S = 30.0
RETRY_MAX_S = 1800.0
"""Wait before something is asked for again that nobody had: twice as long each time."""
LINK_RETRY_S = 1.0
"""The same where a new neighbour may have it, times the tries so far."""
MEASURE_PAUSE = 10.0
"""Times as long as a look took, before the next."""
QUICK_S = 0.05
"""What takes no longer may be looked at again at once."""
MAX_ENDED = 64
"""Gets that are over and still told of."""


class _Getting:
    """An item on its way: the blobs that it still lacks, and how it goes. Touched on the loop only."""

    def __init__(self, wanted: Wanted, hints: tuple[PeerId, ...], may_be_file: bool) -> None:
        self.wanted = wanted
        self.item = Digest(wanted.ref.digest)
        self.hints = hints
        self.may_be_file = may_be_file
        self.state = "getting"  # or waiting, held, failed
        self.detail = ""
        self.path: Path | None = None
        self.todo: dict[Digest, ContentRef] = {}
        self.asked: dict[Digest, ContentRef] = {}
        self.missed: dict[Digest, ContentRef] = {}
        """Asked for in vain. All others come first."""
        self.gained = False
        """Something has come since the missed ones were last asked for."""
        self.looking = False
        """A thread finds out what is missing, puts it in its place, or removes what there is of it."""
        self.moved = (0, wanted.ref.size_bytes)
        """Bytes that are here, and all, when somebody asked last."""
        self.measure_at = 0.0
        """When to look again how much is here: of a folder of many files that takes long, and somebody asks all the time."""
        self.sources: dict[PeerId, None] = {}
        self.likely: tuple[PeerId, ...] = ()
        """Who brought the last of it, and may have the rest."""
        self.tries = 0
        self.retry: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("held", "failed")

    def facts(self) -> dict[str, Any]:
        """As the API tells it."""
        return {
            "item": self.item.hex(),
            "title": self.wanted.title,
            "kind": self.wanted.kind.value,
            "state": self.state,
            "detail": self.detail,
            "path": None if self.path is None else str(self.path),
            "done_bytes": self.moved[0],
            "total_bytes": self.moved[1],
            "sources": list(self.sources),
        }


class Gets:
    """All items that a node is getting. For the loop; what blocks is done in threads.

    handle: the driver. spawn: begins work on the loop that ends with the node.
    """

    def __init__(
        self,
        store: ContentStore,
        telemetry: Telemetry,
        handle: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._store = store
        self._telemetry = telemetry
        self._handle = handle
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._gets: dict[Digest, _Getting] = {}
        self._asks = Budget(ASK_PER_S)
        self._pause: asyncio.TimerHandle | None = None
        self._may_place = asyncio.Semaphore(1)

    async def rows(self) -> list[dict[str, Any]]:
        """What is under way, and what has just ended."""
        return [await self._facts(getting) for getting in list(self._gets.values())]

    async def again(self, item: Digest) -> dict[str, Any] | None:
        """Do not wait any longer with an item that is under way. How it stands; None where it is not."""
        getting = self._gets.get(item)
        if getting is None or getting.ended:
            return None
        self._again(getting)
        return await self._facts(getting)

    async def begin(self, wanted: Wanted, hints: tuple[PeerId, ...], may_be_file: bool) -> dict[str, Any]:
        """Get an item that the store wants, unless it is under way. How it stands.

        hints: peers that say that they have it. may_be_file: some say of a folder that it is none.
        """
        under_way = self._gets.get(Digest(wanted.ref.digest))
        if under_way is not None and not under_way.ended:  # two must not put it in its place
            return await self._facts(under_way)
        getting = _Getting(wanted, hints, may_be_file)
        self._gets.pop(getting.item, None)
        self._gets[getting.item] = getting
        ended = [each for each in self._gets.values() if each.ended]
        for each in ended[: max(0, len(ended) - MAX_ENDED)]:
            del self._gets[each.item]
        self._ask_on()
        return await self._facts(getting)

    async def leave_off(self, prefix: str) -> dict[str, Any]:
        """Get an item no more whose digest begins so.

        Raises:
            LocalError: there is not one such, or it is nearly here.
        """
        under_way = [
            getting
            for getting in self._gets.values()
            if getting.item.hex().startswith(prefix.lower()) and not getting.ended
        ]
        if len(under_way) != 1:
            problem = "several items are" if under_way else "nothing is"
            raise LocalError(f"{problem} under way whose digest begins with {prefix}; see `covey library`")
        (getting,) = under_way
        if getting.looking:
            raise LocalError("it is being put in its place right now")
        getting.looking = True
        try:
            await self._give_up(getting, "cancelled")
        finally:
            getting.looking = False
        del self._gets[getting.item]
        self._ask_on()
        return await self._facts(getting)

    def on_link(self) -> None:
        """A new neighbour may have what others had not."""
        for getting in self._gets.values():
            if getting.retry is not None:
                soon = self._loop.time() + LINK_RETRY_S * getting.tries
                if soon < getting.retry.when():
                    getting.retry.cancel()
                    getting.retry = self._loop.call_at(soon, self._again, getting)

    def on_held(self, digest: Digest, sources: tuple[PeerId, ...]) -> None:
        """A blob is here."""
        for getting in self._gets.values():
            getting.todo.pop(digest, None)
            getting.missed.pop(digest, None)
            if getting.asked.pop(digest, None) is not None:
                getting.sources.update(dict.fromkeys(sources))
                getting.likely = sources
                getting.gained, getting.tries = True, 0
        self._ask_on()

    def on_missing(self, digest: Digest, detail: str) -> None:
        """A blob cannot be had now."""
        for getting in self._gets.values():
            if (ref := getting.asked.pop(digest, None)) is not None:
                getting.missed[digest], getting.detail = ref, detail
                getting.likely = ()
        self._ask_on()

    def stop(self) -> None:
        """No timer fires any more."""
        for timer in (self._pause, *(getting.retry for getting in self._gets.values())):
            if timer is not None:
                timer.cancel()

    # --- asking -----------------------------------------------------------------------------------------
    def _ask_on(self) -> None:
        """Ask for as much as may be asked for at once and in a second."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        free = WINDOW - sum(len(getting.asked) for getting in self._gets.values())
        for getting in self._gets.values():
            if getting.state == "getting" and not (getting.looking or getting.todo or getting.asked):
                self._turn(getting)
            while free > 0 and getting.state == "getting" and getting.todo:
                # Whoever had the list of a folder is not asked for each file: most are small, and there may be thousands.
                if not getting.likely and not self._asks.take(self._loop.time()):
                    self._pause = self._loop.call_later(1 / ASK_PER_S, self._ask_on)
                    return
                digest, ref = getting.todo.popitem()
                getting.asked[digest] = ref
                self._handle(Get(ref, getting.hints, getting.likely))
                free -= 1

    def _turn(self, getting: _Getting) -> None:
        """All that could be had is here: on to what was missed, or to what comes next."""
        if not getting.missed:
            getting.looking = True
            self._spawn(self._look(getting))
            return
        getting.todo, getting.missed = getting.missed, {}
        if not getting.gained:
            self._wait(getting, getting.detail)
        getting.gained = False

    async def _look(self, getting: _Getting) -> None:
        """What is still missing: the item itself, then the files of a folder, and in the end nothing but its place."""
        try:
            missing = await asyncio.to_thread(self._store.missing, getting.item)
            # The last is taken first.
            getting.todo.update({Digest(ref.digest): ref for ref in reversed(missing)})
        except PeerError as error:
            # Whoever served the list is not who made it up.
            self._telemetry.refusal(PeerId(""), error.reason, error.detail)
            if getting.may_be_file:
                await asyncio.to_thread(self._store.want_as_file, getting.item)
                getting.wanted, getting.may_be_file = getting.wanted._replace(kind=Kind.FILE), False
            else:
                await self._fail(getting, str(error))
        except (CoveyError, OSError, sqlite3.Error) as error:
            await self._fail(getting, str(error))
        else:
            if not getting.todo:
                await self._put_in_place(getting)
        finally:
            getting.looking = False
        self._ask_on()

    async def _put_in_place(self, getting: _Getting) -> None:
        try:
            await self._measure(getting)
            async with self._may_place:  # a copy to another disk takes a thread for long
                getting.path = await asyncio.to_thread(self._store.place, getting.item, getting.wanted.title)
        except (LocalError, OSError, sqlite3.Error) as error:
            self._wait(getting, str(error))
            return
        getting.state, getting.detail = "held", ""
        self._handle(Hold(await asyncio.to_thread(self._store.digests)))
        self._telemetry.info(
            "got", title=getting.wanted.title, item=getting.item.hex(), path=str(getting.path)
        )

    def _wait(self, getting: _Getting, why: str) -> None:
        """Try again later, longer each time."""
        getting.state, getting.detail = "waiting", why
        if getting.retry is None:
            getting.tries += 1
            wait_s = min(RETRY_S * 2.0 ** (getting.tries - 1), RETRY_MAX_S)
            getting.retry = self._loop.call_later(wait_s, self._again, getting)

    def _again(self, getting: _Getting) -> None:
        if getting.retry is not None:
            getting.retry.cancel()
            getting.retry = None
        if getting.state == "waiting":
            getting.state, getting.detail = "getting", ""
            self._ask_on()

    # --- how it ends ------------------------------------------------------------------------------------
    async def _fail(self, getting: _Getting, why: str) -> None:
        """It can never be had, or not be kept here."""
        self._telemetry.warning(
            "cannot be got", title=getting.wanted.title, item=getting.item.hex(), reason=why
        )
        await self._give_up(getting, why)

    async def _give_up(self, getting: _Getting, why: str) -> None:
        """It has ended when nothing is left of it, and not before: then it may begin anew."""
        getting.todo, getting.asked, getting.missed = {}, {}, {}
        if getting.retry is not None:
            getting.retry.cancel()
            getting.retry = None
        dropped = await asyncio.to_thread(self._store.unwant, getting.item)
        for digest in dropped:
            self._handle(Drop(digest))
        # What had come of it is not here any more, unless it is shared too.
        held = set(await asyncio.to_thread(self._store.digests))
        self._handle(Hold(tuple(digest for digest in dropped if digest not in held), held=False))
        getting.state, getting.detail = "failed", why

    async def _facts(self, getting: _Getting) -> dict[str, Any]:
        if not getting.ended and self._loop.time() >= getting.measure_at:
            await self._measure(getting)
        return getting.facts()

    async def _measure(self, getting: _Getting) -> None:
        began = self._loop.time()
        moved = await asyncio.to_thread(self._store.progress, getting.item)
        now = self._loop.time()
        getting.measure_at = now + MEASURE_PAUSE * max(0.0, now - began - QUICK_S)
        if moved is not None:
            getting.moved = moved
