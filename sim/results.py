"""What a run leaves behind: rows while it goes on, one result at the end, and a folder that holds both.

Belongs here: the structs of the rows and how they are written and read again. Drawing them is `report.py`'s affair.
"""

import contextlib
import csv
import platform
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar, get_args

import msgspec
from msgspec import Struct

from protocols.errors import ConfigError
from protocols.messages import LinkMessage


class SampleRow(Struct, frozen=True):
    """The whole network at one virtual moment. Counts are totals since the start."""

    at_s: float
    alive: int
    """Nodes that are online and answer."""
    done: int
    """Nodes that have finished all their rounds."""
    links: int
    rounds: int
    """Node-rounds ended."""
    events: int
    messages: dict[str, int]
    """Sent, by kind."""
    control_bytes: int
    """Of link messages, sent."""
    model_bytes: int
    """Of fetched models, sent."""


class RoundRow(Struct, frozen=True):
    """One evaluated round of one node. The final merge stands as one more round, with what the node went on with."""

    at_s: float
    node: int
    round: int
    num_merged: int
    staleness_max: int
    duration_s: float
    metrics: Mapping[str, float]


class ConsensusRow(Struct, frozen=True):
    """How far the evaluated nodes' models are from their mean: root mean square distance."""

    at_s: float
    nodes: int
    distance: float


class MergedRow(Struct, frozen=True):
    """What the mean of the evaluated nodes' models would be worth: the task's first metric, of a model that nobody has."""

    at_s: float
    nodes: int
    accuracy: float


class NoteRow(Struct, frozen=True):
    """Something worth a mark on the time axis: a line of the timeline, or a node's trouble (then `node` says whose)."""

    at_s: float
    text: str
    node: int | None = None


class TraceBlock(Struct, frozen=True):
    """The running trace hash after so many events: two runs part in the first block that differs."""

    events: int
    at_s: float
    hash: str


class OverlayNode(Struct, frozen=True):
    index: int
    alive: bool
    device: str
    nat: str
    round: int


class Overlay(Struct, frozen=True):
    """Who is linked with whom."""

    nodes: list[OverlayNode]
    links: list[tuple[int, int]]


class ScalarFigures(Struct, frozen=True):
    """What learning by scalars cost and came to. Bytes are those sent, all nodes together."""

    num_states: int
    """Different final states among the live nodes that did all their rounds: 1, or the log fell apart."""
    log_records: int
    """That counted, all rounds together, at the node that has most."""
    log_bytes: int
    """Of these records as they are written."""
    held_records: float
    """Mean over the live nodes: what is not cut yet."""
    signed_records: int
    """By all authors, those too that came too late to count."""
    flooded_bytes: int
    """Of records passed on when they were new."""
    served_bytes: int
    """Of records sent because another log lacked them."""
    compared_bytes: int
    """Of what finds out which are lacking: ranges, holdings, pulls."""
    marks_bytes: int
    """Of terms and marks."""
    caught_up: int
    """Starts, of late joiners and restarted nodes, after which a node came to where the others are."""
    catch_up_median_s: float | None
    catch_up_max_s: float | None
    """From such a start to the first round that the node began, the first state that it sealed, or its end, with the log
    of most others and in no earlier round than most others."""
    behind: int
    """Live nodes that had not come so far at the end."""


class Result(Struct, frozen=True):
    """What a run gave; equal for equal scenarios, up to the rounding of accuracies. Accuracies are the task's first
    metric, over the evaluated nodes that are online or have finished at the end."""

    trace_hash: str
    partial: bool
    """Interrupted before its end."""
    accuracy_mean: float | None
    accuracy_min: float | None
    accuracy_max: float | None
    accuracy_by_round: list[float]
    """Mean over the nodes that evaluated after each of `evaluated_rounds`."""
    evaluated_rounds: list[int]
    consensus_distance: float | None
    events: int
    node_rounds: int
    bytes_sent: int
    messages_sent: dict[str, int]
    fetches: int
    refused: dict[str, int]
    failed_work: int
    """Work without a usable result, after which a node went on with the model it had, or said nothing but zeros."""
    virtual_s: float
    nodes: int
    alive: int
    finished: int
    """Nodes that did all their rounds."""
    timeline_left: int
    """Lines of the timeline that come after the end."""
    merged_accuracy: float | None = None
    """Of the mean of the evaluated nodes' models, measured last (`evaluation.merged`)."""
    final_merged_accuracy: float | None = None
    """Mean over the nodes of the final merge's model, as each of them measured its own, whether it kept it or not."""
    scalars: ScalarFigures | None = None
    """Where nodes learn by scalars."""


