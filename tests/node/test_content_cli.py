"""The commands on shared content against a real HTTP API whose node is a fake: what is asked, what is printed, what is refused."""

import asyncio
import io
import json
import os
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node import cli, content_api, content_cli
from node.api import API_FILE, TOKEN_FILE, ApiServer, make_app
from node.content_api import MAX_BODY_BYTES, OpenBody, ShareBody, content_routes
from node.content_cli import SEARCH_FILE
from protocols.errors import ConfigError, LocalError

ITEM = "ab12cd" + "0" * 58
OTHER = "ffee00" + "0" * 58
EVIL = "\x1b[2J[red]evil\n\u202etxt.exe"
SPELT_OUT = "<U+001B>[2J[red]evil<U+000A><U+202E>txt.exe"


def item(**changes: Any) -> dict[str, Any]:
    return {
        "item": ITEM,
        "day": 1,
        "kind": "file",
        "title": "notes.txt",
        "creator": "",
        "tags": ["jazz"],
        "media_type": "text/plain",
        "size_bytes": 1234,
        "uri": "",
        "details": {},
        "mine": False,
        "sharers": ["12D3KooWA"],
        "state": "",
        "path": None,
        **changes,
    }


def result(**changes: Any) -> dict[str, Any]:
    why = {
        "matched": ["jazz"],
        "matched_tags": [],
        "clicks": 0.0,
        "clickers": 0,
        "similar_clicks": 0.0,
        "similar_peers": 0,
        "similarity": 0.0,
        "rank": 1,
        "score": 1.0,
    }
    return item(**{**why, **changes})


def get(state: str, **changes: Any) -> dict[str, Any]:
    row = {
        "item": ITEM,
        "title": "notes.txt",
        "kind": "file",
        "state": state,
        "detail": "",
        "path": None,
        "done_bytes": 0,
        "total_bytes": 1234,
        "sources": [],
    }
    return {**row, **changes}


