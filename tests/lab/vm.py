"""A running lab: commands as a user with a real login session, files in and out, and its orderly end.

Each command is an SSH login of its own, through PAM and logind: it has its session scope below its user's slice, its
XDG_RUNTIME_DIR, and the groups the user database has at that moment. After `close` nothing of the machine is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import select
import selectors
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import IO

from lab.errors import CommandFailed, CommandTimeout, LabDied, LabError
from lab.monitor import monitor

CONSOLE_TAIL = 60  # lines
STATE = "state.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """How a command inside ended. `status` is its exit status, as the remote shell gives it (128+N for a signal)."""

    command: str
    user: str
    status: int
    stdout: str
    stderr: str


class Vm:
    """A booted lab in its folder. Made by `lab.boot`, or by `attach` for one that another process keeps."""

    def __init__(self, folder: Path, pid: int, port: int) -> None:
        self.folder = folder
        self.pid = pid
        self.port = port
        self._pidfd = os.pidfd_open(pid)

    @classmethod
    def attach(cls, folder: Path) -> Vm:
        """The machine that runs in `folder`; LabError when none does."""
        try:
            state = json.loads((folder / STATE).read_text())
            vm = cls(folder, state["pid"], state["port"])
        except (FileNotFoundError, ProcessLookupError) as error:
            raise LabError(f"no lab runs in {folder}") from error
        if start_time(vm.pid) != state["start_time"]:
            raise LabError(f"no lab runs in {folder}: its process is gone")
        return vm

    def save(self) -> None:
        """Leaves a note by which `attach` finds this machine."""
        state = {"pid": self.pid, "start_time": start_time(self.pid), "port": self.port}
        (self.folder / STATE).write_text(json.dumps(state))

    def connect(self) -> bool:
        """Opens the connection that root's commands share: a login costs seconds, a command on this one does not.

        For any other user a shared connection would freeze the groups at its beginning; there, each command logs in.
        Tells whether root could log in. If not, each command of his tries it anew.
        """
        command = self.ssh("root", "-M", "-N", "-f") if self._sharable else [*self.ssh("root"), "true"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
        return done.returncode == 0

    def leave(self) -> None:
        """Closes the shared connection."""
        subprocess.run([*self.ssh("root", "-O", "exit")], capture_output=True, check=False)

    @property
    def _control(self) -> Path:
        return self.folder / "ssh"

    @property
    def _sharable(self) -> bool:
        return len(os.fsencode(self._control)) < 88  # of 107; ssh appends 18 while it makes the socket

    @property
    def alive(self) -> bool:
        return not select.select([self._pidfd], [], [], 0)[0]

    def run(
        self,
        command: str | list[str],
        *,
        user: str = "root",
        check: bool = True,
        timeout: float | None = 600.0,
        input: bytes = b"",  # noqa: A002 - as in subprocess.run
        stream: bool = False,
    ) -> Finished:
        """Runs `command` (a line for the user's shell, or an argument vector) in a login session of `user`.

        `stream` passes its output on as it comes. After `timeout` seconds the connection is cut and CommandTimeout
        raised; `check` makes a status other than 0 a CommandFailed. LabDied when the machine ended meanwhile.
        """
        line = command if isinstance(command, str) else shlex.join(command)
        process = subprocess.Popen(
            [*self.ssh(user), line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            try:
                stdout, stderr, in_time = _pump(process, input, timeout, stream)
            finally:
                if process.poll() is None:
                    process.kill()
        done = Finished(
            line, user, process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace")
        )
        output = "" if stream else done.stdout + done.stderr
        if not in_time:
            raise CommandTimeout(f"{user}: {line}: no end after {timeout} s", done.status, output)
        if done.status == 255:  # ssh's own failure, or the command's status: see which
            self.check_alive()
        if check and done.status != 0:
            raise CommandFailed(f"{user}: {line}: exit status {done.status}", done.status, output)
        return done

    def put(self, local: Path | str, remote: str) -> None:
        """Copies a file, or a folder with all below it, to the path `remote` inside; owned by root, modes kept."""
        source = Path(local).resolve()  # the thing itself, even if `local` is a link to it
        parent, name = os.path.split(remote.rstrip("/"))
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.add(source, arcname=name, filter=_plain_root)
        parent = shlex.quote(parent or "/")
        self.run(f"mkdir -p {parent} && tar -x --no-same-owner -C {parent}", input=buffer.getvalue())

    def get(self, remote: str, local: Path | str) -> None:
        """Copies the file or folder `remote` out, to the path `local`."""
        parent, name = os.path.split(remote.rstrip("/"))
        target = Path(local)
        command = [*self.ssh("root"), f"tar -c -C {shlex.quote(parent or '/')} {shlex.quote(name)}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode != 0:
            self.check_alive()
            raise CommandFailed(f"root: cannot read {remote}", done.returncode, done.stderr.decode(errors="replace"))
        with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".lab-") as scratch:
            # tar itself, since Python 3.11.2 cannot yet be told to refuse names that lead out of the folder.
            unpack = ["tar", "-x", "--no-same-owner", "-C", scratch]
            subprocess.run(unpack, input=done.stdout, check=True)
            (Path(scratch) / name).rename(target)

    def install(self, deb: Path | str) -> None:
        """Installs a Debian package whose dependencies the image already has (there is no network outside).

        By dpkg, which looks at the dependencies too, and not at lists of what else there is.
        """
        remote = f"/root/{Path(deb).resolve().name}"
        self.put(deb, remote)
        self.run(f"DEBIAN_FRONTEND=noninteractive dpkg --install {shlex.quote(remote)}", timeout=1200.0)

    def ssh(self, user: str, *options: str) -> list[str]:
        """The argument vector that logs `user` in; a command may follow."""
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": "120",  # a TCP handshake inside is answered late while all its CPUs are busy
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
            "ServerAliveCountMax": "20",
            "ServerAliveInterval": "30",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": _quoted(self.folder / "known_hosts"),
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": "lab",
        }
        arguments = ["ssh", "-F", "none", "-i", str(self.folder / "key"), "-p", str(self.port), "-l", user]
        if user == "root" and self._sharable:
            settings |= {"ControlPath": _quoted(self._control)}
        for name, value in settings.items():
            arguments += ["-o", f"{name}={value}"]
        return [*arguments, *options, "127.0.0.1"]

    def check_alive(self) -> None:
        """LabDied, with the console's tail, when the machine has ended."""
        # QEMU's last moments may overlap with the connection's end: give it a second to be gone.
        if select.select([self._pidfd], [], [], 1.0)[0]:
            raise LabDied(f"the lab ended\n{self.console_tail()}")

    def console_tail(self, lines: int = CONSOLE_TAIL) -> str:
        """The last lines of the serial console, with a heading."""
        return console_tail(self.folder, lines)

    def report(self) -> str:
        """What a person wants to see after a failure: the console's tail and, if it still answers, the journal's."""
        parts = [self.console_tail()]
        if self.alive:
            try:
                journal = self.run("journalctl --no-pager -n 80 -o short-monotonic", timeout=120.0).stdout
                parts.append(f"--- journal of the lab, last 80 lines ---\n{journal}")
            except LabError as error:
                parts.append(f"--- the journal cannot be read: {error} ---")
        return "\n".join(parts)

    def reboot(self, timeout: float = 900.0) -> None:
        """The host's own orderly shutdown, and its next boot, up to where it is ready. LabDied when that does not come.

        The overlay stays, and so does this object: /run and all processes are new, what was written to disk is there.
        """
        ready = self.folder / "ready.log"
        before = ready.read_bytes().count(b"lab-ready")
        with monitor(self.folder) as qmp:
            qmp.command("set-action", reboot="reset")  # QEMU was started with -no-reboot
            self.run("reboot", timeout=60.0, check=False)
            self.leave()
            deadline = time.monotonic() + timeout
            while ready.read_bytes().count(b"lab-ready") <= before:
                self.check_alive()
                if time.monotonic() > deadline:
                    raise LabDied(f"the lab was not back after {timeout:.0f} s\n{self.console_tail()}")
            qmp.command("set-action", reboot="shutdown")  # a kernel that panics ends it again
        while not self.connect():
            self.check_alive()
            if time.monotonic() > deadline:
                raise LabDied(f"nobody could log in to the lab after {timeout:.0f} s\n{self.console_tail()}")

    def power_off(self, timeout: float = 600.0) -> None:
        """The host's own orderly shutdown; LabDied when it is not off after `timeout` seconds (it is killed then)."""
        with contextlib.suppress(CommandFailed):
            self.run("systemctl poweroff", timeout=60.0, check=False)
        self.wait_off(timeout)

    def wait_off(self, timeout: float = 600.0) -> None:
        """Waits for the end of a shutdown that is under way; LabDied when it does not come in `timeout` seconds."""
        if not select.select([self._pidfd], [], [], timeout)[0]:
            tail = self.console_tail()
            self.close()
            raise LabDied(f"the lab was not off after {timeout:.0f} s\n{tail}")

    def close(self) -> None:
        """Ends QEMU: asks, then kills. Nothing happens when it has ended already."""
        if self.alive:
            with contextlib.suppress(LabError), monitor(self.folder, timeout=5.0) as qmp:
                qmp.command("quit")
            if not select.select([self._pidfd], [], [], 5.0)[0]:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                select.select([self._pidfd], [], [], 30.0)


def console_tail(folder: Path, lines: int = CONSOLE_TAIL) -> str:
    try:
        text = (folder / "console.log").read_text(errors="replace")
    except FileNotFoundError:
        text = ""
    tail = "\n".join(text.replace("\r", "").splitlines()[-lines:])
    return f"--- console of the lab, last {lines} lines ---\n{tail}"


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, proc(5), in clock ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _pump(
    process: subprocess.Popen[bytes], data: bytes, timeout: float | None, stream: bool
) -> tuple[bytes, bytes, bool]:
    """Feeds `data`, collects stdout and stderr; the last value is False when the time was over before the end."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    collected: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
    deadline = None if timeout is None else time.monotonic() + timeout
    pending = memoryview(data)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, 1)
        selector.register(process.stderr, selectors.EVENT_READ, 2)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE, 0)
        while selector.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return bytes(collected[1]), bytes(collected[2]), False
            for key, _ in selector.select(left):
                stream_file: IO[bytes] = key.fileobj  # type: ignore[assignment]  # typeshed: int or any file object
                if key.data == 0:
                    pending = _feed(stream_file, pending)
                    if not pending:
                        selector.unregister(stream_file)
                        with contextlib.suppress(BrokenPipeError):
                            stream_file.close()
                    continue
                chunk = os.read(stream_file.fileno(), 65536)
                if not chunk:
                    selector.unregister(stream_file)
                    continue
                collected[key.data] += chunk
                if stream:
                    out = sys.stdout if key.data == 1 else sys.stderr
                    out.write(chunk.decode(errors="replace"))
                    out.flush()
    process.wait()
    return bytes(collected[1]), bytes(collected[2]), True


def _feed(stdin: IO[bytes], pending: memoryview) -> memoryview:
    try:
        return pending[os.write(stdin.fileno(), pending[:65536]) :] if pending else pending
    except BrokenPipeError:
        return pending[:0]


def _plain_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if Path(member.name).name == "__pycache__":
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("%", "%%") + '"'
