"""Shielding where the kernel has no remote partitions: cgroup v2, Linux before 6.11. The host's groups leave the CPUs.

    init.scope  system.slice  user.slice  ...   cpuset.cpus: what it was, less all shielded CPUs
    qemu.slice/qemu-1000.slice/qemu-launcher-1000-win11.scope    as below, and its own shield
        pool/            all CPUs less all shielded ones
            emulator/    pinned/TID/             as with partitions
        vcpus/TID/       one thread, its CPUs

A VM's scope cannot stay below user.slice, which leaves its CPUs; it ends with its user's slice all the same. Threads of
the kernel's own are in no group but the root's, which has all CPUs always: they are not kept away.

systemd does the same with AllowedCPUs=. That it is not asked to has three reasons: what an administrator set that way
stays his, to be read by systemctl and put back here exactly; the change is done when the write returns, in one step
with the rest; and systemd, too, leaves the last list in force when AllowedCPUs= is emptied. It writes these files when
somebody changes AllowedCPUs=, and again for daemon-reload; a group without AllowedCPUs= keeps what is written here. A
list that others wrote is the one to be put back, and `settle`, which runs whenever the helper starts or serves, takes
the shielded CPUs out of it again.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..contract import Conflict, Failed, Pin
from ..target import Ended
from .cpulist import cpulist, parse_cpulist
from .partition import CGROUP, Partition, find, read, text, threaded, write

# What each group's file said before, and what has been written to it since: by the group's name, a list of texts.
MEMORY = Path("/run/qemu-launcher/pool")
POSSIBLE = Path("/sys/devices/system/cpu/possible")


class Pool(Partition):
    """The mechanism. Undone by `settle` alone: nobody else puts the host's groups back."""

    name = "pool"
    reason = "The kernel is older than 6.11: its own threads are not kept away"
    slices: tuple[str, ...] = ("qemu.slice/qemu-*.slice/",)

    def __init__(self, root: Path = CGROUP, memory: Path = MEMORY, possible: Path = POSSIBLE) -> None:
        super().__init__(root)
        # A full list, as a group with tasks in it cannot be given an empty one (ENOSPC); CPUs that come later included.
        self._memory, self.everything = memory, parse_cpulist(possible.read_text())

    def home(self, unit: str, uid: int) -> str:
        """Return the group of the user's VMs: their shields cannot be below user.slice."""
        del unit
        return f"/qemu.slice/qemu-{uid}.slice"

    def lacks(self) -> str:
        """Tell what this host lacks for it; "" when it can be used."""
        with Ended(OSError):
            if "cpuset" in (self.root / "cgroup.controllers").read_text().split():
                return ""
        return "Shielding needs the cgroup v2 hierarchy with its cpuset controller"

    def settle(self, live: Mapping[str, frozenset[int]]) -> None:
        """Let each group of the host, and each scope of a VM, have all CPUs but those that `live` shields for others.

        Raises Conflict when the first of them leaves a group nothing, or one keeps what it has; all others are as they
        should be.
        """
        shielded = frozenset[int]().union(*live.values())
        alone = self._partitions()
        groups, bare = self._groups(shielded, next(iter(live.values()), shielded), alone)
        scopes = {self._dir(scope) / "cpuset.cpus": live.get(scope, frozenset()) for scope in self._scopes()}
        scopes |= {self._outside(scope) / "cpuset.cpus": frozenset[int]() for scope in self._scopes()}
        wanted = groups | {path: cpulist(self.everything - shielded | own) for path, own in scopes.items()}
        refused = [path.parent.name for path, cpus in wanted.items() if not change(path, cpus)]
        if not shielded and not refused and not (alone and groups):
            self._memory.unlink(missing_ok=True)
        if refused:
            raise Conflict(f"The kernel does not let {refused[0]!a} leave CPUs {cpulist(shielded)}, or have them back")
        if bare:
            raise Conflict(bare)

    def _partitions(self) -> dict[str, frozenset[int]]:
        """Return those of somebody else's, with their CPUs.

        The kernel ends one, since Linux 6.1 without an error, when a group beside it gets a list with one of them.
        """
        states = {path.parent: text(path) for path in find(self.root, "*/cpuset.cpus.partition")}
        valid = [path for path, state in states.items() if state in ("root", "isolated")]
        return {path.name: parse_cpulist(text(path / "cpuset.cpus") or "") for path in valid}

    def _groups(
        self, shielded: frozenset[int], claim: frozenset[int], alone: Mapping[str, frozenset[int]]
    ) -> tuple[dict[Path, str], str]:
        """Return what to write for each group of the host, and why the `claim` cannot be had; remember what is there.

        A killed helper has written some of it, or none: `memory` says of each text which of both it is.
        """
        known, memory, bare = remembered(self._memory), dict[str, list[str]](), ""
        online, wanted = parse_cpulist(text(self.root / "cpuset.cpus.effective") or ""), dict[Path, str]()
        if claim & (theirs := frozenset[int]().union(*alone.values())):
            bare = f"CPUs {cpulist(claim & theirs)} are those of a partition that others have made"
        for path in find(self.root, "*/cpuset.cpus") if shielded or known != {} else ():
            name, now = path.parent.name, text(path)
            if now is None or name in ("qemu.slice", *alone):
                continue
            # Where what it was is lost, a full list: what is there may be ours, and would stay for good.
            before, *ours = ["", now] if known is None else known.get(name, [now])
            # Neither what was there nor ours: an administrator has changed it meanwhile, and knows best.
            before = before if now in ours else now
            listed = (parse_cpulist(before) or self.everything) - theirs
            left = listed - shielded
            if shielded or now != before:
                wanted[path] = cpulist(left) or before
                memory[name] = [before, now, wanted[path]]
            # A group left without CPUs has its parent's. Where others' shields alone do that, this claim may be had.
            if shielded and not left & online and (listed & claim or not listed & online):
                bare = f"CPUs {before or cpulist(online)} are all that AllowedCPUs= leaves to {name!a}"
        if shielded or (alone and memory):  # all comes back when there is no such partition any more
            remember(self._memory, memory)
        return wanted, bare

    def apply(self, scope: str, pins: Sequence[Pin], reserved: frozenset[int], others: frozenset[int]) -> None:
        """Put every thread of the scope where `pins` and `others` (empty: all unshielded CPUs) want it. Idempotent.

        After `settle`, which has taken all other shields' CPUs from the scope. Failed when the kernel does otherwise.
        """
        outside = threaded(self._outside(scope))
        (self._dir(scope) / "cgroup.subtree_control").write_text("+cpuset")
        write(outside / "cpuset.cpus", read(self._dir(scope) / "cpuset.cpus") - reserved)
        super().apply(scope, pins, reserved, others)

    def _outside(self, scope: str) -> Path:
        return self._dir(scope) / "pool"

    def _reserved(self, vcpus: Path) -> frozenset[int]:
        """Return the CPUs of the shield when there is one and its threads have them all."""
        with Ended(OSError):
            cpus = read(vcpus / "cpuset.cpus")
            return cpus if cpus == read(vcpus / "cpuset.cpus.effective") != self.everything else frozenset()
        return frozenset()

    def _reserve(self, base: Path, reserved: frozenset[int], kind: str) -> None:
        del kind  # the kernel balances load in here as anywhere
        if reserved:
            write(threaded(base / "vcpus") / "cpuset.cpus", reserved)
            if self._reserved(base / "vcpus") != reserved:
                raise Failed(f"The kernel does not give the CPUs {cpulist(reserved)}")

    def _claims(self, base: Path) -> bool:
        return text(base / "vcpus/cpuset.cpus") not in (None, "", cpulist(self.everything))

    def _open(self, base: Path) -> None:
        if (base / "vcpus").exists():
            write(base / "vcpus/cpuset.cpus", self.everything)


def remembered(memory: Path) -> dict[str, list[str]] | None:
    """Return what groups had before, by their names; None when that cannot be read any more."""
    try:
        groups = json.loads(memory.read_text()) if memory.exists() else {}
        return {name: [*map(str, texts)] for name, texts in groups.items() if texts}
    except (AttributeError, TypeError, ValueError) as err:
        logging.warning("what groups had before is lost, they get all CPUs: %a", str(err))
        return None


def remember(memory: Path, groups: Mapping[str, list[str]]) -> None:
    """Put it on disk, whole or not at all, before what it is about is changed."""
    memory.parent.mkdir(mode=0o755, exist_ok=True)
    temporary = memory.with_name("pool.new")
    temporary.write_text(json.dumps(groups))
    temporary.replace(memory)


def change(path: Path, cpus: str) -> bool:
    """Write the list if it is another; tell whether it is there now, or the group has ended."""
    with suppress(OSError):
        if path.read_text().strip() != cpus:
            path.write_text(cpus)
        return True
    return not path.exists()
