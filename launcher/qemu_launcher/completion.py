"""What may come next on the command line: for the shells, whose scripts ask `qemu-launcher __complete WORD...`.

Why it exists: the commands, their options and the places of definitions are known here and nowhere else; a shell that
had them too would soon know other ones. `__complete` can be no VM's name, so it takes none away.

The words are those after the program's name, the last one being what stands before the cursor, perhaps nothing. The
answer has a line for each word that may stand there: the word, a tab, and what it means. Where the shell knows more
than we do it is one line instead: :files, :users or :commands. Nothing is asked of any QEMU and no definition is read,
so this is over before the user has looked. It never fails: where nothing is known, nothing is said.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from . import cli, locate, stdout
from .errors import LauncherError, printable

FILES, USERS, COMMANDS = ":files", ":users", ":commands"

# What the words after a command are, in their order. A test holds this to cli.COMMANDS, and the next to cli.VALUED.
DEFINITION, RUNNING, ANYTHING = "definition", "running", "anything"
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "run": (DEFINITION,),
    "start": (DEFINITION,),
    "stop": (RUNNING,),
    "kill": (RUNNING,),
    "pause": (RUNNING,),
    "resume": (RUNNING,),
    "list": (),
    "status": (RUNNING,),
    "check": (DEFINITION,),
    "command": (DEFINITION,),
    "import": (COMMANDS, FILES),  # behind --
    "monitor": (RUNNING, ANYTHING),
    "qmp": (RUNNING, ANYTHING),
    "limits": (),
    "release": (RUNNING,),
}
VALUES = {"--owner": USERS, "-o": FILES, "--output": FILES, "--libvirt": FILES}
_GENERAL = ("-h", "--help", "--version")


class Candidate(NamedTuple):
    word: str
    meaning: str = ""


class _Line(NamedTuple):
    """What stands before the cursor's word. `command` is None as long as it may still come."""

    command: str | None
    plain: int  # words that are neither the command nor an option
    valued: str | None  # the option whose value comes next
    is_literal: bool  # after --
    options: frozenset[str]


def answer(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print what may stand in the place of the last of `words`. Returns the exit status, 0."""
    try:
        lines = _candidates(words, environ) if words else []
    except (LauncherError, OSError):
        lines = []
    stdout.say("".join(f"{printable(word)}\t{printable(meaning)}\n".replace("\t\n", "\n") for word, meaning in lines))
    return 0


def _candidates(words: Sequence[str], environ: Mapping[str, str]) -> list[Candidate]:
    line, current = _read(words[:-1]), words[-1]
    if line.valued is not None:
        return [Candidate(VALUES.get(line.valued, FILES))]
    if current.startswith("-") and not line.is_literal:
        return _matching(_options(line), current)
    if line.command is None:
        found = _matching([*_commands(), *_definitions(environ)], current)
        return found or [Candidate(FILES)]
    kinds = ARGUMENTS.get(line.command, (FILES,))
    if line.command == "import" and not line.is_literal:
        return _matching([Candidate("--", "QEMU's command line follows")], current)
    kind = kinds[min(line.plain, len(kinds) - 1)] if line.plain < len(kinds) or line.command == "import" else ANYTHING
    if kind == RUNNING:
        return _matching(_running(), current)
    if kind == DEFINITION:
        return _matching(_definitions(environ), current) or [Candidate(FILES)]
    return [] if kind == ANYTHING else [Candidate(kind)]


def _read(words: Sequence[str]) -> _Line:
    line = _Line(None, 0, None, is_literal=False, options=frozenset())
    for word in words:
        if line.valued is not None:
            line = line._replace(valued=None)
        elif line.is_literal or not word.startswith("-") or word == "-":
            if line.command is None and word in cli.COMMANDS and not line.is_literal:
                line = line._replace(command=word)
            else:
                line = line._replace(command=line.command or "run", plain=line.plain + 1)
        elif word == "--":
            line = line._replace(is_literal=True, command=line.command or "run")
        else:
            line = line._replace(options=line.options | {word}, valued=word if word in cli.VALUED else None)
    return line


def _matching(candidates: Sequence[Candidate], current: str) -> list[Candidate]:
    return [candidate for candidate in candidates if candidate.word.startswith(current)]


def _commands() -> Iterator[Candidate]:
    meanings = _help()
    return (Candidate(command, meanings.get(command, "")) for command in cli.COMMANDS)


def _options(line: _Line) -> list[Candidate]:
    meanings = _help()
    if line.command == "monitor" and line.plain:
        return []  # all that follows is QEMU's
    fitting = [option for option, commands in cli.OPTIONS.items() if line.command is None or line.command in commands]
    return [
        Candidate(option, meanings.get(option, "")) for option in (*fitting, *_GENERAL) if option not in line.options
    ]


def _help() -> dict[str, str]:
    """What the help says of each command and option, without whose an option is."""
    found = dict[str, str]()
    for line in cli.HELP.splitlines():
        head, text = line[:_HELP_COLUMN], line[_HELP_COLUMN:]
        if head.startswith("  ") and text:
            owner, colon, rest = text.partition(": ")
            is_owned = bool(colon) and all(word in cli.COMMANDS for word in owner.split(", "))
            words = head.split()
            for word in words[:1] if words[:1] and words[0] in cli.COMMANDS else words:
                found.setdefault(word, rest if is_owned and word.startswith("-") else text)
    return found


_HELP_COLUMN = 19  # where the meanings begin


def _definitions(environ: Mapping[str, str]) -> list[Candidate]:
    located, _ = locate.located(locate.folders(environ))
    usable = [one for one in located if one.shadowed_by is None and one.problem is None]
    return [Candidate(one.name, os.fspath(one.path)) for one in sorted(usable, key=lambda one: one.name)]


def _running() -> list[Candidate]:
    from . import runtime  # noqa: PLC0415  where a definition is wanted it would only cost time

    return [Candidate(vm.name, f"PID {vm.qemu.pid}" if vm.qemu else "starting") for vm in runtime.find_all()]
