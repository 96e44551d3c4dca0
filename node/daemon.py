"""One daemon: everything put together, started in order, stopped in order."""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from node.api import API_FILE, ApiServer, make_app, make_token
from node.config import Config
from node.content import ContentService
from node.content_api import content_routes
from node.content_sharing import ModelSource
from node.content_store import ContentStore, Holdings
from node.core import NodeCore
from node.discovery import Discovery
from node.driver import Driver, Perform
from node.identity import KEY_FILE, key_seed, load_key, peer_id_of
from node.invitation import load_admission
from node.libp2p_network import Libp2pNetwork
from node.libp2p_transfer import Blobs
from node.library import Library
from node.manners import Manners, device_manners, lower_priority, may_move
from node.ports import MonotonicClock
from node.scalar_store import ScalarStore
from node.signatures import Ed25519Signatures
from node.store import BlobStore, History, HomeLock
from node.telemetry import Telemetry
from protocols.errors import ConfigError, LocalError, PeerError
from protocols.events import Started, WorkFailed
from protocols.scalars import ScalarLearning
from protocols.view import PeerStatus
from protocols.vocabulary import (
    DIGEST_BYTES,
    Checkpoint,
    ModelRef,
    PeerId,
    Reason,
    ScalarRecord,
    SchemaHash,
)

LATENESS_PERIOD_S = 0.1
ALONE_S = 3.0
"""A node that has found nobody says so after this long, and then after twice as long each time."""
ALONE_MAX_S = 600.0
ALONE_PEERS = 4
"""Peers that are named then."""
SCRATCH = "scratch"
"""Folder of the home for what is written anew at every start."""


class Beginning(NamedTuple):
    """What the core begins with. See `protocols.events.Started`."""

    ref: ModelRef | None
    checkpoint: Checkpoint | None = None
    records: tuple[ScalarRecord, ...] = ()


class Part(Protocol):
    """What a node has of its learning protocol.

    base: the digest that all replicas begin with; scalars: where the log is kept. Of a node that learns by scalars.
    """

    name: str
    schema: SchemaHash
    max_model_bytes: int
    store: BlobStore
    perform: Perform
    base: bytes
    scalars: ScalarStore | None

    def begin(self, warn: Callable[[str], None]) -> Beginning:
        """Where the node left off, or a fresh start."""


class Learner:
    """What a learning node has and a mere helper has not: a task, its schema, a place for its models."""

    base = bytes(DIGEST_BYTES)
    scalars: ScalarStore | None = None

    def __init__(self, config: Config, home: Path, me: PeerId, manners: Manners) -> None:
        import torch

        from node.compute import StoredModels, Work
        from node.merging import rule_error
        from node.task_loading import make_task
        from node.tasks import initial_params
        from node.weights import check_weights, max_blob_bytes, schema_hash, schema_of

        learning = config.learning
        torch.set_num_threads(config.training.threads)
        task = make_task(config.task.name, config.task.options, home, config.task.shard, config.task.probe)
        seed = config.task.seed if config.task.seed is not None else key_seed(me)
        # Rounds of `sampled` go on from one model that all have.
        common = config.task.seed or 0
        try:
            self._first = initial_params(task, common if learning.protocol == "sampled" else seed)
        except Exception as error:  # the user's own model, which may raise anything
            raise ConfigError("task.name", f"the model of '{task.name}' cannot be made: {error!r}") from error
        schema = schema_of(self._first)
        self.name = task.name
        self.schema = schema_hash(task.name, schema)
        self.max_model_bytes = max_blob_bytes(schema)
        self.store = BlobStore(home, lambda path: check_weights(path, schema))
        self._models = StoredModels(self.store)
        work = Work(
            task,
            config.training,
            config.rule,
            self._models,
            seed,
            me,
            final_rule=None if learning.final_merge == "none" else learning.final_rule,
            judges_final=learning.final_keep == "better",
            pace=manners.pace,
        )
        try:
            work.rehearse(self._first)
        except ValueError as error:
            raise rule_error(error) from error
        self.num_samples = work.num_samples
        self.perform: Perform = work.perform

    def begin(self, warn: Callable[[str], None]) -> Beginning:
        """The newest whole checkpoint, or a fresh start."""
        return Beginning(self.store.restore(warn) or self._models.save(self._first, 0, self.num_samples))


