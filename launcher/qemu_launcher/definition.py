"""The definition of a VM: a YAML file becomes one frozen value, or an error that names file, line and column.

All rules about a definition that need neither the host nor the helper are here, those across several keys too.
After a failure nothing has been started or changed. As many problems as can be told apart are reported in one go.

The values are named tuples and not dataclasses: importing dataclasses brings in inspect, a sixth of all the time that
`qemu-launcher command` may take.
"""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import yamlnode
from .errors import DefinitionError, Mark
from .options import Property, QemuOption, has_mem_lock, has_vfio
from .yamlnode import List, Map, Node, Scalar, describe, fail, shortened

MAX_FILE_BYTES = 1 << 20  # a long definition has 10 KiB; this bounds time and memory for a file that is none
MAX_ARGUMENT_BYTES = (128 << 10) - 1  # MAX_ARG_STRLEN of execve(2), less the final NUL
MAX_OPTIONS_BYTES = 1 << 20  # execve(2) gives arguments and environment a quarter of the stack limit, 2 MiB by default
MAX_UINT32 = (1 << 32) - 1
MAX_ID = MAX_UINT32 - 1  # 2^32-1 means "leave unchanged" in setresuid(2)
MAX_MEMLOCK = (1 << 63) - 1
LEAST_MEMLOCK = 1 << 20  # less than a MiB is a size without its unit
MAX_SHUTDOWN_TIMEOUT = 30 * 24 * 3600  # seconds
DEFAULT_SHUTDOWN_TIMEOUT = 60.0  # seconds

REALTIME_POLICIES = ("fifo", "rr")
POLICIES = ("other", "batch", "idle", *REALTIME_POLICIES)
MIN_PRIORITY, MAX_PRIORITY = 1, 99  # sched(7)
ISOLATIONS = ("shield", "cpuset", "affinity")
SECTIONS = ("launcher", "qemu")
SIZE_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}


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


class VmDefinition(NamedTuple):
    """One VM, as its user wants it. `marks` says where each key of the launcher section stands."""

    name: str
    path: Path
    binary: str
    options: tuple[QemuOption, ...]
    clear_env: bool = False
    env: tuple[tuple[str, str], ...] = ()
    working_directory: Path | None = None
    pinning: Pinning | None = None
    scheduler: str | None = None  # one of POLICIES
    priority: int = 0  # 1-99 for fifo and rr, else 0
    memlock: Memlock = Memlock("none")
    isolation: str | None = None  # one of ISOLATIONS; None when nothing is pinned
    on_tuning_failure: str = "abort"  # or "continue"
    shutdown_timeout: float | None = DEFAULT_SHUTDOWN_TIMEOUT  # seconds; None: wait for ever
    user: str | int | None = None
    group: str | int | None = None
    warnings: tuple[str, ...] = ()  # each with its place; for stderr when the VM is started
    marks: Mapping[str, Mark] = {}

    @property
    def is_realtime(self) -> bool:
        return self.scheduler in REALTIME_POLICIES


def load(path: Path, name: str) -> VmDefinition:
    """Read and check the definition of VM `name` in `path`. Raises DefinitionError."""
    return parse(read(path), path, name)


def read(path: Path) -> bytes:
    """The content of a definition file: a regular file of at most MAX_FILE_BYTES. Raises DefinitionError."""
    try:
        # Not blocking: a FIFO would keep us waiting for a writer before we can see that it is one.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(descriptor, "rb") as file:  # noqa: PTH123  a descriptor, not a path
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
                raise DefinitionError(f"{path} is {kind}", "a definition is a YAML file")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as err:
        raise DefinitionError(f"cannot read {path}: {err.strerror}") from err
    except ValueError as err:  # a NUL in the path
        raise DefinitionError(f"cannot read {str(path)!r}: {err}") from err
    if len(data) > MAX_FILE_BYTES:
        raise DefinitionError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", "this can be no definition")
    return data


def parse(data: bytes, path: Path, name: str) -> VmDefinition:
    """Check the definition of VM `name` whose file `path` has the content `data`. Raises DefinitionError."""
    document = yamlnode.compose(yamlnode.decode(data, str(path)), str(path))
    problems: list[DefinitionError] = []
    sections = _sections(document, problems)
    keys, marks = _launcher(sections["launcher"], problems) if "launcher" in sections else ({}, {})
    options = _options(sections["qemu"], problems) if "qemu" in sections else ()
    if not problems:
        warnings = _check_together(keys, marks, options, problems)
    if problems:
        raise DefinitionError.several(problems)
    return VmDefinition(name, path, options=options, warnings=tuple(warnings), marks=marks, **keys)


