"""A helper that does what a test tells it to: act, lie, refuse, hang, vanish. D-Bus activated, as the real one is.

What it really does is what this machine allows: sched_setaffinity on the test's own processes. `shielded` is played by
keeping QEMU's other threads and the calling launcher off those CPUs.

    fake_helper.py PLAN LOG

PLAN is a JSON file {member: what}, LOG gets one JSON object a line for each call, written before the answer.
`what`: absent or "act"; "lie" (answer success and do nothing); "hang"; "die"; {"error": [name, text]};
{"return": value} (for a{sv}: {name: [signature, value]}); {"unless_asked": what} (NotAuthorized for a call that lets
nobody be asked, else `what`); {"act_less": n} (do nothing for the last n pins); {"shield": "qemu"} or
{"shield": "host"} (keep only QEMU's other threads, or only the launcher, off the CPUs); a list of these, one for each
call in turn.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from dbus_next import BusType, Message, MessageType, Variant
from dbus_next.aio import MessageBus

NAME = "org.qemulauncher.Helper1"
ANSWERS = {
    "SetMemlock": "t",
    "PinThreads": "",
    "SetScheduler": "",
    "CheckMemlock": "t",
    "CheckPins": "",
    "CheckScheduler": "",
    "Release": "",
    "ListVms": "a(susutss)",
    "GetLimits": "a{sv}",
    "GetLimitsOf": "a{sv}",
}
LIMITS = {
    "version": ["s", "0.1.0"],
    "mechanism": ["s", "partition"],
    "reason": ["s", "The kernel has remote cpuset partitions"],
    "limits_source": ["s", "the built-in defaults"],
    "cpus": ["s", "0-15"],
    "max_cpus": ["t", 16],
    "max_vms": ["t", 8],
    "memlock": ["t", 28 << 30],
    "policies": ["as", ["batch", "fifo", "idle", "other", "rr"]],
    "max_priority": ["t", 10],
    "realtime": ["s", "shielded"],
    "deadline": ["b", False],
    "free_cpus": ["s", "2-15"],
}
INTERACTIVE = 4  # ALLOW_INTERACTIVE_AUTHORIZATION of the message's flags
REFUSED = ["org.qemulauncher.Error.NotAuthorized", "polkit does not allow this to you in this session"]


class FakeHelper:
    def __init__(self, bus: Any, plan: dict[str, Any], log: Path) -> None:
        self.bus = bus
        self.plan = plan
        self.log = log
        self.count: dict[str, int] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def receive(self, message: Any) -> bool:
        if message.message_type is not MessageType.METHOD_CALL or message.interface != NAME:
            return False
        task = asyncio.get_running_loop().create_task(self.answer(message))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return True

    async def answer(self, message: Any) -> None:
        reply = await self.bus.call(
            Message(
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member="GetConnectionUnixProcessID",
                signature="s",
                body=[message.sender],
            )
        )
        launcher = reply.body[0]
        entry = {
            "member": message.member,
            "signature": message.signature,
            "body": message.body,
            "flags": int(message.flags),
            "launcher": launcher,
            "sender": message.sender,
            "time": time.monotonic(),
        }
        with self.log.open("a") as log:
            log.write(json.dumps(entry) + "\n")
        what = self.plan.get(message.member, "act")
        turn = self.count.get(message.member, 0)
        self.count[message.member] = turn + 1
        if isinstance(what, list):
            what = what[min(turn, len(what) - 1)]
        self.carry_out(message, what, launcher)

    def carry_out(self, message: Any, what: Any, launcher: int) -> None:
        signature = ANSWERS[message.member]
        if isinstance(what, dict) and "unless_asked" in what:
            what = what["unless_asked"] if int(message.flags) & INTERACTIVE else {"error": REFUSED}
        if what == "hang":
            return
        if what == "die":
            os._exit(3)
        if isinstance(what, dict) and "error" in what:
            self.bus.send(Message.new_error(message, *what["error"]))
            return
        if message.member == "PinThreads" and what != "lie":
            pid, _, pins, others = message.body
            pins = pins[: len(pins) - what["act_less"]] if isinstance(what, dict) and "act_less" in what else pins
            self.pin(pid, pins, others, launcher, what.get("shield", "all") if isinstance(what, dict) else "all")
        answer = [what["return"]] if isinstance(what, dict) and "return" in what else []
        if isinstance(what, dict) and "signature" in what:
            signature = what["signature"]
        if signature == "a{sv}":
            facts = {**LIMITS, **(answer[0] if answer else {})}
            answer = [{name: Variant(form, value) for name, (form, value) in facts.items()}]
        if signature == "a(susutss)" and not answer:
            answer = [[]]
        if signature == "t" and not answer:
            answer = [message.body[-1]]  # SetMemlock and CheckMemlock end in the size
        self.bus.send(Message.new_method_return(message, signature, answer))

    def pin(self, pid: int, pins: list[Any], others: list[int], launcher: int, shield_from: str) -> None:
        everywhere = os.sched_getaffinity(0)
        shielded = {cpu for _, cpus, shield in pins if shield for cpu in cpus}
        for tid, cpus, _ in pins:
            os.sched_setaffinity(tid, cpus)
        named = {tid for tid, _, _ in pins}
        for task in Path(f"/proc/{pid}/task").iterdir():
            if int(task.name) not in named and shield_from != "host":
                os.sched_setaffinity(int(task.name), others or everywhere - shielded)
        if shield_from != "qemu":
            os.sched_setaffinity(launcher, everywhere - shielded)


async def main(plan: Path, log: Path) -> None:
    bus = MessageBus(bus_address=os.environ["DBUS_STARTER_ADDRESS"], bus_type=BusType.SYSTEM)
    await bus.connect()
    bus.add_message_handler(FakeHelper(bus, json.loads(plan.read_text()), log).receive)
    await bus.request_name(NAME)
    await bus.wait_for_disconnect()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
