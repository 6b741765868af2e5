"""A systemd of the test's own, on the private bus: as much of org.freedesktop.systemd1 as the helper speaks to."""

import ctypes
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dbus_next.constants import MessageType
from dbus_next.message import Message

from bus.client import Client
from bus.world import ROOT_USER, World, as_user, cgroup_of

SYSTEMD = "org.freedesktop.systemd1"


def as_systemd(host: World) -> Client:
    """A connection that owns systemd's name."""
    client = Client(host.socket)
    assert client.daemon("RequestName", "su", [SYSTEMD, 4]).body == [1]
    return client


@contextmanager
def recording_systemd(host: World) -> Iterator[Callable[[], list[str]]]:
    """A systemd that moves processes into scopes, as far as this world can see; yields what tells the scopes so far."""
    file = host.folder / "units.jsonl"
    file.touch()

    def start(call: Message) -> None:
        name, _, pairs, _ = call.body
        properties = {key: value.value for key, value in pairs}
        with file.open("a") as log:
            log.write(json.dumps(name) + "\n")
        [pid] = properties["PIDs"]
        scope = f"/user.slice/{properties['Slice']}/{name}"
        place = host.folder / f"cgroup-of-{pid}"
        place.write_text(cgroup_of(scope))
        host.place(pid, place)
        emulator = host.cgroups / scope.lstrip("/") / "emulator"
        emulator.mkdir(parents=True)
        (emulator / "cgroup.type").write_text("threaded\n")

    def serve() -> None:
        """Serve until nobody calls any more; a job has always ended when it is asked about."""
        while (call := client.receive(200)) is not None:
            if call.member == "StartTransientUnit":
                start(call)
                client.answer(Message.new_method_return(call, "o", ["/org/freedesktop/systemd1/job/7"]))
            elif call.member == "GetJob":
                client.answer(Message.new_error(call, f"{SYSTEMD}.NoSuchJob", "Job does not exist"))
            elif call.message_type is MessageType.METHOD_CALL:
                client.answer(Message.new_method_return(call))

    client = as_systemd(host)
    child = as_user(ROOT_USER, serve)
    client.socket.close()
    try:
        yield lambda: [json.loads(line) for line in file.read_text().splitlines()]
    finally:
        child.kill()


def as_qemu(name: bytes = b"qemu-system-x86") -> int:
    """Fork a child that is a QEMU by its name, as a launcher would; return its PID. It lives as long as its parent."""
    read, write = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # PR_SET_NAME; python-prctl takes no odd names
        os.write(write, b"x")
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(0)
    os.read(read, 1)
    os.close(read)
    os.close(write)
    return pid
