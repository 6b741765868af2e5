"""The definition of a VM: a YAML file becomes one frozen value, or an error that names file, line and column.

All rules about a definition that need neither the host nor the helper hold for a VmDefinition: those of single keys
are in `keys` and `options`, those across several are here. After a failure nothing has been started or changed. As
many problems as can be told apart are reported in one go.

The values are named tuples and not dataclasses: importing dataclasses brings in inspect, a sixth of all the time that
`qemu-launcher command` may take.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from . import restrictions, yamlnode
from .cpulist import format_cpulist
from .errors import MOST_PROBLEMS, DefinitionError, Mark
from .hostdevices import drives_host_devices, pinned_by
from .keys import (
    KEY_NAMES,
    NO_KEYS_HINT,
    REALTIME_POLICIES,
    HookCommand,
    Isolation,
    Memlock,
    Scheduling,
    Section,
    priority_of,
    read_launcher,
)
from .locking import has_mem_lock
from .optionlist import NO_OPTIONS_HINT, read_options
from .options import QemuOption, iothread_ids, smp_numbers, vcpu_limit
from .pinning import CpuSet, Pinning, beside_the_first, out_of_range, smp_for
from .yamlnode import Map, Node, Scalar, describe, fail

__all__ = [
    "CpuSet",
    "HookCommand",
    "Isolation",
    "Memlock",
    "Pinning",
    "QemuOption",
    "Scheduling",
    "VmDefinition",
    "is_pc",
    "load",
    "parse",
    "read",
    "validate_tunable",
]

MAX_FILE_BYTES = 1 << 20  # a long definition has 10 KiB; this bounds time and memory for a file that is none
MOST_SHARED = 3  # warnings of CPUs that several vCPUs have; where there are more, one for all
DEFAULT_SHUTDOWN_TIMEOUT = 60.0  # seconds
PC_BINARIES = ("qemu-system-x86_64", "qemu-system-i386", "qemu-kvm")  # the latter is Red Hat's name for the first
SECTIONS = ("launcher", "qemu")


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
    scheduler: str | None = None  # one of keys.POLICIES
    priority: int = 0  # 1-99 for fifo and rr, else 0
    emulator_pinning: CpuSet | None = None
    iothread_pinning: Mapping[str, CpuSet] | None = None  # by id; never empty
    emulator_scheduler: Scheduling | None = None
    memlock: Memlock = Memlock("none")
    isolation: Isolation | None = None  # None when nothing is pinned
    on_tuning_failure: str = "abort"  # or "continue"
    shutdown_timeout: float | None = DEFAULT_SHUTDOWN_TIMEOUT  # seconds; None: wait for ever
    before_start: tuple[HookCommand, ...] = ()
    after_stop: tuple[HookCommand, ...] = ()
    inhibit_sleep: bool = False
    debug: bool = False
    user: str | int | None = None
    group: str | int | None = None
    warnings: tuple[str, ...] = ()  # each with its place; for stderr when the VM is started
    marks: Mapping[str, Mark] = MappingProxyType({})

    @property
    def is_realtime(self) -> bool:
        return self.scheduler in REALTIME_POLICIES

    @property
    def wants_tuning(self) -> bool:
        """Whether there is anything to do before the guest may run."""
        return self.memlock.kind != "none" or self.places_threads or self.schedules_threads

    @property
    def places_threads(self) -> bool:
        """Whether any thread has host CPUs of its own."""
        return bool(self.pinning or self.emulator_pinning or self.iothread_pinning)

    @property
    def threads_by_helper(self) -> bool:
        """Whether placing or scheduling them takes more rights than the user has."""
        emulator_priority = self.emulator_scheduler.priority if self.emulator_scheduler else 0
        return self.isolation in ("shield", "cpuset") or self.is_realtime or emulator_priority > 0

    @property
    def could_pin_unaided(self) -> bool:
        """Whether its threads need the helper as they are, and with `isolation: affinity` would not."""
        return self.isolation in ("shield", "cpuset") and not self._replace(isolation="affinity").threads_by_helper

    @property
    def schedules_threads(self) -> bool:
        """Whether any thread has a policy of its own."""
        return self.scheduler is not None or self.emulator_scheduler is not None

    @property
    def may_bring_binary(self) -> bool:
        """Whether before_start may: as a link, or on what it mounts. A name along PATH is to be there before."""
        return "/" in self.binary and bool(self.before_start)

    def environment(self, ours: Mapping[str, str]) -> dict[str, str]:
        """That of QEMU and of the user's commands, where the launcher's own is `ours`."""
        return {**({} if self.clear_env else ours), **dict(self.env)}


def load(path: Path, name: str) -> VmDefinition:
    """Read and check the definition of VM `name` in `path`. Raises DefinitionError."""
    return parse(read(path), path, name)


def read(path: Path) -> bytes:
    """The content of a definition file: a regular file of at most MAX_FILE_BYTES. Raises DefinitionError."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DefinitionError(f"{path} is no regular file", "a definition is a YAML file")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as err:
        raise DefinitionError(f"cannot read {path}: {err.strerror}") from err
    except ValueError as err:  # a NUL in the path
        raise DefinitionError(f"cannot read {str(path)!r}: {err}") from err
    if len(data) > MAX_FILE_BYTES:
        raise DefinitionError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", "this can be no definition")
    return data


