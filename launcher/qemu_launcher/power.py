"""A running VM's power button, power cord and pause key: `stop`, `kill`, `pause` and `resume`.

`stop` returns when QEMU has accepted the request, `kill` when QEMU is gone, `pause` when the guest stands still and
`resume` when it goes on. None touches a process that is not the one recorded, whatever its PID.

Refused: NotRunning (exit 3) for a VM that does not run; `stop` and `pause` for a guest that was never started, which
can neither hear its power button nor be held any more than it is; and `resume` for one whose launcher has not let it
run, since it may not be tuned. One that stands still because of its user's own -S has been tuned: `resume` starts it.
"""

import asyncio
import signal
import time

from . import control, procfs, runtime, stdout
from .errors import LauncherError
from .process import QUIT_GRACE
from .procfs import Process
from .qmp import QmpRefused
from .runtime import Found
from .shutdown import DEAF, NOT_STARTED, STANDING, stillness

# Of RunState, qapi/run-state.json: the guest executes instructions, or will at the next key stroke.
_MOVES = ("running", "suspended")
_LOOK = 0.2  # seconds


def stop(name: str) -> int:
    """Ask the guest to power down; returns when QEMU has pressed its power button. Returns the exit status."""
    vm = control.running(name, f"stop {name}")
    if vm.never_started:
        raise control.never_started(vm)
    state = asyncio.run(_power_down(vm))
    if state in STANDING:
        hint = f"{stillness(state)}, and hears it when it goes on: qemu-launcher resume {name}"
    else:
        hint = f"if it does not: qemu-launcher kill {name}"
    stdout.confirm(f"{name}: asked the guest to power down; {hint}\n")
    return 0


def kill(name: str) -> int:
    """Cut the power: SIGTERM, on which QEMU closes its images, then SIGKILL. Returns when QEMU is gone."""
    vm = control.running(name, f"kill {name}")
    if vm.qemu is not None:
        procfs.end(vm.qemu, grace=QUIT_GRACE)
    elif vm.launcher is not None:  # between its lock and its QEMU: it ends in order
        with vm.launcher.pidfd() as fd:
            if fd is not None:
                signal.pidfd_send_signal(fd, signal.SIGTERM)
                _see_end(vm, vm.launcher, fd)
    stdout.confirm(f"{name}: its power is cut\n")
    return 0


def _see_end(vm: Found, launcher: Process, fd: int) -> None:
    """Wait for the end of a launcher that was told to; LauncherError if it does not come.

    To one whose guest runs by now, that was only a wish.
    """
    end = time.monotonic() + 3 * QUIT_GRACE  # it may have to end a command, or a QEMU that hangs
    while not procfs.wait_readable(fd, _LOOK):
        now = runtime.find(vm.name)
        if now is not None and now.launcher == launcher and now.qemu is not None and not now.is_held:
            procfs.end(now.qemu, grace=QUIT_GRACE)
            return
        if time.monotonic() > end:
            raise LauncherError(
                f"the launcher of {vm.name} (PID {launcher.pid}) was told to end, and has not ended yet",
                "it waits for a command of before_start or after_stop, perhaps; once more: "
                f"qemu-launcher kill {vm.name}",
            )


def pause(name: str) -> int:
    """Let the guest stand still. Returns the exit status: 0 also if it does already."""
    vm = control.running(name, f"pause {name}")
    control.refuse_held(vm)
    stdout.confirm(f"{name}: {asyncio.run(_pause(vm))}\n")
    return 0


def resume(name: str) -> int:
    """Let the guest go on. Returns the exit status: 0 also if it runs already."""
    vm = control.running(name, f"resume {name}")
    control.refuse_held(vm)
    stdout.confirm(f"{name}: {asyncio.run(_resume(vm))}\n")
    return 0


async def _power_down(vm: Found) -> str:
    """The state in which the request met the guest."""
    async with control.linked(vm) as qmp, asyncio.timeout(control.ANSWER_TIMEOUT):
        state = await control.state_behind(qmp)
        if state in DEAF:
            why = "has not been started yet" if state in NOT_STARTED else "does not run any more"
            raise LauncherError(
                f"the guest of {vm.name} {why} ({state}), so it cannot hear its power button",
                f"cut its power with: qemu-launcher kill {vm.name}",
            )
        await qmp.execute("system_powerdown")
    return state


async def _pause(vm: Found) -> str:
    async with control.linked(vm) as qmp:
        state = await control.state_behind(qmp)
        if state == "inmigrate":
            await qmp.execute("stop")  # else it would run as soon as it has arrived
            return f"it will stand still when its migration has arrived; qemu-launcher resume {vm.name} lets it go on"
        if state in NOT_STARTED:
            _refuse_held_now(vm)
            return f"it has not been started yet ({state}), and stands still already"
        if state == "paused":
            return f"it is paused already; it goes on with: qemu-launcher resume {vm.name}"
        if state not in _MOVES:
            return f"it stands still already ({state})"
        await qmp.execute("stop")  # without a limit: QEMU writes its images' caches back first
        return f"paused; it goes on with: qemu-launcher resume {vm.name}"


def _refuse_held_now(vm: Found) -> None:
    """Once more: the VM behind a connection may be one that was started since we looked."""
    if (now := runtime.find(vm.name)) is not None:
        control.refuse_held(now)


async def _resume(vm: Found) -> str:
    async with control.linked(vm) as qmp:
        _refuse_held_now(vm)
        before = await control.state_behind(qmp)
        if before == "running":
            return "it is running already"
        try:
            await qmp.execute("cont")
        except QmpRefused as err:  # it has powered down, or crashed
            err.hint = (
                f"it stands still ({before}); reset it with: qemu-launcher qmp {vm.name} system_reset\n"
                f"or end it with: qemu-launcher kill {vm.name}"
            )
            raise
        after = await control.state_behind(qmp)
    if after == "running":
        return "started" if before in NOT_STARTED else "running again"
    if after == "inmigrate":
        return "it runs as soon as its migration has arrived"
    return f"told to go on, but QEMU says: {after}"
