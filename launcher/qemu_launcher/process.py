"""QEMU as a child of ours: forked, held at a gate, executed, watched through its pidfd, ended in order.

Why it exists: one function makes the child, so that there is one place where its descriptors, signal mask and
limits are decided.

    fork -> the child waits at its gate -> open_gate() -> exec -> ... -> ended (an Ending)

The gate is a pipe. As long as it is closed no QEMU runs, and the PID is already the one that QEMU will have: it is
written into the lock file, and handed to the helper, before QEMU exists. End of file at the gate means that the
launcher died, and the child leaves too. So there is no moment at which a QEMU runs that nobody knows of.

It refuses to fork when a thread exists already (the child of a threaded process may only call async-signal-safe
functions, signal-safety(7)). After QemuFailed there is no child. Leaving `Qemu`'s context ends a QEMU that still
runs, unless `let_run()` was called: from `cont` on, a failing launcher leaves the guest alone.
"""

import asyncio
import contextlib
import errno
import os
import resource
import select
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from . import patience, unexpanded
from .errors import QemuFailed
from .procfs import Process
from .sizes import INFINITY

# A QEMU that was told to quit still writes its images back. Ten seconds is what systemd's own
# TimeoutStopSec= gives to far smaller services; after it, only a hung disk or a stopped process is left.
QUIT_GRACE = 10.0

# Signals of the terminal: they reach the whole foreground group, but only the launcher shall act on them.
_ONLY_FOR_THE_LAUNCHER = frozenset({signal.SIGINT, signal.SIGHUP})
# Python ignores these from its start (CPython: _Py_RestoreSignals); an ignored signal stays ignored across exec.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)

_TOO_MANY = "end some: ulimit -u, or TasksMax= of your slice, says how many processes and threads you may have"

_STDERR = 2
_GO = b"g"
_STAGES = {b"c": "enter its working directory", b"l": "raise its own memory lock limit", b"x": "execute it"}


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute: argv (the program first), environment, directory, and the descriptors QEMU inherits."""

    argv: Sequence[str]
    env: Mapping[str, str]
    working_directory: Path | None
    inherited: Sequence[int]
    soft_memlock: int | None  # bytes; raised by the child itself, within its hard limit (setrlimit(2))
    stderr: int | None = None  # None: our own


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended: by itself with `code` 0-255, or by signal `-code`, as os.waitstatus_to_exitcode tells.

    A shell folds both into one number, in which `exit 130` and SIGINT are the same: that is for our own exit alone.
    """

    code: int

    @property
    def exit_status(self) -> int:
        """As a shell reports it: 128+N for signal N."""
        return 128 - self.code if self.code < 0 else self.code

    def __str__(self) -> str:
        if self.code >= 0:
            return f"with exit status {self.code}"
        # Most real-time signals have no name (signal(7)).
        names = {number.value: f" ({number.name})" for number in signal.Signals}
        return f"by signal {-self.code}{names.get(-self.code, '')}"


