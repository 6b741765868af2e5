"""What the host's desktop services are asked for: that the host stays awake, and that a person sees an error.

Why it exists: both are D-Bus, and neither is tuning. A host that sleeps with a passed-through device does not wake up
well; and who starts a VM from a menu has no terminal to read in. No VM needs them to run: what cannot be had is said,
or left (modules `awake`, `unseen`), and nothing waits for it longer than a moment.

Each is a connection of its own that is closed again. For the lock logind hands out a descriptor, which holds as long as
it is open, by us alone: it ends with the launcher, however that ends. The connection that can take descriptors is not
kept, since whoever is on the bus could send us some.
"""

import asyncio
import os
from typing import Any

from dbus_next import BusType, Message, MessageType, Variant

from . import systembus
from .errors import LauncherError
from .systembus import Bus

# For logind, which asks polkit, which may have to be started first: D-Bus's own limit for an answer. It is waited for
# while QEMU starts, so that only a logind that hangs costs time.
_LOCK_TIMEOUT = 25.0  # seconds
_NOTICE_TIMEOUT = 2.0  # seconds; for an error that can also be read elsewhere
_CRITICAL = 2  # urgency: Desktop Notifications Specification, "Urgency Levels"; shown until it is closed


async def held_awake(vm: str) -> int:
    """A descriptor that keeps the host from sleeping as long as it is open: logind's Inhibit. LauncherError without.

    See org.freedesktop.login1(5); polkit's action is org.freedesktop.login1.inhibit-block-sleep.
    """
    message = Message(
        destination="org.freedesktop.login1",
        path="/org/freedesktop/login1",
        interface="org.freedesktop.login1.Manager",
        member="Inhibit",
        signature="ssss",
        body=["sleep", "qemu-launcher", f"virtual machine {vm} runs", "block"],
    )
    try:
        async with asyncio.timeout(_LOCK_TIMEOUT):
            reply = await _asked(systembus.address(), BusType.SYSTEM, message)
    except TimeoutError as err:
        raise LauncherError("logind does not answer") from err
    except Exception as err:  # the library raises anything from OSError to bare Exception
        raise LauncherError(f"logind cannot be asked: {err}") from err
    if reply.message_type is MessageType.ERROR:
        raise LauncherError(f"logind says: {reply.body[0] if reply.body else reply.error_name}")
    if reply.signature != "h" or len(reply.unix_fds) != 1:
        for fd in reply.unix_fds:
            os.close(fd)
        raise LauncherError("logind gave something else than a lock")
    lock = int(reply.unix_fds[0])
    os.set_inheritable(lock, False)
    return lock


def show_error(address: str, title: str, text: str) -> None:
    """Show an error with the notification server of this session bus. It stays until a person closes it.

    Raises whatever goes wrong; takes two seconds at most.
    """
    asyncio.run(_notify(address, title, text))


async def _notify(address: str, title: str, text: str) -> None:
    hints = {"urgency": Variant("y", _CRITICAL)}
    # The text may be taken for markup, which it is not: the server may draw &, < and > as it likes, but not run them.
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    message = Message(
        destination="org.freedesktop.Notifications",
        path="/org/freedesktop/Notifications",
        interface="org.freedesktop.Notifications",
        member="Notify",
        signature="susssasa{sv}i",
        body=["qemu-launcher", 0, "dialog-error", title, plain, [], hints, -1],
    )
    async with asyncio.timeout(_NOTICE_TIMEOUT):
        await _asked(address, BusType.SESSION, message)


async def _asked(address: str, bus_type: Any, message: Any) -> Any:
    """The answer to one call over a connection of its own."""
    bus = Bus(bus_address=address, bus_type=bus_type, negotiate_unix_fd=bus_type is BusType.SYSTEM)
    try:
        await bus.connect()
        return await bus.call(message)
    finally:
        bus.leave()
