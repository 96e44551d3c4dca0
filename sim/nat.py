"""Who can dial whom: every node sits behind a kind of network address translation (NAT).

Belongs here: the classes, their table, and how nodes get their class. A link that stands works both ways, whoever
dialled it; only the dial can be blocked.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from protocols.errors import ConfigError
from protocols.vocabulary import PeerId
from sim.dealing import deal

HEADER = "natA;natB;ms"


class NatClass(Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of connection to the internet."""

    name: Annotated[str, Meta(min_length=1)]
    """With `table_path`, the number that the table knows the class by."""
    share: Annotated[float, Meta(gt=0, le=1)]
    """Of the nodes. Most homes have a NAT that can be punched through; mobile networks mostly have a symmetric one."""


class NatSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Left as it is, everybody can dial everybody."""

    classes: tuple[NatClass, ...] = ()
    """Their shares add up to 1."""
    reachable: tuple[tuple[str, str], ...] = ()
    """Pairs (class that dials, class that is dialled) that can connect; all other pairs cannot. Name both directions."""
    table_path: str | None = None
    """Instead of `reachable`: a file with lines `natA;natB;ms`, classes as integers, -1 ms for a pair that cannot
    connect. How long connecting took is not used; that is the latency's affair."""


class Nat:
    """The class of every node, and who can dial whom.

    peers: all nodes that there will ever be; the classes' shares of them are exact to one node.
    base: the folder that a relative `table_path` starts from.

    Raises:
        ConfigError: at `nat...`, shares that do not add up to 1, a class named twice or not at all, no table or two,
            or a table file that cannot be read.
    """

    def __init__(
        self, settings: NatSettings, peers: Sequence[PeerId], rng: random.Random, base: Path = Path()
    ) -> None:
        self._reachable = _reachable(settings, base)
        self._class_of: dict[PeerId, str] = {}
        if settings.classes:
            kinds = deal([kind.share for kind in settings.classes], len(peers), rng)
            names = (settings.classes[kind].name for kind in kinds)
            self._class_of = dict(zip(peers, names, strict=True))

    def class_of(self, peer: PeerId) -> str:
        """Its class's name; empty where there are no classes, or no such node."""
        return self._class_of.get(peer, "")

    def obstacle(self, me: PeerId, peer: PeerId) -> str:
        """What keeps `me` from dialling `peer`, in a few words; empty where nothing does."""
        pair = self._class_of.get(me), self._class_of.get(peer)
        if None in pair or pair in self._reachable:
            return ""
        return f"blocked by NAT ({pair[0]} -> {pair[1]})"


def _reachable(settings: NatSettings, base: Path) -> frozenset[tuple[str | None, str | None]]:
    names = [kind.name for kind in settings.classes]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"nat.classes[{index}].name", f"'{name}' is there already")
    total = sum(kind.share for kind in settings.classes)
    if names and abs(total - 1) > 1e-6:
        raise ConfigError("nat.classes", f"the shares add up to {total:g}", ["1"])
    if settings.table_path is not None and settings.reachable:
        raise ConfigError("nat.table_path", "there is `reachable` as well", ["one of the two"])
    if settings.table_path is not None:
        return _from_table(base / settings.table_path, names)
    if names and not settings.reachable:
        raise ConfigError("nat.reachable", "classes of which none can connect", ["pairs", "nat.table_path"])
    for index, pair in enumerate(settings.reachable):
        for name in pair:
            if name not in names:
                raise ConfigError(f"nat.reachable[{index}]", f"there is no class '{name}'", names)
    return frozenset(settings.reachable)


def _from_table(path: Path, names: Sequence[str]) -> frozenset[tuple[str | None, str | None]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("nat.table_path", f"cannot read {path}: {error}") from error
    known: set[str] = set()
    reachable: set[tuple[str | None, str | None]] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.strip() == HEADER:
            continue
        try:
            dialler, dialled, duration_ms = line.split(";")
            pair, can_connect = (str(int(dialler)), str(int(dialled))), float(duration_ms) >= 0
        except ValueError as error:
            raise ConfigError("nat.table_path", f"{path}, line {number}: '{line}'", [HEADER]) from error
        known.update(pair)
        if can_connect:
            reachable.add(pair)
    for index, name in enumerate(names):
        if name not in known:
            raise ConfigError(
                f"nat.classes[{index}].name", f"'{name}' is not in {path}", sorted(known, key=int)
            )
    return frozenset(reachable)
