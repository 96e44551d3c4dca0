"""The commands on shared content: `covey share`, `unshare`, `library`, `search`, `open`, `get`, `forget`.

Belongs here: their options, what they ask the daemon, and what they print. Titles, names and tags are words of strangers:
they are shown as text, and what was fetched is never run or unpacked.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from node import api
from node.cli_common import DEFAULT_HOME, Home, Json, err, out, plain, print_json, size_text
from node.config import RANKERS
from protocols.errors import ConfigError, LocalError

SEARCH_FILE = "search.json"
"""In the home: the results that were shown last, so that a number means one of them. It holds what the operator searched for."""
SHORT_DIGITS = 12
"""Of a digest, where people read it."""
PREFIX_DIGITS = 6
POLL_S = 0.2
ASK_S = 60.0
SHARE_S = 24 * 3600.0
"""Hashing takes as long as reading."""
NAMES = {
    "q": "QUERY",
    "path": "PATH",
    "uri": "--uri",
    "title": "--title",
    "creator": "--by",
    "tag": "--tag",
    "tags": "--tag",
    "body": "the command line",
}
"""What the API's fields are called here."""
T = TypeVar("T")

Digest = Annotated[str, typer.Argument(help="A digest, or its first digits.", show_default=False)]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="How many to show at most.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `covey`."""
    app.command("share")(share_command)
    app.command("unshare")(unshare_command)
    app.command("library")(library_command)
    app.command("search")(search_command)
    app.command("open")(open_command)
    app.command("get")(get_command)
    app.command("forget")(forget_command)


# --- covey share, covey unshare -------------------------------------------------------------------------
def share_command(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Files and folders, each an item.", show_default=False)
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="What to call it.", show_default="the file's name")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A word to find it by; may be repeated.")] = None,
    by: Annotated[str, typer.Option(help="Who made it.", show_default=False)] = "",
    uri: Annotated[
        str,
        typer.Option(help="Share a link instead of a file: its title and tags alone.", show_default=False),
    ] = "",
    model: Annotated[bool, typer.Option("--model", help="Share the node's newest checkpoint.")] = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Share files, folders, a link or the node's model: all peers may find and get them.

    Files stay where they are, and are served as long as they do not change. Peers keep what they got, whatever you unshare.
    Ctrl-C while one is hashed: it is not shared.
    """
    told = {"title": title, "creator": by, "tags": tag or []}
    found = []
    try:
        for thing in _things(paths or [], uri, model, title):
            found.append(_share(home, {**told, **thing}))
            if not as_json:
                for line in _shared_lines(found[-1]):
                    _say(line)
    finally:  # what is shared is shared, even where the next is refused
        if as_json and found:
            print_json(found)


def _things(paths: Sequence[Path], uri: str, model: bool, title: str | None) -> list[dict[str, Any]]:
    """What is to be shared, each as the daemon is told."""
    if sum(map(bool, (paths, uri, model))) != 1:
        raise ConfigError("PATH", "share one kind of thing at a time", ["paths", "--uri", "--model"])
    if uri:
        if title is None:
            raise ConfigError("--title", "must be given with --uri")
        return [{"uri": uri}]
    if model:
        return [{"model": True}]
    if title is not None and len(paths) > 1:
        raise ConfigError("--title", f"is for one item, and here are {len(paths)}", ["leave it out"])
    # Not resolved: a symbolic link is for the daemon to refuse.
    whole = [Path.cwd() / path.expanduser() for path in paths]
    for path in whole:
        if not path.exists():
            raise ConfigError(str(path), "is not there", ["a file or a folder", "--uri for a link"])
    return [{"path": str(path)} for path in whole]


def _share(home: Path, body: dict[str, Any]) -> dict[str, Any]:
    with _bar() as bar:
        row = bar.add_task(plain(f"hashing {Path(body.get('path', 'model')).name}"), total=None)

        def look() -> None:
            for each in _ask(home, "/gets")["sharing"]:
                bar.update(row, completed=each["done_bytes"], total=each["total_bytes"] or None)

        try:
            return _meanwhile(lambda: _ask(home, "/share", body, SHARE_S), look)
        except KeyboardInterrupt:
            err.print("broken off: it is not shared", highlight=False)
            raise


def _shared_lines(item: dict[str, Any]) -> Iterator[str]:
    yield f"[bold]{_short(item)}[/bold]  {_shown(item['title'])}  {_kind(item)}"
    yield f"    {item['item']}"
    if item.get("skipped"):
        yield f"    not shared of it: {item['skipped']}, being hidden, empty, links, or of a name that others cannot write"


def unshare_command(
    digests: Annotated[list[str], typer.Argument(help="Digests, or their first digits.", show_default=False)],
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Share items no more. Your files stay; so do the copies that others have got."""
    items = [_digest(digest) for digest in digests]
    found = []
    try:
        for item in items:
            found.append(_ask(home, "/unshare", {"item": item}))
            if not as_json:
                what = "shared no more" if found[-1]["withdrawn"] else "served no more"
                _say(f"{_short(found[-1])}  {_shown(found[-1]['title'])}: {what}")
    finally:  # as above
        if as_json and found:
            print_json(found)


