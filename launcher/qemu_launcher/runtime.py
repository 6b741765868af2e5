"""Which VMs of this user run: one lock file and one control socket for each, and how to find a VM without them.

`$XDG_RUNTIME_DIR/qemu-launcher/NAME.lock` is locked with flock(2) by the launcher, and QEMU inherits the open file:
it stays locked as long as one of the two lives, so a lock can never be stale. Its content, a `record`, says who they
are and whether the guest was ever let run.

When the user logs out, $XDG_RUNTIME_DIR goes and the VM may stay; and who asks may have another one than who started
it. Then it is found by the open file in QEMU itself (/proc/PID/fd), and by its scope in the cgroup tree; a second start
is refused all the same.

Nothing that is left over keeps a VM from starting: a record of processes that are gone, or of another boot, names
nobody; what is no record is written over; a socket that nobody listens on makes room. Refused: a directory that is not
ours alone, and what is in the place of lock or socket and is none (LauncherError). A failing claim leaves no lock and
no socket behind.
"""

import contextlib
import fcntl
import glob
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import cgroups, procfs, rundir
from .errors import AlreadyRunning, LauncherError
from .names import VM_NAME
from .procfs import Process
from .record import RUNNING, STARTING, Record

# A QEMU that never ran has written nothing, so it need not be waited for as one that did (process.QUIT_GRACE).
NEVER_STARTED_GRACE = 2.0  # seconds
# A launcher writes its record right after it took the lock, and lets go of the lock right after it cleared the record.
# Between the two the record is not its own; these looks see it through unless it is held up.
_LOOKS, _PAUSE = 20, 0.025  # seconds
_LARGEST_RECORD = 1 << 20  # bytes; one of 4096 vCPUs takes 64 KiB

_FLOCK = re.compile(r"^lock:\s.*\bFLOCK\b.*\bWRITE\s+([0-9]+)", re.MULTILINE)  # /proc/PID/fdinfo/FD of proc(5)
# The kernel adds " (deleted)" once the file is gone, and leaves out the mount point once that is detached.
_LOCK_LINK = re.compile(rf"/{rundir.DIRECTORY}(?:-[0-9]+)?/({VM_NAME.pattern})\.lock(?: \(deleted\))?\Z")


@dataclass(frozen=True, slots=True)
class Found:
    """A VM of this user that has a QEMU, or is about to have one."""

    name: str
    record: Record
    socket: Path | None  # None when its directory is gone, or not to be seen from here

    @property
    def qemu(self) -> Process | None:
        """QEMU if it is alive."""
        return self.record.qemu if self.record.qemu and self.record.qemu.is_alive() else None

    @property
    def launcher(self) -> Process | None:
        """Its launcher if it is alive."""
        return self.record.launcher if self.record.launcher and self.record.launcher.is_alive() else None

    @property
    def is_alive(self) -> bool:
        """Whether anybody is there."""
        return self.qemu is not None or self.launcher is not None

    @property
    def is_starting(self) -> bool:
        """Its launcher is there, and QEMU, if it exists already, has not been heard of yet."""
        ended = self.record.qemu is not None and self.qemu is None
        return self.launcher is not None and self.record.state != RUNNING and not ended

    @property
    def is_held(self) -> bool:
        """Its launcher has not let the guest run, and is about to, or has died before."""
        return self.is_alive and self.record.state == STARTING

    @property
    def never_started(self) -> bool:
        """QEMU is there, its guest has not run, and nobody is left who would let it."""
        return self.qemu is not None and self.launcher is None and self.record.state == STARTING


class Claim:
    """The lock of one VM, held. Made by `claimed`."""

    def __init__(self, name: str, directory: Path, lock_fd: int, record: Record) -> None:
        self.lock_fd = lock_fd
        self.record = record
        self.directory = directory
        self.lock = directory / f"{name}.lock"
        self._socket = directory / f"{name}.sock"
        self._written = os.fstat(lock_fd).st_size  # of a launcher that was killed, perhaps longer than ours will be
        if self._written > _LARGEST_RECORD:  # this was no launcher, and no reader looks that far
            os.ftruncate(lock_fd, 0)
            self._written = 0
        self.update()

    def update(self, **changes: Any) -> None:
        """Change fields of the record and write it. LauncherError if that cannot be, on a full disk say."""
        self.record = replace(self.record, **changes)
        data = self.record.encode()
        # Written over in one go and never shortened: a reader sees the old line or the new one, blanks after it.
        self._written = max(self._written, len(data))
        try:
            os.pwrite(self.lock_fd, data[:-1].ljust(self._written - 1) + b"\n", 0)
        except OSError as err:
            raise LauncherError(
                f"cannot write into {self.lock}: {err.strerror}", "make room there: df says how much"
            ) from err

    def listening_socket(self) -> socket.socket:
        """The control socket, bound and listening; QEMU inherits it and accepts one client at a time."""
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.unlink(missing_ok=True)  # ours to remove: we hold the lock
            with rundir.short_path(self._socket) as path:
                control.bind(path)
            control.listen(1)
        except OSError as err:
            control.close()
            raise rundir.not_made("control socket", self._socket, err.strerror, wanted=stat.S_IFSOCK) from err
        return control

    def clear(self) -> None:
        """Nothing runs any more. The file stays: taking it away would let two starts lock two files of one name."""
        with contextlib.suppress(OSError):  # a directory in its place, which was told when it was in the way
            self._socket.unlink(missing_ok=True)
        os.ftruncate(self.lock_fd, 0)


