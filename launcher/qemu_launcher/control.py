"""The control socket of a running VM: asked, with a limit on the waiting, and what the answers mean.

Why it exists: all commands that speak to a VM which another launcher has started do it this way. QEMU serves one client
of this socket at a time, so each question has a connection of its own and leaves at once.

Refused: to let a guest run that its launcher still holds, or held when it died (`refuse_held`): it may not be tuned.
NotRunning (exit 3) for a VM that does not run; Busy when another program has the socket, or QEMU hangs.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import locate, runtime
from .errors import AlreadyRunning, LauncherError, NotRunning, did_you_mean
from .qmp import ConnectionLost, Qmp, run_state
from .record import RUNNING
from .runtime import Found

# QEMU greets at once when nobody else is connected; who is second in its queue hears nothing.
GREETING_TIMEOUT = 2.0  # seconds
# It answers a question as quickly, unless it hangs.
ANSWER_TIMEOUT = 2.0
_NEXT_TRY = 0.02


class Busy(LauncherError):  # noqa: N818  as in errors.py
    """The control socket has another client, or QEMU does not answer."""


@dataclass(frozen=True, slots=True)
class State:
    """What a VM does, in a word: QEMU's own (RunState of qapi/run-state.json), or starting, ended, never started.

    `remark` says what is unusual about it. `control_socket` is ok, busy or unreachable; None if it was not asked.
    """

    word: str
    remark: str | None = None
    control_socket: str | None = None

    def __str__(self) -> str:
        return self.word if self.remark is None else f"{self.word} ({self.remark})"


def running(name: str, words: str) -> Found:
    """The running VM of this name. NotRunning if there is none; `words` are those that asked for it: `stop win11`."""
    vm = runtime.find(name)
    if vm is not None:
        return vm
    message, hint = f"{name} is not running", "see what runs with: qemu-launcher status"
    if os.geteuid() == 0:  # who became another user to start it (`user:`) has to become him to see it too
        message = f"{name} is not running among the VMs of root"
        hint += f"\na VM with user: in its definition is that user's: sudo -u USER qemu-launcher {words}"
    where = locate.folders(os.environ)
    if name not in (known := locate.names(where)):
        message += f", and there is no {name}{locate.SUFFIX} in {', '.join(map(str, where))}"
        near = did_you_mean(name, [*known, *(other.name for other in runtime.find_all())])
        hint = f"{near}\n{hint}" if near else hint
    raise NotRunning(message, hint)


@asynccontextmanager
async def linked(vm: Found) -> AsyncIterator[Qmp]:
    """A client of the control socket, greeted. Busy, ConnectionLost or LauncherError when nobody answers, also later.

    Whoever has made this socket had written its record before: what is read of it from now on is the VM's behind it.
    """
    if vm.socket is None or not vm.socket.exists():
        if vm.is_starting:
            raise still_starting(vm)
        raise LauncherError(
            f"the control socket of {vm.name} is gone, with the runtime directory of an earlier login, or hidden",
            f"power the guest down from inside, or cut its power with: qemu-launcher kill {vm.name}",
        )
    try:
        with ExitStack() as stack:
            async with asyncio.timeout(GREETING_TIMEOUT):
                qmp = await Qmp.negotiated(await _turn(stack, vm.socket))
            try:
                yield qmp
            finally:
                await qmp.close()
    except TimeoutError as err:
        if vm.is_starting:
            raise still_starting(vm) from err
        raise Busy(
            f"the control socket of {vm.name} is busy: another program is connected to it, or QEMU hangs",
            f"close that program ({vm.socket}), or cut the power with: qemu-launcher kill {vm.name}",
        ) from err
    except ConnectionLost as err:
        hint = f"see whether it still runs: qemu-launcher status {vm.name}"
        raise ConnectionLost(f"{vm.name} gave no answer: {err.message}", hint) from err
    except OSError as err:
        raise LauncherError(
            f"nobody listens on the control socket of {vm.name}: {err.strerror}",
            f"cut its power with: qemu-launcher kill {vm.name}",
        ) from err


async def _turn(stack: ExitStack, path: Path) -> socket.socket:
    """Connected, as soon as there is a place in QEMU's queue, which holds two: several of us may ask at a time."""
    while True:
        try:
            return stack.enter_context(runtime.connected(path))
        except BlockingIOError:
            await asyncio.sleep(_NEXT_TRY)


async def ask(vm: Found, *commands: str) -> list[Any]:
    """Answers to `commands`, which QEMU gives at once. Busy or LauncherError when nobody answers."""
    async with linked(vm) as qmp, asyncio.timeout(ANSWER_TIMEOUT):
        return [await qmp.execute(command) for command in commands]


async def state_behind(qmp: Qmp) -> str:
    """RunState of the QEMU at the other end. TimeoutError, which `linked` explains, if it hangs."""
    async with asyncio.timeout(ANSWER_TIMEOUT):
        return run_state(await qmp.execute("query-status"))


def state_unasked(vm: Found) -> State | None:
    """What it does, as far as that can be told without asking QEMU; None if QEMU is to be asked."""
    if vm.qemu is None:
        return State("starting") if vm.record.qemu is None else State("ended", "its launcher is about to end too")
    if vm.never_started:
        return State("never started", f"its launcher died; qemu-launcher run {vm.name} ends it first")
    return State("starting") if vm.is_starting else None


def state_unheard(error: LauncherError) -> State:
    """What is said of a VM that did not answer: QEMU is there, and that is all that is known."""
    how = "busy" if isinstance(error, Busy) else "unreachable"
    return State("running", f"control socket {how}", how)


async def state_of(vm: Found) -> State:
    """What it does. Never fails, and never takes longer than the two timeouts together."""
    if (state := state_unasked(vm)) is not None:
        return state
    try:
        (answer,) = await ask(vm, "query-status")
    except LauncherError as err:
        return state_unheard(err)
    return State(run_state(answer), control_socket="ok")


def refuse_held(vm: Found) -> None:
    """LauncherError if its launcher has not let the guest run: nobody else may, for it may not be tuned yet."""
    if vm.never_started:
        raise never_started(vm)
    if vm.is_held:
        raise LauncherError(
            f"{vm.name} is still starting: its launcher lets the guest run when it is tuned, and nobody else may",
            f"see how far it is with: qemu-launcher status {vm.name}",
        )


def with_stillness(error: AlreadyRunning, name: str) -> AlreadyRunning:
    """The error for a second start of a VM that stands still: whoever wants it to run has another command for that."""
    vm = runtime.find(name)
    if vm is None or vm.record.state != RUNNING:  # one that only starts would not answer
        return error
    word = asyncio.run(state_of(vm)).word
    if word == "paused":
        error.message += ", and paused"
        error.hint = f"let it go on with: qemu-launcher resume {name}\n{error.hint}"
    elif word == "prelaunch":  # its user's own -S
        error.message += ", and waits to be started"
        error.hint = f"start its guest with: qemu-launcher resume {name}\n{error.hint}"
    return error


def never_started(vm: Found) -> LauncherError:
    """What is said of a guest whose launcher died before it was tuned."""
    return LauncherError(
        f"the guest of {vm.name} has never been started: its launcher died before",
        f"end it with: qemu-launcher kill {vm.name}",
    )


def still_starting(vm: Found) -> LauncherError:
    """What is said while QEMU does not answer yet."""
    return LauncherError(
        f"{vm.name} is still starting, and QEMU does not answer yet",
        f"try again in a moment, or end it with: qemu-launcher kill {vm.name}",
    )
