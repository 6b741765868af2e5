"""The `launcher` section: what each key may hold, one key at a time.

Each reader turns a node into the value that VmDefinition carries, or refuses it at its place. Rules across keys are
in `definition`. Nothing here looks at the host: a CPU that does not exist is refused later, by `fitting`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from . import pinning, sizes, yamlnode
from .errors import MOST_PROBLEMS, DefinitionError, Mark, shortened
from .pinning import MAX_UINT32
from .yamlnode import List, Map, Node, Scalar, describe, fail

MAX_ID = MAX_UINT32 - 1  # 2^32-1 means "leave unchanged" in setresuid(2)
MAX_MEMLOCK = (1 << 63) - 1  # bytes
LEAST_MEMLOCK = 1 << 20  # bytes; less than a MiB is a size without its unit
MAX_COMMAND_BYTES = 1 << 20  # of all words of one key; execve(2) takes no more by default for one command alone
MAX_SHUTDOWN_TIMEOUT = 30 * 24 * 3600  # seconds

REALTIME_POLICIES = ("fifo", "rr")
POLICIES = ("other", "batch", "idle", *REALTIME_POLICIES)
MIN_PRIORITY, MAX_PRIORITY = 1, 99  # of the real-time policies: sched(7)
Isolation = Literal["shield", "cpuset", "affinity"]
ISOLATIONS: tuple[Isolation, ...] = get_args(Isolation)
MEMLOCK_HINT = "write true (as much as I may), false, auto (guest RAM and 1 GiB more) or a size such as 16G"
NO_KEYS_HINT = "write launcher: and below it, two spaces further in, binary: qemu-system-x86_64"

_VARIABLE = re.compile(r"(\w+)=([\w./][\w./-]*)")  # a shell's, with a value that needs no quotes
_DURATION = re.compile(r"(?:([0-9]{1,9}):)?([0-9]{1,9}) ?s?")  # 1:30, 60s, 08


class Scheduling(NamedTuple):
    """A policy, one of POLICIES, and its priority: 1-99 for fifo and rr, else 0."""

    policy: str
    priority: int

    def __str__(self) -> str:
        return f"{self.policy} {self.priority}" if self.priority else self.policy


class HookCommand(NamedTuple):
    """A command of before_start or after_stop: the program and its arguments, never empty."""

    argv: tuple[str, ...]
    mark: Mark


class Memlock(NamedTuple):
    """How much memory QEMU must be able to lock.

    none: nothing is asked for; all: as much as the user may have; auto: guest RAM + 1 GiB; size: `bytes`.
    `mark` is None where it is the default.
    """

    kind: Literal["none", "all", "auto", "size"]
    bytes: int | None = None
    mark: Mark | None = None


class Section(NamedTuple):
    """The section `launcher`: the values of the keys given, under their names in VmDefinition; where each stands.

    `unsure`: of which of those names nothing is known: what stands there could not be read, or a key that nobody knows
    may be meant for one of them.
    """

    values: dict[str, Any]
    marks: dict[str, Mark]
    unsure: frozenset[str]


def read_launcher(node: Node | None, problems: list[DefinitionError]) -> Section:
    """Read the section, None if there is none; what is wrong is added to `problems`."""
    values: dict[str, Any] = {}
    marks: dict[str, Mark] = {}
    if node is None:
        return Section(values, marks, FIELDS)
    failed: frozenset[str] = frozenset()
    try:
        for key, value in yamlnode.entries(node, "the section launcher", NO_KEYS_HINT):
            if len(problems) >= MOST_PROBLEMS:
                failed = FIELDS
                break
            if key.kind != "str" or key.text not in _KEYS:
                problems.append(_unknown(key))
                failed = FIELDS
                continue
            marks[key.text] = value.mark
            field, reader = _KEYS[key.text]
            try:
                values[field] = reader(value, key.text)
            except DefinitionError as err:
                problems.append(err)
                failed |= {field}
    except DefinitionError as err:
        problems.append(err)
        failed = FIELDS
    else:
        if "binary" not in marks:
            problems.append(
                DefinitionError(
                    "the key binary is missing in launcher:",
                    "name the QEMU to run, for example binary: qemu-system-x86_64",
                    mark=node.mark,
                )
            )
    return Section(values, marks, failed - values.keys())


def _unknown(key: Scalar) -> DefinitionError:
    if key.text == "qemu":
        hint = "it is a section: put it at the beginning of its line"
        return DefinitionError("unknown key in launcher: 'qemu'", hint, mark=key.mark)
    return yamlnode.unknown(key, "key in launcher:", tuple(_KEYS))


def _path(node: Node, what: str) -> Path:
    if isinstance(node, Scalar) and node.kind == "null" and node.text == "~":
        from . import unexpanded  # noqa: PLC0415  only for this message, and `command` is to be quick

        fail(node, f"{what} must be text, and ~ alone is nothing (null) in YAML", unexpanded.HINT)
    return Path(yamlnode.string(node, what))


def _env(node: Node, what: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for key, value in yamlnode.entries(node, what, f"write {what}: {{{_as_pairs(node)}}}"):
        name = yamlnode.string(key, f"a variable's name in {what}")
        if "=" in name:
            fail(key, f"a variable's name in {what} cannot contain '=': {shortened(name)!r}", "write NAME: value")
        pairs.append((name, yamlnode.verbatim(value, f"{what}: {name}")))
    return tuple(pairs)


def _as_pairs(node: Node) -> str:
    """What stands there as `A=b`, or as a list of such, in the form of a map."""
    items = node.items if isinstance(node, List) else (node,)
    found = (_VARIABLE.fullmatch(item.text) if isinstance(item, Scalar) else None for item in items)
    return shortened(", ".join(f"{one[1]}: {one[2]}" if one else "NAME: value" for one in found))


def _scheduler(node: Node, what: str) -> str:
    if isinstance(node, Scalar) and node.kind == "str" and node.text == "deadline":
        fail(
            node,
            f"{what} deadline cannot be had: it needs a runtime, a deadline and a period, the kernel refuses it for "
            "threads confined to a partition (EPERM), and its admission control is shared by all users",
            "use fifo or rr, with vcpu_pinning",
        )
    return yamlnode.choice(node, what, POLICIES)


def _priority(node: Node, what: str) -> int:
    # Its range depends on the scheduler: `definition` looks at both.
    return yamlnode.number(node, what)


def priority_of(policy: str, priority: int | None, mark: Mark) -> int:
    """The priority that goes with `policy`, where `priority` was given at `mark`, or not at all. DefinitionError."""
    if policy in REALTIME_POLICIES:
        if priority is None:
            return MIN_PRIORITY
        if MIN_PRIORITY <= priority <= MAX_PRIORITY:
            return priority
        raise DefinitionError(
            f"priority {priority} is out of range for {policy} ({MIN_PRIORITY}-{MAX_PRIORITY})",
            f"write a priority from {MIN_PRIORITY} to {MAX_PRIORITY}; your administrator may allow less",
            mark=mark,
        )
    if priority:
        raise DefinitionError(
            f"priority {priority} is out of range for {policy}, which has none but 0",
            "remove it, or use fifo or rr",
            mark=mark,
        )
    return 0


def _emulator_scheduler(node: Node, what: str) -> Scheduling:
    """A policy's name, or {policy: fifo, priority: 1}."""
    if not isinstance(node, Map):
        policy = _scheduler(node, what)
        return Scheduling(policy, priority_of(policy, None, node.mark))
    given = {}
    for key, value in node.pairs:
        if key.text not in ("policy", "priority"):
            raise yamlnode.unknown(key, f"key in {what}:", ("policy", "priority"))
        given[key.text] = value
    if "policy" not in given:
        fail(node, f"the key policy is missing in {what}:", f"write {what}: {{policy: fifo, priority: 1}}")
    policy = _scheduler(given["policy"], f"the policy of {what}")
    number = given.get("priority")
    priority = None if number is None else _priority(number, f"the priority of {what}")
    return Scheduling(policy, priority_of(policy, priority, node.mark if number is None else number.mark))


