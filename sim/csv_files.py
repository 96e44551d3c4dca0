"""The small CSV files that a scenario may name.

Belongs here: from a path to rows of text, and numbers out of them. What the columns mean is said where they are used.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from protocols.errors import ConfigError


class Row:
    """One line of a file. Every mistake found in it names the scenario's field, the file and the line."""

    def __init__(self, field: str, name: str, line: int, cells: list[str]) -> None:
        self.line = line
        self.cells = cells
        self._field = field
        self._name = name

    def wrong(self, problem: str, *allowed: str) -> ConfigError:
        """What to raise."""
        return ConfigError(self._field, f"line {self.line} of {self._name}: {problem}", allowed)

    def node(self, column: int, num_nodes: int) -> int:
        """A node's index.

        Raises:
            ConfigError: not a whole number from 0 to `num_nodes` - 1.
        """
        text = self.cells[column]
        if not (text.isdecimal() and text.isascii() and len(text) < 10 and int(text) < num_nodes):
            raise self.wrong(f"there is no node '{text}'", f"0 to {num_nodes - 1}")
        return int(text)

    def seconds(self, column: int) -> float:
        """A virtual time.

        Raises:
            ConfigError: not a finite number of at least 0.
        """
        text = self.cells[column]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise self.wrong(f"'{text}' is no time", "seconds, 0 or more")
        return value


def read_rows(field: str, path: str | None, base: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows under the header; empty lines do not count.

    field: the scenario's field that names the file, for errors.
    path: relative to `base`, or absolute.

    Raises:
        ConfigError: no path, no such file, no UTF-8, another header, another number of columns.
    """
    header = ",".join(columns)
    if not path:
        raise ConfigError(field, "must be given", [f"the path of a CSV file with the header {header}"])
    try:
        # Spreadsheets put a byte order mark before the header; "utf-8-sig" takes it away.
        text = (base / path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(field, f"{base / path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(field, f"{base / path} is not UTF-8 text") from error
    lines = csv.reader(text.splitlines())
    found = [cell.strip() for cell in next(lines, [])]
    if found != list(columns):
        raise Row(field, path, 1, found).wrong(f"the header is '{','.join(found)}'", header)
    for cells in lines:
        row = Row(field, path, lines.line_num, [cell.strip() for cell in cells])
        if not any(row.cells):
            continue
        if len(cells) != len(columns):
            raise row.wrong(f"has {len(cells)} columns", header)
        yield row