class ScalarLearner:
    """The same of a node that learns by scalars: one module in memory, and the log that its state follows from."""

    def __init__(self, config: Config, home: Path, me: PeerId, author: bytes) -> None:
        from node.replica import Replica, check_member
        from node.scalar_work import ScalarWork
        from node.weights import schema_hash

        check_member(config, me)
        replica = Replica(config, home, home / SCRATCH)
        self.base = replica.base
        self.name = replica.task.name
        self.schema = schema_hash(self.name, replica.schema)
        self.max_model_bytes = self._size_bytes = replica.state.file.size_bytes
        self.store = BlobStore(home, replica.state.check)
        self.scalars: ScalarStore | None = ScalarStore(home, author, config.scalars.keep_log)
        self.scalars.bind(replica.terms)
        self._author = author
        work = ScalarWork(
            replica.task,
            replica.module,
            replica.state,
            config.scalars,
            config.training,
            self.store,
            replica.base,
            author,
            config.task.seed if config.task.seed is not None else key_seed(me),
            me,
        )
        self.perform: Perform = work.perform

    def begin(self, warn: Callable[[str], None]) -> Beginning:
        """The newest checkpoint that is whole and what came after it, or the base model and all that was kept."""
        assert self.scalars is not None
        base = ModelRef(self.base, self._size_bytes, 0, 1)
        checkpoints = self.scalars.checkpoints()
        self.store.set_aside([checkpoint.ref.digest for checkpoint in checkpoints], warn)
        for checkpoint in checkpoints:
            digest = checkpoint.ref.digest
            if digest == self.base or self.store.restore_one(digest, warn):
                return Beginning(base, checkpoint, self.scalars.records(checkpoint.round))
            warn(f"the checkpoint of round {checkpoint.round} cannot be used; falling back to the one before")
        records = self.scalars.records()
        if self.scalars.cut:
            warn(
                "no checkpoint is whole, and the log before them was cut: the state has to come from neighbours"
            )
            # What this node signed it must not sign otherwise; the rest leads nowhere without what was before it.
            records = tuple(record for record in records if record.author == self._author)
        return Beginning(base, None, records)


class Helper:
    """A node that takes no part in learning: it holds no model and accepts none."""

    base = bytes(DIGEST_BYTES)
    scalars: ScalarStore | None = None
    name = "none"
    schema = SchemaHash(bytes(DIGEST_BYTES))
    max_model_bytes = 1

    def __init__(self, home: Path) -> None:
        def refuse(path: Path) -> None:
            raise PeerError(Reason.IDLE, "this node does not learn")

        self.store = BlobStore(home, refuse)
        self.perform: Perform = lambda order: WorkFailed(order.token, "this node does not learn")

    def begin(self, warn: Callable[[str], None]) -> Beginning:
        return Beginning(None)


def make_part(config: Config, home: Path, me: PeerId, author: bytes, manners: Manners) -> Part:
    """What the configured protocol needs. Raises ConfigError and LocalError where it cannot be had."""
    if config.learning.protocol == "scalars":
        return ScalarLearner(config, home, me, author)
    return Learner(config, home, me, manners) if config.learns else Helper(home)


def _round_of(beginning: Beginning) -> int:
    rounds = [record.round for record in beginning.records[-1:]]
    rounds += [ref.round for ref in (beginning.checkpoint, beginning.ref) if ref is not None]
    return max(rounds, default=0)


def _why(row: PeerStatus) -> str:
    """Why there is no link with a peer."""
    return row.last_reason or ("no answer yet" if row.state in ("dialling", "greeting") else row.state)


