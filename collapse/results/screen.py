"""Text for a terminal: paragraphs and tables that fit its width, 80 columns where there is none."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence

NARROWEST, WIDEST, NAME = 40, 120, 8


def columns() -> int:
    """The width of the terminal, or of COLUMNS, from 40 to 120; 80 where there is none."""
    return min(WIDEST, max(NARROWEST, shutil.get_terminal_size((80, 24)).columns))


def paragraph(text: str) -> str:
    """The text in lines that fit."""
    return textwrap.fill(text, columns(), break_long_words=False, break_on_hyphens=False)


def fitted(rows: Sequence[Sequence[str]], short: Mapping[str, str] | None = None) -> str:
    """A table as lines: the first column to the left, numbers to the right.

    rows: the heads, then a row each.  short: heads that stand instead where the table is too wide; a name that is
    still too long has a line of its own.
    """
    width = columns()
    if _widths(rows, 2) > width:
        rows = [[(short or {}).get(head, head) for head in rows[0]], *rows[1:]]
    gap = 2 if _widths(rows, 2) <= width else 1
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = min(sizes[0], max(NAME, width - sum(sizes[1:]) - gap * (len(sizes) - 1)))
    lines = []
    for name, *cells in rows:
        if len(name) > first:
            lines.append(name)
            name = ""
        lines.append((" " * gap).join([name.ljust(first), *map(str.rjust, cells, sizes[1:])]).rstrip())
    return "\n".join(lines)


def _widths(rows: Sequence[Sequence[str]], gap: int) -> int:
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return sum(sizes) + gap * (len(sizes) - 1)
