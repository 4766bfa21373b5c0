"""Text from anywhere, such as class names, shown as it is: in Markdown, on a page, in a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence


def printable(text: str) -> str:
    """One line of `text`, with a space in place of every character that is not shown but does something: line breaks,
    escape sequences of terminals, and the marks that turn the direction of writing around."""
    return "".join(char if char.isprintable() else " " for char in text)


def inline_code(text: str) -> str:
    """One line of Markdown code that shows `text` as it is.

    Nothing inside a code span is markup, neither Markdown nor HTML, as long as its fence is longer than any run of
    backticks in it.
    """
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def table_cell(text: str) -> str:
    """The same, inside of a table."""
    return inline_code(text).replace("|", r"\|")  # a cell ends at a bar even inside of code


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def aligned(rows: list[list[str]]) -> str:
    """Columns of equal width, with a line under the first row; no cell can do anything to the terminal."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
