"""Counts the steps of a launcher's start, from within, and ends it or its QEMU at one of them. For tests only.

A step is a system call that Python code makes between the begin of the run and the end of what follows `cont`, in the
launcher or in a library below it: between two of them nothing happens that another process could see, so whoever dies
there has died at the later one. They are counted by sys.setprofile as they come, not listed: a call that is new in the
launcher is a step by itself. A step is named after the function and the line of the launcher's that led to it, and
numbered; of a loop the first rounds are steps, and of an import, which only reads, none.

Put before the launcher by Home.with_changed, see test_crash_points.py; in the lab it is a program of its own, which is
the installed launcher: stepping_launcher.py LOG STEP WHO ARGUMENTS...
"""

import os
import select
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

# Modules, and types of objects, whose functions are system calls.
CALLING = {"posix", "fcntl", "_socket", "socket", "_signal", "select", "resource", "_io", "io"}
# Those that only tell what is known already, or that wait: the step is what comes next.
SILENT = {
    "fspath", "fsencode", "fsdecode", "strerror", "WIFSTOPPED", "waitstatus_to_exitcode", "StringIO", "BytesIO",
    "fileno", "gettimeout", "settimeout", "setblocking", "getsockname", "getpeername", "detach", "text_encoding",
    "poll", "register", "unregister", "modify", "getpid", "getuid", "geteuid", "getcwd", "sysconf", "cpu_count",
    "uname", "isatty", "getvalue", "getsignal", "valid_signals", "signal", "pthread_sigmask", "siginterrupt",
    "set_wakeup_fd", "tell", "seek", "readable", "writable", "seekable", "decode", "reset", "flush",
}  # fmt: skip
ROUNDS = 8  # of a loop


class Steps:
    """The profile function."""

    def __init__(self, log: str, wanted: str, do: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        self._wanted, self._do = wanted, do
        self._pid = os.getpid()
        self._counts = False
        self._seen: Counter[str] = Counter()

    def __call__(self, frame: FrameType, event: str, what: Any) -> None:
        if event == "call":
            code = frame.f_code
            self._counts = self._counts or (code.co_name == "_run" and code.co_filename.endswith("/session.py"))
        elif event == "c_call" and self._counts and _is_system_call(what):
            if os.getpid() != self._pid:
                sys.setprofile(None)  # the child at its gate
                return
            if where := _where(frame):
                self._reached(f"{what.__name__} {where}")

    def _reached(self, name: str) -> None:
        self._seen[name] += 1
        if self._seen[name] > ROUNDS:
            return
        step = f"{name} #{self._seen[name]}"
        os.write(self._log, step.encode() + b"\n")
        if step != self._wanted:
            return
        qemu = [int(pid) for pid in Path(f"/proc/self/task/{self._pid}/children").read_text().split()]
        os.write(self._log, b"reached\n")
        if "QEMU" in self._do:
            for pid in qemu:
                descriptor = os.pidfd_open(pid)
                os.kill(pid, signal.SIGKILL)
                select.select([descriptor], [], [])
                os.close(descriptor)
        if "launcher" in self._do:
            os.kill(self._pid, signal.SIGKILL)


def _is_system_call(what: Any) -> bool:
    owner = getattr(what, "__self__", None)
    module = type(owner).__module__ if owner is not None and not hasattr(owner, "__spec__") else what.__module__
    return module in CALLING and what.__name__ not in SILENT and not what.__name__.startswith("_")


def _where(frame: FrameType | None) -> str:
    """The nearest line of the launcher; "" inside an import."""
    while frame is not None:
        path = frame.f_code.co_filename
        if "importlib" in path:
            return ""
        if "/qemu_launcher/" in path:
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "loop"


def begin(log: str, wanted: str = "", do: str = "") -> None:
    """Count from now on."""
    sys.setprofile(Steps(log, wanted, do))


if __name__ == "__main__":
    sys.path.append("/usr/lib/python3/dist-packages")
    from qemu_launcher.__main__ import main

    begin(*sys.argv[1:4])
    sys.exit(main(sys.argv[4:]))