# --- covey library --------------------------------------------------------------------------------------
def library_command(
    mine: Annotated[bool, typer.Option("--mine", help="What this node shares, and its state.")] = False,
    limit: Limit = 50,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """What is shared, and by whom, as far as this node has heard; and what is being got."""
    data = _ask(home, "/library", query={"mine": int(mine), "limit": limit})
    if as_json:
        print_json(data)
        return
    for item in data["items"]:
        _say(f"[bold]{_short(item)}[/bold]  {_headline(item)}")
        _say(f"    {_sharers(item)}{_state(item)}")
    if not data["items"]:
        _say("nothing shared yet; `covey share PATH` shares a file" if mine else "nothing known yet")
    elif len(data["items"]) < (total := data["shared" if mine else "known"]):
        _say(f"{len(data['items'])} of {total} shown; --limit shows more, `covey search` finds what you want")
    for get in data["gets"]:
        if get["state"] != "held":
            _say(_get_line(get))


def _state(item: dict[str, Any]) -> str:
    state, path = item["state"], item.get("path")
    where = f" {_shown(path)}" if path else ""
    return {
        "served": f"; served from{where}",
        "changed": f"; [yellow]not served: the file has changed or is gone[/yellow]{where}",
        "got": f"; got, and served from{where}",
    }.get(state, "")


def _get_line(get: dict[str, Any]) -> str:
    share = 100 * get["done_bytes"] // max(1, get["total_bytes"])
    how = {
        "getting": f"getting, {share} % of {size_text(get['total_bytes'])}",
        "waiting": f"waiting at {share} %: {_shown(get['detail'])}",
        "failed": f"failed: {_shown(get['detail'])}",
        "held": f"got: {_shown(get['path'] or '')}",
    }[get["state"]]
    return f"{_short(get)}  {_shown(get['title'])}  {how}"


# --- covey search, covey open ---------------------------------------------------------------------------
def search_command(
    query: Annotated[list[str], typer.Argument(help="What to search for.", show_default=False)],
    limit: Limit = 20,
    ranker: Annotated[
        str | None,
        typer.Option(help=f"How to rank: {', '.join(RANKERS)}.", show_default="what the config says"),
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Search what is shared. Nobody is asked: it is found and ranked by what this node has heard before."""
    if ranker is not None and ranker not in RANKERS:
        raise ConfigError("--ranker", f"no ranker is called '{ranker}'", RANKERS)
    given = {"q": " ".join(query), "limit": limit, **({"ranker": ranker} if ranker else {})}
    data = _ask(home, "/search", query=given)
    _remember(home, data)
    if as_json:
        print_json(data)
        return
    for number, item in enumerate(data["results"], 1):
        _say(f"[bold]{number:2}[/bold]  {_headline(item)}  {_short(item)}")
        _say(f"    {_sharers(item)}; {_why(item)}")
    if data["results"]:
        _say("`covey open N` gets one, and ranks better next time")
    else:
        _say("nothing found among what this node has heard of; what is new takes a while to come")


def _why(item: dict[str, Any]) -> str:
    reasons = []
    if item["matched"]:
        tags = f", tagged {_shown(', '.join(item['matched_tags']))}" if item["matched_tags"] else ""
        reasons.append(f"matches {_shown(', '.join(item['matched']))}{tags}")
    if item["clicks"]:
        like = f", {item['similar_clicks']:.4g} of them by {_many(item['similar_peers'], 'peer')} like you"
        clicks = f"{_many(item['clicks'], 'click')} by {_many(item['clickers'], 'peer')}"
        reasons.append(clicks + (like if item["similar_peers"] else ""))
    return "why: " + ("; ".join(reasons) or "nothing better")


def _many(number: float, what: str) -> str:
    return f"{number:.4g} {what}" + ("" if number == 1 else "s")


def open_command(
    number: Annotated[int, typer.Argument(min=1, help="Of the last search.", show_default=False)],
    fetch: Annotated[bool, typer.Option("--fetch/--no-fetch", help="Get it too.")] = True,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait until it is here.")] = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Choose a result of the last search: that is what results are ranked by. Gets it, or prints where a link leads."""
    last = _remembered(home)
    item = _numbered(last, number)
    body = {"item": item, "terms": last["terms"], "rank": number, "fetch": fetch}
    _finish(home, _ask(home, "/open", body), detach, None, as_json)


def _remember(home: Path, data: dict[str, Any]) -> None:
    """Keep the numbers of these results, for the operator's eyes only."""
    kept = {"query": data["query"], "terms": data["terms"], "results": [r["item"] for r in data["results"]]}
    path = home / SEARCH_FILE
    draft = path.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(kept, file)
    draft.replace(path)


def _remembered(home: Path) -> dict[str, Any]:
    """The last search, or one without results."""
    try:
        found = json.loads((home / SEARCH_FILE).read_text(encoding="utf-8"))
        return {"terms": list(found["terms"]), "results": list(map(str, found["results"]))}
    except (OSError, ValueError, KeyError, TypeError):
        return {"terms": [], "results": []}


def _numbered(last: dict[str, Any], number: int) -> str:
    results = last["results"]
    if not results:
        raise LocalError("there are no results to take a number from; begin with `covey search`")
    if not 1 <= number <= len(results):
        raise ConfigError("N", f"the last search had no result {number}", [f"1 to {len(results)}"])
    item: str = results[number - 1]
    return item


# --- covey get ------------------------------------------------------------------------------------------
def get_command(
    item: Annotated[
        str,
        typer.Argument(
            metavar="DIGEST|N",
            help="A digest or its first digits, or a number of the last search.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="Put a copy into this folder too.", show_default="the downloads alone"),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait until it is here.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Get it no more.")] = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Get an item from whoever has it, several peers at once; what is here already is not fetched again.

    Ctrl-C only ends the waiting. Nothing that comes is ever run or unpacked.
    """
    if to is not None and not to.is_dir():
        raise ConfigError("--to", f"{to} is no folder")
    if to is not None and (detach or cancel):
        raise ConfigError("--to", "needs to wait for the item", ["leave out --detach and --cancel"])
    body = {"item": _digest_or_number(home, item), "cancel": cancel}
    found = _ask(home, "/get", body)
    if cancel:
        print_json(found) if as_json else _say(f"{_short(found)}  {_shown(found['title'])}: not got any more")
        return
    _finish(home, found, detach, to, as_json)


def _finish(home: Path, item: dict[str, Any], detach: bool, to: Path | None, as_json: bool) -> None:
    """Wait for an item that is on its way, and say where it is."""
    if item["state"] not in ("link", "chosen") and not detach:
        item = _wait(home, item)
    copy = _copy(Path(item["path"]), to) if to is not None and item.get("path") else None
    if as_json:
        print_json({**item, "copy": str(copy) if copy else None})
    elif item["state"] == "link":
        _say(f"{_shown(item['title'])}\n{_shown(item['uri'])}")
    elif item["state"] == "chosen":
        _say(f"{_short(item)}  {_shown(item['title'])}: chosen")
    elif item.get("path"):
        _say(_shown(str(copy or item["path"])))
    else:
        _say(f"{_get_line(item)}\nit goes on in the daemon; `covey library` shows how far it is")


def _wait(home: Path, item: dict[str, Any]) -> dict[str, Any]:
    """The item when it is here.

    Raises:
        LocalError: nobody has it now, or it cannot be kept here.
    """
    try:
        with _bar() as bar:
            row = bar.add_task(plain(item["title"]), total=item["total_bytes"])
            while item["state"] == "getting":
                time.sleep(POLL_S)
                item = _under_way(home, item)
                bar.update(row, completed=item["done_bytes"], total=item["total_bytes"])
    except KeyboardInterrupt:
        err.print("it goes on in the daemon; `covey library` shows how far it is", highlight=False)
        raise
    if item["state"] == "held":
        return item
    after = "; the node goes on trying while it runs" if item["state"] == "waiting" else ""
    raise LocalError(f"'{item['title']}' cannot be got now: {item['detail']}{after}")


def _under_way(home: Path, item: dict[str, Any]) -> dict[str, Any]:
    for each in _ask(home, "/gets")["gets"]:
        if each["item"] == item["item"]:
            found: dict[str, Any] = each
            return found
    raise LocalError(f"'{item['title']}' is not got any more: it was cancelled, or the daemon began anew")


def _copy(source: Path, folder: Path) -> Path:
    target = folder / source.name
    if target.exists() or target.is_symlink():
        raise LocalError(f"{target} exists already; what you got is at {source}")
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copyfile(source, target)
    return target


def _digest_or_number(home: Path, text: str) -> str:
    last = _remembered(home)
    if text.isascii() and text.isdigit() and len(text) < PREFIX_DIGITS:
        return _numbered(last, int(text))
    return _digest(text)


def _digest(text: str) -> str:
    digits = text.lower()
    if not PREFIX_DIGITS <= len(digits) <= 64 or set(digits) - set("0123456789abcdef"):
        raise ConfigError(
            "DIGEST",
            f"'{text}' is none",
            [f"{PREFIX_DIGITS} to 64 hexadecimal digits, as `covey library` shows them"],
        )
    return digits


# --- covey forget ---------------------------------------------------------------------------------------
def forget_command(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Forget which results you chose, and take it back where you told others. What you share stays."""
    if not yes:
        _confirm("Forget all your choices? Results will be ranked as for a newcomer")
    data = _ask(home, "/forget", {})
    (home / SEARCH_FILE).unlink(missing_ok=True)
    if as_json:
        print_json(data)
        return
    _say(f"{_many(data['clicks'], 'choice')} forgotten")
    if data["taken_back"]:
        _say("peers drop what you told them as soon as they hear of it; nobody can be made to")


def _confirm(question: str) -> None:
    try:
        typer.confirm(question, abort=True, err=True)
    except typer.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if isinstance(error.__context__, EOFError):
            raise LocalError("nobody is here to answer; --yes forgets without the question") from None
        raise


# --- what they share ------------------------------------------------------------------------------------
def _ask(
    home: Path,
    path: str,
    body: dict[str, Any] | None = None,
    timeout_s: float = ASK_S,
    query: Mapping[str, Any] | None = None,
) -> Any:
    """The daemon's answer. Its refusals in its own words, but for the names of what was asked.

    Raises:
        ConfigError: what was asked was wrong. LocalError: it cannot be done, or no daemon runs.
    """
    _check_utf8(body or query or {})
    whole = f"{path}?{urlencode(query)}" if query else path
    try:
        return api.call(home, whole, "GET" if body is None else "POST", timeout_s, body)
    except api.RefusedError as error:
        field, colon, problem = error.problem.partition(": ")
        if error.status == 400 and colon:
            raise ConfigError(NAMES.get(field, field), problem) from error
        raise LocalError(error.problem) from error


def _check_utf8(given: Mapping[str, Any]) -> None:
    """Raises ConfigError: names of files and what is typed may be any bytes, and what is sent is text."""
    for field, value in given.items():
        for text in map(str, value if isinstance(value, list) else [value]):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                problem = f"'{text}' is not UTF-8; rename the file, or set the terminal to UTF-8"
                raise ConfigError(NAMES.get(field, field), problem) from error


def _meanwhile(ask: Callable[[], T], look: Callable[[], None]) -> T:
    """The answer to a long question, with looks at how it goes. Ctrl-C leaves the question to itself."""
    answers: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as error:  # it is raised again, where it is waited for
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        if thread.is_alive():
            with contextlib.suppress(LocalError):
                look()
    if failures:
        raise failures[0]
    return answers[0]


def _bar() -> Progress:
    """How far long work is, on the error output of a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def _short(item: dict[str, Any]) -> str:
    return escape(str(item["item"])[:SHORT_DIGITS])


def _shown(text: object) -> str:
    return escape(plain(str(text)))


def _headline(item: dict[str, Any]) -> str:
    if not item["title"]:
        return "[dim]nobody says what it is[/dim]"
    by = f", by {_shown(item['creator'])}" if item["creator"] else ""
    tags = f"  {_shown(', '.join(item['tags']))}" if item["tags"] else ""
    return f"{_shown(item['title'])}  {_kind(item)}{by}{tags}"


def _kind(item: dict[str, Any]) -> str:
    kind = _shown(item["kind"])
    if item["kind"] == "link":
        return kind
    metrics = item["details"].get("metrics") if item["kind"] == "model" else None
    return f"{kind}, {size_text(item['size_bytes'])}" + (f", {_shown(metrics)}" if metrics else "")


def _sharers(item: dict[str, Any]) -> str:
    others = list(map(_shown, item["sharers"]))
    names = (["you"] if item["mine"] else []) + others[:2]
    more = f" and {len(others) - 2} more" if len(others) > 2 else ""
    return "shared by " + ", ".join(names) + more if names else "shared by nobody known"


def _say(line: str) -> None:
    out.print(line, highlight=False, soft_wrap=True)
