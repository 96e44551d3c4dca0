"""The HTTP API over a real socket, and the commands' side of it."""

import asyncio
import http.client
import json
import os
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from node.api import (
    API_FILE,
    TOKEN_FILE,
    ApiServer,
    RefusedError,
    call,
    json_response,
    make_app,
    make_token,
)
from protocols.errors import LocalError

TOKEN = "the token"


class Server:
    """The API in this test's loop, over a home that the `covey` commands could read."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.asked: list[int] = []
        self.stops = 0
        self.log: dict[str, Any] | None = {"round": 3, "authors": {"12D3KooWA": 3}}
        self.status: dict[str, Any] = {"round": 3, "metrics": {"accuracy": 0.5}}
        app = make_app(
            token=TOKEN,
            status=lambda: self.status,
            peers=lambda: [{"peer": "a", "state": "live"}],
            rounds=self._rounds,
            metrics=lambda: b"covey_round 3.0\n",
            stop=self._stop,
            log=lambda: self.log,
        )
        self.server = ApiServer(app, 0)
        (home / API_FILE).write_text(json.dumps({"port": self.server.port, "pid": 1}))
        (home / TOKEN_FILE).write_text(TOKEN + "\n")

    def _rounds(self, last: int) -> list[dict[str, Any]]:
        self.asked.append(last)
        return [{"round": 2}]

    def _stop(self) -> None:
        self.stops += 1

    async def request(
        self, path: str, method: str = "GET", token: str | None = TOKEN, **headers: str
    ) -> tuple[int, Any]:
        def ask() -> tuple[int, Any]:
            connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
            given = {} if token is None else {"Authorization": f"Bearer {token}"}
            connection.request(method, path, headers={**given, **headers})
            response = connection.getresponse()
            body = response.read().decode()
            connection.close()
            kind = response.getheader("content-type") or ""
            return response.status, json.loads(body) if kind.startswith("application/json") else body

        return await asyncio.to_thread(ask)

    async def call(self, path: str, method: str = "GET") -> Any:
        return await asyncio.to_thread(call, self.home, path, method)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    server.server.start()
    # The socket is bound but not yet listened on: a served answer says that it is.
    await until_served(lambda: server.request("/metrics"))
    yield server
    await server.server.stop()


async def until_served(ask: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await ask()
            except ConnectionRefusedError:
                continue
            return


# --- who may ask ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1]])
async def test_without_the_token_nothing_is_told_or_done(api: Server, token: str | None) -> None:
    for path in ("/status", "/peers", "/rounds", "/metrics", "/stop", "/nothing"):
        status, body = await api.request(path, "POST" if path == "/stop" else "GET", token)
        assert status == 401
        assert TOKEN_FILE in body["error"]
    assert api.stops == 0


async def test_a_token_in_another_scheme_is_refused(api: Server) -> None:
    assert (await api.request("/status", token=None, Authorization=TOKEN))[0] == 401
    assert (await api.request("/status", token=None, Authorization=f"Basic {TOKEN}"))[0] == 401


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", ""])
async def test_a_name_that_was_rebound_to_this_machine_is_refused(api: Server, host: str) -> None:
    status, body = await api.request("/stop", "POST", Host=host)
    assert (status, api.stops) == (403, 0)
    assert "Host" in body["error"]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", ""])
async def test_a_web_page_from_elsewhere_is_refused_even_with_the_token(api: Server, origin: str) -> None:
    status, body = await api.request("/stop", "POST", Origin=origin)
    assert (status, api.stops) == (403, 0)
    assert "web pages" in body["error"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8080", "[::1]:8080", "[::1]"])
async def test_every_name_of_this_machine_is_accepted(api: Server, host: str) -> None:
    assert (await api.request("/status", Host=host))[0] == 200
    assert (await api.request("/status", Origin=f"http://{host}"))[0] == 200


# --- what it tells --------------------------------------------------------------------------------------
async def test_status_and_peers_are_what_the_daemon_says(api: Server) -> None:
    assert await api.request("/status") == (200, api.status)
    assert await api.request("/peers") == (200, [{"peer": "a", "state": "live"}])


async def test_a_metric_that_is_not_finite_is_null(api: Server) -> None:
    api.status = {"metrics": {"loss": float("nan"), "rmse": float("inf"), "r2": 0.5}}
    assert await api.request("/status") == (200, {"metrics": {"loss": None, "rmse": None, "r2": 0.5}})


async def test_rounds_take_a_number_within_bounds(api: Server) -> None:
    assert await api.request("/rounds") == (200, [{"round": 2}])
    for last in ("7", "0", "-5", "999999999"):
        assert (await api.request(f"/rounds?last={last}"))[0] == 200
    assert api.asked == [100, 7, 1, 1, 100_000]
    assert await api.request("/rounds?last=many") == (400, {"error": "last: a whole number"})


async def test_the_log_is_told_where_there_is_one(api: Server) -> None:
    assert await api.request("/log") == (200, api.log)
    api.log = None
    assert await api.request("/log") == (
        404,
        {"error": "this node does not learn by scalars and keeps no log"},
    )
    with pytest.raises(LocalError, match=r"refused: .*does not learn by scalars"):
        await api.call("/log")


async def test_metrics_are_prometheus_text(api: Server) -> None:
    assert await api.request("/metrics") == (200, "covey_round 3.0\n")


async def test_stop_is_a_post_and_is_passed_on_once(api: Server) -> None:
    assert (await api.request("/stop"))[0] == 405
    assert api.stops == 0
    assert await api.request("/stop", "POST") == (200, {"stopping": True})
    assert api.stops == 1


# --- the commands' side ---------------------------------------------------------------------------------
async def test_a_command_reads_port_and_token_from_the_home(api: Server) -> None:
    assert await api.call("/status") == api.status
    assert await api.call("/metrics") == "covey_round 3.0\n"
    assert await api.call("/stop", "POST") == {"stopping": True}


async def test_a_command_never_goes_through_a_proxy(api: Server) -> None:
    script = "import sys; from pathlib import Path; from node.api import call; print(call(Path(sys.argv[1]), '/metrics'))"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        str(api.home),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""},
    )
    output, _ = await process.communicate()
    assert (process.returncode, output) == (0, b"covey_round 3.0\n\n")


async def test_a_command_with_a_wrong_token_is_told_why(api: Server) -> None:
    (api.home / TOKEN_FILE).write_text("wrong")
    with pytest.raises(LocalError, match=r"refused: .*the token is in api.token"):
        await api.call("/status")


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"port": "x"}', '{"port": null}'])
async def test_without_a_daemon_a_command_says_how_to_start_one(tmp_path: Path, content: str | None) -> None:
    (tmp_path / TOKEN_FILE).write_text(TOKEN)
    if content is not None:
        (tmp_path / API_FILE).write_text(content)
    with pytest.raises(LocalError, match=f"no daemon runs in .*covey run --home {tmp_path}"):
        call(tmp_path, "/status")


async def test_a_daemon_that_was_killed_does_not_answer(tmp_path: Path) -> None:
    server = Server(tmp_path)
    await server.server.stop()
    with pytest.raises(LocalError, match=r"does not answer .*is it still running"):
        await server.call("/status")


class OtherProgram(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>welcome</html>")

    def log_message(self, *args: object) -> None:
        pass


def test_another_web_server_on_a_dead_daemons_port_is_no_answer(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), OtherProgram) as server:
        Thread(target=server.handle_request, daemon=True).start()
        (tmp_path / API_FILE).write_text(json.dumps({"port": server.server_port}))
        (tmp_path / TOKEN_FILE).write_text(TOKEN)
        with pytest.raises(LocalError, match="does not answer"):
            call(tmp_path, "/status")


async def test_a_program_that_speaks_no_http_is_no_answer(tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        (tmp_path / API_FILE).write_text(json.dumps({"port": server.sockets[0].getsockname()[1]}))
        (tmp_path / TOKEN_FILE).write_text(TOKEN)
        with pytest.raises(LocalError, match="does not answer"):
            await asyncio.to_thread(call, tmp_path, "/status")


async def test_a_refusal_keeps_its_status_and_its_sentence(api: Server) -> None:
    with pytest.raises(RefusedError) as caught:
        await api.call("/rounds?last=many")
    assert (caught.value.status, caught.value.problem) == (400, "last: a whole number")


async def test_a_body_travels_as_json_to_the_routes_of_others(tmp_path: Path) -> None:
    async def echo(request: Request) -> Response:
        return json_response({"type": request.headers["content-type"], "body": await request.json()})

    async def counts() -> dict[str, int]:
        return {"shared": 2}

    app = make_app(
        TOKEN,
        lambda: {"round": 3},
        list,
        lambda last: [],
        lambda: b"",
        lambda: None,
        content=counts,
        more=[Route("/echo", echo, methods=["POST"])],
    )
    server = ApiServer(app, 0)
    (tmp_path / API_FILE).write_text(json.dumps({"port": server.port}))
    (tmp_path / TOKEN_FILE).write_text("wrong")
    server._socket.listen()
    server.start()
    with pytest.raises(RefusedError) as caught:
        await asyncio.to_thread(call, tmp_path, "/echo", "POST", body={})
    assert caught.value.status == 401, "they are behind the same guard"
    (tmp_path / TOKEN_FILE).write_text(TOKEN)
    answer = await asyncio.to_thread(call, tmp_path, "/echo", "POST", body={"title": "é\n"})
    assert answer == {"type": "application/json", "body": {"title": "é\n"}}
    assert await asyncio.to_thread(call, tmp_path, "/status") == {"round": 3, "content": {"shared": 2}}
    await server.stop()


# --- its life -------------------------------------------------------------------------------------------
def test_the_token_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    token = make_token(tmp_path)
    assert len(token) >= 32
    assert make_token(tmp_path) == token
    assert stat.S_IMODE((tmp_path / TOKEN_FILE).stat().st_mode) == 0o600


async def test_a_taken_port_is_an_error_that_names_the_setting(api: Server) -> None:
    with pytest.raises(LocalError, match=rf"api\.port {api.server.port} on 127\.0\.0\.1 cannot be used"):
        ApiServer(make_app(TOKEN, dict, list, lambda last: [], lambda: b"", lambda: None), api.server.port)


async def test_only_this_machine_can_reach_it(api: Server) -> None:
    assert api.server._socket.getsockname()[0] == "127.0.0.1"


async def test_after_stop_nothing_listens(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.server.start()
    await until_served(lambda: server.request("/metrics"))
    await server.server.stop()
    with pytest.raises(ConnectionRefusedError):
        await server.request("/status")
