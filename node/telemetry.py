"""What an operator can see: log lines, one JSON line a round, Prometheus metrics. Nothing leaves the machine.

No label ever holds a peer id: a network of thousands would make thousands of series.
"""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from protocols.events import (
    CaughtUp,
    ContentHeld,
    ContentMissing,
    FinalMergeDone,
    LearningDone,
    LinkChanged,
    Record,
    RoundDone,
    Trouble,
)
from protocols.vocabulary import PeerId, Reason


def configure_logging(level: str, as_json: bool) -> None:
    """Log to standard error, for people or for machines."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


class Telemetry:
    """Logs, round records and metrics of one node."""

    def __init__(self, home: Path) -> None:
        self._rounds_path = home / "rounds.jsonl"
        self._log = structlog.get_logger()
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Gauge] = {}
        self.last_round: RoundDone | None = None
        self.refused: dict[str, int] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"covey_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"covey_{name}", text, registry=self.registry)

        self._refused = counter("refused", "What peers sent and was refused, by reason", "reason")
        self._messages = counter("messages", "Link messages", "direction", "kind")
        self._fetches = counter("fetches", "Models fetched from peers, by outcome", "outcome")
        self._fetch_time = Histogram(
            "covey_fetch_seconds",
            "From the decision to fetch a model to its being held and checked",
            buckets=(0.01, 0.1, 0.5, 1, 5, 10, 60, 300),
            registry=self.registry,
        )
        self._trouble = counter("trouble", "Work of our own that failed", "what")
        self._message_counters: dict[tuple[str, str], Counter] = {}
        self._round = gauge("round", "The learning round")
        self._live = gauge("live_peers", "Greeted neighbours")
        self._merged = gauge("merged_models", "Received models in the last merge")
        self._metric = Gauge(
            "covey_model_metric",
            "The last evaluation of the node's model",
            ["metric"],
            registry=self.registry,
        )
        self._sent = gauge("bytes_sent", "Bytes written to link and fetch streams")
        self._received = gauge("bytes_received", "Bytes read from link and fetch streams")
        self._log_rounds = Gauge(
            "covey_log_round",
            "Where the log of scalars stands: its newest round, the last that is sealed, the last that is cut",
            ["what"],
            registry=self.registry,
        )
        self._log_records = Gauge(
            "covey_log_records",
            "Records of scalars: held now, on the disk, and by what became of those that came",
            ["what"],
            registry=self.registry,
        )
        self._lateness = gauge("loop_lateness_seconds_max", "Worst lateness of the event loop so far")

    def record(self, record: Record, at_s: float) -> None:
        """One record from the core. `at_s` is Unix time."""
        match record:
            case RoundDone():
                self._on_round(record, at_s)
            case FinalMergeDone():
                self._on_final_merge(record, at_s)
            case LinkChanged(peer, up, reason, num_live):
                self._live.set(num_live)
                self._log.info(
                    "link up" if up else "link down", peer=peer, reason=reason or None, live=num_live
                )
            case CaughtUp(round_, from_round, num_models, duration_s):
                self._log.info(
                    "caught up",
                    round=round_,
                    from_round=from_round,
                    models=num_models,
                    seconds=round(duration_s, 2),
                )
            case Trouble(what, detail):
                self._trouble.labels(what).inc()
                self._log.warning("work failed", what=what, detail=detail)
            case ContentHeld(digest, sources):
                self._log.info("content held", digest=digest.hex(), sources=list(sources))
            case ContentMissing(digest, detail):
                self._log.warning("content missing", digest=digest.hex(), reason=detail)
            case LearningDone(round_):
                self._round.set(round_)
                self._log.info("learning done; serving on", round=round_)
            case _:
                assert_never(record)

    def _on_round(self, record: RoundDone, at_s: float) -> None:
        # Not every round is evaluated: the last figures stand until there are others.
        known = record.metrics or (self.last_round.metrics if self.last_round else {})
        self.last_round = msgspec.structs.replace(record, metrics=known)
        self._round.set(record.round)
        self._merged.set(record.num_merged)
        for name, value in record.metrics.items():
            self._metric.labels(name).set(value)
        self._write_line(record, at_s)
        shown = {name: round(value, 4) for name, value in record.metrics.items()}
        report = {
            name: value if isinstance(value, str) else round(value, 4)
            for name, value in record.report.items()
        }
        self._log.info("round done", round=record.round, merged=record.num_merged, **shown, **report)

    def _on_final_merge(self, record: FinalMergeDone, at_s: float) -> None:
        metrics = record.merged if record.kept == "merged" else record.before
        for name, value in metrics.items():
            self._metric.labels(name).set(value)
        if metrics and self.last_round is not None:
            # What the node has now, which is what an operator asks for.
            self.last_round = msgspec.structs.replace(self.last_round, metrics=metrics)
        self._write_line(record, at_s)
        self._log.info(
            "final merge done",
            members=record.num_members,
            kept=record.kept,
            before={name: round(value, 4) for name, value in record.before.items()},
            merged={name: round(value, 4) for name, value in record.merged.items()},
        )

    def _write_line(self, record: RoundDone | FinalMergeDone, at_s: float) -> None:
        line = {"at_s": round(at_s, 3), **msgspec.to_builtins(record)}
        with self._rounds_path.open("a", encoding="utf-8") as file:
            file.write(msgspec.json.encode(line).decode() + "\n")

    def refusal(self, peer: PeerId, reason: Reason, detail: str) -> None:
        """Something from a peer was refused."""
        self._refused.labels(reason.value).inc()
        self.refused[reason.value] = self.refused.get(reason.value, 0) + 1
        self._log.warning("refused", peer=peer or "unknown", reason=reason.value, detail=detail)

    def message(self, direction: str, kind: str) -> None:
        """A link message was sent (`out`) or received (`in`)."""
        child = self._message_counters.get((direction, kind))
        if child is None:
            child = self._message_counters[direction, kind] = self._messages.labels(direction, kind)
        child.inc()

    def fetch(self, outcome: str, seconds: float) -> None:
        """A fetch ended: `ok` or the reason it failed, and how long it took."""
        self._fetches.labels(outcome).inc()
        if outcome == "ok":
            self._fetch_time.observe(seconds)

    def bytes_moved(self, sent: int, received: int) -> None:
        """Totals so far."""
        self._sent.set(sent)
        self._received.set(received)

    def scalar_log(self, log: Mapping[str, Any]) -> None:
        """The log of scalars, as the API tells it."""
        sealed = log["sealed"]["round"] if log["sealed"] else 0
        for what, number in (("newest", log["round"]), ("sealed", sealed), ("cut", log["cut"])):
            self._log_rounds.labels(what).set(number)
        for what, number in (
            ("held", log["records"]),
            ("on_disk", log["on_disk"]["records"]),
            *log["counts"].items(),
        ):
            self._log_records.labels(what).set(number)

    def lateness(self, seconds: float) -> None:
        """The worst lateness of the loop so far."""
        self._lateness.set(seconds)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def info(self, event: str, **fields: object) -> None:
        self._log.info(event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        self._log.warning(event, **fields)
