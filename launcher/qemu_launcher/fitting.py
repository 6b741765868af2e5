"""Whether the CPUs that a definition names are CPUs of this host, and do not get into each other's way on it. Pure."""

from collections.abc import Iterator

from .cpulist import format_cpulist
from .definition import CpuSet, VmDefinition
from .errors import DefinitionError
from .host import CPU_FOLDER, Host


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