class Run(Struct, frozen=True):
    """A results folder, read."""

    folder: Path
    scenario_text: str
    scenario_toml: dict[str, Any]
    result: dict[str, Any]
    """The fields of `Result` and how long it took; empty after a crash, which leaves no result."""
    rounds: list[RoundRow]
    samples: list[SampleRow]
    consensus: list[ConsensusRow]
    notes: list[NoteRow]
    overlay: Overlay | None
    blocks: list[TraceBlock]
    merged: list[MergedRow] = []

    @property
    def partial(self) -> bool:
        """It ended before its end."""
        return bool(self.result.get("partial", True))


SCENARIO_FILE = "scenario.toml"
RESULT_FILE = "result.json"
OVERLAY_FILE = "overlay.json"
ROUNDS_FILE = "rounds.jsonl"
SAMPLES_FILE = "samples.csv"
CONSENSUS_FILE = "consensus.csv"
MERGED_FILE = "merged.csv"
NOTES_FILE = "notes.jsonl"
TRACE_FILE = "trace.jsonl"
REPORT_FILE = "report.html"

RUN_FILES = (
    SCENARIO_FILE,
    RESULT_FILE,
    OVERLAY_FILE,
    ROUNDS_FILE,
    SAMPLES_FILE,
    CONSENSUS_FILE,
    MERGED_FILE,
    NOTES_FILE,
    TRACE_FILE,
    REPORT_FILE,
)
"""All that a run may leave in its folder."""

MESSAGE_KINDS = tuple(str(kind.__struct_config__.tag) for kind in get_args(LinkMessage))

_MESSAGES = "messages_"
_SAMPLE_COLUMNS = (
    *(name for name in SampleRow.__struct_fields__ if name != "messages"),
    *(f"{_MESSAGES}{kind}" for kind in MESSAGE_KINDS),
)


