"""logind and a notification server, as far as the launcher asks them, on a private bus. What is asked is noted.

Arguments: the bus name to own, a file with what to answer, a file for what was asked. A lock is the writing end of a
pipe, as logind's is: the reading end says when it has been given back, and that is written down too.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from dbus_next import BusType, Message, MessageType
from dbus_next.aio import MessageBus


async def main(name: str, plan: Path, log: Path) -> None:
    bus = MessageBus(bus_address=os.environ["DBUS_STARTER_ADDRESS"], bus_type=BusType.SYSTEM, negotiate_unix_fd=True)
    await bus.connect()
    loop = asyncio.get_running_loop()

    def note(**facts: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def given_back(fd: int) -> None:
        loop.remove_reader(fd)
        os.close(fd)
        note(given_back=True)

    def receive(message: Any) -> bool:
        if message.message_type is not MessageType.METHOD_CALL or message.interface not in (name, f"{name}.Manager"):
            return False
        note(member=message.member, signature=message.signature, body=[str(part) for part in message.body])
        answer = json.loads(plan.read_text()) if plan.exists() else {}
        if answer.get("silent"):
            return True
        if "error" in answer:
            bus.send(Message.new_error(message, *answer["error"]))
        elif message.member == "Inhibit":
            ours, theirs = os.pipe()
            loop.add_reader(ours, given_back, ours)
            sent = bus.send(Message.new_method_return(message, "h", [0], [theirs]))
            sent.add_done_callback(lambda _: os.close(theirs))
        else:
            bus.send(Message.new_method_return(message, "u", [1]))
        return True

    bus.add_message_handler(receive)
    await bus.request_name(name)
    await bus.wait_for_disconnect()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
