"""A home as a node leaves it behind that learnt by scalars, for the tests of what reads one."""

import sqlite3
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.config import Config, convert_config, to_toml
from node.identity import peer_id_of
from node.replica import Replica
from node.scalar_store import ScalarStore
from node.signatures import Ed25519Signatures
from node.store import BlobStore
from protocols.scalar_log import ScalarLog, signed_bytes
from protocols.scalar_terms import round_scalars, terms_digest
from protocols.vocabulary import STATE_ID_BYTES, Checkpoint, ScalarRecord

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2)]
PEERS = [peer_id_of(key) for key in KEYS]
SIGNATURES = [Ed25519Signatures(key) for key in KEYS]
EVERY, LAST = 4, 10


def configure(**scalars: Any) -> Config:
    return convert_config(
        {
            "learning": {"protocol": "scalars"},
            "task": {"name": "digits", "options": {"hidden": []}, "seed": 3},
            "scalars": {"learning_rate": 0.001, "checkpoint_every": EVERY, **scalars},
        }
    )


CONFIG = configure()


class Home:
    """What a node leaves behind that has heard of ten rounds of two authors and sealed two checkpoints."""

    def __init__(self, home: Path, config: Config = CONFIG, skip: frozenset[int] = frozenset()) -> None:
        home.mkdir()
        (home / "covey.toml").write_text(to_toml(config))
        self.home, self.config = home, config
        self.replica = Replica(config, home, home / "scratch")
        blobs = BlobStore(home, self.replica.state.check)
        self.log = ScalarLog(self.replica.base, config.scalars.max_authors)
        self.terms = self.replica.terms
        with ScalarStore(home, SIGNATURES[0].author, config.scalars.keep_log) as store:
            store.bind(self.terms)
            for number in [number for number in range(1, LAST + 1) if number not in skip]:
                said = [self.record(number, author) for author in (0, 1)]
                store.keep(said)
                for each in said:
                    self.log.add(each)
            for number in range(EVERY, LAST + 1, EVERY):
                self.replica.state.apply(self.rounds(number - EVERY + 1, number))
                ref = blobs.save_pieces(self.replica.state.pieces(), number, 1)
                blobs.keep(ref)
                checkpoint = Checkpoint(number, self.log.chain(number), self.log.num_counted(number), ref)
                store.keep([], checkpoint, number - EVERY)

    def record(self, number: int, author: int, codes: bytes | None = None) -> ScalarRecord:
        codes = bytes([60 + number, 190 + number + author]) if codes is None else codes
        built_on = bytes(STATE_ID_BYTES)
        data = signed_bytes(terms_digest(self.terms), number, codes, built_on)
        mine = SIGNATURES[author]
        return ScalarRecord(mine.author, number, codes, built_on, mine.sign(data))

    def rounds(self, first: int, last: int) -> list[Any]:
        numbers = self.log.rounds(first, last)
        return [round_scalars(self.config.scalars, number, self.log.counting(number)) for number in numbers]

    def edit(self, statement: str, *values: object) -> None:
        db = sqlite3.connect(self.home / "covey.db")
        with db:
            assert db.execute(statement, values).rowcount > 0
        db.close()
