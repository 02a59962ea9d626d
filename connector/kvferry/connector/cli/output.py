"""How commands print: aligned columns, marks for levels, and nothing that a terminal would obey."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import click

__all__ = ["clean", "mark", "table"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")
_COLOURS = {"ok": "green", "warn": "yellow", "error": "red"}


def clean(text: str, longest: int = 200) -> str:
    """Return text of unknown origin without control characters, and cut to a length."""
    printable = _CONTROL.sub("?", text)
    return printable if len(printable) <= longest else printable[: longest - 3] + "..."


def mark(level: str) -> str:
    """Return a level's name, coloured and padded."""
    return click.style(f"{level:<5}", fg=_COLOURS.get(level))


def table(rows: Sequence[Sequence[str]], indent: str = "", right: Sequence[int] = ()) -> Iterator[str]:
    """Yield rows as lines with aligned columns, two spaces apart.

    Args:
        rows: Cells; all rows of one length.
        indent: Before every line.
        right: Columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (indent + "  ".join(cells)).rstrip()
