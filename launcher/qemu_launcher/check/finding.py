"""What `check` has found out, as values: one finding, one line, and what to do about it.

Why it exists: each topic says what it found and how bad that is; whether the VM would start follows from the
findings alone. Pure. A fix is a sentence or a command that can be pasted; several are several lines.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from ..errors import DefinitionError

# From good to bad. ok: looked at, and as it should be. note: good to know. warning: the VM starts, but not as its user
# will want it. error: it would not start.
Severity = Literal["ok", "note", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "error")
DEFINITION = "definition"  # what findings about a definition itself are about


class Finding(NamedTuple):
    """`about` names the topic, for programs that read them; `text` says what, which value, where.

    `may_come`: it is about a file that is not there, and need not be before before_start has run.
    """

    severity: Severity
    about: str
    text: str
    fix: str | None = None
    may_come: bool = False


def mistakes(problems: Iterable[DefinitionError]) -> Iterator[Finding]:
    """What is wrong with a definition, each with its place."""
    for problem in problems:
        yield Finding("error", DEFINITION, str(problem), problem.hint)


def would_stop(findings: Iterable[Finding]) -> bool:
    """Whether any of them would keep the VM from starting."""
    return any(finding.severity == "error" for finding in findings)


def left_to_before_start(findings: Iterable[Finding]) -> int:
    """How many files the VM would start with, that only before_start can make."""
    return sum(finding.may_come for finding in findings)


def counted(findings: Iterable[Finding]) -> str:
    """`2 errors, 1 warning`; empty when there is neither."""
    severities = [finding.severity for finding in findings]
    numbers = {severity: severities.count(severity) for severity in ("error", "warning")}
    return ", ".join(f"{number} {severity}{'s' * (number != 1)}" for severity, number in numbers.items() if number)


def without_repetitions(findings: Iterable[Finding]) -> list[Finding]:
    """In their order, each text once, and as severe as the worst of them.

    What keeps three requests from being granted is one thing to repair.
    """
    kept: dict[str, Finding] = {}
    for finding in findings:
        before = kept.get(finding.text, finding)
        kept[finding.text] = max(before, finding, key=lambda one: SEVERITIES.index(one.severity))
    return list(kept.values())
