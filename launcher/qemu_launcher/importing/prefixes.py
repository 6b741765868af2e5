"""What people put before QEMU on a shell's command line, `sudo taskset -c 2,3 chrt -f 1 qemu-system-x86_64 ...`.

Variables become the definition's; what taskset and chrt say about all of QEMU is a hint for what its virtual CPUs
should have, and who makes keys of it says so; all else is named in a note and left out. Pure. UsageError when no
program is left.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..cpulist import parse_cpulist
from ..errors import UsageError
from ..keys import REALTIME_POLICIES

_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)


class Prefix(NamedTuple):
    """What stood before QEMU. `argv` is QEMU's own command line, never empty.

    `cpus_of`, `policy_of`, `inhibited_by`: the words that said it.
    """

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    clear_env: bool
    cpus: tuple[int, ...]  # of taskset or numactl, in their order; empty: nothing is said
    cpus_of: tuple[str, ...]
    policy: str | None  # of chrt
    priority: int
    policy_of: str
    inhibited_by: str  # systemd-inhibit against sleep; empty: none
    notes: tuple[str, ...]


class _Program(NamedTuple):
    """How to step over a program's own words: options, of which some take a value, then perhaps one more word."""

    valued: frozenset[str]
    note: str
    operand: re.Pattern[str] | None = None


class _Option(NamedTuple):
    """One option of such a program's, out of a bundle too. `text`: how it is written by itself."""

    name: str
    value: str
    text: str


class _Own(NamedTuple):
    """A program's own words, and what they are; `operand` is empty where there is none."""

    words: Sequence[str]
    options: Sequence[_Option]
    operand: str

    def written(self, options: Sequence[_Option]) -> str:
        return " ".join((self.words[0], *(option.text for option in options)))


