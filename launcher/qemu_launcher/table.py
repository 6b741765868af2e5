"""Tables for people: aligned columns, or rich's where stdout is a terminal that wants them.

Why it exists: each command that shows a table has both forms, and rich may be missing. It is imported only for a
terminal, since it takes longer than all the rest. Every cell is text: no markup in it means anything.
"""

import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

NARROWEST = 20  # columns; below it a table is a column of single letters


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line for each row, the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


class RichPage:
    """What is printed with rich. Made by `rich_page`."""

    def __init__(self, console: Any, table: Any, text: Any) -> None:
        self._console = console
        self._table = table
        self._text = text

    def line(self, text: str, *, bold: bool = False) -> None:
        """One line."""
        self._console.print(self._text(text, style="bold" if bold else ""))

    def marked(self, word: str, style: str, rest: str) -> None:
        """One line that begins with a coloured word. Not wrapped here: what can be pasted must stay one line."""
        self._console.print(self._text.assemble((word, style), rest), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table with a head."""
        table = self._table()
        for column in columns:
            table.add_column(column, overflow="fold")  # on a narrow terminal nothing is left out
        for row in rows:
            table.add_row(*map(self._text, row))
        self._console.print(table)


def rich_page(file: TextIO | None = None) -> RichPage | None:
    """None if rich is not installed, or the terminal wants none of it. What goes to `file` is drawn for stdout."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console  # noqa: PLC0415  only for a terminal, and only if it is there
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415
    except ImportError:
        return None
    console = Console(highlight=False)
    if console.width < NARROWEST:  # COLUMNS=0, or a window being made: rich would print nothing at all
        return None
    if file is not None:
        console = Console(highlight=False, file=file, force_terminal=True, width=console.width)
    return RichPage(console, Table, Text)


def rich_text(draw: Callable[[RichPage], None]) -> str | None:
    """What `draw` would put on a terminal; None where rich cannot be used."""
    text = io.StringIO()
    if (page := rich_page(text)) is None:
        return None
    draw(page)
    return text.getvalue()


def page_for_stdout() -> RichPage | None:
    """A page on stdout; None where `rich_page` gives none, or stdout is no terminal."""
    return rich_page() if sys.stdout is not None and sys.stdout.isatty() else None
