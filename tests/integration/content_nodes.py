"""What tests of shared content need of real daemons: their settings, what a test asks them, and `covey` as a user calls it."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from node.api import call
from node.cluster import NODE, LocalNode, local_settings

PULL_S = 0.6
"""Two questions each time, and a node answers four a second of one peer."""


def content_settings(network: str, bootstrap: list[str], **content: Any) -> dict[str, Any]:
    """Tables of a daemon that learns nothing, so that it starts quickly, and hears news as quickly."""
    return local_settings(
        network={"name": network, "bootstrap": bootstrap, "shuffle_s": 1.0},
        learning={"protocol": "none"},
        content={"pull_s": PULL_S, "min_free_bytes": 0, **content},
    )


def start_linked(nodes: list[LocalNode]) -> None:
    """Start them side by side, and wait until each is linked with all others."""
    for node in nodes:
        node.start()
    for node in nodes:
        node.wait_for(lambda status: status["live_peers"] >= len(nodes) - 1, "links with all")


# --- what is asked of a daemon --------------------------------------------------------------------------
def share(node: LocalNode, path: Path, **words: Any) -> dict[str, Any]:
    """Share a path. The item as the daemon tells it."""
    found: dict[str, Any] = call(node.home, "/share", "POST", 60, {"path": str(path), **words})
    return found


def results(node: LocalNode, query: str, ranker: str = "") -> list[dict[str, Any]]:
    """What a search finds now, best first."""
    found: list[dict[str, Any]] = search(node, query, ranker)["results"]
    return found


def search(node: LocalNode, query: str, ranker: str = "") -> dict[str, Any]:
    """All that the daemon says to a query."""
    given = {"q": query, **({"ranker": ranker} if ranker else {})}
    found: dict[str, Any] = call(node.home, "/search?" + urlencode(given))
    return found


def titles(node: LocalNode, query: str, ranker: str = "") -> list[str]:
    """Of the results, best first."""
    return [result["title"] for result in results(node, query, ranker)]


def wait_found(node: LocalNode, query: str, count: int = 1) -> list[dict[str, Any]]:
    """The results once there are so many."""
    wait_until(node, lambda: len(results(node, query)) == count, f"{count} results for {query}")
    return results(node, query)


def wait_until(node: LocalNode, condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Ask again and again while the daemon runs."""
    node.wait_for(lambda _: condition(), what, timeout_s)


def open_result(node: LocalNode, query: str, title: str, fetch: bool = True) -> dict[str, Any]:
    """Choose the result of this title, as `covey open` does."""
    found = search(node, query)
    (chosen,) = [result for result in found["results"] if result["title"] == title]
    body = {"item": chosen["item"], "terms": found["terms"], "rank": chosen["rank"], "fetch": fetch}
    opened: dict[str, Any] = call(node.home, "/open", "POST", 60, body)
    return opened


def get(node: LocalNode, item: str) -> dict[str, Any]:
    """Begin to get an item."""
    found: dict[str, Any] = call(node.home, "/get", "POST", 60, {"item": item})
    return found


def getting(node: LocalNode, item: str) -> dict[str, Any]:
    """How it goes with an item that was asked for."""
    (found,) = [row for row in call(node.home, "/gets")["gets"] if row["item"] == item]
    row: dict[str, Any] = found
    return row


def wait_got(node: LocalNode, item: str, state: str = "held") -> dict[str, Any]:
    """The item once it is here, or has come to another state that is waited for."""
    wait_until(node, lambda: getting(node, item)["state"] == state, f"{item[:12]} in state {state}")
    return getting(node, item)


def tree(top: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path; a file by itself has none. A link is no file here."""
    if top.is_symlink():
        return {}
    if top.is_file():
        return {"": top.read_bytes()}
    return {
        path.relative_to(top).as_posix(): path.read_bytes()
        for path in top.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


# --- the command ----------------------------------------------------------------------------------------
def covey(folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    """Run `covey` as a user does. code: the exit code that is right."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("COVEY_")}
    environ |= {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*NODE, *words], cwd=folder, capture_output=True, timeout=60, env=environ)
    assert done.returncode == code, (words, done.stdout, done.stderr)
    return done
