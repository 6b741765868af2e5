"""The helper, as one VM's launcher deals with it: joined when it is first needed, left when nothing more is to come.

Why it exists: `tune` decides what is to be done, and for what the user may not do himself it has this. Here are the
connection and its ends, the question for a password, the patience with both, and what there may be to take back.

After TuningFailed from any call nothing is known of what the helper did; `release` takes back all of it.
"""

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from . import absence, access, agent, procfs, restrictions, terminal
from .definition import Scheduling, VmDefinition
from .errors import TuningFailed
from .patience import patiently
from .plan import ThreadPlan
from .process import Qemu
from .voice import Voice

if TYPE_CHECKING:
    from .helper_proxy import Helper

T = TypeVar("T")


class Assistance:
    """What the helper does for one VM. `on_stop` is called when systemd wants the VM's scope to end.

    `has_acted`: whether the helper has done, or may have done, something that can be undone.
    """

    def __init__(self, definition: VmDefinition, voice: Voice, on_stop: Callable[[], None]) -> None:
        self._definition = definition
        self._voice = voice
        self._on_stop = on_stop
        self._helper: Helper | None = None
        self._terminal = terminal.modes_now()  # before QEMU may change them
        self._qemu: Qemu | None = None
        self._is_asking = False
        self._may_ask = True
        self.has_acted = False

    def beware_of(self, qemu: Qemu) -> None:
        """From now on this QEMU may have the terminal, when a password is to be asked for there."""
        self._qemu = qemu

    async def wake(self) -> None:
        """Have the helper started, so that its first call need not wait for that."""
        if self._helper is None:
            (await self._join()).wake()

    async def set_memlock(self, pid: int, size: int) -> int:
        """Let `pid` lock `size` bytes; returns what was granted."""
        helper = await self._join(to_act=True)
        return await self._patiently(helper.set_memlock(pid, self._definition.name, size))

    async def pin(self, wanted: ThreadPlan, pid: int) -> None:
        """Pin the threads of `pid`: the whole map."""
        helper = await self._join(to_act=True)
        pins = [(pin.tid, pin.cpus, pin.shielded) for pin in wanted.pins]
        with self._place_of_refusal(pid):
            await self._patiently(helper.pin_threads(pid, self._definition.name, pins, wanted.others))

    async def schedule(self, tids: Sequence[int], policy: Scheduling, pid: int) -> None:
        """Set policy and priority of threads of `pid`."""
        helper = await self._join(to_act=True)
        with self._place_of_refusal(pid):
            await self._patiently(helper.set_scheduler(pid, self._definition.name, tids, *policy))

    def ask_nobody(self) -> None:
        """From now on no call waits for a person: the guest runs."""
        self._may_ask = False
        if self._helper is not None:
            self._helper.ask_nobody()

    async def until_lost(self) -> None:
        """Stay on the bus to hear systemd, if the helper may have made a scope; else leave it at once."""
        if self._helper is not None and self.has_acted:
            await self._helper.until_lost()
            self._voice.warn("lost the system bus; systemd cannot ask for a power-down any more, the guest runs on")
        await self.leave()

    async def leave(self) -> None:
        """Leave the bus; what is needed later joins it again."""
        helper, self._helper = self._helper, None
        if helper is not None:
            await helper.close()

    async def release(self, known: str = "") -> None:
        """Give back all that the VM was granted. A failure is a warning, unless it is the `known` one."""
        # Over a new connection. The old one may be lost; and as long as it is there systemd, told to end what is left
        # in the scope, would ask us to do it.
        await self.leave()
        try:
            helper = await self._join()
            await self._patiently(helper.release(os.geteuid(), self._definition.name))
        except TuningFailed as err:
            # Who is not let in, or finds no helper, was granted nothing, and has read why already.
            if err.message != known:
                self._voice.warn(f"its CPUs could not be given back: {err.message}", err.hint)
        finally:
            self.has_acted = False
            await self.leave()

    async def _join(self, *, to_act: bool = False) -> "Helper":
        if self._helper is not None and self._helper.is_lost:
            await self.leave()
        if self._helper is None:
            from . import helper_proxy  # noqa: PLC0415  an untuned VM must not pay for dbus_next

            self._helper = await helper_proxy.Helper.connected(
                interactive=self._may_ask and agent.somebody_is_there(),
                agent=self._asking if self._may_ask and agent.is_possible() else None,
                trace=self._voice.step,
            )
            self._helper.on_request_stop(self._definition.name, self._on_stop)
        self.has_acted = self.has_acted or to_act
        return self._helper

    @contextlib.contextmanager
    def _place_of_refusal(self, pid: int) -> Iterator[None]:
        """Tell with which option the user has made his QEMU one that the helper does not know for his."""
        try:
            yield
        except TuningFailed as err:
            if err.wire_name == access.TARGET_REFUSED:
                is_own = procfs.owner(pid) in (os.geteuid(), None)
                mark, hint = restrictions.helper_refused(self._definition.options, procfs.comm(pid), is_own=is_own)
                err.message = err.message if mark is None else f"{mark}: {err.message}"
                err.hint = err.hint or hint or absence.in_container()
            raise

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """The text agent on our terminal, which meanwhile is as it was before QEMU.

        A QEMU that has its monitor there (-nographic) stands still: it must not take the password.
        """
        with contextlib.ExitStack() as stack:
            if self._qemu is not None and terminal.modes_now() != self._terminal:
                self._qemu.send(signal.SIGSTOP)
                stack.callback(self._qemu.send, signal.SIGCONT)
                stack.enter_context(terminal.with_modes(self._terminal))
            self._is_asking = True
            stack.callback(setattr, self, "_is_asking", False)
            async with agent.registered():
                yield

    async def _patiently(self, call: Coroutine[Any, Any, T]) -> T:
        def tell() -> None:
            if not self._is_asking:  # else the question is on the screen, and perhaps half of an answer
                self._voice.note("waiting for qemu-launcher-helper, or for your answer")

        return await patiently(call, tell)
