"""A program of some user's that talks to the helper directly; stands for any code that this user may run.

Copied to where users can read it and run by tests through `people.login_command`; see `Claimant` in claims.py. Reads
one JSON object a line, does it, answers with one:

    {"do": "spawn", "threads": N}            a child that calls itself QEMU, with N threads besides its first
                                             -> {"pid": P, "tids": [...]}
    {"do": "call", "member": M, "signature": S, "body": [...]}      the helper
    {"do": "manager", "member": M, "signature": S, "body": [...]}   systemd's system manager
                                             -> {"error": NAME or null, "body": [...]}
    {"do": "end", "pid": P}                  kills and reaps a child -> {}
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from client import Client  # type: ignore[import-not-found]  # tests/bus/client.py, copied beside this file
from dbus_next.signature import Variant

SOCKET = "/run/dbus/system_bus_socket"
SYSTEMD = {
    "destination": "org.freedesktop.systemd1",
    "path": "/org/freedesktop/systemd1",
    "interface": "org.freedesktop.systemd1.Manager",
}


def spawn(threads: int) -> dict[str, object]:
    """A child that does nothing, under QEMU's name."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/comm").write_text("qemu-system-x86")
        forever = threading.Event()
        for _ in range(threads):
            threading.Thread(target=forever.wait, daemon=True).start()
        tids = sorted(thread.native_id or 0 for thread in threading.enumerate() if thread.native_id != pid)
        os.write(writable, json.dumps([tid for tid in tids if tid != os.getpid()]).encode() + b"\n")
        signal.pause()
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        return {"pid": pid, "tids": json.loads(pipe.readline())}


def plain(value: object) -> object:
    """What JSON can carry."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    """Serve until the end of input."""
    client = Client(SOCKET)
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, object] = {}
        match order.pop("do"):
            case "spawn":
                answer = spawn(**order)
            case "end":
                os.kill(order["pid"], signal.SIGKILL)
                os.waitpid(order["pid"], 0)
            case "call" | "manager" as whom:
                more = SYSTEMD if whom == "manager" else {}
                reply = client.call(order["member"], order["signature"], order["body"], **more)
                answer = {"error": reply.error, "body": plain(reply.body)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