def _memlock(node: Node, what: str) -> Memlock:
    if not isinstance(node, Scalar) or node.kind not in ("bool", "int", "str"):
        fail(node, f"{what} cannot be {describe(node)}", MEMLOCK_HINT)
    if node.kind == "bool":
        return Memlock("all" if node.text == "true" else "none", None, node.mark)
    if node.kind == "str" and node.text == "auto":
        return Memlock("auto", None, node.mark)
    digits, unit = (node.text[:-1], node.text[-1:].upper()) if node.text[-1:].isalpha() else (node.text, "")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20 or unit not in ("", *sizes.UNITS):
        fail(node, f"{what} cannot be {describe(node)}", MEMLOCK_HINT)
    size = int(digits) << sizes.UNITS.get(unit, 0)
    if not LEAST_MEMLOCK <= size <= MAX_MEMLOCK:
        hint = _with_unit(size) if size and not unit else MEMLOCK_HINT
        fail(node, f"{what}: {node.text} is out of range (1M-8388607T); a number alone is in bytes", hint)
    return Memlock("size", size, node.mark)


def _with_unit(number: int) -> str:
    """A hint for a size without its unit: GiB, unless nobody has that many; KiB is what `ulimit -l` prints."""
    for unit, least in (("K", 1 << 16), ("M", 1 << 10)):
        if number >= least:
            return f"did you mean {number}{unit} ({sizes.format_size(number << sizes.UNITS[unit])})?"
    return f"did you mean {number}G?"


