"""The part of the HTTP API that is about shared content: what is known, found, shared and fetched.

Belongs here: paths, bodies and status codes. 400 is a wrong request, 409 one that cannot be done now; either says why in a
sentence. Only the token's owner gets here, see `api.py`: whoever may ask may name any file of the operator's.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from node.api import json_response
from protocols.entries import Term
from protocols.errors import ConfigError, LocalError
from protocols.vocabulary import MAX_TERMS

MAX_BODY_BYTES = 64 * 1024
MAX_LISTED = 1000
LISTED = 50
FOUND = 20
LOOK_S = 0.5
"""Between two looks whether somebody still waits."""
T = TypeVar("T")
_Item = Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{6,64}\Z")]
"""An item's digest, or the first digits of it where they are unique."""


class ShareBody(Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be shared: a path, a URI or the node's model, and one of them alone."""

    path: str = ""
    """Absolute, of a file or a folder."""
    uri: str = ""
    model: bool = False
    """The newest checkpoint."""
    title: str | None = None
    """Left out, it follows from the name."""
    creator: str = ""
    tags: tuple[str, ...] = ()


class ItemBody(Struct, frozen=True, forbid_unknown_fields=True):
    """An item that is known here."""

    item: _Item


class GetBody(Struct, frozen=True, forbid_unknown_fields=True):
    """An item to fetch, or to fetch no more."""

    item: _Item
    cancel: bool = False


class OpenBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A result that the operator chose."""

    item: _Item
    terms: Annotated[tuple[Term, ...], Meta(min_length=1, max_length=MAX_TERMS)]
    """Of the query, as the search told them."""
    rank: Annotated[int, Meta(ge=1, le=MAX_LISTED)]
    """Where it stood among the results, from 1."""
    fetch: bool = True


class ForgetBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing: all of one's own clicks are meant."""


class ContentCalls(Protocol):
    """What the API needs of the node's content. Raises ConfigError and LocalError, in words for the operator."""

    async def library(self, mine: bool, limit: int) -> dict[str, Any]: ...

    async def search(self, text: str, limit: int, ranker: str | None) -> dict[str, Any]: ...

    async def share(self, body: ShareBody) -> dict[str, Any]: ...

    async def unshare(self, item: str) -> dict[str, Any]: ...

    async def open(self, body: OpenBody) -> dict[str, Any]: ...

    async def get(self, item: str, cancel: bool) -> dict[str, Any]: ...

    async def forget(self) -> dict[str, Any]: ...

    async def gets(self) -> dict[str, Any]: ...

    async def counts(self) -> dict[str, int]: ...


def content_routes(contents: ContentCalls | None) -> list[Route]:
    """The routes. contents: None where the node has none to do with content; then every answer says so."""

    def route(path: str, answer: Callable[[ContentCalls, Request], Awaitable[object]], method: str) -> Route:
        async def endpoint(request: Request) -> Response:
            if contents is None:
                return _refused("this node shares no content: content.enabled is false in its config", 404)
            try:
                return json_response(await answer(contents, request))
            except ConfigError as error:
                return _refused(str(error), 400)
            except (LocalError, OSError, sqlite3.Error) as error:
                return _refused(str(error), 409)

        return Route(path, endpoint, methods=[method])

    return [
        route("/library", _library, "GET"),
        route("/search", _search, "GET"),
        route("/gets", _gets, "GET"),
        route("/share", _share, "POST"),
        route("/unshare", _unshare, "POST"),
        route("/open", _open, "POST"),
        route("/get", _get, "POST"),
        route("/forget", _forget, "POST"),
    ]


async def _library(contents: ContentCalls, request: Request) -> object:
    mine = request.query_params.get("mine", "0")
    if mine not in ("0", "1"):
        raise ConfigError("mine", f"'{mine[:20]}'", ["0", "1"])
    return await contents.library(mine == "1", _limit(request, LISTED))


async def _search(contents: ContentCalls, request: Request) -> object:
    given = request.query_params
    return await contents.search(given.get("q", ""), _limit(request, FOUND), given.get("ranker"))


async def _gets(contents: ContentCalls, request: Request) -> object:
    return await contents.gets()


async def _share(contents: ContentCalls, request: Request) -> object:
    body = await _body(request, ShareBody)
    if "\0" in body.path:
        raise ConfigError("path", "holds a NUL, which no path may")
    return await _while_connected(request, contents.share(body))


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of long work, which is broken off where nobody waits for it any more."""
    task = asyncio.create_task(work)
    try:
        while not task.done() and not await request.is_disconnected():
            await asyncio.wait([task], timeout=LOOK_S)
    finally:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        return await task
    raise LocalError("it was broken off, since nobody waits for it any more")


async def _unshare(contents: ContentCalls, request: Request) -> object:
    return await contents.unshare((await _body(request, ItemBody)).item)


async def _open(contents: ContentCalls, request: Request) -> object:
    return await contents.open(await _body(request, OpenBody))


async def _get(contents: ContentCalls, request: Request) -> object:
    body = await _body(request, GetBody)
    return await contents.get(body.item, body.cancel)


async def _forget(contents: ContentCalls, request: Request) -> object:
    await _body(request, ForgetBody)
    return await contents.forget()


def _limit(request: Request, default: int) -> int:
    text = request.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_LISTED):
        raise ConfigError("limit", f"'{text[:20]}'", [f"1 to {MAX_LISTED}"])
    return int(text)


_Body = TypeVar("_Body", ShareBody, ItemBody, GetBody, OpenBody, ForgetBody)


async def _body(request: Request, kind: type[_Body]) -> _Body:
    """The body, as JSON of this form.

    Raises:
        ConfigError: too long, or of another form.
    """
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_BODY_BYTES:
            raise ConfigError("body", "is too long", [f"{MAX_BODY_BYTES} bytes"])
    try:
        return msgspec.json.decode(bytes(content) or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError("body", str(error)) from error


def _refused(sentence: str, status_code: int) -> Response:
    return json_response({"error": sentence}, status_code)
