"""Virtual machines as users start them: a definition, `qemu-launcher NAME` in a login, and a witness of our own.

Each definition gets a second QMP monitor that only the tests use (`-qmp unix:...`): by it a test sees from inside QEMU
whether the guest runs, and since when, without believing a word of the launcher's. And it gets the port to which
its firmware writes with its third instruction: as long as that file is empty, the guest has not run.
The guests have no disk and no operating system, and firmware of ours: it spins, where a test needs that, or halts.
SeaBIOS would take seconds to come up in here, and a third of the lab's one real CPU while it waits for a disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from system import host
from system.people import Login, User, folder_of

# 64 KiB, mapped below 4 GiB and below 1 MiB; a CPU begins 16 bytes before the end, in real mode.
_SPEAK = bytes.fromhex("ba0204 b078 ee")  # mov dx, 0x402; mov al, 'x'; out dx, al
_SPIN = bytes.fromhex("ebfe")  # jmp to itself
_HALT = bytes.fromhex("fa f4 ebfd")  # cli; hlt, again and again
_RESET = bytes.fromhex("e90d00")  # jmp to the first byte
HELPER_UNIT = "qemu-launcher-helper.service"


class Vcpu(NamedTuple):
    """Where QEMU has a vCPU, and the host's thread that runs it."""

    socket: int
    core: int
    thread: int
    tid: int