class ResultsWriter:
    """Fills a results folder while a run goes on. Each sample brings what came before it to the disk.

    scenario_toml: the whole scenario as text, enough to run it again.
    replace: remove what an earlier run left in the folder.

    Raises:
        ConfigError: at `--out`: the folder holds a run or something else of that name, or cannot be written.
    """

    def __init__(self, folder: Path, scenario_toml: str, replace: bool = False) -> None:
        self.folder = folder
        self._files = contextlib.ExitStack()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _make_room(folder, replace)
            (folder / SCENARIO_FILE).write_text(scenario_toml, encoding="utf-8")
            self._rounds = self._open(ROUNDS_FILE)
            self._samples = self._open(SAMPLES_FILE)
            self._consensus = self._open(CONSENSUS_FILE)
            self._merged = self._open(MERGED_FILE)
            self._notes = self._open(NOTES_FILE)
            self._trace = self._open(TRACE_FILE)
        except OSError as error:
            self._files.close()
            raise ConfigError("--out", f"{folder} cannot be written ({error.strerror})") from error
        self._sample_csv = csv.writer(self._samples, lineterminator="\n")
        self._consensus_csv = csv.writer(self._consensus, lineterminator="\n")
        self._merged_csv = csv.writer(self._merged, lineterminator="\n")
        self._sample_csv.writerow(_SAMPLE_COLUMNS)
        self._consensus_csv.writerow(ConsensusRow.__struct_fields__)
        self._merged_csv.writerow(MergedRow.__struct_fields__)
        self.flush()

    def _open(self, name: str) -> TextIO:
        return self._files.enter_context((self.folder / name).open("w", encoding="utf-8", newline="\n"))

    def round(self, row: RoundRow) -> None:
        """An evaluated round. A metric that is not finite is written as null."""
        self._rounds.write(_line(row))

    def sample(self, row: SampleRow) -> None:
        """The network at one moment."""
        assert set(row.messages) <= set(MESSAGE_KINDS), sorted(set(row.messages) - set(MESSAGE_KINDS))
        flat = {
            **msgspec.structs.asdict(row),
            **{f"{_MESSAGES}{kind}": n for kind, n in row.messages.items()},
        }
        self._sample_csv.writerow(flat.get(name, 0) for name in _SAMPLE_COLUMNS)
        self.flush()

    def consensus(self, row: ConsensusRow) -> None:
        """A measured consensus distance."""
        self._consensus_csv.writerow(msgspec.structs.astuple(row))

    def merged(self, row: MergedRow) -> None:
        """The measured mean of models."""
        self._merged_csv.writerow(msgspec.structs.astuple(row))

    def note(self, row: NoteRow) -> None:
        """A mark on the time axis."""
        self._notes.write(_line(row))

    def block(self, row: TraceBlock) -> None:
        """The running trace hash."""
        self._trace.write(_line(row))

    def flush(self) -> None:
        """Hand every row so far to the system: a crash of this process loses none of them."""
        for file in (
            self._rounds,
            self._samples,
            self._consensus,
            self._merged,
            self._notes,
            self._trace,
        ):
            file.flush()

    def finish(self, result: Result, timing: Mapping[str, Any], overlay: Overlay) -> None:
        """Write the overlay and then the result, each whole or not at all, and close the rows.

        timing: what differs from machine to machine (`wall_s`, `events_per_s`, the engine's description);
            it stands beside the result's fields.
        """
        self.close()
        _write_whole(self.folder / OVERLAY_FILE, msgspec.json.encode(overlay))
        whole = {**msgspec.to_builtins(result), "versions": versions(), **timing}
        _write_whole(self.folder / RESULT_FILE, msgspec.json.format(msgspec.json.encode(whole), indent=2))

    def close(self) -> None:
        """Close the rows without a result, as after a crash."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def versions() -> dict[str, str]:
    """Of what the numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in ("covey", "torch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def clear_run(folder: Path) -> None:
    """Remove the files of a run, and nothing else."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def _make_room(folder: Path, replace: bool) -> None:
    present = {name for name in RUN_FILES if (folder / name).exists()}
    if RESULT_FILE in present and not replace:
        raise ConfigError(
            "--out", f"{folder} holds the results of an earlier run", ["another folder", "--replace"]
        )
    if SCENARIO_FILE in present and ROUNDS_FILE not in present:  # somebody's own scenario
        raise ConfigError("--out", f"{folder} holds a {SCENARIO_FILE} that no run wrote", ["another folder"])
    clear_run(folder)


def _line(row: Struct) -> str:
    return msgspec.json.encode(row).decode() + "\n"


def _write_whole(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)


# --- reading --------------------------------------------------------------------------------------------
Row = TypeVar("Row", bound=Struct)


def read_run(folder: Path) -> Run:
    """A results folder, finished or not. A last line cut short by a crash is left out.

    Raises:
        ConfigError: the folder is not a run, or a file in it is damaged: which one, and where.
    """
    if not (folder / SCENARIO_FILE).is_file() or not (folder / ROUNDS_FILE).is_file():
        raise ConfigError(str(folder), "is not a results folder", ["a folder given as --out to `covey sim`"])
    try:
        text = _read(folder / SCENARIO_FILE).decode()
        tables = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(str(folder / SCENARIO_FILE), f"is damaged: {error}") from error
    overlay = _read_json(folder / OVERLAY_FILE, Overlay) if (folder / OVERLAY_FILE).exists() else None
    result = _read_json(folder / RESULT_FILE, dict[str, Any]) if (folder / RESULT_FILE).exists() else {}
    return Run(
        folder=folder,
        scenario_text=text,
        scenario_toml=tables,
        result=result,
        rounds=_read_lines(folder / ROUNDS_FILE, RoundRow, _with_nan),
        samples=_read_csv(folder / SAMPLES_FILE, SampleRow, _SAMPLE_COLUMNS),
        consensus=_read_csv(folder / CONSENSUS_FILE, ConsensusRow, ConsensusRow.__struct_fields__),
        notes=_read_lines(folder / NOTES_FILE, NoteRow),
        overlay=overlay,
        blocks=_read_lines(folder / TRACE_FILE, TraceBlock),
        # Older runs have none.
        merged=_read_csv(folder / MERGED_FILE, MergedRow, MergedRow.__struct_fields__)
        if (folder / MERGED_FILE).exists()
        else [],
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})") from error


Whole = TypeVar("Whole")


def _read_json(path: Path, kind: type[Whole]) -> Whole:
    try:
        return msgspec.json.decode(_read(path), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is damaged: {error}") from error


def _whole_lines(path: Path) -> list[bytes]:
    """What stands after the last line's end was cut short by a crash."""
    return _read(path).split(b"\n")[:-1]


@contextlib.contextmanager
def _damage_named(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(str(path), f"line {number} is damaged: {error}") from error


def _read_lines(path: Path, kind: type[Row], mend: Callable[[Any], Any] = lambda data: data) -> list[Row]:
    rows = []
    for number, line in enumerate(_whole_lines(path), 1):
        with _damage_named(path, number):
            rows.append(msgspec.convert(mend(msgspec.json.decode(line)), kind))
    return rows


def _with_nan(data: Any) -> Any:
    """JSON has no word for what is not finite: it was written as null."""
    if isinstance(data, dict) and isinstance(metrics := data.get("metrics"), dict):
        metrics.update({name: float("nan") for name, value in metrics.items() if value is None})
    return data


def _read_csv(path: Path, kind: type[Row], columns: tuple[str, ...]) -> list[Row]:
    rows = []
    for number, line in enumerate(_whole_lines(path), 1):
        with _damage_named(path, number):
            values = line.decode().split(",")
            if number == 1 and tuple(values) != columns:
                raise ValueError(f"the columns are not {','.join(columns)}")
            if number > 1:
                flat = dict(zip(columns, values, strict=True))
                messages = {
                    name.removeprefix(_MESSAGES): flat[name] for name in columns if name.startswith(_MESSAGES)
                }
                rows.append(msgspec.convert({**flat, "messages": messages}, kind, strict=False))
    return rows
