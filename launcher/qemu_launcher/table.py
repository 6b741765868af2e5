"""What people read, with tables in it: aligned columns, or rich's where stdout is a terminal that wants them.

Why it exists: no command that shows something has to know of both forms, and rich may be missing. It is imported only
for a terminal, since it takes longer than all the rest. Every cell is text: no markup in it means anything.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

from . import stdout

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

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, indent: int = 0) -> None:  # noqa: ARG002
        """A table with a head, and a frame that tells it from the lines around it."""
        table = self._table()
        for column in columns:
            table.add_column(column, overflow="fold")  # on a narrow terminal nothing is left out
        for row in rows:
            table.add_row(*map(self._text, row))
        self._console.print(table)


class PlainPage:
    """The same as `text`, of which nothing is printed here."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        """All lines, each with its end."""
        return "".join(f"{line}\n" for line in self._lines)

    def line(self, text: str, *, bold: bool = False) -> None:  # noqa: ARG002  text has no such thing
        """One line."""
        self._lines.append(text)

    def marked(self, word: str, style: str, rest: str) -> None:  # noqa: ARG002
        """The same."""
        self.line(word + rest)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, indent: int = 0) -> None:
        """A table with a head."""
        self._lines += (" " * indent + line for line in aligned([columns, *rows]))


Page = RichPage | PlainPage


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


def drawn(draw: Callable[[Page], None]) -> str:
    """What `draw` would put on a terminal."""
    text = io.StringIO()
    if (rich := rich_page(text)) is not None:
        draw(rich)
        return text.getvalue()
    plain = PlainPage()
    draw(plain)
    return plain.text


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A page for stdout, where all of it is when the context ends."""
    if (rich := page_for_stdout()) is not None:
        yield rich
        return
    plain = PlainPage()
    yield plain
    stdout.say(plain.text)


def page_for_stdout() -> RichPage | None:
    """A page on stdout; None where `rich_page` gives none, or stdout is no terminal."""
    return rich_page() if sys.stdout is not None and sys.stdout.isatty() else None
