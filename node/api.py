"""The daemon's HTTP API, for its own machine: status, peers, rounds, the log of scalars, metrics, stop, and what others add.

Bound to 127.0.0.1. Every call needs the token that lies in the home; a Host or Origin that is not local is
refused, so that a web page in the user's browser can neither read nor stop the node.
"""

import asyncio
import contextlib
import hmac
import http.client
import json
import os
import secrets
import socket
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from protocols.errors import LocalError

API_FILE = "api.json"
TOKEN_FILE = "api.token"  # noqa: S105 - a file's name
_LOCAL = {"127.0.0.1", "localhost", "[::1]"}
# The token is for our own daemon: never through a proxy that the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def make_token(home: Path) -> str:
    """The home's API token, made on first use, readable by its owner only."""
    path = home / TOKEN_FILE
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(24))
    return path.read_text().strip()


class _Guard:
    """Refuses what is not local or does not know the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        problem = None
        if not _is_local(headers.get(b"host", b"").decode("latin-1")):
            problem = (403, "the Host header must name this machine")
        elif b"origin" in headers and not _is_local(headers[b"origin"].decode("latin-1").split("://")[-1]):
            problem = (403, "requests from web pages elsewhere are refused")
        elif not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            problem = (
                401,
                f"send 'Authorization: Bearer <token>'; the token is in {TOKEN_FILE} in the node's home",
            )
        if problem:
            response = json_response({"error": problem[1]}, problem[0])
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def json_response(data: object, status_code: int = 200) -> Response:
    """A metric that is not finite becomes null: JSON has no word for it."""
    return Response(msgspec.json.encode(data), status_code, media_type="application/json")


def _is_local(host: str) -> bool:
    name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.split(":")[0]
    return name in _LOCAL


def make_app(
    token: str,
    status: Callable[[], dict[str, Any]],
    peers: Callable[[], list[dict[str, Any]]],
    rounds: Callable[[int], list[dict[str, Any]]],
    metrics: Callable[[], bytes],
    stop: Callable[[], None],
    log: Callable[[], dict[str, Any] | None] = lambda: None,
    content: Callable[[], Awaitable[dict[str, int]]] | None = None,
    more: Sequence[Route] = (),
) -> Starlette:
    """The application over what the daemon can tell and do. log: None where the node keeps none. content: how much is shared
    and known, for the status; None where nothing is. more: routes of others, behind the same guard."""

    async def get_status(request: Request) -> Response:
        data = status()
        if content is not None:
            with contextlib.suppress(LocalError):  # a damaged library is told by whoever asks for it
                data = {**data, "content": await content()}
        return json_response(data)

    async def get_peers(request: Request) -> Response:
        return json_response(peers())

    async def get_rounds(request: Request) -> Response:
        try:
            last = int(request.query_params.get("last", "100"))
        except ValueError:
            return json_response({"error": "last: a whole number"}, 400)
        return json_response(rounds(max(1, min(last, 100_000))))

    async def get_log(request: Request) -> Response:
        data = log()
        if data is None:
            return json_response({"error": "this node does not learn by scalars and keeps no log"}, 404)
        return json_response(data)

    async def get_metrics(request: Request) -> Response:
        return PlainTextResponse(metrics(), media_type="text/plain; version=0.0.4")

    async def post_stop(request: Request) -> Response:
        stop()
        return json_response({"stopping": True})

    return Starlette(
        routes=[
            Route("/status", get_status),
            Route("/peers", get_peers),
            Route("/rounds", get_rounds),
            Route("/log", get_log),
            Route("/metrics", get_metrics),
            Route("/stop", post_stop, methods=["POST"]),
            *more,
        ],
        middleware=[Middleware(_Guard, token=token)],
    )


class _Server(uvicorn.Server):
    """uvicorn that leaves the process's signals to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServer:
    """Serves the application on the running loop."""

    def __init__(self, app: Starlette, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
        except OSError as error:
            self._socket.close()
            raise LocalError(f"api.port {port} on 127.0.0.1 cannot be used: {error.strerror}") from error
        self.port: int = self._socket.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
            )
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()


# --- the other side: commands that ask a running daemon -------------------------------------------------
class RefusedError(LocalError):
    """The daemon answered, and did not do it. problem: its own sentence."""

    def __init__(self, home: Path, status: int, body: bytes) -> None:
        text = body.decode(errors="replace")
        super().__init__(f"the daemon of {home} refused: {text[:200]}")
        self.status = status
        self.problem = text[:200]
        with contextlib.suppress(ValueError, KeyError, TypeError):
            self.problem = str(json.loads(text)["error"])


def call(
    home: Path, path: str, method: str = "GET", timeout_s: float = 5.0, body: dict[str, Any] | None = None
) -> Any:
    """Ask the daemon of a home. body: what is sent along, as JSON.

    Raises:
        LocalError: no daemon runs there, it does not answer, or it refuses (`RefusedError`).
    """
    try:
        port = int(json.loads((home / API_FILE).read_text())["port"])
        token = (home / TOKEN_FILE).read_text().strip()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LocalError(f"no daemon runs in {home}; start it with `covey run --home {home}`") from error
    headers = {"Authorization": f"Bearer {token}"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        method=method,
        headers=headers,
        data=None if body is None else json.dumps(body).encode(),
    )
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            answer = response.read()
        return answer.decode() if path == "/metrics" else json.loads(answer)
    except urllib.error.HTTPError as error:
        raise RefusedError(home, error.code, error.read()) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        # After a crash, `api.json` may name a port that another program has taken since.
        raise LocalError(f"the daemon of {home} does not answer ({error}); is it still running?") from error
