"""All runs of `covey sim grank` as people start them: with a folder of results, a report, and an end that loses nothing on
Ctrl-C.

Belongs here: what is done around the runs, and what is left of them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from protocols.errors import ConfigError
from sim.grank import ATTACK, EXPERIMENTS, Row, Run, Settings, run_trial
from sim.grank_catalogue import Catalogue

RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
PICTURE_FILE = "report.png"
AGREED = 0.999
"""A median share of nodes from which on all of them count as agreed."""


class Summary(Struct, frozen=True):
    """A run in a line.

    distance_*: mean positional distance to the ranking by honest clicks: before the first step, when the attack begins or
    half of the steps are done, the most since then, at the end. beyond_ties: at the end. agreement: of nodes on the first
    result at the end, median over terms; agreed_at: the first step with all of them. target_first: share of honest nodes
    that show the attacked item first at the end; None where none is attacked.
    """

    experiment: str
    ranker: str
    isolation: float
    distance_start: float
    distance_half: float
    distance_worst: float
    distance_end: float
    beyond_ties: float
    agreement: float
    agreed_at: int | None
    target_first: float | None
    answer_bytes: float
    """Mean over the whole run."""
    log_bytes: float


class Results(Struct):
    """What a results folder holds. Equal seeds and catalogues give equal results."""

    catalogue: str
    """Where it is from."""
    num_items: int
    num_tags: int
    runs: list[Run]
    summaries: list[Summary]
    partial: bool = False
    """Interrupted: runs are missing, or end early."""


Tell = Callable[[int, Settings, Row], None]
"""(number of the run, its settings, what was just measured)."""


def run_all(
    planned: Sequence[Settings], catalogue: Catalogue, source: str, folder: Path | None, tell: Tell
) -> Results:
    """Run one after another; leave `results.json`, `report.html` and `report.png` in the folder.

    source: where the catalogue is from, in a word. Ctrl-C ends it early: what there is by then is written all the same.

    Raises:
        ConfigError: before anything runs where the folder holds results already or cannot be made.
    """
    if folder is not None:
        make_folder(folder)
    results = Results(source, len(catalogue), len(catalogue.tags), [], [])
    try:
        for number, settings in enumerate(planned):
            run = Run(settings, [])
            results.runs.append(run)

            def told(row: Row, number: int = number, settings: Settings = settings) -> None:
                tell(number, settings, row)

            run_trial(settings, catalogue, told, run)
    except KeyboardInterrupt:
        results.partial = True
    results.runs = [run for run in results.runs if run.rows]
    results.summaries = [summary(run) for run in results.runs]
    if folder is not None:
        write_results(results, folder)
    return results


def make_folder(folder: Path) -> None:
    """Raises ConfigError where it holds results already, or cannot be made."""
    if (folder / RESULTS_FILE).exists():
        raise ConfigError("--out", f"{folder} holds results already", ["another folder"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--out", f"{folder} cannot be made ({error.strerror})") from error


def write_results(results: Results, folder: Path) -> None:
    """The results come first: they are there even where nothing can be drawn.

    Raises:
        ConfigError: a file cannot be written.
    """
    from sim.report import write_file

    text = msgspec.json.format(msgspec.json.encode(results), indent=1)
    write_file(folder / RESULTS_FILE, text + b"\n")
    if results.runs:
        from sim.grank_report import write_report

        write_report(results, folder / REPORT_FILE, folder / PICTURE_FILE)


def summary(run: Run) -> Summary:
    """Raises IndexError for a run without rows."""
    settings, rows = run.settings, run.rows
    half = ATTACK * settings.steps
    later = [row for row in rows if row.step >= half] or rows[-1:]
    middle = [row for row in rows if row.step <= half][-1]
    end = rows[-1]
    agreed = [row.step for row in rows if row.honest.agreement.median >= AGREED]
    return Summary(
        experiment=settings.experiment,
        ranker=settings.ranker,
        isolation=settings.isolation,
        distance_start=rows[0].honest.distance.mean,
        distance_half=middle.honest.distance.mean,
        distance_worst=max(row.honest.distance.mean for row in later),
        distance_end=end.honest.distance.mean,
        beyond_ties=end.honest.beyond_ties,
        agreement=end.honest.agreement.median,
        agreed_at=agreed[0] if agreed else None,
        target_first=end.target.first if end.target else None,
        answer_bytes=sum(row.answer_bytes_mean for row in rows[1:]) / max(1, len(rows) - 1),
        log_bytes=end.log_bytes,
    )


def by_experiment(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """In the order of the experiments' table."""
    found = [(name, [run for run in runs if run.settings.experiment == name]) for name in EXPERIMENTS]
    return [(name, own) for name, own in found if own]