class Daemon:
    """A node from its home to its halt."""

    def __init__(self, config: Config, home: Path) -> None:
        self._config = config
        self._home = home
        self._started_at = time.time()  # noqa: TID251 - the shell tells the wall time
        self._driver: Driver | None = None
        self._contents: ContentService | None = None
        self._lateness_s = 0.0
        self._addresses: tuple[str, ...] = ()

    async def run(self) -> None:
        """Serve until a signal, the API or the core ends it.

        Raises:
            LocalError, ConfigError: it could not begin, or broke; the text says why and what to do.
        """
        with ExitStack() as stack:
            stack.enter_context(HomeLock(self._home))
            key = load_key(self._home / KEY_FILE)
            self._me = peer_id_of(key)
            self._telemetry = Telemetry(self._home)
            device = self._config.device
            lower_priority(device.nice, self._telemetry.warning)
            history = History(self._home)
            stack.callback(history.close)
            self._history = history
            signatures = Ed25519Signatures(key)
            manners, meter = device_manners(
                device,
                history,
                lambda: self._network.bytes_sent + self._network.bytes_received,
                MonotonicClock(),
                time.time,  # noqa: TID251
                self._telemetry.warning,
            )
            self._meter = meter
            part = make_part(self._config, self._home, self._me, signatures.author, manners)
            if part.scalars is not None:
                stack.callback(part.scalars.close)
            self._scalars = part.scalars
            self._contents, holdings = self._make_contents(part, signatures.author, stack)
            beginning = part.begin(self._telemetry.warning)
            core = NodeCore(
                self._config.core_settings(
                    part.name, part.schema, part.max_model_bytes, part.base, load_admission(self._home)
                ),
                self._me,
                random.Random(os.urandom(16)),
                signatures,
            )
            self._task_name, self._store = part.name, part.store
            driver = self._driver = Driver(
                core,
                MonotonicClock(),
                time.time,  # noqa: TID251
                part.store,
                history,
                self._telemetry,
                part.perform,
                part.scalars,
                manners,
                self._contents,
            )
            if self._contents is not None:
                self._contents.attach(driver)
            network = self._network = Libp2pNetwork(
                key,
                self._config.network.listen,
                holdings,
                driver.handle,
                announce=self._config.network.announce,
                on_crash=self._on_crash,
                discovery=self._make_discovery(),
                up_bytes_per_s=device.upload_bytes_per_s,
                down_bytes_per_s=device.download_bytes_per_s,
                psk=self._config.network.psk,
                may_serve=lambda num_bytes: may_move(device, meter.peek(), num_bytes),
                has_greeted=core.view.is_live,
            )
            driver.attach(network)
            try:
                self._addresses = await network.start()
                await self._serve(driver, history, beginning)
            finally:
                await network.stop()
                driver.close()
                meter.close()
        if driver.failure is not None:
            raise LocalError(f"the node broke and has stopped: {driver.failure!r}") from driver.failure

    async def _serve(self, driver: Driver, history: History, beginning: Beginning) -> None:
        self._catch_signals(driver)
        api = self._start_api(driver)
        watches = [
            asyncio.create_task(self._watch_lateness()),
            asyncio.create_task(self._watch_links(driver)),
        ]
        try:
            self._telemetry.info(
                "running",
                peer=self._me,
                task=self._task_name,
                listening=list(self._addresses),
                round=_round_of(beginning),
            )
            now_s = time.time()  # noqa: TID251
            heads = self._contents.heads() if self._contents is not None else ()
            driver.handle(Started(self._addresses, history.peers(), *beginning, unix_s=now_s, heads=heads))
            if self._contents is not None:
                await self._contents.start()
            await driver.halted.wait()
        finally:
            for watch in watches:
                watch.cancel()
            if self._contents is not None:
                await self._contents.stop()
            if api is not None:
                await api.stop()
                (self._home / API_FILE).unlink(missing_ok=True)
            self._telemetry.info("stopped")

    def _catch_signals(self, driver: Driver) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, driver.request_stop)

    @property
    def working(self) -> bool:
        """Whether a training or a merge is still under way, which nobody waits for."""
        return self._driver is not None and self._driver.working

    def _make_contents(self, part: Part, me: bytes, stack: ExitStack) -> tuple[ContentService | None, Blobs]:
        """What has to do with shared content, unless it is switched off; and all that peers may fetch of this node."""
        settings = self._config.content
        if not settings.enabled:
            return None, part.store
        network, warning = self._config.network.name, self._telemetry.warning
        library = Library(
            self._home,
            me,
            network,
            settings,
            warning,
        )
        stack.callback(library.close)
        store = ContentStore(
            self._home,
            settings,
            lambda digest, problem: service.on_changed(digest, problem),
        )
        stack.callback(store.close)
        model = None
        if self._config.learns:
            model = ModelSource(
                self._home,
                part.name,
                self._config.learning.protocol,
                part.schema.hex(),
                network,
                self._history.rounds,
            )
        service = ContentService(
            settings,
            network,
            me,
            library,
            store,
            time.time,  # noqa: TID251
            self._telemetry,
            model,
        )
        return service, Holdings(part.store, store)

    def _make_discovery(self) -> Discovery:
        network = self._config.network
        return Discovery(
            network.name,
            random.Random(os.urandom(16)),
            mdns=network.mdns,
            dht=network.dht,
            seeds=network.bootstrap,
        )

    def _on_crash(self, error: BaseException) -> None:
        """The network thread ended. What is worth keeping is kept all the same."""
        assert self._driver is not None
        self._driver.request_stop()
        self._driver.fail(error)

    def _start_api(self, driver: Driver) -> ApiServer | None:
        if not self._config.api.enabled:
            return None
        app = make_app(
            token=make_token(self._home),
            status=self.status,
            peers=self.peers,
            rounds=self._history.rounds,
            metrics=self._metrics,
            stop=self._stop_soon,
            log=self.log,
            content=None if self._contents is None else self._contents.counts,
            more=content_routes(self._contents),
        )
        server = ApiServer(app, self._config.api.port)
        server.start()
        where = self._home / API_FILE
        draft = where.with_suffix(".draft")
        draft.write_text(json.dumps({"port": server.port, "pid": os.getpid()}))
        draft.replace(where)
        return server

    def _stop_soon(self) -> None:
        # After the answer to the caller has left.
        assert self._driver is not None
        asyncio.get_running_loop().call_later(0.05, self._driver.request_stop)

    async def _watch_lateness(self) -> None:
        """How long the loop kept a due callback waiting, at worst: what training must not disturb."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LATENESS_PERIOD_S
            await asyncio.sleep(LATENESS_PERIOD_S)
            self._lateness_s = max(self._lateness_s, loop.time() - due)

    async def _watch_links(self, driver: Driver) -> None:
        """A node that reaches nobody says so, and why: soon, and then ever more seldom."""
        alone_s, say_at_s, pause_s = 0.0, ALONE_S, ALONE_S
        while True:
            await asyncio.sleep(ALONE_S)
            known = driver.core.peers()
            if not known or driver.core.view.num_live():
                alone_s, say_at_s, pause_s = 0.0, ALONE_S, ALONE_S
                continue
            alone_s += ALONE_S
            if alone_s >= say_at_s:
                pause_s = min(2 * pause_s, ALONE_MAX_S)
                say_at_s = alone_s + pause_s
                self._tell_alone(known, alone_s)

    def _tell_alone(self, known: Sequence[PeerStatus], alone_s: float) -> None:
        """Which peers were tried and what came of it; those of the operator first."""
        tried = sorted(known, key=lambda row: (not row.bootstrap, row.peer))[:ALONE_PEERS]
        self._telemetry.warning(
            "no link to anybody",
            for_s=round(alone_s),
            tried=[f"{row.addresses[0] if row.addresses else row.peer}: {_why(row)}" for row in tried],
            remedy=f"it goes on trying; `covey doctor --home {self._home}` says which step fails",
        )

    # --- what the API tells -----------------------------------------------------------------------------
    def peers(self) -> list[dict[str, Any]]:
        """Every known peer as the core sees it, with what its link has measured: bytes since it linked up, round trips."""
        assert self._driver is not None
        moved, round_trips_s = self._network.bytes_by_peer(), self._network.round_trips_s()
        rows = []
        for status in self._driver.core.peers():
            row = msgspec.to_builtins(status)
            row["bytes_sent"], row["bytes_received"] = moved.get(PeerId(status.peer), (0, 0))
            if round_trip_s := round_trips_s.get(PeerId(status.peer)):
                row["latency_ms"] = round(round_trip_s * 1e3, 1)
            rows.append(row)
        return rows

    def status(self) -> dict[str, Any]:
        """The node at a glance."""
        assert self._driver is not None
        core, last = self._driver.core, self._telemetry.last_round
        return {
            "peer": self._me,
            "network": self._config.network.name,
            "task": self._task_name,
            "learning": self._config.learning.protocol,
            "addresses": list(self._addresses),
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self._started_at, 1),  # noqa: TID251
            "phase": core.phase.value,
            "round": core.round,
            "metrics": dict(last.metrics) if last else {},
            "merged": last.num_merged if last else 0,
            "report": dict(last.report) if last else {},
            "waiting": self._driver.waiting,
            "live_peers": core.view.num_live(),
            "bytes_sent": self._network.bytes_sent,
            "bytes_received": self._network.bytes_received,
            "month_bytes": self._meter.month_bytes(),
            "refused": dict(self._telemetry.refused),
            "loop_lateness_ms_max": round(self._lateness_s * 1e3, 1),
            **({"log": log} if (log := self.log()) else {}),
        }

    def log(self) -> dict[str, Any] | None:
        """The log of scalars at a glance; None where this node keeps none."""
        assert self._driver is not None
        learning = self._driver.core.learning
        if not isinstance(learning, ScalarLearning) or self._scalars is None:
            return None
        from node.replica import describe

        return describe(learning.status(), self._scalars, running=True)

    def _metrics(self) -> bytes:
        if log := self.log():
            self._telemetry.scalar_log(log)
        self._telemetry.bytes_moved(self._network.bytes_sent, self._network.bytes_received)
        self._telemetry.lateness(self._lateness_s)
        return self._telemetry.render()
