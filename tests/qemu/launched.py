"""The launcher under test, started as a user starts it, and a QMP client of the tests' own.

Everything waits for something that happens: a line on stderr, an event on QMP, the end of a process. The generous
timeouts only bound a broken run.
"""

import errno
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DESKTOP = ("DISPLAY", "WAYLAND_DISPLAY", "DBUS_SESSION_BUS_ADDRESS")  # of whoever runs the tests
PATIENCE = 60.0  # seconds; two slow cores shared with other work
# What every user is and root is not: CAP_SYS_NICE would let one take the policy idle back.
AS_A_USER = ("setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", "--")
MACHINE = ("nodefaults", {"display": "none"}, {"machine": "q35"}, {"accel": "tcg,thread=multi"}, {"m": "64"})


class Qmp:
    """A blocking QMP client on a VM's control socket; `events` collects what comes between the answers."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        with _through_directory(path) as short:
            self._socket.connect(short)
        self._file = self._socket.makefile("rw")
        self.events: list[dict[str, Any]] = []
        assert "QMP" in self._line()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            message = self._line()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise RuntimeError(f"{command}: {message['error']}")
            else:
                return message["return"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """The first event of this name, whether it has come already or not."""
        while True:
            for event in self.events:
                if event["event"] == name:
                    return event
            message = self._line()
            if "event" in message:
                self.events.append(message)

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _line(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise EOFError("QEMU closed the control socket")
        value: dict[str, Any] = json.loads(line)
        return value


class Run:
    """One `qemu-launcher run`, in the foreground of its own process group."""

    def __init__(self, process: "subprocess.Popen[bytes]", home: "Home", name: str) -> None:
        self.process = process
        self.home = home
        self.name = name
        self.output = ""

    def wait_line(self, pattern: str) -> str:
        """The first line on stderr that matches."""
        return self.wait_lines(pattern, 1)[0]

    def wait_lines(self, pattern: str, number: int) -> list[str]:
        """So many lines on stderr that match."""
        assert self.process.stderr is not None
        deadline = time.monotonic() + PATIENCE
        while len(found := [line for line in self.output.splitlines() if re.search(pattern, line)]) < number:
            left = deadline - time.monotonic()
            assert left > 0, f"no line like {pattern!r} in:\n{self.output}"
            if select.select([self.process.stderr], [], [], left)[0]:
                data = os.read(self.process.stderr.fileno(), 65536)
                assert data, f"ended with {self.process.wait()} without a line like {pattern!r}:\n{self.output}"
                self.output += data.decode()
        return found

    def wait_running(self) -> str:
        return self.wait_line(rf"^{self.name}: running, ")

    def wait_recorded(self) -> None:
        """The same for one that says nothing (-q): until its record says so."""
        record = self.home.runtime / "qemu-launcher" / f"{self.name}.lock"

        def is_running() -> bool:
            assert self.process.poll() is None
            return record.exists() and '"running"' in record.read_text()

        wait_until(is_running)

    def record(self) -> dict[str, Any]:
        return self.home.record(self.name)

    @property
    def qemu_pid(self) -> int:
        return int(self.record()["qemu"][0])

    def qmp(self) -> Qmp:
        return Qmp(self.home.runtime / "qemu-launcher" / f"{self.name}.sock")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for the launcher's end, and return its exit status as a shell would see it."""
        assert self.process.stderr is not None
        while data := _read_until(self.process.stderr.fileno(), PATIENCE):
            self.output += data.decode()
        status = self.process.wait(PATIENCE)
        assert "Traceback" not in self.output, self.output
        return 128 - status if status < 0 else status