class FakeContents:
    """Answers as it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.asked: list[Any] = []
        self.items: list[dict[str, Any]] = []
        self.known = self.shared = 0
        """Left at 0, as many as there are items."""
        self.results: list[dict[str, Any]] = []
        self.under_way: list[dict[str, Any]] = []
        self.begun: dict[str, Any] = get("getting")
        self.steps: list[dict[str, Any]] = []
        """How the get stands, each time that it is asked."""
        self.error: Exception | None = None
        self.is_slow = False
        """To share takes until somebody asks how far it is."""
        self.looked = asyncio.Event()
        self.broken_off = threading.Event()
        self.shares: list[dict[str, Any]] = [item(path="/x/notes.txt", skipped=0)]

    def _note(self, *what: Any) -> None:
        self.asked.append(what)
        if self.error is not None:
            raise self.error

    async def library(self, mine: bool, limit: int) -> dict[str, Any]:
        self._note("library", mine, limit)
        counts = {"known": self.known or len(self.items), "shared": self.shared or len(self.items)}
        return {"items": self.items[:limit], "gets": self.under_way, **counts}

    async def search(self, text: str, limit: int, ranker: str | None) -> dict[str, Any]:
        self._note("search", text, limit, ranker)
        return {"query": text, "terms": text.split(), "ranker": "g-rank", "results": self.results}

    async def share(self, body: ShareBody) -> dict[str, Any]:
        self._note("share", body)
        if self.is_slow:
            try:
                async with asyncio.timeout(10):
                    await self.looked.wait()
            except asyncio.CancelledError:
                self.broken_off.set()
                raise
        if not self.shares:
            raise LocalError("there is no more to share")
        return self.shares.pop(0)

    async def unshare(self, item: str) -> dict[str, Any]:
        self._note("unshare", item)
        if item == OTHER:
            raise LocalError("it is not shared")
        return {"item": ITEM, "title": EVIL, "withdrawn": True}

    async def open(self, body: OpenBody) -> dict[str, Any]:
        self._note("open", body)
        return self.begun

    async def get(self, item: str, cancel: bool) -> dict[str, Any]:
        self._note("get", item, cancel)
        return self.begun

    async def forget(self) -> dict[str, Any]:
        self._note("forget")
        return {"clicks": 3, "taken_back": True}

    async def gets(self) -> dict[str, Any]:
        if self.steps:
            self.under_way = [self.steps.pop(0)]
        self.looked.set()
        sharing = [{"path": "/x", "done_bytes": 1, "total_bytes": 2}] if self.is_slow else []
        return {"gets": self.under_way, "sharing": sharing}

    async def counts(self) -> dict[str, int]:
        return {"shared": 2, "known": 30, "authors": 4, "clicks": 500}


def serve(home: Path, contents: FakeContents | None, ready: threading.Event, ends: threading.Event) -> None:
    async def run() -> None:
        app = make_app(
            "token",
            lambda: {"peer": "me"},
            list,
            lambda last: [],
            lambda: b"",
            lambda: None,
            content=None if contents is None else contents.counts,
            more=content_routes(contents),
        )
        server = ApiServer(app, 0)
        server._socket.listen()
        server.start()
        (home / API_FILE).write_text(json.dumps({"port": server.port, "pid": 1}))
        (home / TOKEN_FILE).write_text("token")
        ready.set()
        await asyncio.to_thread(ends.wait)
        await server.stop()

    asyncio.run(run())


def served(folder: Path, contents: FakeContents | None) -> Iterator[Path]:
    """A folder that names a running API."""
    ready, ends = threading.Event(), threading.Event()
    thread = threading.Thread(target=serve, args=(folder, contents, ready, ends))
    thread.start()
    assert ready.wait(10)
    yield folder
    ends.set()
    thread.join()


FAKE = FakeContents()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from served(tmp_path_factory.mktemp("daemon"), FAKE)


@pytest.fixture(scope="module")
def daemon_without(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from served(tmp_path_factory.mktemp("without"), None)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def lead_to(daemon: Path, home: Path) -> None:
    for name in (API_FILE, TOKEN_FILE):
        (home / name).write_bytes((daemon / name).read_bytes())


@pytest.fixture
def contents(home: Path, daemon: Path) -> FakeContents:
    lead_to(daemon, home)
    FAKE.reset()
    return FAKE


@pytest.fixture
def switched_off(home: Path, daemon_without: Path) -> None:
    lead_to(daemon_without, home)


class Covey:
    """Runs `covey ... --home` in this process, as the installed script does."""

    def __init__(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._home = home
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """What it printed; its exit code is this one."""
        argv = ["covey", *map(str, arguments), "--home", str(self._home)]
        self._monkeypatch.setattr(sys, "argv", argv)
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        self.out, self.err = self._capsys.readouterr()
        assert int(ended.value.code or 0) == code, self.out + self.err
        return self.out

    def json(self, *arguments: object) -> Any:
        printed = self(*arguments, "--json")
        assert len(printed.splitlines()) == 1, "one value, one line, nothing else"
        return json.loads(printed)


@pytest.fixture
def covey(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Covey:
    for name in [name for name in os.environ if name.startswith("COVEY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(content_cli, "POLL_S", 0.001)
    return Covey(home, monkeypatch, capsys)


# --- share, unshare -------------------------------------------------------------------------------------
def test_share_tells_the_daemon_whole_paths_and_prints_the_digest(
    covey: Covey, contents: FakeContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "songs").mkdir()
    monkeypatch.chdir(tmp_path)
    contents.shares.append(item(item=OTHER, kind="folder", title="songs", skipped=2))
    printed = covey("share", "notes.txt", tmp_path / "songs", "--tag", "a", "--tag", "b", "--by", "Me")
    assert contents.asked == [
        ("share", ShareBody(str(tmp_path / "notes.txt"), creator="Me", tags=("a", "b"))),
        ("share", ShareBody(str(tmp_path / "songs"), creator="Me", tags=("a", "b"))),
    ]
    lines = printed.splitlines()
    assert lines[:2] == ["ab12cd000000  notes.txt  file, 1.2 kB", f"    {ITEM}"]
    assert lines[2:4] == ["ffee00000000  songs  folder, 1.2 kB", f"    {OTHER}"]
    assert "not shared of it: 2" in lines[4]


def test_share_of_a_link_and_of_the_model(covey: Covey, contents: FakeContents) -> None:
    contents.shares *= 2
    covey("share", "--uri", "https://example.org", "--title", "A page")
    covey("share", "--model", "--title", "Mine")
    assert contents.asked == [
        ("share", ShareBody(uri="https://example.org", title="A page")),
        ("share", ShareBody(model=True, title="Mine")),
    ]


def test_share_asks_how_far_the_hashing_is(covey: Covey, contents: FakeContents, tmp_path: Path) -> None:
    contents.is_slow = True
    (shared,) = covey.json("share", tmp_path)
    assert shared["item"] == ITEM
    assert contents.looked.is_set()


def test_what_is_done_is_told_though_the_next_is_refused(
    covey: Covey, contents: FakeContents, tmp_path: Path
) -> None:
    covey("share", tmp_path, tmp_path, "--json", code=1)
    assert [each["item"] for each in json.loads(covey.out)] == [ITEM]
    covey("unshare", ITEM, OTHER, "--json", code=1)
    assert [each["item"] for each in json.loads(covey.out)] == [ITEM]
    covey("unshare", ITEM, "wrong", code=2)
    assert contents.asked[-1] == ("unshare", OTHER), "nothing is done before all are looked at"
    covey("unshare", OTHER, "--json", code=1)
    assert covey.out == ""


def test_ctrl_c_while_sharing_says_what_becomes_of_it(
    covey: Covey, contents: FakeContents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(content_cli, "_meanwhile", interrupt)
    covey("share", "--model", code=130)
    assert "it is not shared" in covey.err


def test_sharing_is_broken_off_where_nobody_waits_for_it(
    contents: FakeContents, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_api, "LOOK_S", 0.01)
    contents.is_slow = True
    body = b'{"path": "/x"}'
    head = (
        "POST /share HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer token\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    port = json.loads((home / API_FILE).read_text())["port"]
    with socket.create_connection(("127.0.0.1", port)) as asking:
        asking.sendall(head.encode() + body)
    assert contents.broken_off.wait(10)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "one kind of thing at a time"),
        (("notes.txt", "--model"), "one kind of thing at a time"),
        (("--uri", "a:b"), "--title: must be given with --uri"),
        (("nothing.txt",), "nothing.txt: is not there"),
        (("notes.txt", "notes.txt", "--title", "t"), "--title: is for one item"),
    ],
)
def test_what_cannot_be_shared_is_wrong_usage(
    covey: Covey,
    contents: FakeContents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    told: str,
) -> None:
    (tmp_path / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    covey("share", *arguments, code=2)
    assert told in covey.err
    assert contents.asked == []


def test_what_the_daemon_finds_wrong_is_wrong_usage_in_its_words(
    covey: Covey, contents: FakeContents, tmp_path: Path
) -> None:
    contents.error = ConfigError("title", "is too long", ["200 characters"])
    covey("share", tmp_path, code=2)
    assert covey.err == "covey: --title: is too long (allowed: 200 characters)\n"
    contents.error = LocalError("the disk is full")
    covey("share", tmp_path, code=1)
    assert covey.err == "covey: the disk is full\n"


@pytest.mark.parametrize(
    ("field", "name"), [("creator", "--by"), ("tag", "--tag"), ("tags", "--tag"), ("uri", "--uri")]
)
def test_a_wrong_field_goes_by_its_name_on_the_command_line(
    covey: Covey, contents: FakeContents, tmp_path: Path, field: str, name: str
) -> None:
    contents.error = ConfigError(field, "is wrong")
    covey("share", tmp_path, code=2)
    assert covey.err == f"covey: {name}: is wrong\n"


def test_a_query_without_words_and_a_body_that_is_too_long_are_told_without_the_apis_names(
    covey: Covey, contents: FakeContents, tmp_path: Path
) -> None:
    contents.error = ConfigError("q", "holds no word to search for")
    covey("search", "!!!", code=2)
    assert covey.err == "covey: QUERY: holds no word to search for\n"
    covey("share", tmp_path, "--title", "x" * MAX_BODY_BYTES, code=2)
    assert covey.err.startswith("covey: the command line: is too long")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("search", "caf\udce9"), "QUERY"),
        (("share", "--model", "--title", "caf\udce9"), "--title"),
        (("share", "--model", "--tag", "a", "--tag", "caf\udce9"), "--tag"),
        (("share", "caf\udce9"), "PATH"),
    ],
)
def test_bytes_that_are_no_utf8_are_a_sentence(
    covey: Covey,
    contents: FakeContents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    name: str,
) -> None:
    """So a file's name in Latin-1 comes, and what a terminal in Latin-1 sends."""
    monkeypatch.setattr(content_cli.Path, "exists", lambda path: True)  # not every system has such a file
    monkeypatch.chdir(tmp_path)
    covey(*arguments, code=2)
    assert covey.err.startswith(f"covey: {name}: ")
    assert "caf<U+DCE9>' is not UTF-8" in covey.err
    assert contents.asked == []