@contextlib.contextmanager
def claimed(name: str, definition: Path) -> Iterator[tuple[Claim, Process | None]]:
    """Lock the VM for this process and its QEMU. AlreadyRunning if it runs; LauncherError if there is no place for it.

    A QEMU that its dead launcher never let run is ended first, and handed back for the user to be told.
    When the context ends and QEMU is gone the record is cleared; a QEMU that lives on keeps lock and record.
    """
    place = rundir.made(rundir.candidates())
    fd = rundir.opened_lock(place / f"{name}.lock")
    try:
        discarded = _lock(fd, name)
        record = Record(
            launcher=Process.of(os.getpid()), definition=str(definition.absolute()), boot=procfs.boot_id() or ""
        )
        claim = Claim(name, place, fd, record)
        try:
            # Only now: of two who start it at once, each with its own lock, the later one finds the other's record.
            discarded = _refuse_lost(name, discarded)
        except BaseException:
            os.ftruncate(fd, 0)  # the socket, if there is one, is that of who runs
            raise
        try:
            yield claim, discarded
        finally:
            if not (claim.record.qemu and claim.record.qemu.is_alive()):
                claim.clear()
    finally:
        os.close(fd)


def find(name: str) -> Found | None:
    """The running VM of this name, wherever its files are."""
    return next((vm for vm in find_all() if vm.name == name), None)


