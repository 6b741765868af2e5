"""The user's running VMs, as they are.

Why it exists: `status`. What is shown is read back from /proc, the cgroup tree and QEMU itself; the lock file only says
which threads are vCPUs. A VM whose launcher has died, or whose runtime directory went with the login, is found all the
same. All VMs are asked at once, so that one that hangs costs no more time than its own timeouts.

NotRunning (exit 3) for a VM that does not run.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

from . import cgroups, control, host, procfs, runtime, stdout, table, threads
from .control import State
from .cpulist import format_cpulist, named
from .errors import LauncherError, printable
from .procfs import Scheduling
from .qmp import run_state
from .record import Record
from .runtime import Found
from .sizes import format_limit, format_size

COLUMNS = ("vCPU", "TID", "host CPUs", "shielded", "policy", "priority")


@dataclass(frozen=True, slots=True)
class Vcpu:
    """One vCPU as the kernel sees it. `shield`: how the one of ours holds that it is in."""

    index: int
    tid: int
    cpus: frozenset[int]
    shielded: bool
    shield: str | None
    scheduling: Scheduling | None  # None if the thread has gone

    def cells(self) -> tuple[str, ...]:
        """In the order of COLUMNS."""
        shielded = self.shield or "no"
        if self.shielded:  # what differs without partitions: qemu-launcher-helper(8), SHIELDS
            shielded = "yes" if cgroups.is_partition(self.shield) else f"yes ({self.shield})"
        policy, priority = "gone", ""
        if (found := self.scheduling) is not None:
            policy = f"{found.policy} (reset on fork)" if found.reset_on_fork else found.policy
            priority = str(found.priority)
        return (str(self.index), str(self.tid), format_cpulist(self.cpus), shielded, policy, priority)

    def as_json(self) -> dict[str, object]:
        """The keys are documented in qemu-launcher(1)."""
        found = self.scheduling
        return {
            "vcpu": self.index,
            "tid": self.tid,
            "cpus": format_cpulist(self.cpus),
            "shielded": self.shielded,
            "shield": self.shield,
            "policy": None if found is None else found.policy,
            "priority": None if found is None else found.priority,
            "reset_on_fork": None if found is None else found.reset_on_fork,
        }


@dataclass(frozen=True, slots=True)
class Memory:
    """Of QEMU, in bytes. `lockable` is its soft limit, sizes.INFINITY for none."""

    used: int
    locked: int
    lockable: int

    def __str__(self) -> str:
        used, locked, lockable = format_size(self.used), format_size(self.locked), format_limit(self.lockable)
        return f"{used} used, {locked} locked, {lockable} lockable"


@dataclass(frozen=True, slots=True)
class Picture:
    """One VM, ready to be shown. PIDs are None for who is not there, `memory` is None without a QEMU."""

    name: str
    state: State
    pid: int | None = None
    definition: str = ""
    launcher: int | None = None
    scope: str | None = None
    memory: Memory | None = None
    warnings: tuple[str, ...] = ()
    vcpus: tuple[Vcpu, ...] = ()

    @property
    def title(self) -> str:
        """`win11: running, PID 4711`."""
        return f"{self.name}: {self.state}" + (f", PID {self.pid}" if self.pid is not None else "")

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What stands between the title and the table."""
        if self.pid is None:
            return []
        launcher = f"PID {self.launcher}" if self.launcher is not None else "gone; the VM runs without it"
        facts = {
            "definition": printable(self.definition),
            "launcher": launcher,
            "scope": self.scope or "",
            "memory": str(self.memory or ""),
        }
        lines = [
            ("" if number else "warning", line)
            for text in self.warnings
            for number, line in enumerate(text.split("\n"))
        ]
        return [(name, fact) for name, fact in facts.items() if fact] + lines

    def as_json(self) -> dict[str, object]:
        """The keys are documented in qemu-launcher(1): they stay."""
        memory = self.memory
        return {
            "name": self.name,
            "state": self.state.word,
            "remark": self.state.remark,
            "pid": self.pid,
            "control_socket": self.state.control_socket,
            "definition": self.definition or None,
            "launcher": self.launcher,
            "scope": self.scope,
            "memory": memory and {"used": memory.used, "locked": memory.locked, "lockable": memory.lockable},
            "warnings": [text.replace("\n", "; ") for text in self.warnings],
            "vcpus": [vcpu.as_json() for vcpu in self.vcpus],
        }


def show(name: str | None, *, as_json: bool = False) -> int:
    """Show one VM, or all of this user. Returns the exit status. NotRunning for a named one that does not run."""
    pictures = asyncio.run(pictures_of(name))
    if as_json:
        stdout.say_json([picture.as_json() for picture in pictures], indent=2)
    elif not pictures:
        stdout.say(f"{nothing_runs()}\n")
    else:
        with table.page() as page:
            draw(pictures, page)
    return 0