def test_unshare_takes_the_beginnings_of_digests(covey: Covey, contents: FakeContents) -> None:
    printed = covey("unshare", "AB12CD", ITEM)
    assert contents.asked == [("unshare", "ab12cd"), ("unshare", ITEM)]
    assert printed.splitlines() == [f"ab12cd000000  {SPELT_OUT}: shared no more"] * 2
    for wrong in ("ab12c", "notes.txt", "0" * 65, "xyzxyz"):
        covey("unshare", wrong, code=2)
        assert "hexadecimal digits" in covey.err


# --- library --------------------------------------------------------------------------------------------
def test_the_library_shows_who_shares_what_and_what_is_under_way(
    covey: Covey, contents: FakeContents
) -> None:
    contents.items = [
        item(sharers=["12D3KooWA", "12D3KooWB", "12D3KooWC"], creator="Someone"),
        item(mine=True, sharers=[], state="served", path="/x/notes.txt"),
        item(mine=True, sharers=[], state="changed", path="/x/notes.txt"),
        item(kind="link", tags=[]),
    ]
    contents.under_way = [
        get("getting", done_bytes=617),
        get("waiting", detail="nobody [b]has[/b] it"),
        get("held", title="is in the list above"),
    ]
    assert covey("library", "--limit", 9).splitlines() == [
        "ab12cd000000  notes.txt  file, 1.2 kB, by Someone  jazz",
        "    shared by 12D3KooWA, 12D3KooWB and 1 more",
        "ab12cd000000  notes.txt  file, 1.2 kB  jazz",
        "    shared by you; served from /x/notes.txt",
        "ab12cd000000  notes.txt  file, 1.2 kB  jazz",
        "    shared by you; not served: the file has changed or is gone /x/notes.txt",
        "ab12cd000000  notes.txt  link",
        "    shared by 12D3KooWA",
        "ab12cd000000  notes.txt  getting, 50 % of 1.2 kB",
        "ab12cd000000  notes.txt  waiting at 0 %: nobody [b]has[/b] it",
    ]
    covey("library", "--mine")
    assert contents.asked == [("library", False, 9), ("library", True, 50)]
    assert covey.json("library")["items"] == contents.items


