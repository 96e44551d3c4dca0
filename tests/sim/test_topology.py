"""Edges: drawn ones connected, regular and quick; read ones checked line by line."""

import time
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from protocols.errors import ConfigError
from sim.scenarios import TopologySettings
from sim.topology import MAX_FULL_NODES, Edge, draw_edges

HERE = Path()


def draw(nodes: int, seed: int = 0, base: Path = HERE, **settings: Any) -> list[Edge]:
    return draw_edges(TopologySettings(**settings), nodes, seed, base)


def check(edges: list[Edge]) -> nx.Graph:
    assert edges == sorted(set(edges))
    assert all(low < high for low, high in edges)
    return nx.Graph(edges)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("nodes", "degree"),
    [(2, 1), (3, 2), (4, 3), (12, 2), (12, 3), (12, 4), (13, 6), (12, 6), (66, 64), (65, 64), (40, 37)],
)
def test_a_regular_graph_is_connected_and_regular(nodes: int, degree: int, seed: int) -> None:
    graph = check(draw(nodes, seed, degree=degree))
    assert len(graph) == nodes
    assert nx.is_connected(graph)
    assert {count for _, count in graph.degree} == {degree}


def test_a_seed_gives_one_graph_and_another_seed_another() -> None:
    for degree in (2, 4, 8):
        first, again, other = (draw(16, seed, degree=degree) for seed in (1, 1, 2))
        assert first == again != other, degree


@pytest.mark.parametrize(
    ("kind", "nodes", "edges"),
    [
        ("ring", 1, []),
        ("ring", 2, [(0, 1)]),
        ("ring", 4, [(0, 1), (0, 3), (1, 2), (2, 3)]),
        ("full", 1, []),
        ("full", 3, [(0, 1), (0, 2), (1, 2)]),
        ("discover", 9, []),
        ("regular", 1, []),
    ],
)
def test_what_is_not_drawn_is_known(kind: str, nodes: int, edges: list[Edge]) -> None:
    assert draw(nodes, kind=kind) == edges


@pytest.mark.parametrize("degree", [2, 4])
def test_ten_thousand_nodes_are_linked_in_no_time(degree: int) -> None:
    began = time.perf_counter()
    edges = draw(10_000, degree=degree)
    assert time.perf_counter() - began < 5, "a fraction of a second on an idle machine"
    graph = check(edges)
    assert len(edges) == 10_000 * degree // 2
    assert nx.is_connected(graph)


@pytest.mark.parametrize(
    ("nodes", "degree", "allowed"),
    [(4, 4, "2 to 3"), (4, 5, "2 to 3"), (5, 3, "2 to 4, even"), (3, 1, "2 to 2, even"), (2, 4, "1 to 1")],
)
def test_a_graph_that_cannot_be_is_refused_with_what_can(nodes: int, degree: int, allowed: str) -> None:
    with pytest.raises(
        ConfigError, match=f"no connected graph of {nodes} nodes with {degree} links"
    ) as caught:
        draw(nodes, degree=degree)
    assert (caught.value.path, caught.value.allowed) == ("topology.degree", allowed)


def test_a_full_graph_of_thousands_is_refused() -> None:
    assert len(draw(MAX_FULL_NODES, kind="full")) == MAX_FULL_NODES * (MAX_FULL_NODES - 1) // 2
    with pytest.raises(ConfigError, match=r"topology.kind: 2001 nodes all linked .* 2001000 links"):
        draw(MAX_FULL_NODES + 1, kind="full")


# --- from a file ----------------------------------------------------------------------------------------
def read(folder: Path, text: str, nodes: int = 4) -> list[Edge]:
    (folder / "edges.csv").write_text(text, encoding="utf-8")
    return draw(nodes, kind="file", path="edges.csv", base=folder)


def test_edges_are_read_each_once_and_need_not_connect(tmp_path: Path) -> None:
    assert read(tmp_path, "a,b\n3,2\n\n 0 , 1\n2,3\n1,0\n") == [(0, 1), (2, 3)]
    assert read(tmp_path, "\ufeffa,b\r\n0,1\r\n") == [(0, 1)], "as a spreadsheet writes it"
    assert read(tmp_path, "a,b\n") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 of edges.csv: the header is '' (allowed: a,b)"),
        ("0,1\n", "line 1 of edges.csv: the header is '0,1' (allowed: a,b)"),
        ("a,b\n0,1\n0,4\n", "line 3 of edges.csv: there is no node '4' (allowed: 0 to 3)"),
        ("a,b\n-1,1\n", "line 2 of edges.csv: there is no node '-1' (allowed: 0 to 3)"),
        ("a,b\n0,x\n", "line 2 of edges.csv: there is no node 'x' (allowed: 0 to 3)"),
        ("a,b\n0,²\n", "line 2 of edges.csv: there is no node '²' (allowed: 0 to 3)"),
        ("a,b\n\n1,1\n", "line 3 of edges.csv: node 1 is linked with itself"),
        ("a,b\n0,1,2\n", "line 2 of edges.csv: has 3 columns (allowed: a,b)"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert str(caught.value) == f"topology.path: {message}"


def test_a_missing_file_and_a_needless_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"topology.path: .*none.csv cannot be read \(No such file"):
        draw(4, kind="file", path="none.csv", base=tmp_path)
    with pytest.raises(ConfigError, match=r"topology.path: must be given"):
        draw(4, kind="file")
    with pytest.raises(ConfigError, match=r"topology.path: means nothing with kind 'ring'"):
        draw(4, kind="ring", path="edges.csv")
    (tmp_path / "latin.csv").write_bytes(b"a,b\n\xff,1\n")
    with pytest.raises(ConfigError, match=r"topology.path: .*latin.csv is not UTF-8 text"):
        draw(4, kind="file", path="latin.csv", base=tmp_path)
