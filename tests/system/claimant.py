"""A program of some user's that talks to the helper directly; stands for any code that this user may run.

Copied to where users can read it and run by tests through `people.login_command`; see `Claimant` in claims.py. Reads
one JSON object a line, does it, answers with one:

    {"do": "spawn", "threads": N, "spin": B}   a child that calls itself QEMU, with N threads besides its first, which
                                               sleep or, if B, keep their CPUs busy -> {"pid": P, "tids": [...]}
    {"do": "tell", "pid": P, "order": {...}}   passes an order on to such a child; its answer:
        {"do": "fork", "count": N, "lock": BYTES}  N children of its own, each of which tries to lock so much memory
                                                   -> {"pids": [...], "locked": how many of them could}
        {"do": "threads", "count": N}              N more threads -> {"tids": [...]}
        {"do": "exec", "argv": [...], "env": {}}   another program in its place, waiting for input -> {}
        {"do": "exit_thread"}                      its first thread ends, the others live on -> {}
    {"do": "call", "member": M, "signature": S, "body": [...]}      the helper
    {"do": "manager", "member": M, "signature": S, "body": [...]}   systemd's system manager
                                             -> {"error": NAME or null, "body": [...]}
    {"do": "calls", "calls": [{"member": M, "signature": S, "body": [...]}, ...]}   the helper, all at once
                                             -> {"answers": [{"error": NAME or null, "body": [...]}, ...]}
    {"do": "end", "pid": P}                  kills and reaps a child -> {}
    {"do": "apprentice"}                     a child that is such a program too, with a connection of its own, and is
                                             told the same orders -> {"pid": P}; one that died over an order answers {}
    {"do": "disown"}                         from now on, children that end are reaped at once, by nobody -> {}
    {"do": "own"}                            they wait to be reaped, as at the beginning -> {}
"""

import contextlib
import ctypes
import json
import mmap
import os
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import TextIO

# Of the library only the codec is used; all the rest, with what it imports, takes seconds in an emulated host.
for _part in ("aio", "glib", "introspection", "message_bus", "proxy_object", "service"):
    sys.modules[f"dbus_next.{_part}"] = ModuleType(_part)

from client import Client  # type: ignore[import-not-found]  # noqa: E402  tests/bus/client.py, copied beside this file
from dbus_next.signature import Variant  # noqa: E402  behind the lines above

SOCKET = "/run/dbus/system_bus_socket"
SYSTEMD = {
    "destination": "org.freedesktop.systemd1",
    "path": "/org/freedesktop/systemd1",
    "interface": "org.freedesktop.systemd1.Manager",
}


class Puppet:
    """The end of a child that its maker holds."""

    def __init__(self, pid: int, orders: int, answers: int) -> None:
        self.pid, self._orders, self._answers = pid, os.fdopen(orders, "w"), os.fdopen(answers)

    def answer(self) -> dict[str, object]:
        """What it says next; nothing once it is another program, or gone."""
        answer: dict[str, object] = json.loads(self._answers.readline() or "{}")
        return answer

    def tell(self, order: dict[str, object]) -> dict[str, object]:
        """Have it do something."""
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()
        return self.answer()


PUPPETS: dict[int, Puppet] = {}
# An apprentice's own ends. What plays QEMU must not have them: its maker's death would not be seen through it.
ENDS: list[int] = []


def spawn(threads: int, *, spin: bool) -> dict[str, object]:
    """A child under QEMU's name."""
    (orders, giving), (taking, answers) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/comm").write_text("qemu-system-x86")
        for end in (giving, taking, *ENDS):
            os.close(end)
        try:
            live(orders, answers, threads, spin=spin)
        finally:
            os._exit(0)
    os.close(orders)
    os.close(answers)
    PUPPETS[pid] = Puppet(pid, giving, taking)
    return {"pid": pid, **PUPPETS[pid].answer()}


def apprentice() -> dict[str, object]:
    """A child that does what this program does."""
    (orders, giving), (taking, answers) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(giving)
        os.close(taking)
        ENDS[:] = orders, answers
        try:
            with os.fdopen(orders) as lines, os.fdopen(answers, "w") as out:
                serve(lines, out)
        finally:
            os._exit(0)
    os.close(orders)
    os.close(answers)
    PUPPETS[pid] = Puppet(pid, giving, taking)
    return {"pid": pid}


def live(orders: int, answers: int, threads: int, *, spin: bool) -> None:
    """Be such a child."""

    def say(answer: dict[str, object]) -> None:
        os.write(answers, json.dumps(answer).encode() + b"\n")

    say({"tids": more_threads(threads, spin=spin)})
    with os.fdopen(orders) as lines:
        for line in lines:
            order = json.loads(line)
            match order.pop("do"):
                case "fork":
                    say(multiply(**order))
                case "threads":
                    say({"tids": more_threads(order["count"], spin=False)})
                case "exec":
                    os.dup2(lines.fileno(), 0)  # where nothing more will come, nor an end
                    os.execve(order["argv"][0], order["argv"], os.environ | order.get("env", {}))
                case "exit_thread":
                    say({})
                    ctypes.CDLL(None).syscall(60, 0)  # exit(2), of this thread alone: x86-64's number
    while ENDS:  # an apprentice's outlives it, as QEMU outlives a launcher that is killed
        signal.pause()


def more_threads(count: int, *, spin: bool) -> list[int]:
    """Start threads; their TIDs."""

    def busy() -> None:
        while True:
            pass

    forever = threading.Event()
    made = [threading.Thread(target=busy if spin else forever.wait, daemon=True) for _ in range(count)]
    for thread in made:
        thread.start()
    return [thread.native_id or 0 for thread in made]


def multiply(count: int, lock: int) -> dict[str, object]:
    """Make children that sleep, each with as much memory locked as it may; how many could lock all of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    read, write = os.pipe()
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            os.close(read)
            memory = mmap.mmap(-1, lock or 1)
            address = ctypes.c_char.from_buffer(memory)
            could = lock and libc.mlock(ctypes.byref(address), ctypes.c_size_t(lock)) == 0
            os.write(write, b"y" if could else b"n")
            os.close(write)
            while True:
                signal.pause()
        pids.append(pid)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()  # one letter each; fewer when the kernel killed some over their memory
    return {"pids": pids, "locked": said.count(b"y")}


def plain(value: object) -> object:
    """What JSON can carry."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def serve(orders: TextIO, answers: TextIO) -> None:
    """Serve until the end of input."""
    client = Client(SOCKET)
    for line in orders:
        order = json.loads(line)
        answer: dict[str, object] = {}
        match order.pop("do"):
            case "spawn":
                answer = spawn(**order)
            case "tell":
                answer = PUPPETS[order["pid"]].tell(order["order"])
            case "apprentice":
                answer = apprentice()
            case "end":
                PUPPETS.pop(order["pid"], None)
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(order["pid"], signal.SIGKILL)
                    os.waitpid(order["pid"], 0)
            case "disown" | "own" as which:
                signal.signal(signal.SIGCHLD, signal.SIG_IGN if which == "disown" else signal.SIG_DFL)
            case "call" | "manager" as whom:
                more = SYSTEMD if whom == "manager" else {}
                reply = client.call(order["member"], order["signature"], order["body"], **more)
                answer = {"error": reply.error, "body": plain(reply.body)}
            case "calls":
                replies = client.replies([client.send(**call) for call in order["calls"]], 240.0)
                answer = {"answers": [{"error": one.error, "body": plain(one.body)} for one in replies]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