def find_all() -> list[Found]:
    """All running VMs of this user, by name."""
    found: dict[str, Found] = {}
    for source in (_in_directories, _in_processes, _in_scopes):
        for vm in source():
            if vm.is_alive:
                found.setdefault(vm.name, vm)
    return sorted(found.values(), key=lambda vm: vm.name)


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    """A client of the control socket. OSError if nobody listens; BlockingIOError if the queue before us is full."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.setblocking(False)  # with a full queue connect would wait for the client before us, for ever
    with client, rundir.short_path(path) as short:
        client.connect(short)
        yield client


def _lock(fd: int, name: str) -> Process | None:
    """Take the lock; return the QEMU that had to go for it, None if there was none."""
    discarded = None
    for _ in range(_LOOKS):
        if _try_lock(fd):
            return discarded
        discarded = _discard_or_refuse(_holder(fd, name)) or discarded
        time.sleep(_PAUSE)
    raise _held(fd, name)


def _held(fd: int, name: str) -> AlreadyRunning:
    """The error for a lock that somebody has who is not in the record."""
    holders = dict(_holders(fd, name))
    for pid, took_it in holders.items():
        if took_it:
            return _being_started(name, pid)
    others = ", ".join(f"{pid} ({procfs.comm(pid)})" for pid in holders)
    return AlreadyRunning(
        f"{name} has ended, but processes it left behind still hold its lock: {others or 'not visible to you'}",
        "end them, then start it again",
    )


def _holders(fd: int, name: str) -> Iterator[tuple[int, bool]]:
    """(PID, whether it took the lock itself or has inherited it) of every other process that holds this very lock."""
    lock = os.fstat(fd)
    for pid, link in _open_in_processes(name):
        with contextlib.suppress(OSError):
            found = _FLOCK.search((link.parent.parent / "fdinfo" / link.name).read_text())
            if found is not None and os.path.samestat(link.stat(), lock):
                yield pid, int(found[1]) == pid


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int, name: str) -> Found | None:
    record = _read_record(fd)
    return None if record is None else Found(name, record, None)


def _refuse_lost(name: str, discarded: Process | None) -> Process | None:
    """We hold the lock; but a VM of this name may live on with the lock file of an earlier login, or of another place.

    Returns the QEMU that had to go for us: `discarded`, or one that is found here.
    """
    for vm in _in_processes():
        if vm.name == name:
            discarded = _discard_or_refuse(vm) or discarded
    # What one that had to go has left in its scope is no QEMU.
    for vm in _in_scopes() if discarded is None else ():
        if vm.name == name:
            _discard_or_refuse(vm)
    return discarded


def _discard_or_refuse(vm: Found | None) -> Process | None:
    if vm is None or not vm.is_alive:
        return None
    qemu = vm.qemu
    if qemu is not None and vm.never_started:
        procfs.end(qemu, grace=NEVER_STARTED_GRACE)
        return qemu
    if (refusal := refused(vm)) is not None:
        raise refusal
    return None


def refused(vm: Found) -> AlreadyRunning | None:
    """Why this VM cannot be started now; None if it has ended since, or its QEMU never ran and would be ended first."""
    qemu, launcher = vm.qemu, vm.launcher
    if launcher is not None and vm.is_starting:
        return _being_started(vm.name, launcher.pid)
    if qemu is None:
        if launcher is None:
            return None
        return AlreadyRunning(
            f"{vm.name} has just ended, and its launcher (PID {launcher.pid}) is about to end too",
            "try again in a moment",
        )
    if vm.never_started:
        return None
    return AlreadyRunning(
        f"{vm.name} is already running (PID {qemu.pid})",
        f"see it with: qemu-launcher status {vm.name}\n"
        f"power it down with: qemu-launcher stop {vm.name}\n"
        f"cut its power with: qemu-launcher kill {vm.name}",
    )


def _being_started(name: str, launcher: int) -> AlreadyRunning:
    return AlreadyRunning(
        f"{name} is being started already, by the launcher with PID {launcher}",
        f"see it with: qemu-launcher status {name}\nend it with: qemu-launcher kill {name}",
    )


# Three ways to find a VM


def _in_directories() -> Iterator[Found]:
    for place in rundir.candidates():
        if not rundir.is_ours_alone(place):
            continue
        # pathlib's glob fails when the place goes with its login meanwhile (Python 3.11).
        for lock in sorted(place / name for name in glob.glob("*.lock", root_dir=place)):  # noqa: PTH207
            if not VM_NAME.fullmatch(lock.stem):
                continue
            with contextlib.suppress(OSError):
                # A FIFO would keep us waiting for a writer; what is no file has no record (ESPIPE).
                fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    record = _read_record(fd)
                finally:
                    os.close(fd)
                if record is not None:
                    yield Found(lock.stem, record, place / f"{lock.stem}.sock")


def _in_processes() -> Iterator[Found]:
    """VMs whose lock file is elsewhere, or gone from its directory, by the open file in QEMU or its launcher."""
    for pid, link in _open_in_processes():
        with contextlib.suppress(OSError):
            lock = link.readlink()
            name = _LOCK_LINK.search(os.fspath(lock))
            fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                record = _read_record(fd)
                there = _is_there(fd, lock)
            finally:
                os.close(fd)
            # Only what the process says of itself: a child of QEMU's may have inherited the file too.
            if name and record and pid in {process.pid for process in (record.qemu, record.launcher) if process}:
                yield Found(name[1], record, lock.with_suffix(".sock") if there else None)


def _is_there(fd: int, path: Path) -> bool:
    """Whether the open file is (still, and for us) the one at `path`, in a directory that is ours alone."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat()) and rundir.is_ours_alone(path.parent)
    except OSError:  # "NAME.lock (deleted)", or a path without its mount point, or one of another mount namespace
        return False


def _open_in_processes(name: str | None = None) -> Iterator[tuple[int, Path]]:
    """(PID, its /proc/PID/fd entry) of every other process of this user that has such a lock file open."""
    uid = os.geteuid()
    for process in procfs.PROC.iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if process.stat().st_uid != uid:
                continue
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):  # it may have closed this one since; the lock is perhaps yet to come
                    found = _LOCK_LINK.search(os.fspath(link.readlink()))
                    if found and name in (None, found[1]):
                        yield int(process.name), link


def _in_scopes() -> Iterator[Found]:
    """VMs by their scopes in the cgroup tree: the oldest process of this user in such a scope is QEMU."""
    uid = os.geteuid()
    for name, scope in cgroups.scopes(uid):
        own = [one for pid in cgroups.members(scope) if procfs.owner(pid) == uid and (one := Process.of(pid))]
        if own:
            yield Found(name, Record(qemu=min(own, key=lambda one: one.start_time), state=RUNNING), None)


def _read_record(fd: int) -> Record | None:
    record = Record.decode(os.pread(fd, _LARGEST_RECORD, 0))
    # PIDs and times since boot begin anew with each boot, and not all runtime directories do: /tmp may stay.
    return record if record is None or record.boot in ("", procfs.boot_id()) else None
