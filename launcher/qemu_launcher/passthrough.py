"""QEMU's own two languages, passed on to a running VM: `qmp` and `monitor`.

    qmp       one command of QMP, with its arguments as JSON; what it returns is printed as JSON
    monitor   lines of HMP, the monitor for people: one from the command line, or many from a prompt or a pipe

Each command has a connection of its own, because QEMU serves one client of the control socket at a time: `status` and
`stop` go on working while somebody sits at the prompt. So nothing is kept between two commands, and no events are seen.

Refused: while the launcher still holds the guest, or when it died before it let it run, everything but questions. The
guest may not be tuned yet, and there are many ways to let it run. That keeps mistakes out, and nobody else: the socket
is the user's own.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from . import control, runtime, stdout
from .errors import PROGRAM, LauncherError, NotRunning, UsageError, did_you_mean, printable, render, shortened
from .qmp import Qmp, QmpRefused
from .runtime import Found

PROMPT = "(qemu) "
_BANNER = "QEMU's monitor of {name}. Ctrl-D or exit leaves it; quit would end the VM, without asking the guest."
_QUIT = ("quit", "q")
_MEANT = "quit ends {name} at once, without asking the guest: say it once more if you mean that, or leave with Ctrl-D"
_HMP = "human-monitor-command"
# HMP's names end at white space or a slash (get_command_name in monitor/hmp.c), and these have no such suffix.
_HMP_QUESTIONS = ("info", "help", "?")


def qmp(name: str, command: str, arguments: str | None) -> int:
    """Run one QMP command and print what it returns. Returns the exit status. UsageError for bad arguments."""
    _validate_text("the command", command)
    members = {} if arguments is None else read_arguments(arguments)
    vm = control.running(name, f"qmp {name} {command}")
    _say_answer(asyncio.run(_execute(vm, command, members)))
    return 0


def monitor(name: str, line: str | None) -> int:
    """Run one line of HMP, or those that come from stdin, and print the answers. Returns the exit status."""
    vm = control.running(name, f"monitor {name}")
    if line is not None:
        _validate_text("the command", line)
        _say_text(asyncio.run(_execute_hmp(vm, line)))
    elif sys.stdin is None:
        raise LauncherError("standard input is closed", f"give the command itself: {PROGRAM} monitor {name} info block")
    elif sys.stdin.isatty() and _stdout_is_terminal():
        _prompt(name)
    else:
        for piped in sys.stdin.buffer:
            words = piped.decode(errors="surrogateescape").strip()
            _validate_text("the command", words)
            if words == "exit":
                break
            if words:
                _say_text(asyncio.run(_execute_hmp(control.running(name, f"monitor {name}"), words)))
    return 0


def read_arguments(text: str) -> dict[str, Any]:
    """The members of a JSON object. UsageError, with the place, for all that is none."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key in found if [name for name, _ in pairs].count(key) > 1)
            raise _no_object(f"the key {shortened(twice)!r} is given twice")
        return found

    def constant(word: str) -> None:
        raise _no_object(f"{word} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=members, parse_constant=constant)
    except json.JSONDecodeError as err:
        message = err.msg[:1].lower() + err.msg[1:]
        raise _no_object(f"line {err.lineno}, column {err.colno}: {message}: {shortened(text)!r}") from err
    except (ValueError, RecursionError) as err:
        raise _no_object(f"a number too long, or nesting too deep: {shortened(text)!r}") from err
    if not isinstance(value, dict):
        raise _no_object(f"line 1, column 1: an object is wanted, not {shortened(text)!r}")
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as err:
        raise _no_object(f"it is no UTF-8: {shortened(text)!r}") from err
    except ValueError as err:
        raise _no_object(f"a number too large: {shortened(text)!r}") from err
    return value


def _no_object(why: str) -> UsageError:
    return UsageError(f"the arguments are no JSON object: {why}", """in a shell: '{"device": "drive0"}'""")


def _validate_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is no UTF-8: {shortened(text)!r}") from None


# What is passed on


async def _execute(vm: Found, command: str, arguments: Mapping[str, Any]) -> Any:
    async with control.linked(vm) as qmp:
        _refuse_acting_on_held(vm, command, arguments)
        try:
            return await qmp.execute(command, arguments)
        except QmpRefused as err:
            if err.error_class == "CommandNotFound":
                err.hint = await _similar(qmp, command)
            raise


async def _execute_hmp(vm: Found, line: str) -> str:
    return str(await _execute(vm, _HMP, {"command-line": line}))


async def _similar(qmp: Qmp, command: str) -> str | None:
    known = await qmp.execute("query-commands")
    return did_you_mean(command, [str(entry["name"]) for entry in known])


def _refuse_acting_on_held(vm: Found, command: str, arguments: Mapping[str, Any]) -> None:
    """Called when connected: the VM may be one that was started since we looked."""
    if _is_question(command, arguments) or (now := runtime.find(vm.name)) is None:
        return
    try:
        control.refuse_held(now)
    except LauncherError as err:
        err.hint = f"{err.hint}\nonly questions are passed on to it: query-... of QMP, info and help of HMP"
        raise


def _is_question(command: str, arguments: Mapping[str, Any]) -> bool:
    if command != _HMP:
        return command.startswith("query-")
    words = str(arguments.get("command-line", "")).split()
    return bool(words) and words[0] in _HMP_QUESTIONS


# The prompt


def _prompt(name: str) -> None:
    """Lines from the terminal until its user leaves, or the VM has ended."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415  input() edits and remembers lines once it is there
    stdout.say(_BANNER.format(name=name) + "\n")
    asked_twice = False
    for line in _typed():
        if line in _QUIT and not asked_twice:
            asked_twice = True
            stdout.say(_MEANT.format(name=name) + "\n")
            continue
        asked_twice = False
        try:
            _say_text(asyncio.run(_execute_hmp(control.running(name, f"monitor {name}"), line)))
            if line not in _QUIT:
                continue
        except NotRunning:
            pass
        except KeyboardInterrupt:  # of a command that takes too long
            stdout.say("\n")
            continue
        except LauncherError as err:
            stdout.say(render(err))
            continue
        stdout.say(f"{name} has ended\n")
        return
    stdout.say("\n")


def _typed() -> Iterator[str]:
    while True:
        try:
            line = input(PROMPT).strip()
        except EOFError:
            return
        except KeyboardInterrupt:  # a line that is not wanted any more, as in a shell
            stdout.say("\n")
            continue
        except UnicodeDecodeError:
            stdout.say("this is no UTF-8\n")
            continue
        if line == "exit":
            return
        if line:
            yield line


# What is printed


def _say_answer(answer: Any) -> None:
    """On a terminal for people, and nothing in it may upset that; otherwise on one line, for programs."""
    if not _stdout_is_terminal():
        stdout.say_json(answer)
        return
    text = json.dumps(answer, ensure_ascii=False, indent=2)
    if not text.replace("\n", "").isprintable():
        text = json.dumps(answer, indent=2)
    stdout.say(text + "\n")


def _say_text(answer: str) -> None:
    """HMP's lines end in CR and LF; what is in them may come from the guest."""
    text = answer.replace("\r\n", "\n")
    if text and not text.endswith("\n"):
        text += "\n"
    stdout.say(printable(text.expandtabs()) if _stdout_is_terminal() else text)


def _stdout_is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()
