"""Text from anywhere, such as class names, shown in Markdown as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence


def inline_code(text: str) -> str:
    """One line of Markdown code that shows `text` as it is.

    Nothing inside a code span is markup, neither Markdown nor HTML, as long as its fence is longer than any run of
    backticks in it.
    """
    text = "".join(char if char.isprintable() else " " for char in text)
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
