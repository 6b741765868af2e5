"""The `launcher` section: what each key may hold, one key at a time.

Each reader turns a node into the value that VmDefinition carries, or refuses it at its place. Rules across keys are
in `definition`. Nothing here looks at the host: a CPU that does not exist is refused later, by `host`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import yamlnode
from .errors import MOST_PROBLEMS, DefinitionError, Mark, shortened
from .yamlnode import List, Map, Node, Scalar, describe, fail

MAX_UINT32 = (1 << 32) - 1
MAX_ID = MAX_UINT32 - 1  # 2^32-1 means "leave unchanged" in setresuid(2)
MAX_PINNED = 8192  # vCPUs; twice what any of QEMU's machines can have
MAX_MEMLOCK = (1 << 63) - 1  # bytes
LEAST_MEMLOCK = 1 << 20  # bytes; less than a MiB is a size without its unit
MAX_SHUTDOWN_TIMEOUT = 30 * 24 * 3600  # seconds

REALTIME_POLICIES = ("fifo", "rr")
POLICIES = ("other", "batch", "idle", *REALTIME_POLICIES)
MIN_PRIORITY, MAX_PRIORITY = 1, 99  # of the real-time policies: sched(7)
ISOLATIONS = ("shield", "cpuset", "affinity")
SIZE_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
MEMLOCK_HINT = "write true (as much as I may), false, auto (guest RAM and 1 GiB more) or a size such as 16G"


class HostCpu(NamedTuple):
    """A host CPU in the pinning, and where it was written."""

    cpu: int
    mark: Mark


class Pinning(NamedTuple):
    """Which vCPU runs on which host CPU: exactly one of the two forms is set, never empty.

    `topology`: (socket, core, thread) of the vCPU -> host CPU. `by_index`: vCPU i runs on the i-th.
    """

    topology: Mapping[tuple[int, int, int], HostCpu] | None
    by_index: tuple[HostCpu, ...] | None
    mark: Mark

    @property
    def host_cpus(self) -> tuple[HostCpu, ...]:
        """All CPUs named, in the order of the file, repetitions included."""
        return tuple(self.topology.values()) if self.topology is not None else self.by_index or ()


class Memlock(NamedTuple):
    """How much memory QEMU must be able to lock.

    none: nothing is asked for; all: as much as the user may have; auto: guest RAM + 1 GiB; size: `bytes`.
    `mark` is None where it is the default.
    """

    kind: Literal["none", "all", "auto", "size"]
    bytes: int | None = None
    mark: Mark | None = None


def read_launcher(node: Node, problems: list[DefinitionError]) -> tuple[dict[str, Any], dict[str, Mark]]:
    """The values of the keys given, under their names in VmDefinition, and where each value stands."""
    values: dict[str, Any] = {}
    marks: dict[str, Mark] = {}
    try:
        for key, value in yamlnode.entries(node, "the section launcher"):
            if len(problems) >= MOST_PROBLEMS:
                break
            if key.kind != "str" or key.text not in _KEYS:
                problems.append(yamlnode.unknown(key, "key in launcher:", tuple(_KEYS)))
                continue
            marks[key.text] = value.mark
            field, reader = _KEYS[key.text]
            try:
                values[field] = reader(value, key.text)
            except DefinitionError as err:
                problems.append(err)
    except DefinitionError as err:
        problems.append(err)
    else:
        if "binary" not in marks:
            problems.append(
                DefinitionError(
                    "the key binary is missing in launcher:",
                    "name the QEMU to run, for example binary: qemu-system-x86_64",
                    mark=node.mark,
                )
            )
    return values, marks


def _path(node: Node, what: str) -> Path:
    return Path(yamlnode.string(node, what))


def _env(node: Node, what: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for key, value in yamlnode.entries(node, what):
        name = yamlnode.string(key, f"a variable's name in {what}")
        if "=" in name:
            fail(key, f"a variable's name in {what} cannot contain '=': {shortened(name)!r}", "write NAME: value")
        pairs.append((name, yamlnode.verbatim(value, f"{what}: {name}")))
    return tuple(pairs)


def _pinning(node: Node, what: str) -> Pinning | None:
    """Either form of vcpu_pinning; None for a map that names no vCPU, which the original tool takes for no pinning."""
    if isinstance(node, List):
        if not node.items:
            fail(node, f"{what} is an empty list", "name a host CPU for each vCPU, or remove the key")
        return Pinning(
            None, tuple(_host_cpu(item, f"the host CPU of vCPU {i}") for i, item in enumerate(node.items)), node.mark
        )
    if not isinstance(node, Map):
        fail(
            node,
            f"{what} must be a map or a list, not {describe(node)}",
            "write socket: {core: {thread: host CPU}}, or a list: [CPU of vCPU 0, CPU of vCPU 1, ...]",
        )
    topology = dict(_by_topology(node, what))
    return Pinning(topology, None, node.mark) if topology else None


def _by_topology(node: Node, what: str) -> Iterator[tuple[tuple[int, int, int], HostCpu]]:
    seen = 0
    for socket, cores in _numbered(node, what, "socket"):
        for core, threads in _numbered(cores, f"socket {socket}", "core"):
            for thread, cpu in _numbered(threads, f"core {core} of socket {socket}", "thread"):
                seen += 1
                yield (socket, core, thread), _host_cpu(cpu, f"the host CPU of vCPU {socket}/{core}/{thread}")
            seen += 1  # empty ones too: aliases can make a billion of them out of a small file
            if seen > MAX_PINNED:
                fail(node, f"{what} names more than {MAX_PINNED} vCPUs")


def _numbered(node: Node, what: str, key_name: str) -> Iterator[tuple[int, Node]]:
    for key, value in yamlnode.entries(node, what):
        yield yamlnode.integer(key, f"a {key_name} number in {what}", 0, MAX_UINT32), value


def _host_cpu(node: Node, what: str) -> HostCpu:
    return HostCpu(yamlnode.integer(node, what, 0, MAX_UINT32), node.mark)


def _scheduler(node: Node, what: str) -> str:
    if isinstance(node, Scalar) and node.kind == "str" and node.text == "deadline":
        fail(
            node,
            "scheduler deadline cannot be had: it needs a runtime, a deadline and a period, the kernel refuses it for "
            "threads confined to a partition (EPERM), and its admission control is shared by all users",
            "use fifo or rr, with vcpu_pinning",
        )
    return yamlnode.choice(node, what, POLICIES)


def _priority(node: Node, what: str) -> int:
    # Its range depends on the scheduler: `definition` looks at both.
    return yamlnode.number(node, what)


def _memlock(node: Node, what: str) -> Memlock:
    if not isinstance(node, Scalar) or node.kind not in ("bool", "int", "str"):
        fail(node, f"{what} cannot be {describe(node)}", MEMLOCK_HINT)
    if node.kind == "bool":
        return Memlock("all" if node.text == "true" else "none", None, node.mark)
    if node.kind == "str" and node.text == "auto":
        return Memlock("auto", None, node.mark)
    digits, unit = (node.text[:-1], node.text[-1:].upper()) if node.text[-1:].isalpha() else (node.text, "")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20 or unit not in ("", *SIZE_UNITS):
        fail(node, f"{what} cannot be {describe(node)}", MEMLOCK_HINT)
    size = int(digits) << SIZE_UNITS.get(unit, 0)
    if not LEAST_MEMLOCK <= size <= MAX_MEMLOCK:
        hint = f"did you mean {digits}G?" if not unit and size else MEMLOCK_HINT
        fail(node, f"{what}: {node.text} is out of range (1M-8388607T); a number alone is in bytes", hint)
    return Memlock("size", size, node.mark)


def _isolation(node: Node, what: str) -> str:
    return yamlnode.choice(node, what, ISOLATIONS)


def _on_tuning_failure(node: Node, what: str) -> str:
    return yamlnode.choice(node, what, ("abort", "continue"))


def _shutdown_timeout(node: Node, what: str) -> float | None:
    if isinstance(node, Scalar) and node.kind == "str" and node.text == "infinity":
        return None
    if not isinstance(node, Scalar) or node.kind != "int":
        fail(node, f"{what} must be a whole number of seconds or infinity, not {describe(node)}")
    return float(yamlnode.integer(node, what, 0, MAX_SHUTDOWN_TIMEOUT))


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
    "vcpu_pinning": ("pinning", _pinning),
    "scheduler": ("scheduler", _scheduler),
    "priority": ("priority", _priority),
    "rlimit_memlock": ("memlock", _memlock),
    "isolation": ("isolation", _isolation),
    "on_tuning_failure": ("on_tuning_failure", _on_tuning_failure),
    "shutdown_timeout": ("shutdown_timeout", _shutdown_timeout),
    "user": ("user", _account),
    "group": ("group", _account),
}