class Witness:
    """A QMP client that looks on: every event that came, in order, with QEMU's own time stamp."""

    def __init__(self, path: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._buffer = b""
        self._next()  # the greeting
        self.ask("qmp_capabilities")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        """Execute a command; its answer. ConnectionError when QEMU has ended."""
        request = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while "event" in (message := self._next()):
            self.events.append(message)
        assert "return" in message, f"{command}: {message}"
        return message["return"]

    def tell(self, command: str) -> None:
        """Execute a command whose answer may be lost, because QEMU ends over it."""
        with contextlib.suppress(OSError):
            self.ask(command)

    def heard(self, name: str) -> list[dict[str, Any]]:
        """The events of that name so far."""
        self.state()  # whatever came before this answer has been read then
        return [event for event in self.events if event["event"] == name]

    def state(self) -> str:
        """QEMU's run state: "prelaunch" until the guest is let run for the first time, then "running"."""
        return str(self.ask("query-status")["status"])

    def vcpus(self) -> list[Vcpu]:
        """All vCPUs, by index."""
        rows = sorted(self.ask("query-cpus-fast"), key=lambda row: int(row["cpu-index"]))
        return [
            Vcpu(row["props"]["socket-id"], row["props"]["core-id"], row["props"]["thread-id"], row["thread-id"])
            for row in rows
        ]

    def _next(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            assert select.select([self._socket], [], [], host.PATIENCE)[0], "QEMU does not answer"
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("QEMU has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def witness_path(user: User, name: str) -> Path:
    """Where QEMU offers the witness its monitor."""
    return folder_of(user.name) / f"{name}.qmp"


def firmware_path(user: User, name: str) -> Path:
    """What the guest's firmware has said."""
    return folder_of(user.name) / f"{name}.firmware"


def firmware(*, spin: bool) -> Path:
    """A file with firmware that says that it runs, and then keeps its CPU busy for ever, or sleeps for ever."""
    path = folder_of("root") / ("spinning" if spin else "halting")
    if not path.exists():
        code = _SPEAK + (_SPIN if spin else _HALT)
        path.write_bytes(code.ljust(0xFFF0, b"\xf4") + _RESET.ljust(16, b"\xf4"))
    return path


def define(
    user: User,
    name: str,
    launcher: Mapping[str, Any] | None = None,
    *options: Any,
    cpus: int = 1,
    spin: bool = False,
) -> Path:
    """Write `user`'s definition NAME: `launcher` besides the binary, `options` besides a small machine.

    The guest has 16 MiB, `cpus` vCPUs in cores of two threads (one vCPU: one core) and a translation buffer of 8 MiB:
    QEMU would lock the 1 GiB it takes otherwise (mlockall(2)), of which the lab does not have enough for two.
    """
    topology = f"{cpus},sockets=1,cores={max(1, cpus // 2)},threads={2 if cpus > 1 else 1}"
    memory = () if any("m" in option for option in options) else ({"m": "16M"},)
    document = {
        "launcher": {"binary": "qemu-system-x86_64", **(launcher or {})},
        "qemu": [
            {"machine": "q35"},
            {"accel": "tcg,thread=multi,tb-size=8"},
            {"cpu": "max"},
            {"smp": topology},
            *memory,
            {"display": "none"},
            {"bios": str(firmware(spin=spin))},
            "nodefaults",
            {"qmp": f"unix:{witness_path(user, name)},server=on,wait=off"},
            {"chardev": f"file,id=firmware,path={firmware_path(user, name)}"},
            {"device": "isa-debugcon,iobase=0x402,chardev=firmware"},
            *options,
        ],
    }
    path = user.home / f".config/qemu-launcher/{name}.yml"
    return user.file(path, yaml.safe_dump(document, sort_keys=False))


class Launch:
    """A launcher that was started, and the QEMU below it."""

    def __init__(
        self,
        user: User,
        name: str,
        *arguments: str,
        before: str = "",
        program: str = "qemu-launcher",
        login: Login | None = None,
    ) -> None:
        """Start `PROGRAM ARGUMENTS NAME`; `before`: shell words that come first, such as `ulimit -R 200000;`."""
        self.user, self.name = user, name
        self.log = folder_of(user.name) / f"{name}.log"
        for earlier in (witness_path(user, name), firmware_path(user, name)):
            earlier.unlink(missing_ok=True)
        user.file(self.log, "")
        self._since = int(time.time())
        self._login = user.login if login is None else login
        self.pid = self._login.spawn(f"{before} exec {program} {' '.join(arguments)} {name}", self.log)
        self._qemu: int | None = None
        self._witness: Witness | None = None
        self._vcpus: list[Vcpu] = []

    @property
    def said(self) -> str:
        """What launcher and QEMU have said so far."""
        return self.log.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        """Whether the launcher is."""
        return host.is_alive(self.pid)

    @property
    def guest_ran(self) -> bool:
        """Whether the guest has ever executed an instruction worth mentioning."""
        path = firmware_path(self.user, self.name)
        return path.exists() and path.stat().st_size > 0

    @property
    def scope(self) -> Path:
        """The VM's scope in the cgroup tree."""
        return host.scope_of(self.user.uid, self.name)

    @property
    def record(self) -> Path:
        """The helper's record of what this VM was granted."""
        return host.GRANTS / f"{self.user.uid}-{self.name}"

    @property
    def offers_monitor(self) -> bool:
        """Whether QEMU does, that of the tests."""
        return _listens(witness_path(self.user, self.name))

    @property
    def witness(self) -> Witness:
        """The tests' own monitor, once QEMU offers it."""
        if self._witness is None:
            host.wait_for(f"QEMU of {self.name} offers a monitor", lambda: self.offers_monitor or not self.is_alive)
            assert self.offers_monitor, f"the launcher ended: {self.said}"
            self._witness = Witness(witness_path(self.user, self.name))
        return self._witness

    @property
    def vcpus(self) -> list[Vcpu]:
        """All vCPUs, by index. Asked once: the threads stay the same ones."""
        if not self._vcpus:
            self._vcpus = self.witness.vcpus()
        return self._vcpus

    @property
    def vcpu_tids(self) -> list[int]:
        """Their threads."""
        return [vcpu.tid for vcpu in self.vcpus]

    @property
    def qemu(self) -> int:
        """PID of QEMU, the launcher's only child."""
        if self._qemu is None:
            children = (host.PROC / f"{self.pid}/task/{self.pid}/children").read_text().split()
            assert len(children) == 1, f"the launcher has the children {children}: {self.said}"
            self._qemu = int(children[0])
        return self._qemu

    def until_running(self) -> Launch:
        """Wait until the launcher says that the guest runs, and the guest says so too; AssertionError otherwise."""
        host.wait_for(f"{self.name} runs", lambda: f"{self.name}: running" in self.said or not self.is_alive)
        assert f"{self.name}: running" in self.said, f"{self.name} did not start: {self.said}"
        assert self.qemu
        host.wait_for(f"the firmware of {self.name} speaks", lambda: self.guest_ran)
        return self

    def until_settled(self) -> Launch:
        """Wait until the launcher's last call to the helper is done: the second PinThreads, by the helper's journal."""
        wanted = f"granted PinThreads uid={self.user.uid} "
        options = ("--no-tail", "--output=cat", f"--since=@{self._since}", f"--unit={HELPER_UNIT}")
        lines = _follow_journal(*options, what=f"the launcher of {self.name} has made its last call")
        with contextlib.closing(lines):
            seen = 0
            while seen < 2:
                line = next(lines)
                seen += line.startswith(wanted) and f" vm={self.name} " in line
        return self

    def until_ended(self) -> int:
        """Exit status of the launcher, when it has ended."""
        host.wait_for(f"the launcher of {self.name} ends", lambda: not self.is_alive)
        return self._login.wait(self.pid)

    def quit(self) -> int:
        """Have QEMU quit, through the witness; the launcher's exit status."""
        self.witness.tell("quit")
        return self.until_ended()

    def close(self) -> None:
        """End it with SIGKILL, whatever has happened; the launcher first, so that it cannot react."""
        with contextlib.suppress(AssertionError, FileNotFoundError):
            assert self.qemu
        if self._witness is not None:
            self._witness.close()
        for pid in (self.pid, self._qemu):
            if pid is not None and host.is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        host.wait_for(f"{self.name} is gone", lambda: not self.is_alive and not (self._qemu and host.tids(self._qemu)))


def expect_tuned(launch: Launch, qemu: int | None = None) -> None:
    """Its two vCPUs have CPUs 4 and 5 for themselves, and fifo 1. `qemu`: its PID, where the launcher is dead."""
    assert [host.cpus_of(qemu or launch.qemu, tid) for tid in launch.vcpu_tids] == [{4}, {5}]
    assert [host.scheduling(tid) for tid in launch.vcpu_tids] == [("fifo", 1, True)] * 2
    assert host.isolated() == {4, 5}


@contextlib.contextmanager
def running(user: User, name: str, *arguments: str, **more: Any) -> Iterator[Launch]:
    """Start a VM as `Launch` does, and wait until its guest runs; afterwards both processes are gone."""
    launch = Launch(user, name, *arguments, **more)
    try:
        yield launch.until_running()
    finally:
        launch.close()


def refused(user: User, name: str, *arguments: str, before: str = "", login: Login | None = None) -> tuple[int, str]:
    """Start a VM that does not get its tuning; exit status and words. AssertionError if its guest has run."""
    launch = Launch(user, name, *arguments, before=before, login=login)
    try:
        host.wait_for(f"{name} is refused, or runs", lambda: not launch.is_alive or launch.guest_ran)
        assert not launch.guest_ran, f"the guest has run: {launch.said}"
        return launch.until_ended(), launch.said
    finally:
        launch.close()


def _follow_journal(*options: str, what: str) -> Generator[str]:
    """Lines of the journal as they come; AssertionError, naming `what` is waited for, when none comes any more.

    Followed, not asked for again and again, which would take the time from what is waited for.
    """
    command = ["journalctl", "--quiet", "--follow", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as journal:
        assert journal.stdout is not None
        try:
            buffer = b""
            while True:
                assert select.select([journal.stdout], [], [], host.PATIENCE)[0], f"it never came that {what}"
                data = os.read(journal.stdout.fileno(), 65536)
                assert data, "journalctl has ended"
                *lines, buffer = (buffer + data).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
        finally:
            journal.kill()


def _listens(path: Path) -> bool:
    """Whether the kernel lists a listening socket of that name: flags 00010000 in /proc/net/unix (proc(5))."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) == 8 and words[7] == str(path) and words[3] == "00010000":
            return True
    return False