async def pictures_of(name: str | None) -> list[Picture]:
    """One VM, or all of this user, taken at the same time. NotRunning for a named one that does not run."""
    found = runtime.find_all() if name is None else [control.running(name, f"status {name}")]
    return list(await asyncio.gather(*map(_picture, found)))


def nothing_runs() -> str:
    """What is said instead of a picture."""
    if os.geteuid() == 0:
        return "no VM of root is running; those of another user: sudo -u USER qemu-launcher status"
    return "no VM of yours is running"


# What there is to see


async def _picture(vm: Found) -> Picture:
    launcher = None if vm.launcher is None else vm.launcher.pid
    if (qemu := vm.qemu) is None:
        state = control.state_unasked(vm) or State("ended")
        return Picture(vm.name, state, definition=vm.record.definition, launcher=launcher)
    state, known = await _state_and_vcpus(vm)
    live = set(procfs.tids(qemu.pid))
    vcpus = tuple(_vcpu(qemu.pid, index, tid) for index, tid in sorted(known.items()) if tid in live)
    loss = lost_shield(vm.name, vm.record, vcpus, host.online_cpus())
    scope = cgroups.scope_of(qemu.pid)
    return Picture(
        vm.name,
        state,
        pid=qemu.pid,
        definition=vm.record.definition,
        launcher=launcher,
        scope=None if scope is None else scope.name,
        memory=_memory(qemu.pid),
        warnings=() if loss is None else (loss,),
        vcpus=vcpus,
    )


def lost_shield(name: str, record: Record, vcpus: Sequence[Vcpu], online: frozenset[int] | None) -> str | None:
    """What has become of the shield of a VM that was started with one; None if it is whole, or never was.

    The first line says what, the others what to do. `online`: the host's CPUs that are, None if that is not known.
    """
    if record.isolation != "shield" or not vcpus:
        return None
    offline = record.cpus - (record.cpus if online is None else online)
    of_it, anew = f"its shield of CPUs {format_cpulist(record.cpus)}", "for a new shield: start it anew"
    remedy = [_to_bring_online(offline)] if offline else []
    held = frozenset[int]().union(*(vcpu.cpus for vcpu in vcpus if vcpu.shielded))
    broken = {vcpu.shield for vcpu in vcpus if not vcpu.shielded and vcpu.shield is not None}
    if held & record.cpus:  # not all of them: a vCPU that was unplugged has left its CPU
        if not offline:
            return None
        what = f"of {of_it} {named(offline)} went offline: its vCPUs share what is left, {format_cpulist(held)}"
    elif broken:
        what = f"{of_it} does not hold: {min(broken)}"
        # Nobody has looked since: whatever had real time has it still, among all others.
        remedy += [f"to take back the real time that it may have: qemu-launcher release {name}", anew]
    elif offline:
        what = f"{of_it} was taken back: {named(offline)} went offline"
        remedy += [anew]
    else:
        what = (
            f"{of_it} was taken back: released by you or an administrator, or one of them was offline, "
            "or the VM was moved out of its scope"
        )
        remedy += [anew]
    return "\n".join([what, *remedy])


def _to_bring_online(cpus: frozenset[int]) -> str:
    """How root does, as a command for a shell."""
    files = " ".join(f"/sys/devices/system/cpu/cpu{cpu}/online" for cpu in sorted(cpus))
    return f"to bring {'them' if len(cpus) > 1 else 'it'} online: echo 1 | sudo tee {files}"


async def _state_and_vcpus(vm: Found) -> tuple[State, dict[int, int]]:
    """QEMU's own word where it gives one; what the lock file says where the control socket is busy or gone."""
    known = dict(vm.record.vcpus)
    if (state := control.state_unasked(vm)) is not None:
        return state, known
    try:
        status, cpus = await control.ask(vm, "query-status", "query-cpus-fast")
        known = known or threads.read_threads(cpus, None, []).tids()
    except LauncherError as err:
        return control.state_unheard(err), known
    return State(run_state(status), control_socket="ok"), known


def _memory(pid: int) -> Memory:
    limits = procfs.memlock_limit(pid)
    return Memory(procfs.resident(pid) or 0, procfs.locked(pid) or 0, limits[0] if limits else 0)


def _vcpu(pid: int, index: int, tid: int) -> Vcpu:
    shield = cgroups.shield_of(pid, tid)
    return Vcpu(
        index=index,
        tid=tid,
        cpus=procfs.allowed_cpus(pid, tid) or frozenset(),
        shielded=cgroups.holds(shield),
        shield=shield,
        scheduling=procfs.scheduling(tid),
    )


# How it is shown


def draw(pictures: Sequence[Picture], page: table.Page) -> None:
    """One below the other."""
    for number, picture in enumerate(pictures):
        if number:
            page.line("")
        page.line(picture.title, bold=True)
        for name, value in picture.facts:
            page.line(f"  {name:<10}  {value}")
        if picture.vcpus:
            page.table(COLUMNS, [vcpu.cells() for vcpu in picture.vcpus], indent=2)