def test_the_library_says_how_many_there_are_only_where_more_are(
    covey: Covey, contents: FakeContents
) -> None:
    contents.items = [item(), item(item=OTHER)]
    contents.known, contents.shared = 7, 2
    assert "shown" not in covey("library", "--mine", "--limit", 2)
    assert "2 of 7 shown; --limit shows more" in covey("library", "--limit", 2)
    contents.known = 2
    assert "1 of 2 shown; --limit shows more" in covey("library", "--limit", 1)
    assert "shown" not in covey("library", "--limit", 2)


def test_a_model_shows_its_metrics(covey: Covey, contents: FakeContents) -> None:
    contents.items = [item(kind="model", title="digits", details={"metrics": f"accuracy 0.9{EVIL}"})]
    assert f"digits  model, 1.2 kB, accuracy 0.9{SPELT_OUT}  jazz" in covey("library")


def test_an_empty_library_says_what_to_do(covey: Covey, contents: FakeContents) -> None:
    assert "nothing known yet" in covey("library")
    assert "covey share PATH" in covey("library", "--mine")


@pytest.mark.parametrize("command", ["library", "search"])
def test_words_of_strangers_move_no_cursor(covey: Covey, contents: FakeContents, command: str) -> None:
    strange = {"title": EVIL, "creator": EVIL, "tags": [EVIL], "sharers": [EVIL], "kind": EVIL}
    contents.items = contents.results = [result(**strange, matched=[EVIL], matched_tags=[EVIL])]
    contents.under_way = [get("failed", title=EVIL, detail=EVIL)]
    printed = covey(command, *(["x"] if command == "search" else []))
    assert printed.count(SPELT_OUT) >= 5
    assert "\x1b" not in printed
    assert "\u202e" not in printed