def _isolation(node: Node, what: str) -> str:
    return yamlnode.choice(node, what, ISOLATIONS)


def _on_tuning_failure(node: Node, what: str) -> str:
    return yamlnode.choice(node, what, ("abort", "continue"))


def _shutdown_timeout(node: Node, what: str) -> float | None:
    if isinstance(node, Scalar) and node.kind == "str" and node.text == "infinity":
        return None
    if not isinstance(node, Scalar) or node.kind != "int":
        hint = "write a number such as 60"
        if isinstance(node, Scalar) and (found := _DURATION.fullmatch(node.text)):
            seconds = int(found[1] or 0) * 60 + int(found[2])
            hint = f"write {seconds}" if seconds <= MAX_SHUTDOWN_TIMEOUT else hint
        fail(node, f"{what} must be a whole number of seconds or infinity, not {describe(node)}", hint)
    return float(yamlnode.integer(node, what, 0, MAX_SHUTDOWN_TIMEOUT))


def _commands(node: Node, what: str) -> tuple[HookCommand, ...]:
    """A list of commands, each a list of words; in the common mistake it is one command's words."""
    hint = f"write {what}: [[program, argument, ...], [program, ...]], each command a list of its own"
    commands = []
    room = MAX_COMMAND_BYTES
    if not isinstance(node, List):
        fail(node, f"{what} must be a list of commands, not {describe(node)}", hint)
    for item in node.items:
        if not isinstance(item, List):
            fail(item, f"a command in {what} must be a list of words, not {describe(item)}", hint)
        if not item.items:
            fail(item, f"a command in {what} is an empty list", hint)
        words = []
        for word in item.items:
            words.append(yamlnode.verbatim(word, f"a word of a command in {what}"))
            room -= len(words[-1]) + 1  # aliases make much out of little
            if room < 0:
                fail(word, f"up to here {what} comes to more than {MAX_COMMAND_BYTES >> 20} MiB")
        if not words[0]:
            fail(item.items[0], f"the program of a command in {what} is empty")
        commands.append(HookCommand(tuple(words), item.mark))
    return tuple(commands)


def _account(node: Node, what: str) -> str | int:
    """A user or group: its name, or its number where YAML reads a number."""
    if isinstance(node, Scalar) and node.kind == "int":
        return yamlnode.integer(node, what, 0, MAX_ID)
    if not isinstance(node, Scalar) or node.kind != "str":
        fail(node, f"{what} must be a name or a number, not {describe(node)}")
    return yamlnode.string(node, what)


# key -> (field of VmDefinition, reader)
_KEYS: dict[str, tuple[str, Callable[[Node, str], Any]]] = {
    "binary": ("binary", yamlnode.string),
    "clear_env": ("clear_env", yamlnode.boolean),
    "env": ("env", _env),
    "working_directory": ("working_directory", _path),
    "vcpu_pinning": ("pinning", pinning.vcpu_pinning),
    "emulator_pinning": ("emulator_pinning", pinning.emulator_pinning),
    "iothread_pinning": ("iothread_pinning", pinning.iothread_pinning),
    "scheduler": ("scheduler", _scheduler),
    "priority": ("priority", _priority),
    "emulator_scheduler": ("emulator_scheduler", _emulator_scheduler),
    "rlimit_memlock": ("memlock", _memlock),
    "isolation": ("isolation", _isolation),
    "on_tuning_failure": ("on_tuning_failure", _on_tuning_failure),
    "shutdown_timeout": ("shutdown_timeout", _shutdown_timeout),
    "before_start": ("before_start", _commands),
    "after_stop": ("after_stop", _commands),
    "inhibit_sleep": ("inhibit_sleep", yamlnode.boolean),
    "debug": ("debug", yamlnode.boolean),
    "user": ("user", _account),
    "group": ("group", _account),
}

FIELDS = frozenset(field for field, _reader in _KEYS.values())
KEY_NAMES = frozenset(_KEYS)
