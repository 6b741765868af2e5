"""Everything the launcher says when it will not, or cannot, do what it was asked.

    LauncherError                exit 1
    |-- UsageError               exit 2   the command line is wrong
    |-- DefinitionError          exit 2   the definition is wrong, or cannot be had; knows file, line and column
    |-- NotRunning               exit 3   the VM asked about is not running
    |-- NoGrant                  exit 3   the VM that is to give something back holds nothing
    |-- AlreadyRunning           exit 1   the VM asked for runs already
    |-- QemuFailed               exit 1   QEMU could not be started, or ended before the guest ran (then QEMU's own)
    |-- HookFailed               exit 1   a command of before_start or after_stop did not do
    |-- QmpError                 exit 1   QEMU's monitor answered with an error, with nonsense, or not at all
    `-- TuningFailed             exit 1   the guest has not run, it cannot be given what its definition asks for
        |-- PasswordWanted       exit 1   because polkit wants a password, and nobody was to be asked for one
        `-- Unfit                exit 2   because the definition asks for what this guest, by its own options, has not

A message says what, which value and where; the hint says what to do about it. Neither ends in a full stop and
neither carries the program's name: `render` adds what belongs on the terminal. Values that come from outside go
into messages through `!r`; `render` escapes whatever could still upset a terminal.
"""

# ruff: noqa: N818  named for what happened, as the sentences that raise them read
from collections.abc import Sequence
from typing import NamedTuple

PROGRAM = "qemu-launcher"
LONGEST_QUOTE = 60  # characters of a wrong value that a message repeats
A_SLIP = 0.75  # how near a word must be to a command to be a slip of one: stpo, and not first to list
MOST_PROBLEMS = 10  # more than a screenful hides the first one, which is usually the cause of the others


class Mark(NamedTuple):
    """A place in a definition file. Line and column count from 1, columns in characters."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class LauncherError(Exception):
    """Base of all errors that are shown to the user as a message, never as a traceback."""

    exit_status = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(LauncherError):
    """The command line makes no sense; nothing has been done."""

    exit_status = 2


class DefinitionError(LauncherError):
    """The definition cannot be used; nothing has been started.

    `mark` is where, or None when the file itself cannot be read. `problems` holds every problem found in one go
    (this error alone, unless it was made by `several`).
    """

    exit_status = 2

    def __init__(self, message: str, hint: str | None = None, *, mark: Mark | None = None) -> None:
        super().__init__(message, hint)
        self.mark = mark
        self.problems: tuple[DefinitionError, ...] = (self,)

    def __str__(self) -> str:
        return "\n".join(
            problem.message if problem.mark is None else f"{problem.mark}: {problem.message}"
            for problem in self.problems
        )

    @classmethod
    def several(cls, problems: Sequence["DefinitionError"]) -> "DefinitionError":
        """One error that tells all of `problems` (at least one), in the order of the file."""
        # An alias brings the same mistake again wherever it is used.
        flat = list({(part.mark, part.message): part for problem in problems for part in problem.problems}.values())
        flat.sort(key=lambda problem: (0, 0) if problem.mark is None else problem.mark[1:])
        if len(flat) == 1:
            return flat[0]
        first = flat[0]
        whole = cls(first.message, first.hint, mark=first.mark)
        whole.problems = tuple(flat)
        return whole


class NotRunning(LauncherError):
    """The VM that was asked about is not running."""

    exit_status = 3


class NoGrant(LauncherError):
    """The VM that is to give back what it was granted holds nothing; nothing has been done."""

    exit_status = 3


class AlreadyRunning(LauncherError):
    """The VM runs already; the running one was left alone."""


class QemuFailed(LauncherError):
    """QEMU could not be started, or ended before the guest ran. QEMU is gone and reaped.

    `exit_status` is QEMU's own where it ended with a failure (128+N for signal N), else 1.
    """

    def __init__(self, message: str, hint: str | None = None, *, exit_status: int = 1) -> None:
        super().__init__(message, hint)
        self.exit_status = exit_status


class HookFailed(LauncherError):
    """A command of the user's own, of before_start or after_stop, could not be started or did not exit 0."""


class QmpError(LauncherError):
    """QEMU's monitor answered with an error, with nonsense, or not in time. `error_class` is QMP's own, or None."""

    def __init__(self, message: str, hint: str | None = None, *, error_class: str | None = None) -> None:
        super().__init__(message, hint)
        self.error_class = error_class


class TuningFailed(LauncherError):
    """The guest cannot be given what its definition asks for, and has not run.

    `wire_name` is the D-Bus error name of the helper's refusal, or None when the helper was not the one who refused.
    """

    def __init__(self, message: str, hint: str | None = None, *, wire_name: str | None = None) -> None:
        super().__init__(message, hint)
        self.wire_name = wire_name


class PasswordWanted(TuningFailed):
    """The helper's NotAuthorized where polkit would say yes to a password, and nobody was to be asked for one."""


class Unfit(TuningFailed):
    """The tuning does not fit the guest that the same definition describes: its vCPUs, its iothreads, its RAM.

    A mistake in the definition, though perhaps only QEMU could tell: it is gone then, and its guest has not run.
    """

    exit_status = 2


def printable(text: str) -> str:
    """`text` with everything escaped that is not plainly visible: control characters, bidi marks, undecodable bytes.

    Line breaks stay, because hints may have several lines of ours; values come in through `!r`.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character == "\n" or character.isprintable() else _escape(character) for character in text
    )


def one_line(text: str) -> str:
    """The same for what is one line whatever it names: a path with a line break in it forges no second message."""
    return printable(text).replace("\n", "\\n")


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # an undecodable byte, as surrogateescape carries it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def render(error: LauncherError) -> str:
    """The whole message for stderr, ending in a line break: `qemu-launcher: what`, and the hint indented below it."""
    problems: Sequence[LauncherError] = error.problems if isinstance(error, DefinitionError) else (error,)
    lines: list[str] = []
    for problem in problems[:MOST_PROBLEMS]:
        mark = problem.mark if isinstance(problem, DefinitionError) else None
        lines.append(one_line(f"{PROGRAM}: {problem.message if mark is None else f'{mark}: {problem.message}'}"))
        if problem.hint is not None:
            lines.extend(f"    {line}" for line in problem.hint.splitlines())
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"{PROGRAM}: and more")
    return printable("\n".join(lines)) + "\n"


def shortened(text: str, most: int = LONGEST_QUOTE) -> str:
    """`text`, or its beginning where it would drown the message."""
    return text if len(text) <= most else text[:most] + "..."


def did_you_mean(word: str, choices: Sequence[str], least: float = 0.6) -> str | None:
    """A hint that names the nearest of `choices`, None when none is as near as `least`, of 1 for the same word."""
    import difflib  # noqa: PLC0415  only needed when something is wrong already

    close = difflib.get_close_matches(word[:LONGEST_QUOTE].lower(), choices, n=1, cutoff=least)
    return f"did you mean {close[0]}?" if close else None
