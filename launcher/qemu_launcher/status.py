"""The user's running VMs: shown, powered down, cut off.

Why it exists: `status`, `stop` and `kill`. What is shown is read back from /proc, the cgroup tree and QEMU itself; the
lock file only says which threads are vCPUs. A VM whose launcher has died, or whose runtime directory went with the
login, is found all the same.

NotRunning (exit 3) for a VM that does not run. `stop` returns when QEMU has accepted the request, `kill` when QEMU is
gone; neither touches a process that is not the one recorded, whatever its PID.
"""

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import cgroups, procfs, runtime, stdout, table, threads
from .cpulist import format_cpulist, parse_cpulist
from .errors import LauncherError, NotRunning, QmpError, printable
from .process import QUIT_GRACE
from .qmp import Qmp
from .record import Record
from .runtime import Found
from .shutdown import NOT_STARTED
from .voice import format_size

# QEMU greets at once when nobody else is connected; who is second in its queue hears nothing.
GREETING_TIMEOUT = 2.0  # seconds

COLUMNS = ("vCPU", "TID", "host CPUs", "shielded", "policy", "priority")


class Busy(LauncherError):  # noqa: N818  as in errors.py
    """The control socket has another client, or QEMU does not answer."""


@dataclass(frozen=True, slots=True)
class VcpuRow:
    """One vCPU as the kernel sees it."""

    vcpu: int
    tid: int
    cpus: str
    shielded: str
    policy: str
    priority: str

    def cells(self) -> tuple[str, ...]:
        """In the order of COLUMNS."""
        return (str(self.vcpu), str(self.tid), self.cpus, self.shielded, self.policy, self.priority)


@dataclass(frozen=True, slots=True)
class Picture:
    """One VM, ready to be shown."""

    name: str
    pid: int | None
    state: str
    facts: tuple[tuple[str, str], ...]
    vcpus: tuple[VcpuRow, ...]

    @property
    def title(self) -> str:
        """`win11: running, PID 4711`."""
        return f"{self.name}: {self.state}" + (f", PID {self.pid}" if self.pid is not None else "")


def show(name: str | None) -> int:
    """Show one VM, or all of this user. Returns the exit status. NotRunning for a named one that does not run."""
    found = runtime.find_all() if name is None else [_running(name, "status")]
    pictures = asyncio.run(_pictures(found))
    if not pictures and os.geteuid() == 0:
        stdout.say("no VM of root is running; those of another user: sudo -u USER qemu-launcher status\n")
    elif not pictures:
        stdout.say("no VM of yours is running\n")
    elif (page := table.page_for_stdout()) is not None:
        _show_rich(pictures, page)
    else:
        stdout.say("\n".join(_plain(picture) for picture in pictures))
    return 0


def stop(name: str) -> int:
    """Ask the guest to power down; returns when QEMU has pressed its power button. Returns the exit status."""
    vm = _running(name, "stop")
    if vm.never_started:
        raise LauncherError(
            f"the guest of {name} has never been started: its launcher died before",
            f"end it with: qemu-launcher kill {name}",
        )
    asyncio.run(_power_down(vm))
    stdout.confirm(f"{name}: asked the guest to power down; if it does not: qemu-launcher kill {name}\n")
    return 0


def kill(name: str) -> int:
    """Cut the power: SIGTERM, on which QEMU closes its images, then SIGKILL. Returns when QEMU is gone."""
    vm = _running(name, "kill")
    if vm.qemu is not None:
        procfs.end(vm.qemu, grace=QUIT_GRACE)
    elif vm.launcher is not None:  # between its lock and its QEMU: it ends in order
        with vm.launcher.pidfd() as fd:
            if fd is not None:
                signal.pidfd_send_signal(fd, signal.SIGTERM)
                procfs.wait_readable(fd, QUIT_GRACE)
    stdout.confirm(f"{name}: its power is cut\n")
    return 0


def _running(name: str, command: str) -> Found:
    vm = runtime.find(name)
    if vm is not None:
        return vm
    message, hint = f"{name} is not running", "see what runs with: qemu-launcher status"
    if os.geteuid() == 0:  # who became another user to start it (`user:`) has to become him to see it too
        message = f"{name} is not running among the VMs of root"
        hint += f"\na VM with user: in its definition is that user's: sudo -u USER qemu-launcher {command} {name}"
    raise NotRunning(message, hint)


# The control socket


async def _ask(vm: Found, *commands: str) -> list[Any]:
    """Answers to `commands` over the control socket. Busy or LauncherError when nobody answers."""
    if vm.socket is None or not vm.socket.exists():
        if vm.is_starting:
            raise _still_starting(vm)
        raise LauncherError(
            f"the control socket of {vm.name} is gone, with the runtime directory of an earlier login, or hidden",
            f"power the guest down from inside, or cut its power with: qemu-launcher kill {vm.name}",
        )
    try:
        with runtime.connected(vm.socket) as client:
            async with asyncio.timeout(GREETING_TIMEOUT):
                qmp = await Qmp.negotiated(client)
            try:
                async with asyncio.timeout(GREETING_TIMEOUT):
                    return [await qmp.execute(command) for command in commands]
            finally:
                await qmp.close()
    except (TimeoutError, BlockingIOError) as err:
        if vm.is_starting:
            raise _still_starting(vm) from err
        raise Busy(
            f"the control socket of {vm.name} is busy: another program is connected to it, or QEMU hangs",
            f"close that program ({vm.socket}), or cut the power with: qemu-launcher kill {vm.name}",
        ) from err
    except OSError as err:
        raise LauncherError(f"nobody listens on the control socket of {vm.name}: {err.strerror}") from err


