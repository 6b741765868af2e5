"""The CPUs that a definition pins, the cores they are on, and what else on the host has a say about them.

Why it exists: a shield can be granted and still be a poor one. Half a core, CPU 0, or what an earlier attempt with
isolcpus= or libvirt's hooks has left behind cost the user his gain, and no error says so.
Pure judgement over a definition, a Host and a Tree. Nothing here keeps a VM from starting, but CPUs that are not there.
"""

import re
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
from . import asked
from .finding import Finding
from .tree import Tree, cpus_in, linux

Cpus = frozenset[int]

FAIR_SERVER = (6, 12)  # the kernel's deadline server for fair tasks: kernel/sched/fair.c, fair_server_init
_LIBVIRT_HOOKS = "/etc/libvirt/hooks"
# systemd.unit(5), "Unit File Load Path", as far as an administrator, or systemctl set-property, writes there.
_UNIT_FOLDERS = (
    "/etc/systemd/system",
    "/etc/systemd/system.control",
    "/run/systemd/system",
    "/run/systemd/system.control",
)
_WHOLE_HOST = ("init.scope.d", "system.slice.d", "user.slice.d")


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
    for _, at_boot in _isolcpus(tree):  # the kernel counts these in
        isolated -= at_boot
    taken = all_named(definition) & isolated
    if taken:
        fix = "qemu-launcher status shows your VMs; an administrator sees all with --all-users. Use other CPUs, or wait"
        yield Finding("error", "cpus", f"{named(taken)}: shielded for another VM now", fix)


# What fights with us


def leftovers(tree: Tree, pinned: Cpus, mechanism: str | None) -> Iterator[Finding]:
    """Settings of the host that were made for the same purpose by other means.

    `pinned`: CPUs of this VM; empty for the host as such. `mechanism`: how the helper shields; the masks that it sets
    itself, to shield without partitions, are none of these.
    """
    yield from _kernel_arguments(tree, pinned)
    online, said = cpus_in(tree.text("/sys/devices/system/cpu/online")), set[str]()
    for folder in _UNIT_FOLDERS:
        for unit in _WHOLE_HOST:
            for file in tree.names(f"{folder}/{unit}"):
                path = f"{folder}/{unit}/{file}"
                value = _allowed_cpus(tree.text(path) or "") if file.endswith(".conf") else ""
                if value:
                    said.add(unit)
                if value and not (online and online <= cpus_in(re.sub(r"[\s,]+", ",", value))):
                    yield _drop_in(tree, path, unit.removesuffix(".d"), value)
    if mechanism != "pool" and online:
        yield from _masks(tree, online, said)
    for path in _hooks(tree):
        words = sorted(set(re.findall(r"AllowedCPUs|\bcset\b|cpuset", tree.text(path) or "")))
        if words:
            yield Finding(
                "warning",
                "libvirt",
                f"the libvirt hook {path} moves the host's tasks between CPUs too ({', '.join(words)})",
                "take that out of it, or do not run libvirt's VMs beside these",
            )


def _kernel_arguments(tree: Tree, pinned: Cpus) -> Iterator[Finding]:
    words = (tree.text("/proc/cmdline") or "").split()
    for word, cpus in _isolcpus(tree):
        idle = cpus - pinned
        what = f"the kernel was started with {word}: "
        if pinned and not idle:
            yield Finding("note", "isolcpus", f"{what}{named(cpus)} stay empty also while the VM is off")
        elif idle:
            text = f"{what}nothing of the host runs on {named(idle)} by itself, VM or not"
            fix = "take it off the kernel command line: a shield does the same, and only while a VM has it"
            yield Finding("warning", "isolcpus", text, fix)
    for word in words:
        name, _, value = word.partition("=")
        if name == "nohz_full" and pinned and (rest := pinned - cpus_in(value)):
            text = f"{word} leaves out {named(rest)}, where the timer ticks on"
            yield Finding("note", "nohz_full", text, "add them, or leave nohz_full away: a shield works without it")


def _isolcpus(tree: Tree) -> Iterator[tuple[str, Cpus]]:
    """isolcpus=[flags,]list with what it names: Documentation/admin-guide/kernel-parameters.txt."""
    for word in (tree.text("/proc/cmdline") or "").split():
        name, _, value = word.partition("=")
        if name == "isolcpus":
            cpus = cpus_in(",".join(part for part in value.split(",") if not part[:1].isalpha()))
            if cpus:
                yield word, cpus


def _masks(tree: Tree, online: Cpus, said: set[str]) -> Iterator[Finding]:
    """What keeps a part of the host on some CPUs by no word of systemd's; `said`: where there is one."""
    for unit in (one.removesuffix(".d") for one in _WHOLE_HOST if one not in said):
        path = f"/sys/fs/cgroup/{unit}/cpuset.cpus"
        cpus = cpus_in(tree.text(path))
        if cpus and not online <= cpus:
            text = f"{unit} is kept on {named(cpus)} ({path}), though no AllowedCPUs= says so any more"
            fix = (
                "an empty AllowedCPUs= leaves the old mask in force: "
                f"sudo systemctl set-property --runtime {unit} AllowedCPUs={format_cpulist(online)}"
            )
            yield Finding("warning", "AllowedCPUs", text, fix)


def _drop_in(tree: Tree, path: str, unit: str, value: str) -> Finding:
    online = tree.text("/sys/devices/system/cpu/online") or "0-..."
    return Finding(
        "warning",
        "AllowedCPUs",
        f"{path} keeps {unit} on CPUs {value} (AllowedCPUs=), whether a VM runs or not",
        f"sudo rm {path}; sudo systemctl daemon-reload; and, since an empty value leaves the old one in force: "
        f"sudo systemctl set-property --runtime {unit} AllowedCPUs={online}",
    )


def _allowed_cpus(text: str) -> str:
    """The value that holds; systemd.syntax(7): an empty one resets."""
    value = ""
    for line in text.splitlines():
        name, equals, given = line.strip().partition("=")
        if equals and name.strip() == "AllowedCPUs":
            value = f"{value} {given.strip()}".strip() if given.strip() else ""
    return value


def _hooks(tree: Tree) -> Iterator[str]:
    """libvirt's hooks for QEMU, those of the usual dispatcher (qemu.d/VM/EVENT/STATE/*) among them."""
    yield f"{_LIBVIRT_HOOKS}/qemu"
    pending = [f"{_LIBVIRT_HOOKS}/qemu.d"]
    for _ in range(1000):  # a bound for links in circles
        if not pending:
            return
        folder = pending.pop()
        for name in tree.names(folder):
            path = f"{folder}/{name}"
            if tree.is_directory(path):
                pending.append(path)
            else:
                yield path


# Real time


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