def _sections(document: yamlnode.Document, problems: list[DefinitionError]) -> dict[str, Node]:
    root = document.root
    if not isinstance(root, Map):
        fail(root, f"a definition has the sections launcher: and qemu:, but this is {describe(root)}")
    sections: dict[str, Node] = {}
    for key, node in root.pairs:
        if key.kind == "str" and key.text in SECTIONS:
            sections[key.text] = node
        elif not document.is_shared(node):  # a place for an &anchor that a section uses: YAML's way to share
            problems.append(_unknown(key, "section", SECTIONS))
    problems.extend(
        DefinitionError(f"the section {name}: is missing", mark=root.mark) for name in SECTIONS if name not in sections
    )
    return sections


def _unknown(key: Scalar, what: str, known: Sequence[str]) -> DefinitionError:
    if key.text == "<<":
        hint: str | None = "merge keys (<<) are no part of YAML 1.2; write the keys out, or use an alias for the whole"
    else:
        hint = yamlnode.did_you_mean(key.text, known) or f"known are {', '.join(known)}"
    return DefinitionError(f"unknown {what} {shortened(key.text)!r}", hint, mark=key.mark)


# The launcher section


def _launcher(node: Node, problems: list[DefinitionError]) -> tuple[dict[str, Any], dict[str, Mark]]:
    """The values of the keys given, under their names in VmDefinition, and where each value stands."""
    values: dict[str, Any] = {}
    marks: dict[str, Mark] = {}
    try:
        for key, value in yamlnode.entries(node, "the section launcher"):
            if key.kind != "str" or key.text not in _KEYS:
                problems.append(_unknown(key, "key in launcher:", tuple(_KEYS)))
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
    topology = {
        (socket, core, thread): _host_cpu(cpu, f"the host CPU of vCPU socket {socket}, core {core}, thread {thread}")
        for socket, cores in _by_number(node, "socket")
        for core, threads in _by_number(cores, "core")
        for thread, cpu in _by_number(threads, "thread")
    }
    return Pinning(topology, None, node.mark) if topology else None


def _by_number(node: Node, what: str) -> list[tuple[int, Node]]:
    return [
        (yamlnode.integer(key, f"a {what} number", 0, MAX_UINT32), value)
        for key, value in yamlnode.entries(node, f"what is below a {what}" if what != "socket" else "vcpu_pinning")
    ]


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
    return yamlnode.integer(node, what, 0, MAX_PRIORITY)


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


MEMLOCK_HINT = "write true (as much as I may), false, auto (guest RAM and 1 GiB more) or a size such as 16G"


def _isolation(node: Node, what: str) -> str:
    return yamlnode.choice(node, what, ISOLATIONS)


def _on_tuning_failure(node: Node, what: str) -> str:
    return yamlnode.choice(node, what, ("abort", "continue"))


def _shutdown_timeout(node: Node, what: str) -> float | None:
    if isinstance(node, Scalar) and node.kind == "str" and node.text == "infinity":
        return None
    if not isinstance(node, Scalar) or node.kind != "int":
        fail(node, f"{what} must be a number of seconds or infinity, not {describe(node)}")
    return float(yamlnode.integer(node, what, 0, MAX_SHUTDOWN_TIMEOUT))


def _account(node: Node, what: str) -> str | int:
    """A user or group: its name, or its number where YAML reads a number."""
    if isinstance(node, Scalar) and node.kind == "int":
        return yamlnode.integer(node, what, 0, MAX_ID)
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


# The qemu section


def _options(node: Node, problems: list[DefinitionError]) -> tuple[QemuOption, ...]:
    options: list[QemuOption] = []
    room = MAX_OPTIONS_BYTES
    try:
        for item in yamlnode.items(node, "the section qemu"):
            try:
                option = _option(item)
            except DefinitionError as err:
                problems.append(err)
                continue
            size = option.size()
            if size > MAX_ARGUMENT_BYTES:
                fail(
                    item,
                    f"-{shortened(option.name)} has a value longer than {MAX_ARGUMENT_BYTES} bytes, the kernel's limit",
                )
            room -= size  # aliases make much out of little, so the file's own size is no bound
            if room < 0:
                fail(item, f"up to here the qemu section comes to more than {MAX_OPTIONS_BYTES >> 20} MiB")
            options.append(option)
    except DefinitionError as err:
        problems.append(err)
    return tuple(options)


