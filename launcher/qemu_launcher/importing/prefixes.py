"""What people put before QEMU on a shell's command line, `sudo taskset -c 2,3 chrt -f 1 qemu-system-x86_64 ...`.

Variables become the definition's; what taskset and chrt say about all of QEMU is a hint for what its virtual CPUs
should have; all else is named in a note and left out. Pure. UsageError when no program is left.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..cpulist import parse_cpulist
from ..errors import UsageError
from ..keys import REALTIME_POLICIES

_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)


class Prefix(NamedTuple):
    """What stood before QEMU. `argv` is QEMU's own command line, never empty."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    clear_env: bool
    cpus: tuple[int, ...]  # of taskset or numactl, in their order; empty: nothing is said
    policy: str | None  # of chrt
    priority: int
    notes: tuple[str, ...]


class _Program(NamedTuple):
    """How to step over a program's own words: options, of which some take a value, then perhaps one more word."""

    valued: frozenset[str]
    note: str
    operand: re.Pattern[str] | None = None


def _valued(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ROOT = "QEMU runs as you; what needs root is done by qemu-launcher-helper"
_OF_ALL = "It was for all of QEMU; vcpu_pinning, scheduler and priority are for its virtual CPUs"
_ITSELF = "Start qemu-launcher itself with it"
_PROGRAMS = {
    "sudo": _Program(
        _valued("-u --user -g --group -p --prompt -C --close-from -h --host -r --role -t --type -T -D --chdir"), _ROOT
    ),
    "doas": _Program(_valued("-u -C"), _ROOT),
    "pkexec": _Program(_valued("--user"), _ROOT),
    "env": _Program(_valued("-u --unset -C --chdir"), "See the keys env, clear_env and working_directory"),
    "taskset": _Program(frozenset(), _OF_ALL, re.compile("[0-9a-fA-Fx,:-]+")),
    "chrt": _Program(
        _valued("-T --sched-runtime -P --sched-period -D --sched-deadline"), _OF_ALL, re.compile("[0-9]+")
    ),
    "numactl": _Program(
        _valued(
            "-i --interleave -P --preferred -m --membind -N --cpunodebind -C --physcpubind -p --preferred-many "
            "-w --weighted-interleave"
        ),
        "To bind the guest's memory, give QEMU a memory-backend with host-nodes and policy",
    ),
    "prlimit": _Program(frozenset(), "See the key rlimit_memlock"),
    "nice": _Program(_valued("-n --adjustment"), "The key scheduler is about the virtual CPUs only"),
    "ionice": _Program(_valued("-c --class -n --classdata"), _ITSELF),
    "systemd-run": _Program(
        _valued("-p --property -u --unit --slice --description --uid --gid --nice -E --setenv --working-directory"),
        _ITSELF,
    ),
    "setsid": _Program(frozenset(), _ITSELF),
    "nohup": _Program(frozenset(), _ITSELF),
    "exec": _Program(_valued("-a"), "It is a word of the shell's"),
    "time": _Program(_valued("-f --format -o --output"), _ITSELF),
}


def peel(words: Sequence[str]) -> Prefix:
    """QEMU's own command line, and what was before it. Raises UsageError."""
    rest = list(words)
    found = Prefix((), (), clear_env=False, cpus=(), policy=None, priority=0, notes=())
    while rest:
        if _ASSIGNMENT.fullmatch(rest[0]):
            name, _equals, value = rest.pop(0).partition("=")
            found = found._replace(env=(*((n, v) for n, v in found.env if n != name), (name, value)))
            continue
        program = rest[0].rpartition("/")[2]
        if program not in _PROGRAMS:
            return found._replace(argv=tuple(rest))
        taken = _taken(rest, _PROGRAMS[program])
        own, rest = rest[:taken], rest[taken:]
        if (reader := _READERS.get(program)) is not None:
            found = reader(found, own)
        if len(own) > 1 or program != "env":
            note = f"Stood before QEMU, and is not kept: {' '.join(own)}. {_PROGRAMS[program].note}."
            found = found._replace(notes=(*found.notes, note))
    raise UsageError("there is no QEMU in this command line", "write it after --, the program first")


def _taken(words: Sequence[str], program: _Program) -> int:
    """How many words are the program's own."""
    position = 1
    while position < len(words) and words[position].startswith("-"):
        option = words[position]
        position += 1
        if option == "--":
            break
        position += option in program.valued
    if program.operand is not None and position < len(words) and program.operand.fullmatch(words[position]):
        position += 1
    return min(position, len(words))


def _env(found: Prefix, own: Sequence[str]) -> Prefix:
    return found._replace(clear_env=True, env=()) if {"-", "-i", "--ignore-environment"} & set(own) else found


def _taskset(found: Prefix, own: Sequence[str]) -> Prefix:
    """`taskset -c 2,3` or `taskset 0xc`."""
    as_list = any(word == "--cpu-list" or (word[:1] == "-" and word[1:2] != "-" and "c" in word) for word in own[1:-1])
    text = own[-1]
    try:
        return found._replace(cpus=_in_order(text) if as_list else _mask(text))
    except ValueError:  # a stride such as 0-6:2, or nothing that taskset would take
        return found


def _in_order(text: str) -> tuple[int, ...]:
    """The CPUs of a list as its author has ordered them: 8,20,9,21 has siblings side by side. ValueError."""
    parse_cpulist(text)
    return tuple(dict.fromkeys(cpu for part in text.split(",") for cpu in sorted(parse_cpulist(part))))


def _mask(text: str) -> tuple[int, ...]:
    bits = int(text.replace(",", "")[:2100], 16)
    return tuple(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)


def _numactl(found: Prefix, own: Sequence[str]) -> Prefix:
    for option, value in zip(own, [*own[1:], ""], strict=True):
        name, equals, behind = option.partition("=")
        if name in ("-C", "--physcpubind"):
            try:
                return found._replace(cpus=_in_order(behind if equals else value))
            except ValueError:  # "all", "+0": relative to what we are allowed
                return found
    return found


_CHRT = {policy[:size]: policy for policy in ("fifo", "rr", "other", "batch", "idle") for size in (1, len(policy))}


def _chrt(found: Prefix, own: Sequence[str]) -> Prefix:
    """`chrt -f 1`; without an option it is round robin (chrt(1))."""
    policies = [_CHRT[word.lstrip("-")] for word in own[1:] if word.startswith("-") and word.lstrip("-") in _CHRT]
    policy = policies[-1] if policies else "rr"
    priority = int(own[-1]) if own[-1].isdigit() and len(own[-1]) <= 2 else 0
    if {"-d", "--deadline"} & set(own) or (priority > 0) != (policy in REALTIME_POLICIES):
        return found
    return found._replace(policy=policy, priority=priority)


_READERS: dict[str, Callable[[Prefix, Sequence[str]], Prefix]] = {
    "env": _env,
    "taskset": _taskset,
    "numactl": _numactl,
    "chrt": _chrt,
}
