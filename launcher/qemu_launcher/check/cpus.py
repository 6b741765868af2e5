"""The CPUs that a definition pins, the cores they are on, and real time on them.

Why it exists: a shield can be granted and still be a poor one. Half a core, or CPU 0, costs the user his gain, and no
error says so.
Pure judgement over a definition, a Host and a Tree. Nothing here keeps a VM from starting, but CPUs that are not there.
"""

from collections.abc import Iterator

from .. import fitting
from ..cpulist import format_cpulist, named
from ..definition import VmDefinition, is_pc
from ..errors import DefinitionError
from ..host import Host
from ..keys import REALTIME_POLICIES
from ..options import smp_numbers
from ..pinning import Pinning, beside_the_first, smp_for
from ..places import describe_place
from . import asked, leftovers
from .finding import Finding
from .tree import Tree, cpus_in, linux

Cpus = frozenset[int]

FAIR_SERVER = (6, 12)  # the kernel's deadline server for fair tasks: kernel/sched/fair.c, fair_server_init


def there(definition: VmDefinition, facts: Host) -> Iterator[Finding]:
    """Whether the CPUs exist and are online, and no thread is in another's shield: as a start would see it."""
    try:
        fitting.validate_against_host(definition, facts)
    except DefinitionError as err:
        absent = all_named(definition) - facts.online
        if not absent:
            for problem in err.problems:
                yield Finding("error", "cpus", f"{problem.mark}: {problem.message}", problem.hint)
            return
        # One line for all of them: a definition that comes from another host names many.
        first = err.problems[0]
        has = f"; this host has {format_cpulist(facts.possible)}, online {format_cpulist(facts.online)}"
        text = f"{first.mark}: there {'are' if len(absent) != 1 else 'is'} no host {named(absent)}, or not online{has}"
        yield Finding("error", "cpus", text, first.hint or "lscpu -e=CPU,CORE,ONLINE shows which there are")
        return
    yield Finding("ok", "cpus", f"host {named(all_named(definition))}: there and online")


def count(definition: VmDefinition) -> Iterator[Finding]:
    """Whether as many vCPUs are pinned as there are.

    Machines that are no PCs have as many as their maker gave them, where -smp does not say.
    """
    pinning = definition.pinning
    if pinning is None:
        return
    yield from _unpinned(definition, pinning)
    if is_pc(definition.binary) or smp_numbers(definition.options) != {}:
        return
    if (second := beside_the_first(pinning)) is not None:
        text = f"{second[1]}: vcpu_pinning names {second[0]}, and without -smp most machines have only vCPU 0"
        yield Finding("warning", "cpus", text, f"add - {smp_for(pinning)} to the section qemu")


def _unpinned(definition: VmDefinition, pinning: Pinning) -> Iterator[Finding]:
    """vCPUs that are left to run with the emulator threads. Only the form by topology is made to leave some out."""
    pinned, made = len(pinning.sets), asked.vcpus(definition) or 0
    if pinned >= made:
        return
    others = definition.emulator_pinning
    where = f"on host {named(others.cpus)} (emulator_pinning)" if others else "on any CPU that nobody has shielded"
    if pinning.topology is not None:
        text = f"vcpu_pinning names {pinned} vCPU{'s' * (pinned > 1)}, and smp makes {made}; the others run {where}"
        yield Finding("note", "cpus", f"{pinning.mark}: {text}")
        return
    which = f"vCPU {pinned} is" if made - pinned == 1 else f"vCPUs {format_cpulist(range(pinned, made))} are"
    runs = "it runs" if made - pinned == 1 else "they run"
    text = f"{pinning.mark}: {which} not pinned, and smp makes {made}; {runs} {where}"
    yield Finding("warning", "cpus", text, "name a host CPU for each vCPU in vcpu_pinning, or have smp make fewer")


def of_vcpus(definition: VmDefinition) -> Cpus:
    """All CPUs that vCPUs are pinned to."""
    return definition.pinning.cpus if definition.pinning is not None else frozenset()


def all_named(definition: VmDefinition) -> Cpus:
    """These, and those of iothreads and emulator threads."""
    others = [*(definition.iothread_pinning or {}).values()]
    others += [definition.emulator_pinning] if definition.emulator_pinning is not None else []
    return of_vcpus(definition).union(*(one.cpus for one in others))


