"""The cells of a sweep on the machines of a Ray cluster.

Belongs here: what Ray needs to run a cell elsewhere and to bring its results home. Which cells there are and what their
results say is `sweep.py`'s affair.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sim.ray_cluster import ray_at
from sim.results import RUN_FILES
from sim.sweep import END_WITHIN_S, Cell, Finished, command, last_lines


class Parcel(NamedTuple):
    """What comes back from a worker: how the process ended, and the files of the run."""

    finished: Finished
    files: dict[str, bytes]


def run_cells_on_ray(
    cells: Sequence[Cell],
    done: Callable[[Cell, Finished], None],
    address: str | None = None,
    make_command: Callable[[Cell], list[str]] = command,
) -> None:
    """Run cells as tasks of one core each, wherever the cluster has one, and write their results here.

    covey must be installed on every worker. The scenario's own file travels along; other files that it names (a task,
    a trace, a matrix) must be found there under the same path. A `RunCells` once the address is given.

    address: as `ray_at` takes it.

    Raises:
        ConfigError: at `--ray`: Ray is not installed, or no cluster answers.
    """
    with ray_at(address) as ray:
        task = ray.remote(num_cpus=1, max_retries=1)(run_elsewhere)
        left: dict[Any, Cell] = {}
        try:
            for cell in cells:
                left[task.remote(cell, make_command, _own_file(cell))] = cell
            while left:
                (ready, *_), _ = ray.wait(list(left))
                cell = left.pop(ready)
                done(cell, _unpack(ray, ready, cell))
        finally:
            for running in left:
                ray.cancel(running)  # as by Ctrl-C there, which ends the child too
            if left:
                ray.wait(list(left), num_returns=len(left), timeout=END_WITHIN_S)


def _own_file(cell: Cell) -> bytes | None:
    path = Path(cell.scenario)
    return path.read_bytes() if path.is_file() else None


def _unpack(ray: Any, ready: Any, cell: Cell) -> Finished:
    try:
        parcel: Parcel = ray.get(ready)
    except ray.exceptions.RayError as error:  # the worker died, or could not load what it needs
        return Finished(-1, str(error).strip()[-1000:])
    cell.folder.mkdir(parents=True, exist_ok=True)
    for name, content in parcel.files.items():
        (cell.folder / name).write_bytes(content)
    return parcel.finished


def run_elsewhere(cell: Cell, make_command: Callable[[Cell], list[str]], scenario: bytes | None) -> Parcel:
    """On the worker: run one cell in a folder of its own and pack up what it left."""
    with tempfile.TemporaryDirectory(prefix="covey-cell-") as home:
        here = msgspec.structs.replace(cell, folder=Path(home) / "out")
        if scenario is not None and not Path(cell.scenario).is_file():
            own = Path(home) / Path(cell.scenario).name
            own.write_bytes(scenario)
            here = msgspec.structs.replace(here, scenario=str(own))
        ended = subprocess.run(
            make_command(here),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        left = {name: here.folder / name for name in RUN_FILES}
        files = {name: path.read_bytes() for name, path in left.items() if path.is_file()}
        return Parcel(Finished(ended.returncode, last_lines(ended.stderr)), files)
