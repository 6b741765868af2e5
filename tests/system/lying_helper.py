"""A helper that answers success to everything. For tests only: what would a launcher do that believed it?

    lying_helper.py "act on nothing" | "pin the last one wrong" | "pin without a shield"

It runs as root on the system bus and owns the helper's name.
"""

import asyncio
import os
import sys
from typing import Any

from dbus_next import BusType, Message, MessageType
from dbus_next.aio import MessageBus

NAME = "org.qemulauncher.Helper1"


def act(lie: str, message: Any) -> None:
    """What it does do of a PinThreads."""
    if message.member != "PinThreads" or lie == "act on nothing":
        return
    pins = message.body[2]
    for number, (tid, cpus, _) in enumerate(pins):
        wrong = lie == "pin the last one wrong" and number == len(pins) - 1
        os.sched_setaffinity(tid, {0} if wrong else cpus)


def answer(lie: str, message: Any) -> Message | None:
    """Success."""
    if message.message_type is not MessageType.METHOD_CALL or message.interface != NAME:
        return None
    act(lie, message)
    if message.member == "SetMemlock":
        return Message.new_method_return(message, "t", [message.body[2]])
    return Message.new_method_return(message)


async def main(lie: str) -> None:
    """Serve for ever."""
    bus = await MessageBus(bus_type=BusType.SYSTEM, bus_address="unix:path=/run/dbus/system_bus_socket").connect()
    bus.add_message_handler(lambda message: answer(lie, message))
    await bus.request_name(NAME)
    await bus.wait_for_disconnect()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
