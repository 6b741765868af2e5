"""Whether the CPUs of the vCPUs go together: one L3 cache, one kind of core, one NUMA node.

Why it exists: CPUs may be there, free, and whole cores, and yet the guest stutters, because half of them are on the
other chip of a Ryzen, are an Intel's efficiency cores, or belong to the other socket; and the guest's scheduler takes
all of its vCPUs for equal. Nothing is said where the guest has more vCPUs than one of these has CPUs, and so must be on
several, or where it was told.

Pure judgement over a Tree. Files: Documentation/ABI/testing/sysfs-devices-system-cpu, and for the kinds of core
tools/perf/Documentation/intel-hybrid.txt. Where they are not, as in many virtual machines, nothing is found.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..cpulist import format_cpulist, named
from ..definition import VmDefinition
from ..host import CPU_FOLDER
from ..options import smp_numbers, vcpu_limit
from ..pinning import Pinning
from ..sizes import format_size
from . import asked
from .finding import Finding
from .nodes import nodes
from .tree import Tree, cpus_in

Cpus = frozenset[int]

_KINDS = (("cpu_core", "performance"), ("cpu_atom", "efficiency"), ("cpu_lowpower", "low power"))
_MOST_TOLD = 4


class Part(NamedTuple):
    """CPUs that belong together, and by which word they are told from others; empty where their number says it."""

    cpus: Cpus
    word: str


def layout(definition: VmDefinition, tree: Tree) -> Iterator[Finding]:
    """What the vCPUs are spread over. Several nodes are several L3 caches too: that is said once."""
    pinning = definition.pinning
    if pinning is None:
        return
    of_nodes = [Part(cpus, f"node {number}") for number, cpus in nodes(tree).items()]
    if len(_touched(pinning, of_nodes)) > 1:
        yield from _nodes(definition, pinning, of_nodes)
    elif not _is_told(definition, pinning, caches := _caches(tree)):
        why = "what they share is slow from one to the other, and the guest knows nothing of it"
        yield from _apart(pinning, caches, "L3 caches", why, "CACHE")
    kinds = [Part(cpus_in(tree.text(f"/sys/devices/{pmu}/cpus")), word) for pmu, word in _KINDS]
    yield from _apart(pinning, kinds, "kinds of core", "a guest takes all its vCPUs for equally fast", "MAXMHZ")


def _nodes(definition: VmDefinition, pinning: Pinning, parts: Sequence[Part]) -> Iterator[Finding]:
    guest = sum(one.get("type") == "node" for one in asked.each(definition, "numa"))
    if guest >= len(_touched(pinning, parts)):
        return
    why = "memory of one is slow from the other, and the guest knows nothing of it"
    found = list(_apart(pinning, parts, "NUMA nodes", why, "NODE"))
    yield from (one._replace(severity="warning") for one in found)
    if not found:
        fix = (
            "no node has as many CPUs: tell the guest which vCPUs are on which, with memory of each, as in "
            "qemu-launcher.yml(5), NUMA"
        )
        yield Finding("note", "layout", _where(pinning, parts, "NUMA nodes"), fix)


def _apart(pinning: Pinning, parts: Sequence[Part], what: str, why: str, column: str) -> Iterator[Finding]:
    """A note where they are on several of `parts`, and one would do."""
    needed = min(len(pinning.sets), len(pinning.cpus))
    enough = [part for part in parts if len(part.cpus) >= needed]
    if len(_touched(pinning, parts)) > 1 and enough:
        ones = _some((f"{format_cpulist(part.cpus)}{_in_brackets(part)}" for part in enough), " or ")
        fix = f"{why}: pin all to CPUs of one, {ones}; lscpu -e=CPU,CORE,{column} shows them"
        yield Finding("note", "layout", _where(pinning, parts, what), fix)


def _touched(pinning: Pinning, parts: Iterable[Part]) -> list[Part]:
    pinned = pinning.cpus
    return [part for part in parts if part.cpus & pinned]


def _where(pinning: Pinning, parts: Iterable[Part], what: str) -> str:
    """vCPUs have numbers only in the list form."""
    places = []
    touched = _touched(pinning, parts)
    for part in touched:
        vcpus = [index for index, one in enumerate(pinning.by_index or ()) if one.cpus & part.cpus]
        who = f"vCPU{'s' * (len(vcpus) != 1)} {format_cpulist(vcpus)} on " if vcpus else ""
        places.append(f"{who}{named(part.cpus & pinning.cpus)}{_in_brackets(part)}")
    return f"the vCPUs are on {len(touched)} {what}: {_some(places, ', ')}"


def _in_brackets(part: Part) -> str:
    return f" ({part.word})" if part.word else ""


def _some(words: Iterable[str], between: str) -> str:
    every = list(words)
    return between.join([*every[:_MOST_TOLD], *(["..."] if len(every) > _MOST_TOLD else [])])


def _caches(tree: Tree) -> list[Part]:
    """The L3 caches, with their sizes if these differ."""
    folder, sizes = f"/{CPU_FOLDER}", dict[Cpus, str]()
    seen: set[int] = set()
    for cpu in sorted(int(name[3:]) for name in tree.names(folder) if re.fullmatch(r"cpu[0-9]+", name)):
        cache = f"{folder}/cpu{cpu}/cache/index3"
        if cpu not in seen and (cpus := cpus_in(tree.text(f"{cache}/shared_cpu_list"))):
            seen |= cpus
            size = re.fullmatch(r"([0-9]+)K", tree.text(f"{cache}/size") or "")
            sizes[cpus] = format_size(int(size[1]) << 10) if size else ""
    differ = len(set(sizes.values())) > 1
    return [Part(cpus, size if differ else "") for cpus, size in sizes.items()]


def _is_told(definition: VmDefinition, pinning: Pinning, caches: Sequence[Part]) -> bool:
    """Whether the guest has dies or sockets, which to it have an L3 cache each, and none of them is on two."""
    smp, limit = smp_numbers(definition.options) or {}, vcpu_limit(definition.options) or 0
    dies = smp.get("sockets", 1) * smp.get("dies", 1)
    if dies == 1 or limit % dies:
        return False
    size = limit // dies  # vCPUs
    by_die: dict[object, Cpus] = {}
    for index, one in enumerate(pinning.by_index or ()):
        by_die[index // size] = by_die.get(index // size, frozenset()) | one.cpus
    for place, one in (pinning.topology or {}).items():
        level = dict(place)
        die = level["socket"], level.get("die", level["core"] * smp.get("threads", 1) // size)
        by_die[die] = by_die.get(die, frozenset()) | one.cpus
    return all(sum(bool(cpus & cache.cpus) for cache in caches) <= 1 for cpus in by_die.values())
