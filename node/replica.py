"""A node's replica from its home: the model that all begin with, the log on the disk, and whether one makes the other.

Belongs here: what `covey run`, `covey log` and `covey verify` share of learning by scalars.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from node.config import Config
from node.scalar_store import DATABASE, ScalarStore
from node.signatures import author_of, peer_of_author
from node.store import newest_checkpoints, verify_checkpoint
from protocols.errors import ConfigError, LocalError, PeerError
from protocols.messages import Terms
from protocols.scalar_log import LogStatus, ScalarLog, log_status, signed_bytes
from protocols.scalar_terms import counting_rounds, misfit, terms_digest, terms_of
from protocols.vocabulary import MAX_ROUND, Checkpoint, PeerId, ScalarRecord

if TYPE_CHECKING:
    from node.scalar_state import State

KEYS_AT_A_TIME = 2048
"""Directions that `verify_log` applies between two words of progress."""


class Replica:
    """The base model of a config's task, and the state that its rounds change.

    scratch: a folder for the base values.
    Raises ConfigError and LocalError where the task, the model or the disk is not right.
    """

    def __init__(self, config: Config, home: Path, scratch: Path) -> None:
        import torch

        from node.scalar_state import base_digest, base_module, make_state
        from node.task_loading import make_task
        from node.weights import schema_of

        torch.set_num_threads(config.training.threads)
        self.task = make_task(
            config.task.name, config.task.options, home, config.task.shard, config.task.probe
        )
        self.module = base_module(self.task, config.task.seed)
        self.schema = schema_of(self.module)
        self.base = base_digest(self.module)
        self.terms = terms_of(config.scalars, self.base, config.members)
        self.state: State = make_state(config.scalars, self.module, self.base, scratch)


def check_member(config: Config, me: PeerId) -> None:
    """Raises ConfigError where this node's own records would not count."""
    if config.members and author_of(me) not in config.members:
        raise ConfigError(
            "scalars.members", "this node is not among them: nobody would take its scalars", [f"with '{me}'"]
        )


# --- the log at a glance --------------------------------------------------------------------------------
def describe(status: LogStatus, store: ScalarStore, running: bool) -> dict[str, Any]:
    """A log for the operator and as JSON; authors by their peer ids."""
    terms = store.terms()
    assert terms is not None
    return {
        "running": running,
        "round": status.round,
        "log": status.log,
        "records": status.num_records,
        "void": status.num_void,
        "cut": status.cut,
        "sealed": _checkpoint(status.sealed),
        "proposed": _checkpoint(status.proposed),
        "authors": {
            peer_of_author(bytes.fromhex(key)): _last_round([last], terms)
            for key, last in status.authors.items()
        },
        "missing": [list(each) for each in status.missing],
        "counts": status.counts,
        "on_disk": {"records": store.num_records(), "cut": store.cut},
    }