def _valued(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ROOT = (
    "QEMU runs as you. What root could open must be yours: /dev/vfio, block devices, input devices, huge pages, tap "
    "devices; qemu-launcher check NAME says which are not, save for tap devices. Pinning, locked memory and real time "
    "are qemu-launcher-helper's"
)
_OF_NODES = "For its CPUs see vcpu_pinning and emulator_pinning; lscpu -e=CPU,NODE shows which are a node's"
_ITSELF = "Start qemu-launcher itself with it"
_PROGRAMS = {
    "sudo": _Program(
        _valued("-u --user -g --group -p --prompt -C --close-from -h --host -r --role -t --type -T -D --chdir"), _ROOT
    ),
    "doas": _Program(_valued("-u -C"), _ROOT),
    "pkexec": _Program(_valued("--user"), _ROOT),
    "env": _Program(_valued("-u --unset -C --chdir"), "See the keys env, clear_env and working_directory"),
    "taskset": _Program(
        frozenset(),
        "It was for all of QEMU; vcpu_pinning is for its virtual CPUs",
        re.compile("[0-9a-fA-Fx,:][0-9a-fA-Fx,:-]*"),
    ),
    "chrt": _Program(
        _valued("-T --sched-runtime -P --sched-period -D --sched-deadline"),
        "It was for all of QEMU; scheduler and priority are for its virtual CPUs",
        re.compile("[0-9]+"),
    ),
    "numactl": _Program(
        _valued(
            "-i --interleave -w --weighted-interleave -p --preferred -P --preferred-many -m --membind "
            "-c --cpubind -N --cpunodebind -C --physcpubind"
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
    "systemd-inhibit": _Program(_valued("--what --who --why --mode"), "The key inhibit_sleep is about sleep"),
    "setsid": _Program(frozenset(), _ITSELF),
    "nohup": _Program(frozenset(), _ITSELF),
    "exec": _Program(_valued("-a"), "It is a word of the shell's"),
    "time": _Program(_valued("-f --format -o --output"), _ITSELF),
}


def peel(words: Sequence[str]) -> Prefix:
    """QEMU's own command line, and what was before it. Raises UsageError."""
    rest = list(words)
    found = Prefix(
        (), (), clear_env=False, cpus=(), cpus_of=(), policy=None, priority=0, policy_of="", notes=(), inhibited_by=""
    )
    while rest:
        if _ASSIGNMENT.fullmatch(rest[0]):
            name, _equals, value = rest.pop(0).partition("=")
            found = found._replace(env=(*((n, v) for n, v in found.env if n != name), (name, value)))
            continue
        name = rest[0].rpartition("/")[2]
        if name not in _PROGRAMS:
            return found._replace(argv=tuple(rest))
        own = _own(rest, _PROGRAMS[name])
        rest = rest[len(own.words) :]
        reader = _READERS.get(name)
        kept = reader(found, own) if reader is not None else None
        found = kept or _not_kept(found, " ".join(own.words), _PROGRAMS[name].note)
    raise UsageError("there is no QEMU in this command line", "write it after --, the program first")


def is_known(word: str) -> bool:
    """Whether `peel` would step over it."""
    return word.rpartition("/")[2] in _PROGRAMS or _ASSIGNMENT.fullmatch(word) is not None


def _not_kept(found: Prefix, words: str, note: str) -> Prefix:
    return found._replace(notes=(*found.notes, f"Stood before QEMU, and is not kept: {words}. {note}."))


def _own(words: Sequence[str], program: _Program) -> _Own:
    """The program's name and what is behind it, as far as it is the program's own."""
    options: list[_Option] = []
    position = 1
    while position < len(words) and words[position].startswith("-"):
        word, following = words[position], (words[position + 1] if position + 1 < len(words) else None)
        position += 1
        if word == "--":
            break
        found, takes_following = _options(word, following, program.valued)
        options += found
        position += takes_following
    operand = ""
    if program.operand is not None and position < len(words) and program.operand.fullmatch(words[position]):
        operand = words[position]
        position += 1
    return _Own(words[:position], options, operand)


def _options(word: str, following: str | None, valued: frozenset[str]) -> tuple[list[_Option], bool]:
    """The options in a word, `--user=bob` or `-Eu`; and whether the word that follows is the value of the last."""
    if word == "-" or word.startswith("--"):
        name, equals, value = word.partition("=")
        if equals or name not in valued or following is None:
            return [_Option(name, value, word)], False
        return [_Option(name, following, f"{word} {following}")], True
    options: list[_Option] = []
    for behind, letter in enumerate(word[1:], 2):
        name = f"-{letter}"
        if name in valued:
            if behind == len(word) and following is not None:
                return [*options, _Option(name, following, f"{name} {following}")], True
            return [*options, _Option(name, word[behind:], name + word[behind:])], False
        options.append(_Option(name, "", name))
    return options, False


def _env(found: Prefix, own: _Own) -> Prefix:
    others = [option for option in own.options if option.name not in ("-", "-i", "--ignore-environment")]
    if len(others) < len(own.options):
        found = found._replace(clear_env=True, env=())
    return _not_kept(found, own.written(others), _PROGRAMS["env"].note) if others else found


def _taskset(found: Prefix, own: _Own) -> Prefix | None:
    """`taskset -c 2,3` or `taskset 0xc`."""
    as_list = any(option.name in ("-c", "--cpu-list") for option in own.options)
    return _with_cpus(found, _in_order if as_list else _mask, own.operand, " ".join(own.words))


def _with_cpus(found: Prefix, read: Callable[[str], tuple[int, ...]], text: str, words: str) -> Prefix | None:
    try:
        cpus = read(text)
    except ValueError:  # of taskset a stride such as 0-6:2, of numactl "all" and "+0": relative to what we are allowed
        return None
    return found._replace(cpus=cpus, cpus_of=(*found.cpus_of, words)) if cpus else None


def _in_order(text: str) -> tuple[int, ...]:
    """The CPUs of a list as its author has ordered them: 8,20,9,21 has siblings side by side. ValueError."""
    parse_cpulist(text)
    return tuple(dict.fromkeys(cpu for part in text.split(",") for cpu in sorted(parse_cpulist(part))))


def _mask(text: str) -> tuple[int, ...]:
    bits = int(text.replace(",", "")[:2100], 16)
    return tuple(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)


def _numactl(found: Prefix, own: _Own) -> Prefix:
    of_nodes, of_memory = [], []
    for option in own.options:
        if option.name in ("-C", "--physcpubind"):
            kept = _with_cpus(found, _in_order, option.value, own.written([option]))
            found = kept or found
            of_nodes += [] if kept else [option]
        elif option.name in ("-c", "--cpubind", "-N", "--cpunodebind"):
            of_nodes.append(option)
        else:
            of_memory.append(option)
    found = _not_kept(found, own.written(of_nodes), _OF_NODES) if of_nodes else found
    return _not_kept(found, own.written(of_memory), _PROGRAMS["numactl"].note) if of_memory else found


_CHRT = {policy[:size]: policy for policy in ("fifo", "rr", "other", "batch", "idle") for size in (1, len(policy))}


def _chrt(found: Prefix, own: _Own) -> Prefix | None:
    """`chrt -f 1`; without an option it is round robin (chrt(1))."""
    names = [option.name.lstrip("-") for option in own.options]
    policy = next((_CHRT[name] for name in reversed(names) if name in _CHRT), "rr")
    priority = int(own.operand) if len(own.operand) in (1, 2) else 0
    if {"d", "deadline"} & set(names) or (priority > 0) != (policy in REALTIME_POLICIES):
        return None
    return found._replace(policy=policy, priority=priority, policy_of=" ".join(own.words))


def _inhibit(found: Prefix, own: _Own) -> Prefix | None:
    what = [option.value for option in own.options if option.name == "--what"] or ["idle:sleep:shutdown"]
    return found._replace(inhibited_by=" ".join(own.words)) if "sleep" in what[-1].split(":") else None


# None for what they do not understand: it is not kept, as of all other programs.
_READERS: dict[str, Callable[[Prefix, _Own], Prefix | None]] = {
    "env": _env,
    "taskset": _taskset,
    "numactl": _numactl,
    "chrt": _chrt,
    "systemd-inhibit": _inhibit,
}
