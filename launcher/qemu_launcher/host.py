"""Facts about the host's CPUs, from /sys, and whether a definition fits them.

Reads only. Everything takes the root of the file system as an argument, so that tests can show it another host.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .cpulist import format_cpulist, parse_cpulist
from .definition import CpuSet, VmDefinition
from .errors import DefinitionError, LauncherError

CPU_FOLDER = "sys/devices/system/cpu"  # Documentation/admin-guide/cputopology.rst


@dataclass(frozen=True, slots=True)
class Host:
    """The host's CPUs. `possible` may come online, `online` can run a vCPU now.

    `siblings`: for each online CPU the CPUs of its core, itself included.
    """

    possible: frozenset[int]
    online: frozenset[int]
    siblings: Mapping[int, frozenset[int]]


def read_host(root: Path = Path("/")) -> Host:
    """The host as it is now. Raises LauncherError where /sys is missing or makes no sense."""
    folder = root / CPU_FOLDER
    online = _cpulist(folder / "online")
    siblings = {cpu: _siblings(folder, cpu) for cpu in online}
    return Host(_cpulist(folder / "possible"), online, siblings)


def online_cpus(root: Path = Path("/")) -> frozenset[int] | None:
    """CPUs that can run anything now; None where /sys does not tell."""
    try:
        return _cpulist(root / CPU_FOLDER / "online")
    except LauncherError:
        return None


def _siblings(folder: Path, cpu: int) -> frozenset[int]:
    try:
        return _cpulist(folder / f"cpu{cpu}" / "topology" / "thread_siblings_list")
    except LauncherError:  # no topology: some virtual machines and architectures. Then each CPU is a core.
        return frozenset((cpu,))


def _cpulist(path: Path) -> frozenset[int]:
    try:
        return parse_cpulist(path.read_text("ascii"))
    except (OSError, ValueError) as err:
        why = err.strerror if isinstance(err, OSError) else err  # str(err) would name the path once more
        raise LauncherError(
            f"cannot read the host's CPUs from {path}: {why}",
            "vcpu_pinning is checked against /sys: mount sysfs there if it is missing",
        ) from err


def validate_against_host(definition: VmDefinition, host: Host) -> None:
    """Raise DefinitionError if the definition names host CPUs that do not exist or are offline.

    Or if it wants other threads on the cores that its vCPUs' shield takes whole.
    """
    vcpus = definition.pinning.sets if definition.pinning else ()
    others = [(f"iothread {name!r}", cpus) for name, cpus in (definition.iothread_pinning or {}).items()]
    if definition.emulator_pinning is not None:
        others.append(("emulator_pinning", definition.emulator_pinning))
    problems = [problem for cpus in (*vcpus, *(cpus for _, cpus in others)) for problem in _missing(cpus, host)]
    if not problems and definition.isolation == "shield" and definition.pinning:
        named = definition.pinning.cpus
        shield = frozenset[int]().union(*(host.siblings[cpu] for cpu in named))
        problems = [
            _overlap(what, cpus, overlap, named, shield) for what, cpus in others if (overlap := cpus.cpus & shield)
        ]
    if problems:
        raise DefinitionError.several(problems)


def _missing(cpus: CpuSet, host: Host) -> Iterator[DefinitionError]:
    for numbers, mark in cpus.parts:
        part = frozenset(numbers)
        if absent := part - host.possible:
            what = f"host CPU {format_cpulist(absent)} does not exist; this host has {format_cpulist(host.possible)}"
            yield DefinitionError(what, mark=mark)
        elif offline := part - host.online:
            which = min(offline)
            hint = f"use another, or bring it online: echo 1 | sudo tee /{CPU_FOLDER}/cpu{which}/online"
            yield DefinitionError(f"host CPU {format_cpulist(offline)} is offline", hint, mark=mark)


def _overlap(
    what: str, cpus: CpuSet, overlap: frozenset[int], named: frozenset[int], shield: frozenset[int]
) -> DefinitionError:
    """A shield takes whole cores: a sibling of a vCPU's CPU is in it, though no key names it."""
    why = "vCPUs are pinned there" if overlap & named else "a sibling of it, in the same core, has a vCPU"
    return DefinitionError(
        f"{what} may not run on host CPU {format_cpulist(overlap)}, which is shielded: {why}",
        f"use CPUs outside of {format_cpulist(shield)}, or write isolation: cpuset",
        mark=cpus.mark_of(overlap),
    )