def _checkpoint(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    return {
        "round": checkpoint.round,
        "records": checkpoint.num_records,
        "log": checkpoint.log.hex(),
        "digest": checkpoint.ref.digest.hex(),
    }


def describe_stopped(home: Path) -> dict[str, Any]:
    """The log of a node that does not run, as its disk has it.

    Raises LocalError where there is none.
    """
    with open_log(home) as store:
        terms = store.terms()
        if terms is None:
            raise LocalError(
                f"{home} holds no log of scalars; has the node learnt with protocol = 'scalars'?"
            )
        sealed = next(iter(store.checkpoints()), None)
        log = ScalarLog(terms.base, terms.max_authors)
        if sealed is not None:
            log.adopt(sealed)
        for record in store.records(log.sealed):
            log.add(record)
        present = log.rounds(log.sealed + 1, MAX_ROUND)
        last = max(log.sealed, _last_round(present, terms))
        status = log_status(log, last, sealed, proposed=None, counts={})
        return describe(status, store, running=False)


def open_log(home: Path) -> ScalarStore:
    """The log of a home for reading. Raises LocalError where there is none."""
    if not (home / DATABASE).is_file():
        raise LocalError(f"{home} holds no log of scalars; has the node learnt with protocol = 'scalars'?")
    return ScalarStore(home)


def _last_round(rounds: Sequence[int], terms: Terms) -> int:
    """The last that is replayed: after the last of all, nodes say in further ones on what they stand."""
    last = max(rounds, default=0)
    return min(last, terms.rounds) if terms.rounds else last


# --- from the log to the state --------------------------------------------------------------------------
class Verdict(Struct, frozen=True):
    """What came of replaying a log."""

    ok: bool
    problem: str
    """Empty where all is well."""
    differs_at: int | None
    """The round of the first checkpoint that is not what the log makes."""
    started_at: int
    """0 is the base model; else the checkpoint whose log before it is gone."""
    round: int
    """The last that was replayed."""
    num_records: int
    num_checkpoints: int
    """That were compared."""
    log: str
    """Digest of the log up to `round`, in hex."""
    state: str
    """Digest of the state after `round`, in hex: equal on all replicas."""


class _Differs(Exception):  # noqa: N818 - what was looked for, not an accident
    def __init__(self, round_: int, problem: str) -> None:
        super().__init__(problem)
        self.round = round_


def verify_log(config: Config, home: Path, progress: Callable[[int, int], None]) -> Verdict:
    """Replay the log that a node kept, and compare with every checkpoint that it sealed. The node may run meanwhile.

    progress: told the records replayed so far, and all.
    Raises ConfigError and LocalError where there is nothing to replay, or no way to.
    """
    with open_log(home) as store, TemporaryDirectory(prefix="covey-verify-") as scratch:
        replica = Replica(config, home, Path(scratch))
        kept = store.terms()
        if kept is None:
            raise LocalError(f"{home} holds no log of scalars yet")
        if problem := misfit(replica.terms, kept):
            raise LocalError(
                f"the log in {home} was made under other terms: {problem[1]} (then, and now); give `verify` what `run` was "
                "given"
            )
        # Checkpoints first: what is sealed meanwhile has its records in what is read then.
        checkpoints = store.checkpoints()[::-1]
        return _Replay(config, home, replica, checkpoints, store, progress).verdict()


class _Replay:
    """One run through the log."""

    def __init__(
        self,
        config: Config,
        home: Path,
        replica: Replica,
        checkpoints: Sequence[Checkpoint],
        store: ScalarStore,
        progress: Callable[[int, int], None],
    ) -> None:
        self._config = config
        self._replica = replica
        self._files = {path.stem.rpartition("-")[2]: path for path in newest_checkpoints(home)}
        self._progress = progress
        self._log = ScalarLog(replica.base, config.scalars.max_authors)
        self._start = self._begin(checkpoints, store.cut)
        self._checkpoints = [each for each in checkpoints if each.round >= self._start]
        self._records = store.records(self._start)
        self._done = 0

    def _begin(self, checkpoints: Sequence[Checkpoint], cut: int) -> int:
        """The base, or where the log was cut the first checkpoint that is whole."""
        if not cut:
            return 0
        for checkpoint in checkpoints:
            path = self._files.get(checkpoint.ref.digest.hex())
            if checkpoint.round < cut or path is None or self._damage(path) is not None:
                continue
            self._replica.state.read(path)
            self._log.adopt(checkpoint)
            return checkpoint.round
        raise LocalError(
            f"the log was cut: the records of rounds 1 to {cut} are gone, and of the checkpoints after them none lies "
            "whole on the disk. There is nothing to begin with"
        )

    def _damage(self, path: Path) -> str | None:
        try:
            verify_checkpoint(path)
            self._replica.state.check(path)
        except (PeerError, OSError) as error:
            return str(error)
        return None

    def verdict(self) -> Verdict:
        problem, differs_at = "", None
        at = self._start
        try:
            self._check_signatures()
            for record in self._records:
                self._log.add(record)
            for checkpoint in self._checkpoints:
                self._go_on(at, checkpoint.round)
                at = checkpoint.round
                self._compare(checkpoint)
            last = max(at, _last_round([record.round for record in self._records], self._replica.terms))
            self._go_on(at, last)
            at = last
        except _Differs as found:
            problem, differs_at = str(found), found.round
        return Verdict(
            ok=not problem,
            problem=problem,
            differs_at=differs_at,
            started_at=self._start,
            round=at,
            num_records=len(self._records),
            num_checkpoints=len(self._checkpoints),
            log=self._log.chain(at).hex() if at >= self._log.sealed else "",
            state=self._state_digest(),
        )

    def _check_signatures(self) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        from node.signatures import Ed25519Signatures

        signatures = Ed25519Signatures(Ed25519PrivateKey.from_private_bytes(bytes(32)))
        terms = terms_digest(self._replica.terms)
        for record in self._records:
            if not signatures.verify(record.author, _signed(terms, record), record.signature):
                author = peer_of_author(record.author)
                raise _Differs(record.round, f"round {record.round}: the signature of {author} is wrong")

    def _go_on(self, after: int, last: int) -> None:
        few, num_keys = [], 0
        for each in counting_rounds(self._config.scalars, self._log, after, last):
            few.append(each)
            num_keys += sum(len(record.codes) for record in each.records)
            if num_keys >= KEYS_AT_A_TIME:
                self._apply(few)
                few, num_keys = [], 0
        self._apply(few)

    def _apply(self, rounds: Sequence[Any]) -> None:
        if rounds:
            self._replica.state.apply(rounds)
            self._done += sum(len(each.records) for each in rounds)
            self._progress(self._done, len(self._records))

    def _compare(self, checkpoint: Checkpoint) -> None:
        round_, log = checkpoint.round, self._log
        if log.chain(round_) != checkpoint.log or log.num_counted(round_) != checkpoint.num_records:
            raise _Differs(
                round_,
                f"round {round_}: the records that were kept are not those of the checkpoint ("
                f"{log.num_counted(round_)} count, {checkpoint.num_records} did)",
            )
        if self._state_digest() != checkpoint.ref.digest.hex():
            raise _Differs(
                round_,
                f"round {round_}: the log leads to another state than the checkpoint's, or one before it did",
            )
        path = self._files.get(checkpoint.ref.digest.hex())
        damage = None if path is None else self._damage(path)
        if path is not None and damage is not None and path.exists():  # a running node lets old ones go
            raise _Differs(round_, f"round {round_}: {path.name} is damaged ({damage})")

    def _state_digest(self) -> str:
        from node.store import hash_pieces

        if self._log.cut == 0 and not self._done:
            return self._replica.base.hex()
        return hash_pieces(self._replica.state.pieces())[0].hex()


def _signed(terms: bytes, record: ScalarRecord) -> bytes:
    return signed_bytes(terms, record.round, record.codes, record.built_on)
