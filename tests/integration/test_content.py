"""Shared content among real daemons: shared, heard of, found, ranked, got, taken back, and there when nobody else is."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from node.api import call
from node.cluster import Cluster, LocalNode, free_port, local_settings
from protocols.blob import hash_blob
from protocols.vocabulary import CHUNK_BYTES
from tests.integration.content_nodes import (
    PULL_S,
    content_settings,
    covey,
    get,
    getting,
    open_result,
    results,
    share,
    start_linked,
    titles,
    tree,
    wait_found,
    wait_got,
    wait_until,
)

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(180)]

NETWORK = "library"
SEED = 7
UPLOAD_BYTES_PER_S = 5_000_000
SLOW_BYTES_PER_S = 3_000_000


class Network(NamedTuple):
    """Three nodes that are linked with each other. Bob and Carol tell of their clicks, Alice does not."""

    alice: LocalNode
    bob: LocalNode
    carol: LocalNode
    folder: Path

    @property
    def nodes(self) -> list[LocalNode]:
        return [self.alice, self.bob, self.carol]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """One network for all tests, each of which speaks of its own things in its own words."""
    folder = tmp_path_factory.mktemp("content")
    with Cluster() as cluster:
        nodes: list[LocalNode] = []
        addresses: list[str] = []
        for name, clicks in (("alice", "off"), ("bob", "hashed"), ("carol", "hashed")):
            listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
            tables = content_settings(NETWORK, list(addresses), share_clicks=clicks)
            tables["network"]["listen"] = [listen]
            tables["device"] = {"upload_bytes_per_s": UPLOAD_BYTES_PER_S}
            nodes.append(cluster.add(folder / name, tables))
            addresses.append(f"{listen}/p2p/{nodes[-1].peer}")
        start_linked(nodes)
        yield Network(*nodes, folder)


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write(path: Path, data: bytes) -> Path:
    return write_tree(path.parent, {path.name: data}) / path.name


def received_from(node: LocalNode, other: LocalNode) -> int:
    (row,) = [row for row in call(node.home, "/peers") if row["peer"] == other.peer]
    return int(row["bytes_received"])


def held_sources(node: LocalNode, item: str) -> list[str]:
    """Of whom an item was pulled, by the log."""
    lines = [line for line in node.log().splitlines() if "content held" in line and item in line]
    assert lines, node.log()[-2000:]
    return lines[-1].split("sources=")[1].strip("[]").replace("'", "").split(", ")


# --- sharing and getting --------------------------------------------------------------------------------
def test_a_folder_is_found_and_comes_whole_and_the_third_pulls_from_both_who_have_it(
    network: Network,
) -> None:
    alice, bob, carol = network.nodes
    data = random.Random(SEED)
    files = {
        "Aufführung.wav": data.randbytes(9 * CHUNK_BYTES + 5),
        "deep/er/один.txt": b"first",
        "deep/er/二.txt": b"second",
        "deep/again, the same.txt": b"first",
        "naïve café (1).jpg": data.randbytes(CHUNK_BYTES),
    }
    item = share(alice, write_tree(network.folder / "Kyōto sessions", files), tags=["shakuhachi"])["item"]
    for node in (bob, carol):
        (found,) = wait_found(node, "shakuhachi")
        assert (found["item"], found["title"], found["kind"]) == (item, "Kyōto sessions", "folder")
        assert (found["sharers"], found["matched_tags"]) == ([alice.peer], ["shakuhachi"])
        assert found["size_bytes"] >= sum(map(len, files.values()))

    open_result(bob, "shakuhachi", "Kyōto sessions")
    got = wait_got(bob, item)
    assert got["sources"] == [alice.peer]
    assert tree(Path(got["path"])) == files

    before = {node.peer: received_from(carol, node) for node in (alice, bob)}
    open_result(carol, "shakuhachi", "Kyōto sessions")
    got = wait_got(carol, item)
    assert tree(Path(got["path"])) == files
    assert Path(got["path"]).parent == carol.home / "downloads"
    assert set(got["sources"]) == {alice.peer, bob.peer}
    assert set(held_sources(carol, hash_blob(files["Aufführung.wav"])[0].hex())) == {alice.peer, bob.peer}
    for node in (alice, bob):
        brought = received_from(carol, node) - before[node.peer]
        assert brought > CHUNK_BYTES, f"{node.home.name} brought {brought} bytes"


def test_what_is_shared_no_more_is_found_no_more(network: Network) -> None:
    alice, bob, carol = network.nodes
    item = share(alice, write(network.folder / "draft.txt", b"too early"), tags=["premature"])["item"]
    for node in (bob, carol):
        wait_found(node, "premature")
    taken_back = call(alice.home, "/unshare", "POST", 30, {"item": item})
    assert taken_back["withdrawn"]
    for node in network.nodes:
        wait_found(node, "premature", 0)
    assert (network.folder / "draft.txt").read_bytes() == b"too early"


# --- ranking --------------------------------------------------------------------------------------------
def test_a_click_of_who_clicks_alike_is_seen_in_anothers_ranking_until_it_is_forgotten(
    network: Network,
) -> None:
    alice, bob, carol = network.nodes
    for name in ("Python the snake", "Python the language", "Monty Python"):
        share(alice, write(network.folder / f"{name}.txt", name.encode()), title=name, tags=["python"])
    for node in (bob, carol):
        wait_found(node, "python", 3)
    before = titles(carol, "python")
    first, _, last = before
    assert all(not result["clicks"] for result in results(carol, "python"))

    # Both chose the same thing once: that is what makes them alike.
    for node in (bob, carol):
        open_result(node, "monty", "Monty Python", fetch=False)
    wait_until(carol, lambda: results(carol, "monty")[0]["similar_peers"] == 1, "bob, who clicks alike")
    assert [result["clicks"] for result in results(carol, "python") if result["title"] == last] == [0]

    open_result(bob, "python", last, fetch=False)
    wait_until(carol, lambda: titles(carol, "python")[0] == last, "what bob chose at the top")
    top = results(carol, "python")[0]
    assert (top["clicks"], top["clickers"]) == (1, 1)
    assert (top["similar_clicks"], top["similar_peers"]) == (1, 1)
    assert 0 < top["similarity"] <= 1
    assert first in titles(carol, "python")[1:]
    shown = covey(network.folder, "search", "python", "--home", "carol").stdout.decode()
    assert "1 of them by 1 peer like you" in shown

    # Alice's own ranking heeds what she chose; nobody else hears of it.
    open_result(alice, "python", first, fetch=False)
    forgotten = call(alice.home, "/forget", "POST", 30, {})
    assert forgotten == {"clicks": 1, "taken_back": False}

    forgotten = call(bob.home, "/forget", "POST", 30, {})
    assert (forgotten["clicks"] >= 2, forgotten["taken_back"]) == (True, True)
    wait_until(carol, lambda: titles(carol, "python") == before, "the order as it was")
    assert all(not result["clicks"] for result in results(carol, "python"))
    assert results(carol, "monty")[0]["clicks"] == 1, "carol's own stays"


def test_hashed_clicks_do_not_spell_their_words_to_those_who_hear_of_them(network: Network) -> None:
    alice, bob, _ = network.nodes
    share(alice, write(network.folder / "clinic.txt", b"where to go"), title="Clinic", tags=["health"])
    wait_found(bob, "clinic")
    open_result(bob, "clinic hypochondria", "Clinic", fetch=False)
    wait_until(
        alice, lambda: results(alice, "hypochondria clinic")[0]["clicks"] > 1, "bob's click on both words"
    )
    heard = b"".join(path.read_bytes() for path in alice.home.glob("library.db*"))
    assert b"Clinic" in heard
    assert b"hypochondria" not in heard


# --- alone, and after a crash ---------------------------------------------------------------------------
def test_a_killed_node_goes_on_where_it_was_and_searches_alone_as_it_did_in_company(tmp_path: Path) -> None:
    """A sharer that sends slowly; SIGKILL when some of it is here; and then SIGKILL for the sharer."""
    data = random.Random(SEED)
    files = {f"side {number}/{number}.flac": data.randbytes(4 * CHUNK_BYTES + number) for number in range(3)}
    total = sum(map(len, files.values()))
    with Cluster() as cluster:
        listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
        tables = content_settings(NETWORK, [], share_clicks="plain")
        tables["network"]["listen"] = [listen]
        tables["device"] = {"upload_bytes_per_s": SLOW_BYTES_PER_S}
        sharer = cluster.add(tmp_path / "sharer", tables)
        door = f"{listen}/p2p/{sharer.peer}"
        node = cluster.add(tmp_path / "node", content_settings(NETWORK, [door]))
        start_linked([sharer, node])
        item = share(sharer, write_tree(tmp_path / "Vinyl", files), tags=["record"])["item"]
        for name in ("Criminal record", "World record", "Record player", "Off the record"):
            share(sharer, write(tmp_path / f"{name}.txt", name.encode()), title=name, tags=["record"])
        wait_found(node, "record", 5)

        get(node, item)

        def half_way() -> bool:
            return 3 * CHUNK_BYTES <= getting(node, item)["done_bytes"] < total

        wait_until(node, half_way, "a quarter of it")
        held = getting(node, item)["done_bytes"]
        node.kill()
        assert not list((node.home / "downloads").glob("[!.]*"))
        node.start()
        node.wait_until_up()
        got = wait_got(node, item)
        assert tree(Path(got["path"])) == files
        came = call(node.home, "/status")["bytes_received"]
        assert came < total - held + CHUNK_BYTES // 2, (
            f"{came} bytes for the {total - held} that were missing"
        )
        assert list((node.home / "content").glob("*.part")) == []

        # Its own choice, and the sharer's, which is told to it.
        open_result(node, "record", "World record", fetch=False)
        heard = call(node.home, "/status")["content"]["clicks"]
        open_result(sharer, "record", "Off the record", fetch=False)
        wait_until(
            node, lambda: call(node.home, "/status")["content"]["clicks"] > heard, "the sharer's click"
        )
        before = results(node, "record")
        assert [result["title"] for result in before[:2]] == ["World record", "Off the record"]
        sharer.kill()
        node.wait_for(lambda status: status["live_peers"] == 0, "nobody there")
        assert results(node, "record") == before
        node.kill()
        node.start()
        node.wait_until_up()
        assert results(node, "record") == before, "and after a start all alone"
        (vinyl,) = [result for result in before if result["item"] == item]
        assert (vinyl["state"], vinyl["path"]) == ("got", got["path"])


# --- models ---------------------------------------------------------------------------------------------
def test_a_trained_model_is_found_by_its_task_and_got(network: Network) -> None:
    alice, _, carol = network.nodes
    with Cluster() as cluster:
        tables = local_settings(
            network={"name": NETWORK, "bootstrap": [alice.address()]},
            learning={"rounds": 2, "pause_s": 0.1, "deadline_s": 0.5},
            content={"pull_s": PULL_S, "min_free_bytes": 0},
        )
        learner = cluster.add(network.folder / "learner", tables)
        learner.start()
        learner.wait_for(lambda status: status["round"] == 2, "two rounds")
        shared = call(learner.home, "/share", "POST", 60, {"model": True})
        (found,) = wait_found(carol, "digits")
        assert found["item"] == shared["item"]
        assert (found["kind"], found["details"]["task"]) == ("model", "digits")
        assert found["details"]["round"] == "2"
        assert "accuracy" in found["details"]["metrics"]
        open_result(carol, "digits model", found["title"])
        got = Path(wait_got(carol, found["item"])["path"])
        checkpoint = Path(shared["path"])
        assert got.suffix == ".safetensors"
        assert got.read_bytes() == checkpoint.read_bytes()
        assert hash_blob(got.read_bytes())[0].hex() == found["item"]


# --- the command ----------------------------------------------------------------------------------------
def test_the_commands_as_a_user_types_them(network: Network) -> None:
    bob = network.bob
    folder = network.folder / "work"
    write_tree(folder / "Schnee", {"flocke.txt": b"*", "tief/eis.bin": bytes(range(256)) * 4000})

    def run(*words: str) -> str:
        return covey(folder, *words).stdout.decode()

    (shared,) = json.loads(run("share", "Schnee", "--tag", "winter", "--home", "../alice", "--json"))
    assert "winter" in run("library", "--mine", "--home", "../alice")
    wait_found(bob, "winter")
    text = run("search", "winter", "--home", "../bob")
    assert " 1  Schnee  folder" in text
    assert "why: matches winter, tagged winter" in text
    assert (
        json.loads(run("search", "winter", "--home", "../bob", "--json"))["results"][0]["item"]
        == shared["item"]
    )
    opened = json.loads(run("open", "1", "--home", "../bob", "--json"))
    assert opened["state"] == "held"
    assert tree(Path(opened["path"])) == tree(folder / "Schnee")
    assert run("open", "1", "--home", "../bob").strip() == opened["path"]
    (copies := folder / "copies").mkdir()
    run("get", shared["item"][:12], "--to", "copies", "--home", "../bob")
    assert tree(copies / "Schnee") == tree(folder / "Schnee")
    library = json.loads(run("library", "--home", "../bob", "--json"))
    (row,) = [row for row in library["items"] if row["item"] == shared["item"]]
    assert (row["state"], row["path"]) == ("got", opened["path"])
    assert "covey search" in covey(folder, "open", "7", "--home", "../alice", code=1).stderr.decode()
    forgotten = json.loads(run("forget", "--yes", "--home", "../bob", "--json"))
    assert (forgotten["clicks"] >= 2, forgotten["taken_back"]) == (True, True)
    assert json.loads(run("unshare", shared["item"][:12], "--home", "../alice", "--json"))[0]["withdrawn"]
    wait_found(bob, "winter", 0)


def test_the_honest_have_refused_each_other_nothing(network: Network) -> None:
    for node in network.nodes:
        status = call(node.home, "/status")
        assert status["refused"] == {}, node.log()[-2000:]
        assert "Traceback" not in node.log()
