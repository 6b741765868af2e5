"""The host stays awake while a VM runs that does not survive its sleep (`inhibit_sleep`).

The lock is asked for while QEMU starts, so that it costs no time, and is there before the guest runs. What cannot be
had is said, and the VM runs all the same. dbus_next is imported here, by way of `desktop`, and only for such a VM.
"""

import asyncio
import contextlib
import os
from types import TracebackType
from typing import Self

from .definition import VmDefinition
from .errors import LauncherError
from .patience import retrieved
from .voice import Voice

_HINT = (
    "logind grants it to those who are logged in at this host, else as polkit's rules say:\n"
    "org.freedesktop.login1.inhibit-block-sleep; to do without: inhibit_sleep: false"
)


class Awake:
    """A context manager: the lock, if there is one, is given back when it is left, or when we die."""

    def __init__(self, definition: VmDefinition, voice: Voice) -> None:
        self._definition = definition
        self._voice = voice
        self._asking: asyncio.Future[int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asking, self._asking = self._asking, None
        if asking is not None and not asking.cancel() and not asking.cancelled() and asking.exception() is None:
            with contextlib.suppress(OSError):
                os.close(asking.result())

    def begin(self) -> None:
        """Ask for the lock, and do not wait."""
        if self._definition.inhibit_sleep:
            from . import desktop  # noqa: PLC0415  most VMs do not care, and must not pay for dbus_next

            self._asking = asyncio.ensure_future(desktop.held_awake(self._definition.name))
            self._asking.add_done_callback(retrieved)

    async def settle(self) -> None:
        """Return when the lock is there, or when it is clear that it will not be."""
        if self._asking is None:
            return
        try:
            await self._asking
        except LauncherError as err:
            text = f"the host may go to sleep while it runs: {err.message}"
            if "inhibit_sleep" in self._definition.marks:
                self._voice.warn(text, _HINT)
            else:
                self._voice.note(text)