def _open_at_once(path: str, flags: int) -> int:
    # A FIFO would keep us waiting for a writer before we can see that it is one, and a terminal would become ours.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def parse(data: bytes, path: Path, name: str) -> VmDefinition:
    """Check the definition of VM `name` whose file `path` has the content `data`. Raises DefinitionError."""
    document = yamlnode.compose(yamlnode.decode(data, str(path)), str(path))
    problems = list(document.problems)
    sections = _sections(document, problems)
    launcher = read_launcher(sections.get("launcher"), problems)
    before = len(problems)
    options = read_options(sections["qemu"], problems) if "qemu" in sections else ()
    all_options = "qemu" in sections and len(problems) == before
    warnings = _check_together(launcher, options, problems, all_options=all_options)
    if problems:
        raise DefinitionError.several(problems)
    marks = MappingProxyType(launcher.marks)
    return VmDefinition(name, path, options=options, warnings=tuple(warnings), marks=marks, **launcher.values)


def _sections(document: yamlnode.Document, problems: list[DefinitionError]) -> dict[str, Node]:
    root = document.root
    if not isinstance(root, Map):
        what = f"a definition has the sections launcher: and qemu:, but this is {describe(root)}"
        fail(root, what, yamlnode.EXAMPLE_HINT)
    sections: dict[str, Node] = {}
    for key, node in root.pairs:
        if key.kind == "str" and key.text in SECTIONS:
            sections[key.text] = node
        # Else it is a place for an &anchor that a section uses: YAML's way to share.
        elif len(problems) < MOST_PROBLEMS and not document.is_shared(node):
            problems.append(_unknown_section(key))
    problems.extend(
        DefinitionError(f"the section {name}: is missing", hint, mark=root.mark)
        for name, hint in (("launcher", NO_KEYS_HINT), ("qemu", NO_OPTIONS_HINT))
        if name not in sections
    )
    return sections


def _unknown_section(key: Scalar) -> DefinitionError:
    if key.kind == "str" and key.text in KEY_NAMES:
        hint = f"{key.text} is a key of the section launcher: put it there, two spaces further in"
        return DefinitionError(f"unknown section {key.text!r}", hint, mark=key.mark)
    return yamlnode.unknown(key, "section", SECTIONS)


def is_pc(binary: str) -> bool:
    """Whether this QEMU, a path or a name, makes PCs: machines whose vCPUs its options tell. Nothing is looked at."""
    return os.path.basename(binary) in PC_BINARIES  # noqa: PTH119  a Path costs more


def validate_tunable(definition: VmDefinition) -> None:
    """Raise DefinitionError if this QEMU could not be tuned as the definition wants. It may still be run untuned."""
    if not definition.wants_tuning:
        return
    problems = list(restrictions.untunable(definition.options, threads_by_helper=definition.threads_by_helper))
    if problems:
        raise DefinitionError.several(problems)


# Rules across keys


def _check_together(
    launcher: Section, options: tuple[QemuOption, ...], problems: list[DefinitionError], *, all_options: bool
) -> list[str]:
    """Check what one key alone cannot tell, and fill in the defaults that depend on others. Returns warnings.

    What could not be read is no reason to complain about what could: a rule is left out where it needs a key that is
    unsure, or `all_options` and some are unknown.
    """
    keys, marks, unsure = launcher
    warnings: list[str] = []
    if not unsure & {"scheduler", "priority"}:
        _check_priority(keys, marks, problems)
    pinning: Pinning | None = keys.get("pinning")
    if pinning is not None:
        _check_shared_cpus(pinning, keys.get("scheduler"), problems, warnings)
    if pinning is not None and all_options:
        _check_vcpus(pinning, options, problems, is_pc=is_pc(keys.get("binary", "")))
    if not unsure & {"isolation", "pinning", "iothread_pinning", "emulator_pinning"}:
        _check_isolation(keys, marks, problems)
    if all_options:
        _check_iothreads(keys.get("iothread_pinning"), options, problems)
    keys.setdefault("inhibit_sleep", drives_host_devices(options))
    if "memlock" not in keys and (pinned_by(options) or has_mem_lock(options)):
        keys["memlock"] = Memlock("auto")
    problems.extend(restrictions.never(options))
    warnings.extend(restrictions.doubtful(options))
    return warnings