# --- search, open ---------------------------------------------------------------------------------------
def test_a_search_numbers_its_results_and_says_why(covey: Covey, contents: FakeContents, home: Path) -> None:
    contents.results = [
        result(clicks=12.0, clickers=4, similar_clicks=3.0, similar_peers=2, matched_tags=["jazz"]),
        result(item=OTHER, title="other", clicks=1.0, clickers=1),
    ]
    assert covey("search", "smooth", "jazz", "--ranker", "bm25", "--limit", 5).splitlines() == [
        " 1  notes.txt  file, 1.2 kB  jazz  ab12cd000000",
        "    shared by 12D3KooWA; why: matches jazz, tagged jazz; 12 clicks by 4 peers, 3 of them by 2 peers like you",
        " 2  other  file, 1.2 kB  jazz  ffee00000000",
        "    shared by 12D3KooWA; why: matches jazz; 1 click by 1 peer",
        "`covey open N` gets one, and ranks better next time",
    ]
    assert contents.asked == [("search", "smooth jazz", 5, "bm25")]
    assert stat.S_IMODE((home / SEARCH_FILE).stat().st_mode) == 0o600, "it tells what was searched for"
    assert covey.json("search", "jazz")["results"] == contents.results


def test_a_search_without_results_says_so(covey: Covey, contents: FakeContents) -> None:
    assert "nothing found" in covey("search", "jazz")
    covey("open", 1, code=1)
    assert "begin with `covey search`" in covey.err


def test_a_ranker_that_is_none_is_wrong_usage(covey: Covey, contents: FakeContents) -> None:
    covey("search", "jazz", "--ranker", "best", code=2)
    assert "g-rank-capped" in covey.err


def test_open_tells_which_result_of_which_query_was_chosen(
    covey: Covey, contents: FakeContents, home: Path
) -> None:
    contents.results = [result(), result(item=OTHER)]
    covey("search", "smooth", "jazz")
    contents.begun = get("held", path="/d/notes.txt")
    assert covey("open", 2) == "/d/notes.txt\n"
    assert contents.asked[-1] == ("open", OpenBody(OTHER, ("smooth", "jazz"), 2, True))
    contents.begun = item(state="chosen")
    covey("open", 1, "--no-fetch")
    assert contents.asked[-1] == ("open", OpenBody(ITEM, ("smooth", "jazz"), 1, False))
    contents.begun = item(kind="link", state="link", uri="https://example.org")
    assert covey("open", 1).splitlines() == ["notes.txt", "https://example.org"]
    covey("open", 3, code=2)
    assert "1 to 2" in covey.err


@pytest.mark.parametrize("content", [None, "", "[]", '{"terms": 1, "results": []}', '{"results": ["x"]}'])
def test_without_a_search_there_is_no_number(
    covey: Covey, contents: FakeContents, home: Path, content: str | None
) -> None:
    if content is not None:
        (home / SEARCH_FILE).write_text(content)
    covey("open", 1, code=1)
    assert "begin with `covey search`" in covey.err
    assert contents.asked == []


# --- get ------------------------------------------------------------------------------------------------
def test_get_waits_until_the_item_is_here(covey: Covey, contents: FakeContents) -> None:
    contents.steps = [
        get("getting", done_bytes=600),
        get("getting", done_bytes=1200),
        get("held", done_bytes=1234, path="/d/notes.txt"),
    ]
    assert covey("get", "ab12cd") == "/d/notes.txt\n"
    assert contents.asked == [("get", "ab12cd", False)]


def test_get_ends_with_the_reason_where_nobody_has_it(covey: Covey, contents: FakeContents) -> None:
    contents.steps = [get("getting"), get("waiting", detail="none of 3 peers holds it")]
    covey("get", ITEM, code=1)
    assert "'notes.txt' cannot be got now: none of 3 peers holds it; the node goes on trying" in covey.err
    contents.steps = [get("failed", detail="it is no list")]
    covey("get", ITEM, code=1)
    assert covey.err == "covey: 'notes.txt' cannot be got now: it is no list\n"
    contents.steps = [get("held", item=OTHER)]
    covey("get", ITEM, code=1)
    assert "not got any more" in covey.err


def test_get_takes_a_number_of_the_last_search_and_records_no_choice(
    covey: Covey, contents: FakeContents
) -> None:
    contents.results = [result(item=OTHER)]
    contents.begun = get("held", path="/d/x")
    covey("search", "jazz")
    covey("get", 1)
    assert contents.asked[-1] == ("get", OTHER, False)
    covey("get", "123456")
    assert contents.asked[-1] == ("get", "123456", False), "so many digits are those of a digest"
    for number in ("0", "2"):
        covey("get", number, code=2)
        assert f"the last search had no result {number} (allowed: 1 to 1)" in covey.err
        assert contents.asked[-1] == ("get", "123456", False)