def _still_starting(vm: Found) -> LauncherError:
    return LauncherError(
        f"{vm.name} is still starting, and QEMU does not answer yet",
        f"try again in a moment, or end it with: qemu-launcher kill {vm.name}",
    )


async def _power_down(vm: Found) -> None:
    (answer,) = await _ask(vm, "query-status")
    state = _run_state(answer)
    if state in NOT_STARTED:
        raise LauncherError(
            f"the guest of {vm.name} has not been started yet ({state}), so it cannot hear its power button",
            f"cut its power with: qemu-launcher kill {vm.name}",
        )
    await _ask(vm, "system_powerdown")


def _run_state(answer: Any) -> str:
    return str(answer.get("status", "unknown")) if isinstance(answer, dict) else "unknown"


# What there is to see


async def _pictures(found: list[Found]) -> list[Picture]:
    return [await _picture(vm) for vm in found]


async def _picture(vm: Found) -> Picture:
    if vm.qemu is None:
        state = "starting" if vm.record.qemu is None else "ended; its launcher is about to end too"
        return Picture(vm.name, None, state, (), ())
    state, vcpus = await _state_and_vcpus(vm)
    pid = vm.qemu.pid
    facts = [("definition", printable(vm.record.definition))] if vm.record.definition else []
    facts.append(("launcher", f"PID {vm.launcher.pid}" if vm.launcher is not None else "gone; the VM runs without it"))
    if (scope := cgroups.scope_of(pid)) is not None:
        facts.append(("scope", scope.name))
    facts.append(("memory", _memory(pid)))
    live = set(procfs.tids(pid))
    rows = tuple(_row(pid, index, tid) for index, tid in sorted(vcpus.items()) if tid in live)
    if (loss := lost_shield(vm.record, rows)) is not None:
        facts.append(("warning", loss))
    return Picture(vm.name, pid, state, tuple(facts), rows)


def lost_shield(record: Record, rows: Sequence[VcpuRow]) -> str | None:
    """Why a VM that was started shielded is not any more; None if it is, or never was."""
    if record.isolation != "shield" or not rows:
        return None
    held = frozenset[int]().union(*(parse_cpulist(row.cpus) for row in rows if row.shielded == "yes"))
    if held & record.cpus:  # not all of them: a vCPU that was unplugged has left its CPU
        return None
    broken = {row.shielded for row in rows} - {"yes", "no"}
    if broken:
        return f"its shield of CPUs {format_cpulist(record.cpus)} does not hold: {min(broken)}"
    return (
        f"its shield of CPUs {format_cpulist(record.cpus)} was taken back: released by you or an administrator, "
        "or the VM was moved out of its scope"
    )


async def _state_and_vcpus(vm: Found) -> tuple[str, dict[int, int]]:
    """QEMU's own word where it gives one; what the lock file says where the control socket is busy or gone."""
    known = dict(vm.record.vcpus)
    if vm.never_started:
        return f"never started (its launcher died; qemu-launcher run {vm.name} ends it first)", known
    if vm.is_starting:
        return "starting", known
    try:
        status, cpus = await _ask(vm, "query-status", "query-cpus-fast")
        known = known or {vcpu.index: vcpu.tid for vcpu in threads.read_threads(cpus, None, []).vcpus}
    except (LauncherError, QmpError) as err:
        return f"running (control socket {'busy' if isinstance(err, Busy) else 'unreachable'})", known
    return _run_state(status), known


def _memory(pid: int) -> str:
    limits, locked, used = procfs.memlock_limit(pid), procfs.locked(pid), procfs.resident(pid)
    soft = limits[0] if limits else 0
    lockable = "unlimited" if soft == procfs.INFINITY else format_size(soft)
    return f"{format_size(used or 0)} used, {format_size(locked or 0)} locked, {lockable} lockable"


def _row(pid: int, index: int, tid: int) -> VcpuRow:
    scheduling = procfs.scheduling(tid)
    partition = cgroups.partition_of(pid, tid)
    shielded = "yes" if cgroups.is_shielded(pid, tid) else "no" if partition is None else partition
    return VcpuRow(
        vcpu=index,
        tid=tid,
        cpus=format_cpulist(procfs.allowed_cpus(pid, tid) or ()),
        shielded=shielded,
        policy="gone" if scheduling is None else _policy(scheduling),
        priority="" if scheduling is None else str(scheduling.priority),
    )


def _policy(scheduling: procfs.Scheduling) -> str:
    return f"{scheduling.policy} (reset on fork)" if scheduling.reset_on_fork else scheduling.policy


# How it is shown


def _plain(picture: Picture) -> str:
    lines = [picture.title, *(f"  {name:<10}  {value}" for name, value in picture.facts)]
    if picture.vcpus:
        lines += [f"  {line}" for line in table.aligned([COLUMNS, *(row.cells() for row in picture.vcpus)])]
    return "\n".join(lines) + "\n"


def _show_rich(pictures: list[Picture], page: table.RichPage) -> None:
    """The same in colour."""
    for picture in pictures:
        page.line(picture.title, bold=True)
        for name, value in picture.facts:
            page.line(f"  {name:<10}  {value}")
        if picture.vcpus:
            page.table(COLUMNS, [row.cells() for row in picture.vcpus])
