"""What the cgroup tree says of a VM: its scope, whether anything lives in it, whether its shield holds.

Why it exists: the helper's word is not taken for it; `status` and the end of a run read the tree themselves.
Kernel: Documentation/admin-guide/cgroup-v2.rst, "Cpuset Interface Files"; cgroup-v1/cpusets.rst for hosts with the
legacy hierarchy, where systemd has one of its own, and the cpusets are in another. Without systemd the helper itself
makes the group of a VM, in cgroup v2, and calls it as systemd would: scope means that as well.
"""

import glob
import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from . import absence, names
from .cpulist import format_cpulist, parse_cpulist
from .procfs import PROC, Process

ROOT = Path("/sys/fs/cgroup")

# cpuset.cpus.partition of a partition that works; one that does not reads "isolated invalid (why)".
_PARTITIONS = {"isolated", "root"}
_WITHOUT = {"pool", "cpuset-v1"}  # our words for shields that are made without one
# The hierarchy of scopes, below ROOT, where that is none itself: v2 beside v1 ("hybrid"), or systemd's v1 ("legacy").
_BESIDE = ("unified", "systemd")
# The helper's cpusets of v1, one for each list of CPUs.
_V1 = "qemu-launcher"
# Where the helper makes scopes: in the user's slice, or that of a service (`services` of qemu-launcher-helper.toml(5));
# with a pool, as user.slice then leaves the CPUs, in one beside it. Without systemd, at the top, or in the user's slice
# where elogind makes one. Always right below: what else is in there is none of ours, and comes and goes all the time.
_SLICES = ("user.slice/user-{}.slice", "system.slice", "qemu.slice/qemu-{}.slice", ".")


def scopes(uid: int) -> Iterator[tuple[str, Path]]:
    """(VM name, directory) of every scope that the helper has made for a VM of this user."""
    for pattern in _SLICES:
        for directory in _glob(_units(), f"{pattern.format(uid)}/{names.scope(uid, '*')}"):
            found = names.SCOPE.fullmatch(directory.name)
            if found is not None:
                yield found[2], directory


def has_scope(uid: int, vm: str) -> bool:
    """Whether a VM of that user may have a scope: also where there is no tree with scopes to look into."""
    is_seen = _units() != ROOT or (ROOT / "cgroup.controllers").exists()
    return not is_seen or any(name == vm for name, _ in scopes(uid))


def members(scope: Path) -> list[int]:
    """PIDs in a scope and below it."""
    return [int(word) for word in _read(scope / "cgroup.procs").split() if word.isdigit()]


def is_populated(scope: Path) -> bool:
    """Whether any process is left in a scope or below it."""
    events = _read(scope / "cgroup.events").splitlines()
    return "populated 1" in events or (not events and bool(members(scope)))  # v1 has none


def ends_by_itself(scope: Path) -> bool:
    """Whether somebody sees a scope end, and has its CPUs given back: systemd, once nothing is left in it."""
    return absence.has_systemd() and not is_populated(scope)


def end_members(scope: Path) -> None:
    """Send SIGKILL to all that an ended QEMU has left in its scope; harmless when there is nothing.

    The helper does that in cgroup v2. In the legacy hierarchy the kernel has no file for it, and the helper may send
    no signals: there it is its user's to do.
    """
    seen: set[int] = set()
    while new := {*members(scope)} - seen:
        seen |= new
        for process in filter(None, map(Process.of, new)):
            with suppress(OSError), process.pidfd() as fd:  # it may have ended, or become somebody else's (setuid)
                if fd is not None and scope_of(process.pid) == scope:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)


def scope_of(pid: int) -> Path | None:
    """Directory of the VM's scope that `pid` is in, None if it is in none."""
    path = _path(f"{pid}/cgroup")
    found = names.SCOPE.search(path)
    return None if found is None else _units() / path[: found.end()].lstrip("/")


