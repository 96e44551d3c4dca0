"""Real daemons that learn by scalars, and a peer that signs, forges and floods as it likes: refused, counted, survived."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from node.cluster import Cluster, LocalNode, local_settings
from node.libp2p_network import LINK
from node.signatures import Ed25519Signatures
from protocols.codec import encode, link_decoder
from protocols.messages import Hello, Message, Refuse, Scalars, Terms
from protocols.scalar_log import signed_bytes
from protocols.scalar_terms import terms_digest
from protocols.vocabulary import Reason, ScalarRecord
from tests.integration.test_hostile import raw_attack, read_to_end, said_by

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(180)]

ROUNDS = 60


def tables(index: int, bootstrap: list[str]) -> dict[str, Any]:
    return local_settings(
        network={"name": "hostile", "bootstrap": bootstrap},
        learning={"protocol": "scalars"},
        scalars={
            "rounds": ROUNDS,
            "samples": 4,
            "deadline_s": 2.0,
            "pause_s": 0.4,
            "sync_s": 0.3,
            "repair_s": 0.3,
            "checkpoint_every": 20,
            "learning_rate": 0.01,
            "max_authors": 8,
        },
        task={"options": {"hidden": [8]}, "shard": {"index": index, "count": 2}},
    )


class Attack:
    """One link with terms copied from the victim's own; then whatever the test has it say."""

    def __init__(self, victim: LocalNode) -> None:
        self._victim = victim
        self._key = Ed25519PrivateKey.generate()
        self.signatures = Ed25519Signatures(self._key)
        self.terms = b""

    def record(self, round_: int, codes: bytes = b"\x7f\xff", **changes: Any) -> ScalarRecord:
        signature = self.signatures.sign(signed_bytes(self.terms, round_, codes, bytes(16)))
        parts = {"author": self.signatures.author, "signature": signature, **changes}
        return ScalarRecord(parts["author"], round_, codes, bytes(16), parts["signature"])

    def run(self, hello: Hello, make: Any, base: bytes | None = None) -> list[Message]:
        """Greet, agree to the terms (or to those of another base), send what `make` gives, and read what is answered."""
        heard: list[Message] = []

        async def script(stream: Any) -> None:
            decoder = link_decoder()
            await stream.write(encode(replace(hello, record=said_by(self._key))))
            while not any(isinstance(message, Terms) for message in heard):
                heard.extend(decoder.feed(await stream.read(65536)))
            (terms,) = [message for message in heard if isinstance(message, Terms)]
            self.terms = terms_digest(terms)
            if base is not None:
                terms = Terms(**{**{f: getattr(terms, f) for f in terms.__struct_fields__}, "base": base})
            await stream.write(encode(terms) + b"".join(map(encode, make())))
            heard.extend(await read_to_end(stream))

        raw_attack(self._victim.address(), LINK, script, self._key)
        return heard


@pytest.fixture
def honest(tmp_path: Path) -> Any:
    with Cluster() as cluster:
        first = cluster.add(tmp_path / "0", tables(0, []))
        first.start()
        first.wait_until_up()
        second = cluster.add(tmp_path / "1", tables(1, [first.address()]))
        second.start()
        first.wait_for(lambda status: status["round"] >= 3, "some rounds")
        yield cluster.nodes


async def test_nothing_that_a_peer_says_parts_honest_nodes(honest: list[LocalNode]) -> None:
    first, second = honest
    hello = await asyncio.to_thread(_hello_of, first)

    other_base = Attack(first)
    heard = await asyncio.to_thread(other_base.run, hello, list, b"b" * 32)
    assert [message.reason for message in heard if isinstance(message, Refuse)] == [Reason.BASE]

    forger = Attack(first)

    def forged() -> list[Message]:
        records = [forger.record(first_round(first) + i, signature=b"s" * 64) for i in range(3)]
        return [Scalars(0, tuple(records))]

    heard = await asyncio.to_thread(forger.run, hello, forged)
    assert [message.reason for message in heard if isinstance(message, Refuse)] == [Reason.FORGED]

    liar = Attack(first)

    def lies() -> list[Message]:
        """The largest scalars there are, two for one round, far ahead, far behind, again and again, by strangers."""
        round_ = first_round(first) + 2
        strangers = [Attack(first) for _ in range(40)]
        for stranger in strangers:
            stranger.terms = liar.terms
        huge, other = liar.record(round_, b"\x7f" * 32), liar.record(round_, b"\xff" * 32)
        flood = tuple(stranger.record(round_ + 1, b"\x7f" * 32) for stranger in strangers)
        far = liar.record(2**40)
        return [Scalars(2**40, (huge, other, far, liar.record(1)))] * 20 + [Scalars(0, flood)]

    await asyncio.to_thread(liar.run, hello, lies)
    for node in honest:
        await asyncio.to_thread(
            node.wait_for, lambda status: status["phase"] == "done", "the end of learning", 120
        )
    logs = [(node.status() or {})["log"] for node in (first, second)]
    assert logs[0]["log"] == logs[1]["log"]
    assert logs[0]["sealed"] == logs[1]["sealed"]
    for node, log in zip(honest, logs, strict=True):
        counts, refused = log["counts"], (node.status() or {})["refused"]
        assert log["records"] <= 8 * (ROUNDS + 2), "what strangers say is bounded"
        assert refused["equivocation"] == 1
        assert "equivocation" not in counts, "nobody's link pays for the proof"
    assert logs[0]["counts"]["future"] >= 1
    assert (first.status() or {})["refused"]["forged"] == 3
    assert (first.status() or {})["refused"]["base"] == 1


def first_round(node: LocalNode) -> int:
    return int((node.status() or {})["round"])


def _hello_of(node: LocalNode) -> Hello:
    """What the victim says of itself: a peer can repeat all but its record."""
    heard: list[Message] = []

    async def script(stream: Any) -> None:
        decoder = link_decoder()
        while not heard:
            heard.extend(decoder.feed(await stream.read(65536)))

    raw_attack(node.address(), LINK, script)
    (hello,) = [message for message in heard if isinstance(message, Hello)]
    return hello