class Home:
    """A user's world: a configuration directory, a runtime directory, an environment."""

    def __init__(self, place: Path) -> None:
        self.configuration = place / "vms"
        self.runtime = place / "runtime"
        self.configuration.mkdir()
        self.runtime.mkdir(mode=0o700)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in DESKTOP},
            "PYTHONPATH": str(ROOT / "launcher"),
            "QEMU_LAUNCHER_CONFIG_DIR": str(self.configuration),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={place}/no-bus",
        }
        self.runs: list[Run] = []
        self.pids: set[tuple[int, str]] = set()

    def define(self, name: str = "vm-under-test", *, qemu: tuple[Any, ...] = (), **launcher: Any) -> Path:
        """Write a definition: `qemu` after a minimal machine, `launcher` over a minimal launcher section."""
        sections = {"launcher": {"binary": "qemu-system-x86_64", **launcher}, "qemu": [*MACHINE, *qemu]}
        path = self.configuration / f"{name}.yml"
        path.write_text(yaml.safe_dump(sections, sort_keys=False))
        return path

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "qemu_launcher", *words]

    def with_changed(self, change: str, *words: str) -> list[str]:
        """argv of `run` for VM `words`, in which the line of Python `change` has been executed before."""
        return self.changed_command(change, "run", *(words or ("vm-under-test",)))

    def changed_command(self, change: str, *words: str) -> list[str]:
        """The same for any subcommand."""
        main = "import sys; from qemu_launcher.__main__ import main; sys.exit(main(sys.argv[1:]))"
        return [sys.executable, "-c", f"{change}\n{main}", *words]

    def start(
        self,
        name: str = "vm-under-test",
        *options: str,
        env: Mapping[str, str] | None = None,
        argv: list[str] | None = None,
    ) -> Run:
        """Start a VM; what it leaves running is ended with the test."""
        process = subprocess.Popen(
            argv or self.command("run", *options, name),
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        run = Run(process, self, name)
        self.runs.append(run)
        return run

    def ask(
        self, *words: str, env: Mapping[str, str] | None = None, change: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        """Any other subcommand, to its end."""
        return subprocess.run(
            self.changed_command(change, *words) if change else self.command(*words),
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def record(self, name: str = "vm-under-test") -> dict[str, Any]:
        """The content of the lock file."""
        value: dict[str, Any] = json.loads((self.runtime / "qemu-launcher" / f"{name}.lock").read_text())
        return value

    def clean_up(self) -> None:
        """End what is left: the launchers we started, and QEMUs that are children of theirs, known by our directory."""
        for run in self.runs:
            if run.process.poll() is None:
                run.process.kill()
            run.process.wait()
            assert run.process.stderr is not None
            run.process.stderr.close()
        left = self.leftovers()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # A launcher finds a VM of its user's by name wherever its files are; one of policy idle takes its time to end.
        for pid in left:
            wait_gone(pid)

    def leftovers(self) -> list[int]:
        """Processes that run with this home's environment."""
        mark = b"XDG_RUNTIME_DIR=" + os.fsencode(self.runtime)
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid():
                try:
                    if mark in (process / "environ").read_bytes().split(b"\0"):
                        found.append(int(process.name))
                except OSError:
                    continue
        return found


def hear(fifo: Path) -> bytes:
    """What is said through a FIFO, until its writer closes it. Nobody who dies before keeps us waiting for ever."""
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        assert select.select([file], [], [], PATIENCE)[0], f"nothing came through {fifo}"
        os.set_blocking(fd, True)
        return file.read()


def tell(fifo: Path, text: str) -> None:
    """Say something through a FIFO to the one who reads it, or is about to."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as err:
            if err.errno != errno.ENXIO or time.monotonic() > end:
                raise
            time.sleep(0.05)
    with os.fdopen(fd, "w") as file:
        file.write(text)


@contextmanager
def silent_bus(home: Home) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """A system bus that takes connections and never answers, and the environment for those who are to meet it."""
    with socket.socket(socket.AF_UNIX) as bus:
        place = home.runtime / "bus"
        bus.bind(str(place))
        bus.listen()
        yield bus, {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={place}"}


def wait_until(holds: Callable[[], bool]) -> None:
    """For what nobody tells: look until it is so."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_gone(pid: int) -> None:
    """Wait until a process that is not our child has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], PATIENCE)[0], f"PID {pid} did not end"
    finally:
        os.close(fd)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def _read_until(fd: int, seconds: float) -> bytes:
    if not select.select([fd], [], [], seconds)[0]:
        raise AssertionError(f"the launcher did not end: its stderr is still open in {list(_others_with(fd))}")
    return os.read(fd, 65536)


def _others_with(fd: int) -> Iterator[str]:
    """Who else has the pipe open, with what he is and what he does."""
    pipe = Path(f"/proc/self/fd/{fd}").readlink()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.name != str(os.getpid()) and pipe in (one.readlink() for one in (process / "fd").iterdir()):
                state = next(line for line in (process / "status").read_text().splitlines() if line[:6] == "State:")
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                yield f"{process.name} {state.split()[1]} {' '.join(words)[:200]}"


@contextmanager
def _through_directory(path: Path) -> Iterator[str]:
    """sun_path holds 108 bytes, and pytest's directories are deep."""
    directory = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
