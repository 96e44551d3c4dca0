"""covey's simulator beside gossipy-dfl and Flower's simulation: the same task, this machine, one call.

    python benchmarks/field/run.py --setup DIR     make the other systems' environments under DIR, once
    python benchmarks/field/run.py DIR [--json] [--repeat 3] [--seconds 20] [--only gossipy,flower]

node_rounds_per_s   by system and number of nodes: nodes x rounds over wall seconds, without imports and set-up;
                    median of the repeats
ratio_to_gossipy, ratio_to_flower
                    covey's median over theirs, by number of nodes
runs                every run's JSON line, in the order they ran

Every run is a process of its own, none runs beside another, and every second repeat goes through them backwards.
Method and caveats: README.md in this folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
import venv
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PLAN = (("covey", 100), ("gossipy", 100), ("flower", 100), ("covey", 300), ("gossipy", 300))
"""System and nodes, in the order of the first repeat."""
INSTALLS = {
    "gossipy": (["torch==2.13.0", "gossipy-dfl==0.0.1"],),
    # flwr 1.42.0 asks for a certifi newer than some mirrors hold; 1.41.0 asks for everything else that it needs.
    "flower": (["torch==2.13.0", "flwr[simulation]==1.41.0"], ["--no-deps", "flwr==1.42.0"]),
}
"""By system, what pip is asked for, call by call."""


# --- environments ---------------------------------------------------------------------------------------
def set_up(folder: Path) -> None:
    for system, calls in INSTALLS.items():
        print(f"{system}: {folder / system}", file=sys.stderr)
        venv.create(folder / system, with_pip=True, clear=True)
        for packages in calls:
            subprocess.run(
                [python_of(system, folder), "-m", "pip", "install", "--quiet", *packages], check=True
            )


def python_of(system: str, folder: Path) -> str:
    if system == "covey":
        return sys.executable
    python = folder / system / "bin" / "python"
    if not python.exists() and not (python := folder / system / "Scripts" / "python.exe").exists():
        sys.exit(f"{folder / system} holds no environment; make it: {sys.argv[0]} --setup {folder}")
    return str(python)


# --- runs -----------------------------------------------------------------------------------------------
def write_data(path: Path) -> None:
    """covey's own split of the digits, for all."""
    import numpy as np

    from node.task_loading import make_task

    task = make_task("digits", {}, HERE)
    arrays = zip(("x", "y", "test_x", "test_y"), (*task.train, *task.test), strict=True)
    np.savez(path, **{name: tensor.numpy() for name, tensor in arrays})


def measure(system: str, nodes: int, seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    command = [python_of(system, folder), str(HERE / f"{system}_digits.py")]
    command += ["--data", str(folder / "digits.npz"), "--nodes", str(nodes)]
    command += ["--seconds", str(seconds), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{system} with {nodes} nodes failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    # Not always the last line: what a system prints in closing comes after it.
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"system"'))
    return json.loads(line)


def run_plan(systems: list[str], repeat: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    plan = [(system, nodes) for system, nodes in PLAN if system in systems]
    runs = []
    for seed in range(repeat):
        for system, nodes in reversed(plan) if seed % 2 else plan:
            runs.append(measure(system, nodes, seconds, seed, folder))
            print(json.dumps(runs[-1]), file=sys.stderr)
    return runs


# --- figures --------------------------------------------------------------------------------------------
def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        speeds[run["system"]][str(run["nodes"])].append(run["node_rounds_per_s"])
    medians = {
        system: {nodes: statistics.median(values) for nodes, values in by_nodes.items()}
        for system, by_nodes in speeds.items()
    }
    ours = medians.get("covey", {})
    ratios = {
        f"ratio_to_{system}": {nodes: round(ours[nodes] / value, 1) for nodes, value in by_nodes.items()}
        for system, by_nodes in medians.items()
        if ours and system != "covey"
    }
    return {"node_rounds_per_s": medians, **ratios, "runs": runs}


def table(figures: dict[str, Any]) -> str:
    rows = [
        "| system | nodes | node-rounds/s | lowest to highest | covey is faster by |",
        "|---|---|---|---|---|",
    ]
    for system, by_nodes in figures["node_rounds_per_s"].items():
        for nodes, median in by_nodes.items():
            same = [r for r in figures["runs"] if (r["system"], str(r["nodes"])) == (system, nodes)]
            values = [r["node_rounds_per_s"] for r in same]
            ratio = figures.get(f"ratio_to_{system}", {}).get(nodes)
            rows.append(
                f"| {system} {same[0]['version']} | {nodes} | {median:,.0f} | {min(values):,.0f} to {max(values):,.0f} "
                f"| {f'{ratio:,.1f}x' if ratio else ''} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="of the environments")
    parser.add_argument("--setup", action="store_true", help="make the environments, anew if they are there")
    parser.add_argument("--only", default="covey,gossipy,flower", help="systems, with commas between")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="least length of each run that counts")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    if asked.setup:
        set_up(folder)
        return
    systems = asked.only.split(",")
    if unknown := set(systems) - {system for system, _ in PLAN}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of covey, gossipy, flower")
    for system in systems:
        python_of(system, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder / "digits.npz")
    figures = summarise(run_plan(systems, asked.repeat, asked.seconds, folder))
    print(json.dumps(figures, indent=2) if asked.json else table(figures))


if __name__ == "__main__":
    main()
