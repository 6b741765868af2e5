"""How what a check has found is told: to people, who may paste it into a bug report, and to programs as JSON."""

from collections.abc import Sequence

from .. import stdout, table
from ..errors import printable
from . import finding, versions
from .finding import Finding
from .tree import Tree

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
_WIDTH = max(map(len, finding.SEVERITIES)) + 2

Facts = list[tuple[str, str]]


def system_facts(tree: Tree) -> Facts:
    """What the reports of both forms say of the host and the user."""
    return [
        ("kernel", versions.kernel()),
        ("system", f"{versions.distribution(tree)}, {versions.systemd(tree)}"),
        ("user", versions.user()),
    ]


def show(head: Facts, found: Sequence[Finding], verdict: str) -> None:
    """For people, and for bug reports."""
    width = max(len(name) for name, _ in head) + 2
    told: set[str] = set()
    with table.page() as page:
        for name, value in head:
            page.marked("", "", printable(f"{name:<{width}}{value}"))
        page.line("")
        for one in found:
            text, *more = [part for part in printable(one.text).splitlines() if part] or [""]
            page.marked(one.severity, STYLES[one.severity], f"{'':<{_WIDTH - len(one.severity)}}{text}")
            fix = "(as above)" if one.fix in told else printable(one.fix or "")
            told.add(one.fix or "")
            for line in [*more, *fix.splitlines()]:
                page.marked("", "", f"{'':<{_WIDTH}}{line}")
        page.line("")
        page.marked(verdict, "bold", "")


def say_json(begin: dict[str, object], head: Facts, found: Sequence[Finding]) -> None:
    """The same for programs: head and findings with their names."""
    facts = {name: printable(value) for name, value in head}
    items = [
        # printable: a file's name may be no text.
        {
            "severity": one.severity,
            "about": one.about,
            "text": printable(one.text),
            "fix": one.fix and printable(one.fix),
        }
        for one in found
    ]
    left = {"left_to_before_start": finding.left_to_before_start(found)}
    whole = {**begin, **left, "system": facts, "findings": items}
    stdout.say_json(whole, indent=2)