def cores(definition: VmDefinition, facts: Host) -> Iterator[Finding]:
    """SMT siblings that are split, CPU 0, and a guest whose idea of siblings is not the host's."""
    pinned = of_vcpus(definition) & facts.online
    whole = frozenset[int]().union(*(facts.siblings[cpu] for cpu in pinned))
    alone = whole - pinned
    is_shield = definition.isolation == "shield"
    if alone:
        split = named(cpu for cpu in pinned if facts.siblings[cpu] - pinned)
        if is_shield:
            text = f"a shield is made of whole cores: besides {split} it takes {named(alone)}, which nothing then uses"
            fix = f"pin vCPUs to {format_cpulist(alone)} too, and give the guest threads: 2 in smp"
        else:
            text = f"anybody may run on {named(alone)}, on the same cores as {split}"
            fix = "pin whole cores, with isolation: shield"
        yield Finding("warning", "smt", text, fix)
    elif any(len(facts.siblings[cpu]) > 1 for cpu in pinned):
        yield Finding("ok", "smt", f"{named(pinned)}: whole cores")
    if is_shield and 0 in whole:
        free = format_cpulist(facts.online - whole) or "none"
        yield Finding(
            "warning",
            "cpu 0",
            "the shield takes CPU 0, where the host handles interrupts and timers that cannot be moved"
            + ('; real time there needs an administrator\'s realtime = "anywhere"' if definition.is_realtime else ""),
            f"use other CPUs; not pinned are: {free}",
        )
    yield from _guest_siblings(definition, facts)


def _guest_siblings(definition: VmDefinition, facts: Host) -> Iterator[Finding]:
    """The guest's scheduler treats siblings as one core; they should be."""
    guest_cores = _guest_cores(definition)
    for name, cpus in guest_cores.items():
        known = [cpu for cpu in cpus if cpu in facts.siblings]
        if len(known) > 1 and not set(known) <= facts.siblings[known[0]]:
            yield Finding(
                "note",
                "topology",
                f"{name} of the guest is on CPUs {format_cpulist(known)}, which are not one core of the host's",
                "lscpu -e=CPU,CORE shows siblings; put the vCPUs of one core on two of them",
            )
            return
    shared: dict[Cpus, str] = {}
    for name, cpus in guest_cores.items():
        for core in {facts.siblings[cpu] for cpu in cpus if cpu in facts.siblings and len(facts.siblings[cpu]) > 1}:
            first = shared.setdefault(core, name)
            if first != name:
                yield Finding(
                    "note",
                    "topology",
                    f"{first} and {name} of the guest share one core of the host, CPUs {format_cpulist(core)}",
                    "tell the guest: threads: 2 in smp",
                )
                return


def _guest_cores(definition: VmDefinition) -> dict[str, list[int]]:
    """Host CPUs by core of the guest; empty where a vCPU has several."""
    found: dict[str, list[int]] = {}
    pinning = definition.pinning
    if pinning is None or any(len(one.cpus) > 1 for one in pinning.sets):
        return found
    if pinning.topology is not None:
        for place, one in pinning.topology.items():
            found.setdefault(describe_place(place[:-1]), []).extend(one.cpus)  # the last level is the thread
    else:
        threads = asked.threads_per_core(definition)
        for index, one in enumerate(pinning.by_index or ()):
            found.setdefault(f"core {index // threads}", []).extend(one.cpus)
    return found


def held(definition: VmDefinition, tree: Tree) -> Iterator[Finding]:
    """CPUs in a shield of another VM, where the helper is not asked (isolation: affinity): the kernel's own list."""
    isolated = cpus_in(tree.text("/sys/fs/cgroup/cpuset.cpus.isolated"))
    for _, at_boot in leftovers.isolcpus(tree):  # the kernel counts these in
        isolated -= at_boot
    taken = all_named(definition) & isolated
    if taken:
        fix = "qemu-launcher status shows your VMs; an administrator sees all with --all-users. Use other CPUs, or wait"
        yield Finding("error", "cpus", f"{named(taken)}: shielded for another VM now", fix)


def realtime(definition: VmDefinition, tree: Tree, release: str) -> Iterator[Finding]:
    """What is left for the kernel's own threads on a CPU whose vCPU never sleeps. `release`: uname(2)."""
    policies = [definition.scheduler, definition.emulator_scheduler.policy if definition.emulator_scheduler else None]
    if not set(policies) & set(REALTIME_POLICIES):
        return
    runtime, period = (tree.number(f"/proc/sys/kernel/sched_rt_{name}_us") for name in ("runtime", "period"))
    if runtime == -1:
        fix = "sudo sysctl kernel.sched_rt_runtime_us=950000; see /etc/sysctl.d for who has changed it"
        yield Finding(
            "error", "real time", "kernel.sched_rt_runtime_us is -1: nothing would stop a real-time thread", fix
        )
    elif linux(release) >= FAIR_SERVER:
        yield Finding("ok", "real time", "the kernel's fair server keeps real-time threads from starving others")
    else:
        share = f"{100 * (1 - runtime / period):.0f} %" if runtime and period else "a little"
        yield Finding(
            "warning",
            "real time",
            f"Linux {release} has no fair server (6.12 has): a real-time vCPU that never sleeps is stopped now and "
            f"then, whether anybody waits or not, to leave others {share} of its CPU (sched_rt_runtime_us)",
            "use a newer kernel, or leave out scheduler: on a shielded CPU a vCPU of policy other is alone as well",
        )
