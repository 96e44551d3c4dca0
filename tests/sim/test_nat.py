"""NAT classes: exact shares, a table of who can dial whom, and what is refused."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.errors import ConfigError
from protocols.vocabulary import PeerId
from sim.nat import Nat, NatClass, NatSettings


def peers(count: int) -> list[PeerId]:
    return [PeerId(f"node-{number:05d}") for number in range(count)]


def make(settings: NatSettings, count: int = 10, seed: int = 1) -> Nat:
    return Nat(settings, peers(count), random.Random(seed))


THREE = NatSettings(
    classes=(NatClass("open", 0.25), NatClass("cone", 0.45), NatClass("symmetric", 0.3)),
    reachable=(
        ("open", "open"), ("cone", "open"), ("symmetric", "open"), ("cone", "cone"), ("open", "cone"),
    ),
)  # fmt: skip


def test_without_classes_everybody_reaches_everybody() -> None:
    nat = make(NatSettings())
    assert {nat.class_of(peer) for peer in peers(10)} == {""}
    assert nat.obstacle(*peers(2)) == ""


def test_shares_are_exact_and_which_node_gets_what_is_drawn() -> None:
    draws = []
    for seed in range(5):
        nat = make(THREE, 10, seed)
        draws.append([nat.class_of(peer) for peer in peers(10)])
    # 2.5, 4.5 and 3: the one node that is left goes to the first of those that were cut most.
    assert {tuple(sorted(Counter(draw).items())) for draw in draws} == {
        (("cone", 4), ("open", 3), ("symmetric", 3))
    }
    assert len({tuple(draw) for draw in draws}) == 5
    assert draws[0] == [make(THREE, 10, 0).class_of(peer) for peer in peers(10)]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.integers(0, 200))
def test_no_class_is_a_whole_node_away_from_its_share(weights: list[int], num_nodes: int) -> None:
    shares = {f"class{index}": weight / sum(weights) for index, weight in enumerate(weights)}
    settings = NatSettings(
        classes=tuple(NatClass(name, share) for name, share in shares.items()),
        reachable=(("class0", "class0"),),
    )
    nat = make(settings, num_nodes)
    counts = Counter(nat.class_of(peer) for peer in peers(num_nodes))
    assert counts.total() == num_nodes
    for name, share in shares.items():
        assert abs(counts[name] - share * num_nodes) < 1 + 1e-9


def test_only_pairs_in_the_table_connect_and_direction_counts() -> None:
    nat = make(THREE, 40)
    allowed = set(THREE.reachable)
    for a in peers(40):
        for b in peers(40):
            pair = nat.class_of(a), nat.class_of(b)
            assert nat.obstacle(a, b) == (
                "" if pair in allowed else f"blocked by NAT ({pair[0]} -> {pair[1]})"
            )


def test_who_has_no_class_is_not_blocked() -> None:
    nat = make(THREE)
    stranger = PeerId("stranger")
    assert (nat.class_of(stranger), nat.obstacle(stranger, peers(1)[0]), nat.obstacle(peers(1)[0], stranger)) == (
        "", "", "",
    )  # fmt: skip


@pytest.mark.parametrize("header", ["", "natA;natB;ms\n"])
def test_a_table_file_says_who_connects(tmp_path: Path, header: str) -> None:
    path = tmp_path / "nat.csv"
    path.write_text(header + "0;0;1000\n0;1;-1\n1;0;900.5\n1;1;-1\n\n-2;0;-1\n")
    settings = NatSettings(classes=(NatClass("0", 0.5), NatClass("1", 0.5)), table_path="nat.csv")
    nat = Nat(settings, peers(10), random.Random(1), tmp_path)
    for a in peers(10):
        for b in peers(10):
            blocked = nat.class_of(b) == "1"
            assert bool(nat.obstacle(a, b)) == blocked


TWO = (NatClass("a", 0.5), NatClass("b", 0.5))


@pytest.mark.parametrize(
    ("settings", "path", "problem"),
    [
        (NatSettings(classes=(NatClass("a", 0.5),), reachable=(("a", "a"),)), "nat.classes", "add up to 0.5"),
        (NatSettings(classes=(NatClass("a", 0.5),) * 2, reachable=(("a", "a"),)), "nat.classes[1].name", "already"),
        (NatSettings(classes=TWO), "nat.reachable", "none can connect"),
        (NatSettings(classes=TWO, reachable=(("a", "a"), ("a", "c"))), "nat.reachable[1]", "no class 'c'"),
        (NatSettings(reachable=(("a", "a"),)), "nat.reachable[0]", "no class 'a'"),
        (NatSettings(classes=TWO, reachable=(("a", "a"),), table_path="x"), "nat.table_path", "as well"),
        (NatSettings(classes=TWO, table_path="missing.csv"), "nat.table_path", "cannot read"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(settings: NatSettings, path: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        make(settings)
    assert caught.value.path == path


@pytest.mark.parametrize("line", ["0;1", "0;1;2;3", "0;one;5", "0;1;soon", "0,1,5"])
def test_a_line_that_is_no_row_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "nat.csv"
    path.write_text(f"0;0;1\n{line}\n")
    with pytest.raises(ConfigError, match="line 2") as caught:
        make(NatSettings(classes=(NatClass("0", 1.0),), table_path=str(path)))
    assert caught.value.path == "nat.table_path"


def test_a_class_that_the_file_does_not_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nat.csv"
    path.write_text("0;0;1\n")
    with pytest.raises(ConfigError, match="'symmetric' is not in") as caught:
        make(NatSettings(classes=(NatClass("symmetric", 1.0),), table_path=str(path)))
    assert caught.value.path == "nat.classes[0].name"