def test_get_detached_or_cancelled_does_not_wait(covey: Covey, contents: FakeContents) -> None:
    assert "goes on in the daemon" in covey("get", ITEM, "--detach")
    assert covey("get", ITEM, "--cancel") == "ab12cd000000  notes.txt: not got any more\n"
    assert contents.asked[-1] == ("get", ITEM, True)


def test_ctrl_c_ends_the_waiting_alone(
    covey: Covey, contents: FakeContents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(content_cli.time, "sleep", interrupt)
    covey("get", ITEM, code=130)
    assert "goes on in the daemon" in covey.err


def test_a_copy_goes_where_it_is_wanted_and_never_over_anything(
    covey: Covey, contents: FakeContents, tmp_path: Path
) -> None:
    source, target = tmp_path / "notes.txt", tmp_path / "target"
    source.write_text("x")
    target.mkdir()
    contents.begun = get("held", path=str(source))
    assert covey("get", ITEM, "--to", target) == f"{target / 'notes.txt'}\n"
    assert (target / "notes.txt").read_text() == "x"
    covey("get", ITEM, "--to", target, code=1)
    assert "exists already" in covey.err
    covey("get", ITEM, "--to", source, code=2)
    covey("get", ITEM, "--to", target, "--detach", code=2)


# --- forget ---------------------------------------------------------------------------------------------
def test_forget_asks_first(
    covey: Covey, contents: FakeContents, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    covey("search", "jazz")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    covey("forget", code=1)
    assert "--yes" in covey.err
    assert ("forget",) not in contents.asked
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert covey.json("forget")["clicks"] == 3, "the question is no part of the answer"
    assert "Forget all your choices?" in covey.err
    assert "3 choices forgotten" in covey("forget", "--yes")
    assert not (home / SEARCH_FILE).exists()


# --- the daemon -----------------------------------------------------------------------------------------
COMMANDS = [
    ("library",),
    ("search", "jazz"),
    ("get", ITEM),
    ("unshare", ITEM),
    ("share", "--model"),
    ("forget", "--yes"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_without_a_daemon_each_command_says_how_to_start_one(covey: Covey, command: tuple[str, ...]) -> None:
    covey(*command, code=1)
    assert "covey run" in covey.err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_where_content_is_switched_off_each_command_says_so(
    covey: Covey, switched_off: None, command: tuple[str, ...]
) -> None:
    covey(*command, code=1)
    assert "content.enabled" in covey.err


def test_a_status_tells_of_content(contents: FakeContents, home: Path) -> None:
    from node.api import call

    assert call(home, "/status")["content"] == {"shared": 2, "known": 30, "authors": 4, "clicks": 500}


# --- the API's own checks -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/search?q=x&limit=0", None, "limit"),
        ("/search?q=x&limit=many", None, "limit"),
        ("/library?limit=1001", None, "limit"),
        ("/library?mine=yes", None, "mine"),
        ("/get", {}, "body: Object missing required field `item`"),
        ("/get", {"item": "ab"}, "body: "),
        ("/get", {"item": "../../etc"}, "body: "),
        ("/get", {"item": ITEM, "cancel": "yes"}, "body: "),
        ("/open", {"item": ITEM, "terms": [], "rank": 1}, "body: "),
        ("/open", {"item": ITEM, "terms": ["a\nb"], "rank": 1}, "body: "),
        ("/open", {"item": ITEM, "terms": ["a"], "rank": 0}, "body: "),
        ("/open", {"item": ITEM, "terms": ["a"] * 9, "rank": 1}, "body: "),
        ("/share", {"paths": []}, "body: Object contains unknown field"),
        ("/share", {"title": "x" * MAX_BODY_BYTES}, "body: is too long"),
        ("/share", {"path": "/x\0y"}, "path: holds a NUL"),
        ("/forget", {"all": True}, "body: "),
    ],
)
def test_a_wrong_request_is_a_sentence_and_asks_nothing(
    contents: FakeContents, home: Path, path: str, body: dict[str, Any] | None, told: str
) -> None:
    from node.api import RefusedError, call

    with pytest.raises(RefusedError) as caught:
        call(home, path, "GET" if body is None else "POST", body=body)
    assert (caught.value.status, contents.asked) == (400, [])
    assert told in caught.value.problem


def test_what_changes_something_is_a_post(contents: FakeContents, home: Path) -> None:
    from node.api import RefusedError, call

    for path in ("/share", "/unshare", "/open", "/get", "/forget"):
        with pytest.raises(RefusedError) as caught:
            call(home, path)
        assert caught.value.status == 405
    assert contents.asked == []
