"""The documentation as tests read it: sections, the terms of lists, and the examples with their places."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.name.removesuffix(".md"): path for folder in ("launcher", "helper") for path in (ROOT / folder).glob("man/*")
}
README = ROOT / "README.md"


class Block(NamedTuple):
    """An example. `language`: what README says it is, "" in manual pages; `line`: of the file, where it begins."""

    path: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.path.name}:{self.line}"


def page(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """The text below a heading of any level, to the next one of the same level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[2]


def terms(text: str) -> list[tuple[str, str]]:
    """Of a list of definitions: each term as it is written, and all that is said of it, on one line."""
    found = re.findall(r"^(\S.*)\n: ((?:.+\n|\n: )+)", text, re.MULTILINE)
    return [(term, " ".join(said.replace("\n: ", " ").split())) for term, said in found]


def bold(text: str) -> list[str]:
    return re.findall(r"\*\*([^*]+)\*\*", text)


def blocks() -> Iterator[Block]:
    """Every example of README and of all manual pages."""
    yield from _fenced(README)
    for path in sorted(PAGES.values()):
        yield from _indented(path)


def _fenced(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(path, text.count("\n", 0, found.start()) + 2, found[1], found[2])


def _indented(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r"(?<=\n\n)(?:    .*\n|\n(?=    ))+", text):
        inside = re.sub(r"^    ", "", found[0], flags=re.MULTILINE)
        yield Block(path, text.count("\n", 0, found.start()) + 1, "", inside)
