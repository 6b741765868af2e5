"""vCPUs that are plugged in, or unplugged, while the guest runs: noticed, so that they are tuned as those before them.

Why it exists: a vCPU may come at any time, by whoever has a monitor, and QEMU sends no event of its own for it. So the
process's threads are looked at every few seconds, which costs a directory listing; QEMU is asked only when there is a
thread that has not been seen before or a vCPU's has gone. The events that it does send, once the guest has taken notice
(ACPI_DEVICE_OST) or let a vCPU go (DEVICE_DELETED), are reason to look at once. While no more vCPUs can be plugged in,
only these events make it look.

Until it is noticed a new vCPU runs where QEMU's emulator threads run. The watch ends when QEMU does, and fails nobody's
run.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from . import procfs
from .errors import LauncherError, QmpError
from .qmp import ConnectionLost, Event, Qmp, QmpRefused
from .threads import Threads

LOOK = 2.0  # seconds; a vCPU is plugged in by a person, who will not mind
_EVENTS = ("ACPI_DEVICE_OST", "DEVICE_DELETED")


class Hotplug:
    """Watches one QEMU, whose threads were `known`; `read` asks it for them, `act` is called when they are others."""

    def __init__(
        self,
        pid: int,
        known: Threads,
        read: Callable[[], Awaitable[Threads]],
        act: Callable[[Threads], Awaitable[None]],
    ) -> None:
        self._pid = pid
        self._known = known
        self._read = read
        self._act = act
        self._seen: frozenset[int] = frozenset()
        self._heard = asyncio.Event()

    async def watch(self, qmp: Qmp) -> None:
        """Until QEMU ends; to be cancelled. QmpError if what it says of its threads cannot be understood."""
        qmp.listen(self._hear)
        while True:
            if self._known.can_grow or self._heard.is_set():
                try:
                    await self._look_if_new()
                except ConnectionLost:
                    return
                except QmpRefused:  # not now: when there is another thread, or an event
                    pass
                except QmpError:
                    raise
                except LauncherError:  # a vCPU has gone between QEMU's answer and our look at its threads
                    self._seen = frozenset()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK if self._known.can_grow else None):
                    await self._heard.wait()

    async def _look_if_new(self) -> None:
        tids = frozenset(procfs.tids(self._pid))
        lost = any(vcpu.tid not in tids for vcpu in self._known.vcpus)
        if tids - self._seen or lost or self._heard.is_set():
            self._heard.clear()
            self._seen = tids
            await self._look()

    async def _look(self) -> None:
        found = await self._read()
        if found.tids() != self._known.tids():
            self._known = found
            await self._act(found)

    def _hear(self, event: Event) -> None:
        if event.get("event") in _EVENTS:
            self._heard.set()
