"""Tables, and text from untrusted sources such as class names, for Markdown and the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np


NO_VALUE = "–"


def printable(text: str) -> str:
    """Replaces each character of `text` that has an effect but no glyph with a space.

    These are line breaks, terminal escape sequences and marks that change the writing direction.
    """
    return "".join(char if char.isprintable() else " " for char in text)


def inline_code(text: str) -> str:
    """Returns Markdown that shows `text` literally on one line.

    Neither Markdown nor HTML is interpreted inside a code span, provided that its fence is longer than every run of
    backticks in the text.
    """
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def table_cell(text: str) -> str:
    """Returns `text` as inline code for a cell of a Markdown table, where `|` ends the cell even inside code."""
    return inline_code(text).replace("|", r"\|")


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table whose columns are padded, so that its source is readable too.

    Args:
        rows (`Sequence[Sequence[str]]`):
            The header row, followed by the other rows.
    """
    rows = _pad(rows)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (len(cell) + 2) for cell in rows[0])}|")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table for the terminal. Control characters in its cells are replaced.

    Args:
        rows (`Sequence[Sequence[str]]`):
            The header row, followed by the other rows.
    """
    rows = _pad([[printable(cell) for cell in row] for row in rows])
    rows.insert(1, ["-" * len(cell) for cell in rows[0]])
    return "\n".join("  ".join(row).rstrip() for row in rows)


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: `"1 class"`, `"1,200 classes"`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def listed(words: Sequence[str]) -> str:
    """Returns words as they stand in a sentence: `"a, b and c"`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def percent(values: Sequence[float] | None) -> str:
    """Returns the mean of `values` in percent and, for several values, their standard deviation: `"70.0 ± 10.0"`.

    Args:
        values (`Sequence[float]`, *optional*):
            Values from 0 to 1, one per seed. Without values, a dash is returned.
    """
    if not values:
        return NO_VALUE
    values = 100 * np.asarray(values)
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def _pad(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]