class Qemu:
    """The child. An async context manager: enter it right after `forked`."""

    def __init__(self, command: Command, process: Process, pidfd: int, gate: int, report: int) -> None:
        self.command = command
        self.process = process
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._pidfd = pidfd
        self._gate = gate
        self._report = report
        self._reported = b""
        self._ends_with_us = True

    @property
    def pid(self) -> int:
        """The PID, before and after exec."""
        return self.process.pid

    async def __aenter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ends_with_us:
            await self.end()
        asyncio.get_running_loop().remove_reader(self._pidfd)
        for fd in (self._pidfd, self._gate, self._report):
            with contextlib.suppress(OSError):
                os.close(fd)

    async def open_gate(self) -> None:
        """Let the child execute QEMU. QemuFailed when it could not."""
        with contextlib.suppress(BrokenPipeError):  # the child was killed at its gate; `ended` says so
            os.write(self._gate, _GO)
        await patience.readable(self._report)
        if (failure := self.exec_failure()) is not None:
            raise failure

    def exec_failure(self) -> QemuFailed | None:
        """Why the child could not execute QEMU, by what it has reported so far; None if it has reported nothing."""
        readable, _, _ = select.select([self._report], [], [], 0)
        if readable:  # a few bytes in one write; nothing at all when exec closed the pipe, or the child ended
            self._reported += os.read(self._report, 64)
        if not self._reported:
            return None
        stage, number = self._reported[:1], int(self._reported[1:])
        path = str(self.command.working_directory) if stage == b"c" else self.command.argv[0]
        where = f" {path!r}" if stage == b"c" else ""
        why = os.strerror(number) if number else "Python refuses one of its words"  # no error of the kernel's
        return QemuFailed(
            f"cannot start {self.command.argv[0]!r}: could not {_STAGES[stage]}{where}: {why}",
            unexpanded.hint(path),
        )

    def send(self, number: signal.Signals) -> None:
        """Send a signal to exactly this process; nothing happens when it has ended."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def end(self, grace: float = QUIT_GRACE) -> None:
        """SIGTERM, which QEMU takes as `quit`; after `grace` seconds SIGKILL. Returns when it has ended."""
        self.send(signal.SIGTERM)
        done, _ = await asyncio.wait([self.ended], timeout=grace)
        if not done:
            self.send(signal.SIGKILL)
        await self.ended

    def let_run(self) -> None:
        """From now on the child survives us, whatever happens here."""
        self._ends_with_us = False

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        _, status = os.waitpid(self.pid, 0)
        if not self.ended.done():
            self.ended.set_result(Ending(os.waitstatus_to_exitcode(status)))


def forked(command: Command) -> Qemu:
    """Make the child and leave it at its gate. QemuFailed if the kernel allows no more processes."""
    if threading.active_count() != 1:
        raise RuntimeError("fork after a thread was started")
    gate_read, gate = os.pipe2(os.O_CLOEXEC)
    report, report_write = os.pipe2(os.O_CLOEXEC)
    # Nothing may interrupt the child between fork and the point where it has reset what it inherited from us:
    # Python's signal handlers would write into the wakeup pipe that both processes share.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            os.close(gate)
            os.close(report)
            _child(command, gate_read, report_write, mask)
    except OSError as err:
        for fd in (gate, report):
            os.close(fd)
        # fork(2): EAGAIN is one of these limits; ENOMEM is of memory, and says so itself.
        hint = _TOO_MANY if err.errno == errno.EAGAIN else None
        raise QemuFailed(f"cannot make a process for QEMU: {err.strerror}", hint) from err
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(gate_read)
        os.close(report_write)
    # Not reaped yet, so neither the PID nor its entry in /proc can have passed to another process.
    pidfd = os.pidfd_open(pid)
    process = Process.of(pid) or Process(pid, 0)
    return Qemu(command, process, pidfd, gate, report)


def _child(command: Command, gate: int, report: int, mask: set[int | signal.Signals]) -> NoReturn:
    """The child between fork and exec. Never returns and never raises."""
    stage = b"x"
    try:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)) or number in _IGNORED_BY_PYTHON:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask | _ONLY_FOR_THE_LAUNCHER)
        if os.read(gate, 1) != _GO:
            os._exit(1)
        if command.soft_memlock is not None:
            stage = b"l"
            _raise_soft_memlock(command.soft_memlock)
        if command.working_directory is not None:
            stage = b"c"
            os.chdir(command.working_directory)
        stage = b"x"
        if command.stderr is not None:
            os.dup2(command.stderr, _STDERR)
        for fd in command.inherited:
            os.set_inheritable(fd, True)
        os.execvpe(command.argv[0], list(command.argv), dict(command.env))  # noqa: S606 (this is what we are for)
    except OSError as err:
        os.write(report, stage + str(err.errno or 0).encode())
    except BaseException:  # noqa: BLE001 (a forked child must never run on into its parent's code)
        os.write(report, stage + b"0")
    finally:
        os._exit(127)


def _raise_soft_memlock(wanted: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    soft = hard if wanted == INFINITY else wanted
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
