"""The page of merge rules is what the registry and the last measurement say."""

from pathlib import Path

import pytest

from aggregation.rules import RULES
from node.rule_docs import MEASURED_FILE, TABLE_HEADING, describe, read_measured, table, with_table

DOCS = Path(__file__).parents[2] / "docs"
AGAIN = "make it anew: python -m node.rule_docs docs/rules.md"


def test_the_page_is_current() -> None:
    page = (DOCS / "rules.md").read_text(encoding="utf-8")

    assert page == with_table(page, read_measured(DOCS)), AGAIN


def test_every_rule_was_measured() -> None:
    measured = read_measured(DOCS)

    assert set(measured) == set(RULES), "measure anew: python benchmarks/merge.py --rules"
    for name, figures in measured.items():
        assert figures["ms"] > 0, name
        assert figures["extra_models"] >= 0, name


def test_a_new_entry_changes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {**read_measured(DOCS), "again": {"ms": 1.5, "extra_models": 0.25}}
    monkeypatch.setitem(RULES, "again", RULES["mean"])
    page = (DOCS / "rules.md").read_text(encoding="utf-8")

    anew = with_table(page, measured)

    assert "| `again` |" in anew
    assert "1.5 ms; 0.2 models" in anew
    assert anew.startswith(page[: page.index(TABLE_HEADING)])


def test_the_table_has_a_row_for_each_rule_with_what_it_needs() -> None:
    rows = table(read_measured(DOCS)).splitlines()[2:]

    assert [row.split("`")[1] for row in rows] == list(RULES)
    fisher = next(row for row in rows if row.startswith("| `fisher`"))
    assert "| network, own samples |" in fisher


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_described_in_plain_data(name: str) -> None:
    data = describe(name)

    assert data["common_start"] in ("yes", "no", "alike")
    assert data["text"].count("Source:") == 1, "a docstring says where its rule comes from"
    for argument in data["arguments"]:
        assert f"{argument}" in data["text"] or argument in ("by",), argument
    assert MEASURED_FILE.endswith(".json")