def _option(item: Node) -> QemuOption:
    if isinstance(item, Scalar):
        return QemuOption(yamlnode.string(item, "an option"), None, item.mark)
    if not isinstance(item, Map):
        fail(item, f"an option must be a flag or name: value, not {describe(item)}")
    key, value = _single(item, "an option")
    name = yamlnode.string(key, "an option's name")
    if isinstance(value, Scalar):
        return QemuOption(name, yamlnode.verbatim(value, f"the value of {name}"), key.mark)
    if isinstance(value, Map):
        fail(
            value,
            f"the value of {name} must be text or a list, not {describe(value)}",
            f"write {name}: [name: value, ...]",
        )
    if not value.items:
        fail(value, f"the value of {name} is an empty list", f"for an option without a value write just: - {name}")
    return QemuOption(name, tuple(_element(element, name) for element in value.items), key.mark)


def _element(node: Node, option: str) -> str | Property:
    if isinstance(node, Map):
        key, value = _single(node, f"an element of {option}")
        name = yamlnode.string(key, f"a name in {option}")
        return Property(name, yamlnode.verbatim(value, f"{option}: {name}"))
    return yamlnode.verbatim(node, f"an element of {option}")


def _single(node: Map, what: str) -> tuple[Scalar, Node]:
    if len(node.pairs) != 1:
        second = node.pairs[1][0] if node.pairs else node
        fail(
            second,
            f"{what} is one name: value, not {len(node.pairs)} of them",
            "begin each with a dash of its own" if node.pairs else None,
        )
    return node.pairs[0]


# Rules across keys


def _check_together(
    keys: dict[str, Any], marks: Mapping[str, Mark], options: tuple[QemuOption, ...], problems: list[DefinitionError]
) -> list[str]:
    """Check what one key alone cannot tell, and fill in the defaults that depend on others. Returns warnings."""
    warnings: list[str] = []
    _check_priority(keys, marks, problems)
    pinning: Pinning | None = keys.get("pinning")
    if pinning is not None:
        keys.setdefault("isolation", "shield")
        _check_shared_cpus(pinning, keys.get("scheduler"), problems, warnings)
    elif "isolation" in keys:
        problems.append(
            DefinitionError(
                f"isolation: {keys['isolation']} has nothing to isolate: no vCPU is pinned",
                "add vcpu_pinning, or remove isolation",
                mark=marks["isolation"],
            )
        )
    if "memlock" not in keys and (has_vfio(options) or has_mem_lock(options)):
        keys["memlock"] = Memlock("auto")
    problems.extend(
        DefinitionError(
            "-daemonize takes QEMU out of the launcher's hands, which waits for it and ends it in order",
            "remove it; to have a shell back, run the launcher itself in the background",
            mark=option.mark,
        )
        for option in options
        if option.bare_name == "daemonize"
    )
    return warnings


def _check_priority(keys: dict[str, Any], marks: Mapping[str, Mark], problems: list[DefinitionError]) -> None:
    scheduler, priority = keys.get("scheduler"), keys.get("priority")
    if scheduler in REALTIME_POLICIES:
        if keys.setdefault("priority", MIN_PRIORITY) < MIN_PRIORITY:
            problem = f"priority {priority} is out of range for {scheduler} ({MIN_PRIORITY}-{MAX_PRIORITY})"
            hint = f"write a priority from {MIN_PRIORITY} to {MAX_PRIORITY}"
        else:
            return
    elif priority is None or (scheduler is not None and priority == 0):
        return
    elif scheduler is None:
        problem, hint = (
            f"priority {priority} without scheduler",
            "add scheduler: fifo or scheduler: rr, or remove priority",
        )
    else:
        problem = f"priority {priority} is out of range for {scheduler}, which has none but 0"
        hint = "remove it, or use scheduler: fifo or scheduler: rr"
    problems.append(DefinitionError(problem, hint, mark=marks["priority"]))


def _check_shared_cpus(
    pinning: Pinning, scheduler: str | None, problems: list[DefinitionError], warnings: list[str]
) -> None:
    first: dict[int, Mark] = {}
    for cpu, mark in pinning.host_cpus:
        earlier = first.setdefault(cpu, mark)
        if earlier is mark:
            continue
        what = f"host CPU {cpu} has a vCPU already, from {earlier.line}:{earlier.column}"
        if scheduler in REALTIME_POLICIES:
            hint = f"two {scheduler} vCPUs on one CPU can hang the guest; give each a CPU of its own"
            problems.append(DefinitionError(what, hint, mark=mark))
        else:
            warnings.append(f"{mark}: {what}; they will take turns")