def _check_priority(keys: dict[str, Any], marks: Mapping[str, Mark], problems: list[DefinitionError]) -> None:
    scheduler, priority = keys.get("scheduler"), keys.get("priority")
    if scheduler is None and priority is not None:
        hint = "add scheduler: fifo or scheduler: rr, or remove priority"
        problems.append(DefinitionError(f"priority {priority} without scheduler", hint, mark=marks["priority"]))
    elif scheduler is not None:
        try:
            keys["priority"] = priority_of(scheduler, priority, marks.get("priority", marks["scheduler"]))
        except DefinitionError as err:
            problems.append(err)


def _check_isolation(keys: dict[str, Any], marks: Mapping[str, Mark], problems: list[DefinitionError]) -> None:
    """Only vCPUs are shielded. Without them threads are placed by affinity, or in cpusets where that is asked for."""
    pinning, iothreads, emulator = (keys.get(key) for key in ("pinning", "iothread_pinning", "emulator_pinning"))
    if pinning or iothreads or emulator:
        isolation = keys.setdefault("isolation", "shield" if pinning else "affinity")
        if isolation == "affinity" or pinning or (isolation == "cpuset" and iothreads):
            return
        what = (
            "shield has nothing to shield: no vCPU is pinned"
            if isolation == "shield"
            else "cpuset is made for pinned vCPUs and iothreads, and emulator_pinning alone pins none of them"
        )
        hint = "add vcpu_pinning, or write isolation: affinity"
    elif "isolation" in keys:
        what = f"{keys['isolation']} has nothing to isolate: no vCPU is pinned"
        hint = "add vcpu_pinning, or remove isolation"
    else:
        return
    problems.append(DefinitionError(f"isolation: {what}", hint, mark=marks["isolation"]))


def _check_iothreads(
    iothreads: Mapping[str, CpuSet] | None, options: tuple[QemuOption, ...], problems: list[DefinitionError]
) -> None:
    known = iothread_ids(options)
    if known is None:
        return
    for name, cpus in (iothreads or {}).items():
        if name not in known:
            what = f"iothread_pinning names {name!r}, and the qemu section has no such iothread"
            hint = f"it has {', '.join(known)}" if known else f"add - object: [iothread, id: {name}] to it"
            problems.append(DefinitionError(what, hint, mark=cpus.mark))


def _check_vcpus(
    pinning: Pinning, options: tuple[QemuOption, ...], problems: list[DefinitionError], *, is_pc: bool
) -> None:
    """Whether the guest has the vCPUs that are pinned. Of other machines than a PC only QEMU knows their places."""
    smp, limit = smp_numbers(options), vcpu_limit(options)
    if limit is not None and len(pinning.sets) > limit:
        message = f"vcpu_pinning names {len(pinning.sets)} vCPUs, but -smp gives the guest {limit}"
        problems.append(DefinitionError(message, "give it more there, or pin fewer", mark=pinning.sets[limit].mark))
    if smp and is_pc:
        for place, cpus in (pinning.topology or {}).items():
            wrong = out_of_range(place, smp)
            if wrong is not None:
                problems.append(DefinitionError(f"vcpu_pinning names {wrong}", mark=cpus.mark))
    elif smp == {} and is_pc and (second := beside_the_first(pinning)) is not None:
        message = f"vcpu_pinning names {second[0]}, but without -smp the guest has only vCPU 0"
        problems.append(DefinitionError(message, f"add - {smp_for(pinning)} to the section qemu", mark=second[1]))


def _check_shared_cpus(
    pinning: Pinning, scheduler: str | None, problems: list[DefinitionError], warnings: list[str]
) -> None:
    first: dict[int, Mark] = {}
    told: set[frozenset[int]] = set()
    texts = list[str]()
    for cpus, mark, _parts in pinning.sets:
        shared = frozenset(cpus & first.keys())
        for cpu in cpus - shared:
            first[cpu] = mark
        if not shared:
            continue
        earlier = first[min(shared)]
        plural = "s" * (len(shared) > 1)
        verb = "have" if plural else "has"
        what = f"host CPU{plural} {format_cpulist(shared)} {verb} a vCPU already, from {earlier.line}:{earlier.column}"
        if scheduler in REALTIME_POLICIES:
            hint = f"two {scheduler} vCPUs on one CPU can hang the guest; give each a CPU of its own"
            problems.append(DefinitionError(what, hint, mark=mark))
        elif not (plural and shared in told):  # many vCPUs that float over the same CPUs are one fact
            told.add(shared)
            texts.append(f"{mark}: {what}; they will take turns")
    if len(texts) > MOST_SHARED:
        several = frozenset[int]().union(*told)
        which = f"CPUs {format_cpulist(several)} have" if len(several) > 1 else f"CPU {min(several)} has"
        texts = [f"{pinning.mark}: host {which} several vCPUs{' each' * (len(several) > 1)}; they will take turns"]
    warnings += texts