def shield_of(pid: int, tid: int) -> str | None:
    """State of the shield of ours that it is in, such as `isolated`, or `isolated invalid (why)`; or None."""
    path = start = _path(f"{pid}/task/{tid}/cgroup")
    while names.SCOPE.search(path):
        state = _read(_units() / path.lstrip("/") / "cpuset.cpus.partition").strip()
        if state not in ("", "member"):
            return state
        path = os.path.dirname(path)  # noqa: PTH120 (a cgroup's name, not a file's)
    shielded = re.fullmatch(r"/(qemu\.slice/[^/]+/[^/]+)/vcpus/[0-9]+", start)
    if shielded is not None:
        return _pool_of(ROOT / shielded[1])
    shielded = re.fullmatch(rf"/{_V1}/([0-9,-]+)\n", _read(PROC / f"{pid}/task/{tid}/cpuset"))
    return None if shielded is None else _v1_of(shielded[1])


def holds(shield: str | None) -> bool:
    """Whether a state that `shield_of` has told is that of a shield that works."""
    return shield in _PARTITIONS | _WITHOUT


def is_partition(shield: str | None) -> bool:
    """Whether such a shield is one of the kernel's own making."""
    return shield in _PARTITIONS


def _pool_of(scope: Path) -> str:
    """Whether everybody else leaves the CPUs of this VM.

    A group without a task, as systemd has for some mounts, is nobody; each daemon-reload gives it all CPUs.
    """
    cpus = _cpus(scope / "vcpus/cpuset.cpus")
    if gone := cpus - _cpus(scope / "vcpus/cpuset.cpus.effective"):
        return f"pool invalid (CPUs {format_cpulist(gone)} are offline or taken)"
    for group in [*_glob(ROOT, "*/"), *_glob(ROOT, "qemu.slice/*/*.scope")]:
        if group in (ROOT / "qemu.slice", scope) or "populated 0" in _read(group / "cgroup.events").splitlines():
            continue
        if shared := cpus & _cpus(group / "cpuset.cpus.effective"):
            return f"pool invalid ({group.name} may use CPUs {format_cpulist(shared)})"
    return "pool"


def _v1_of(cpulist: str) -> str:
    """Whether every other cpuset of v1 leaves these CPUs; in the root are only threads that nobody can move."""
    root = Path(v1_cpusets(_read(PROC / "self/mountinfo")) or "/nowhere")
    cpus = parse_cpulist(cpulist)
    if gone := cpus - _cpus(root / _V1 / cpulist / "cpuset.cpus"):
        return f"cpuset-v1 invalid (CPUs {format_cpulist(gone)} are offline or taken)"
    for group in [root / _V1 / "pool", *_glob(root, "*/")]:
        if group != root / _V1 and (shared := cpus & _cpus(group / "cpuset.cpus")):
            return f"cpuset-v1 invalid ({group.name} may use CPUs {format_cpulist(shared)})"
    return "cpuset-v1"


def v1_cpusets(mountinfo: str) -> str:
    """Where cpusets of v1 are mounted, by proc_pid_mountinfo(5); "" where they are not."""
    found = re.search(r"^(?:\S+ ){3}/ (\S+) .* - cgroup \S+ \S*\bcpuset\b", mountinfo, re.MULTILINE)
    return found[1] if found else ""


def unit_path(text: str) -> str:
    """The path in systemd's hierarchy, from /proc/PID/cgroup's text: in v2, always the last line, or else in v1."""
    found: list[str] = re.findall(r"^(?:0:|[0-9]+:name=systemd):(/.+)$", text, re.MULTILINE)
    return found[-1] if found else ""


def _units() -> Path:
    trees = [ROOT / name for name in _BESIDE]
    beside = [tree for tree in trees if (tree / "user.slice").is_dir() or (tree / "cgroup.controllers").exists()]
    return beside[0] if beside else ROOT


def _glob(root: Path, pattern: str) -> list[Path]:
    """What matches. Groups vanish at any moment: pathlib's glob then raises (Python 3.11), and hides all the others."""
    return [root / name for name in glob.glob(pattern, root_dir=root)]  # noqa: PTH207 (see above)


def _cpus(path: Path) -> frozenset[int]:
    return parse_cpulist(_read(path))


def _path(relative: str) -> str:
    return unit_path(_read(PROC / relative))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
