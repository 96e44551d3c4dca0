"""The merge rules described: lines for `covey rules`, and the table of `docs/rules.md`.

Belongs here: from the registry to text. The figures come from `benchmarks/merge.py --rules`, which leaves them in
`docs/rules_measured.json`. Made anew with: python -m node.rule_docs docs/rules.md
"""

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aggregation.base import MODEL, SAMPLES, VALIDATION
from aggregation.rules import RULES, RuleEntry

MEASURED_FILE = "rules_measured.json"
TABLE_HEADING = "## All rules"
_NEEDS = {MODEL: "network", SAMPLES: "own samples", VALIDATION: "validation samples"}


def describe(name: str) -> dict[str, Any]:
    """One rule as plain data."""
    entry = RULES[name]
    return {
        "name": name,
        "summary": entry.summary,
        "source": entry.source,
        "leaves": _leaves(entry),
        "common_start": entry.common_start,
        "needs": _needs(entry),
        "time": entry.time,
        "memory": entry.memory,
        "when": entry.when,
        "arguments": {
            parameter.name: parameter.default
            for parameter in inspect.signature(entry.factory).parameters.values()
        },
        "text": inspect.getdoc(entry.factory) or "",
    }


def _leaves(entry: RuleEntry) -> str:
    if entry.reduces:
        return "one model"
    return "the one model, changed" if entry.takes_one else "the received models, changed or fewer"


def _needs(entry: RuleEntry) -> list[str]:
    needs = entry.factory().needs
    return [word for need, word in _NEEDS.items() if need in needs]


def table(measured: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown, a row for each rule in the order of the registry.

    measured: by rule "ms" and "extra_models" of one merge.
    """
    lines = [
        "| rule | what it does | source | common start? | needs | time, memory | measured | when to use it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in RULES.items():
        figures = measured[name]
        cells = [
            f"`{name}`",
            entry.summary,
            entry.source,
            entry.common_start,
            ", ".join(_needs(entry)) or "nothing",
            f"{entry.time}; {entry.memory}",
            f"{figures['ms']:,.3g} ms; {figures['extra_models']:.1f} models",
            entry.when,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(page: str, measured: Mapping[str, Mapping[str, float]]) -> str:
    """`docs/rules.md` with its table made anew: all that follows the heading's first line of a table."""
    before, heading, after = page.partition(TABLE_HEADING)
    introduction = after.partition("\n| ")[0]
    return f"{before}{heading}{introduction}\n{table(measured)}"


def read_measured(folder: Path) -> dict[str, dict[str, float]]:
    """What was measured last, by rule."""
    found: dict[str, dict[str, float]] = json.loads((folder / MEASURED_FILE).read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    _page = Path(sys.argv[1])
    _text = with_table(_page.read_text(encoding="utf-8"), read_measured(_page.parent))
    _page.write_text(_text, encoding="utf-8")
