"""The cpusets of v1, in a tree of files that does what the kernel's does: who is where, and what is refused.

A task is in one cpuset at a time; a cpuset has CPUs before it has tasks, no more of them than the one above and no
fewer than those below; one with tasks is not removed. A task that is ending stays, and to move it is no error. With
other CPUs all tasks of a cpuset have all of them, as before Linux 6.2; from then on, those that they have asked for.
The real kernel's part is in tests/system/test_v1.py.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_launcher_helper import privileges
from qemu_launcher_helper.contract import Conflict, Failed, Pin
from qemu_launcher_helper.cpuset import v1
from qemu_launcher_helper.cpuset.cpulist import cpulist, parse_cpulist
from qemu_launcher_helper.cpuset.partition import Partition
from qemu_launcher_helper.cpuset.v1 import V1
from qemu_launcher_helper.target import Target
from unit.proc_facts import UNIT_LINES

SCOPES = [f"/user.slice/user-{uid}.slice/qemu-launcher-{uid}-vm.scope" for uid in (1000, 1001)]
NAMES = [scope.rpartition("/")[2] for scope in SCOPES]
KTHREAD, HOST, VCPU0, VCPU1, OTHER0 = 2, 100, 201, 202, 301
NO_PID = 2**22 + 1  # no process can have it, PID_MAX_LIMIT: here it has all threads, for Target it is gone
FILES = {"cpuset.cpus": "", "cpuset.mems": "", "cpuset.cpu_exclusive": "0", "tasks": "", "cgroup.procs": ""}


class Killed(BaseException):
    """The helper, in the middle of it."""


class Kernel:
    """Eight CPUs, a task of the host, a thread of the kernel's own, vCPU threads, a container."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mount, self.units, self.memory = folder / "cpuset", folder / "systemd", folder / "run/pool"
        self.steps = -1  # writes until somebody is killed; -1: nobody is
        self.strangers: set[int] = set()  # numbers that are no thread of a VM's any more
        self.ending: set[int] = set()
        self.asked: dict[int, frozenset[int]] = {}  # for which CPUs: sched_setaffinity(2)
        self.remembers = False  # it is Linux 6.2
        self._real: dict[str, Any] = {
            name: getattr(Path, name) for name in ("write_text", "read_text", "mkdir", "rmdir")
        }
        self._online = folder / "online"
        self._online.write_text("0-7\n")
        (self.units / "system.slice").mkdir(parents=True)
        for scope in SCOPES:
            (self.units / scope[1:]).mkdir(parents=True)
            (self.units / scope[1:] / "cgroup.procs").write_text(f"{NO_PID}\n")
        mounts = [f"32 31 0:27 / {self.units} rw shared:10 - cgroup cgroup rw,xattr,name=systemd"]
        mounts += [
            f"40 31 0:3{n} / {folder}/{name} rw - cgroup cgroup rw,{name}" for n, name in enumerate(("cpu", "cpuset"))
        ]
        mounts += [f"50 31 0:31 /docker {folder}/elsewhere rw - cgroup cgroup rw,cpuset"]
        (folder / "mountinfo").write_text("\n".join(mounts) + "\n")
        monkeypatch.setattr(privileges, "raised", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(os, "sched_getaffinity", self.affinity)
        monkeypatch.setattr(os, "sched_setaffinity", self._ask)
        for name in ("write_text", "read_text", "mkdir", "rmdir"):
            kernels = getattr(self, f"_{name}")
            monkeypatch.setattr(Path, name, lambda path, *a, _do=kernels, **k: _do(path, *a, **k))
        self.group("", "0-7", HOST, VCPU0, VCPU1, OTHER0, KTHREAD)
        (self.mount / "cpuset.mems").write_text("0")
        self.v1 = V1(folder / "mountinfo", self.memory, self._online)

    def group(self, name: str, cpus: str, *tids: int) -> Path:
        """Another cpuset, made by somebody else."""
        path = self.mount / name
        path.mkdir()
        (path / "cpuset.mems").write_text("0")
        (path / "cpuset.cpus").write_text(cpus)
        for tid in tids:
            self._real["write_text"](path / "tasks", self._real["read_text"](path / "tasks") + f"{tid}\n")
        return path

    def where(self, tid: int) -> str:
        """The cpuset of a thread."""
        folders = [self.mount]
        for folder in folders:  # not by os.scandir, which a test replaces
            folders += [folder / name for name in os.listdir(folder) if (folder / name).is_dir()]
        [found] = [folder for folder in folders if str(tid) in (folder / "tasks").read_text().split()]
        return str(found.relative_to(self.mount))

    def offline(self, cpu: int) -> None:
        """What the kernel does: no cpuset has it any more; the tasks of one that has no other are in the one above."""
        write, read = self._real["write_text"], self._real["read_text"]
        for path in sorted(self.mount.rglob("cpuset.cpus"), key=lambda path: -len(path.parts)):
            left = parse_cpulist(read(path)) - {cpu}
            write(path, cpulist(left) + "\n")
            if not left:
                above = path.parent.parent
                while parse_cpulist(read(above / "cpuset.cpus")) <= {cpu}:
                    above = above.parent
                write(above / "tasks", read(above / "tasks") + read(path.with_name("tasks")))
                write(path.with_name("tasks"), "")
        write(self._online, cpulist(parse_cpulist(read(self._online)) - {cpu}))

    def online(self, cpu: int) -> None:
        """It is the root's again, and nobody else's."""
        for path in (self._online, self.mount / "cpuset.cpus"):
            self._real["write_text"](path, cpulist(parse_cpulist(self._real["read_text"](path)) | {cpu}) + "\n")

    def cpus(self, group: str) -> str:
        return (self.mount / group / "cpuset.cpus").read_text().strip()

    def cpus_of(self, tid: int) -> frozenset[int]:
        return parse_cpulist(self.cpus(self.where(tid)))

    def affinity(self, tid: int) -> frozenset[int]:
        """What sched_getaffinity(2) tells: of what it has asked for, what its cpuset has."""
        return self.asked.get(tid, frozenset()) & self.cpus_of(tid) or self.cpus_of(tid)

    def _ask(self, tid: int, cpus: frozenset[int]) -> None:
        if not cpus & self.cpus_of(tid):
            raise OSError(errno.EINVAL, "none of them")
        self.asked[tid] = cpus if self.remembers else cpus & self.cpus_of(tid)

    def _forget(self, tid: int) -> None:
        if not self.remembers:
            self.asked.pop(tid, None)

    def tree(self) -> dict[str, str]:
        return {str(path.parent.relative_to(self.mount)): path.read_text() for path in self.mount.rglob("cpuset.cpus")}

    def pin(self, which: int, *pins: Pin, others: frozenset[int] = frozenset(), beside: tuple[int, ...] = ()) -> None:
        """What operations does."""
        shielded = frozenset[int]().union(*(pin.cpus for pin in pins if pin.shielded))
        self.v1.settle({SCOPES[which]: shielded, **({SCOPES[1 - which]: frozenset(beside)} if beside else {})})
        self.v1.apply(SCOPES[which], pins, shielded, others)

    def reconcile(self, live: dict[str, frozenset[int]]) -> None:
        """What records does."""
        for scope in self.v1.orphans(frozenset(live)):
            self.v1.withdraw(scope, math.inf)
        self.v1.settle(live)

    def _step(self) -> None:
        self.steps -= 1
        if self.steps == -1:
            raise Killed

    def _ours(self, path: Path) -> bool:
        return self.mount in (path, *path.parents)

    def _read_text(self, path: Path, *args: object) -> str:
        if path.name == "cpuset":  # /proc/PID/task/TID/cpuset
            tid = int(path.parent.name)
            if tid in self.strangers:
                raise FileNotFoundError(errno.ENOENT, "no such thread", str(path))
            return f"/{self.where(tid)}\n".replace("/.", "/")
        if path.name.startswith("cpuset.effective_"):
            path = path.with_name(path.name.replace("effective_", ""))
        return str(self._real["read_text"](path, *args))

    def _write_text(self, path: Path, text: str) -> int:
        real = self._real["write_text"]
        if not self._ours(path):
            return int(real(path, text))
        self._step()
        if path.name == "tasks":
            if int(text) == KTHREAD:
                raise OSError(errno.EINVAL, "PF_NO_SETAFFINITY")
            if not path.with_name("cpuset.cpus").read_text().strip() or not path.with_name("cpuset.mems").read_text():
                raise OSError(errno.ENOSPC, "no CPUs or no memory yet")
            if int(text) in self.ending:
                return len(text)
            old = self.mount / self.where(int(text)) / "tasks"
            real(old, "".join(f"{tid}\n" for tid in old.read_text().split() if tid != text))
            self._forget(int(text))
            return int(real(path, path.read_text() + f"{text}\n"))
        if path.name == "cpuset.cpus" and path.parent != self.mount:
            cpus, group = parse_cpulist(text), path.parent
            if not cpus <= parse_cpulist(self._read_text(group.parent / "cpuset.cpus")):
                raise OSError(errno.EACCES, "more than the one above has", str(path))
            if any(not parse_cpulist(below.read_text()) <= cpus for below in group.glob("*/cpuset.cpus")):
                raise OSError(errno.EBUSY, "less than one below has", str(path))
            for other in group.parent.glob("*/"):
                alone = other != group and (other / "cpuset.cpu_exclusive").read_text().strip() == "1"
                if alone and cpus & parse_cpulist((other / "cpuset.cpus").read_text()):
                    raise OSError(errno.EINVAL, "exclusive")
            if not cpus and (group / "tasks").read_text().split():
                raise OSError(errno.ENOSPC, "it has tasks")
            for tid in (group / "tasks").read_text().split():
                self._forget(int(tid))
        return int(real(path, text.strip() + "\n"))

    def _mkdir(self, path: Path, *args: int, **more: object) -> None:
        new = not path.exists()
        if self._ours(path):
            self._step()
        self._real["mkdir"](path, *args, **more)
        if new and self._ours(path):
            for name, text in FILES.items():
                self._real["write_text"](path / name, text)

    def _rmdir(self, path: Path) -> None:
        self._step()
        if (path / "tasks").read_text().split() or any(path.glob("*/")):
            raise OSError(errno.EBUSY, "in use", str(path))
        for name in FILES:
            (path / name).unlink()
        self._real["rmdir"](path)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    with monkeypatch.context() as patch:
        yield Kernel(tmp_path, patch)


def has(cpus: dict[int, set[int]]) -> dict[int, frozenset[int]]:
    return {tid: frozenset(some) for tid, some in cpus.items()}


def one(tid: int, *cpus: int, shielded: bool = True) -> Pin:
    return Pin(tid, frozenset(cpus), shielded)


def test_without_a_shield_nothing_is_made(kernel: Kernel) -> None:
    kernel.v1.settle({SCOPES[0]: frozenset()})
    assert kernel.tree() == {".": "0-7\n"}


def test_the_originals_layout_and_back(kernel: Kernel) -> None:
    kernel.pin(0, one(VCPU0, 4), one(VCPU1, 5))
    assert kernel.where(VCPU0) == "qemu-launcher/4"
    assert kernel.where(VCPU1) == "qemu-launcher/5"
    assert (kernel.where(HOST), kernel.cpus("qemu-launcher/pool")) == ("qemu-launcher/pool", "0-3,6-7")
    assert kernel.where(KTHREAD) == ".", "who refuses to move stays, and does not hold up the others"
    assert kernel.v1.shielded_threads(SCOPES[0]) == has({VCPU0: {4}, VCPU1: {5}})
    assert kernel.v1.shielded_threads(SCOPES[1]) is None
    kernel.reconcile({})
    assert kernel.tree() == {".": "0-7\n"}
    assert {kernel.where(tid) for tid in (HOST, VCPU0, VCPU1, OTHER0, KTHREAD)} == {"."}


@pytest.mark.parametrize("first", [0, 1])
def test_two_vms_end_in_any_order(kernel: Kernel, first: int) -> None:
    both = {SCOPES[0]: frozenset({4, 5}), SCOPES[1]: frozenset({6})}
    kernel.pin(0, one(VCPU0, 4), one(VCPU1, 5))
    kernel.pin(1, one(OTHER0, 6), beside=(4, 5))
    assert kernel.cpus("qemu-launcher/pool") == "0-3,7"
    left = SCOPES[1 - first]
    kernel.reconcile({left: both[left]})
    assert kernel.cpus("qemu-launcher/pool") == ("0-5,7" if first == 0 else "0-3,6-7")
    assert kernel.v1.shielded_threads(SCOPES[first]) is None
    assert kernel.v1.shielded_threads(left) is not None
    kernel.reconcile({})
    assert kernel.tree() == {".": "0-7\n"}


def test_unshielded_pins_and_emulator_threads_stay_off_a_later_shield_and_come_back(kernel: Kernel) -> None:
    kernel.pin(0, one(VCPU0, 1, shielded=False), others=frozenset({2, 3, 6}))
    assert kernel.where(VCPU0) == f"qemu-launcher/pool/{NAMES[0]}/1"
    assert kernel.where(HOST) == ".", "nothing is shielded"
    kernel.v1.settle({SCOPES[0]: frozenset(), SCOPES[1]: frozenset({6, 7})})
    assert kernel.cpus(f"qemu-launcher/pool/{NAMES[0]}/2-3,6") == "2-3"
    kernel.v1.settle({SCOPES[0]: frozenset(), SCOPES[1]: frozenset({2, 3, 6})})
    assert kernel.cpus(f"qemu-launcher/pool/{NAMES[0]}/2-3,6") == "0-1,4-5,7", "it cannot be left without any"
    kernel.v1.settle({SCOPES[0]: frozenset()})
    assert kernel.cpus(f"qemu-launcher/pool/{NAMES[0]}/2-3,6") == "2-3,6"
    kernel.reconcile({})
    assert kernel.tree() == {".": "0-7\n"}


def test_another_map_of_the_same_vm(kernel: Kernel) -> None:
    kernel.pin(0, one(VCPU0, 4), one(VCPU1, 5))
    kernel.pin(0, one(VCPU0, 5), one(VCPU1, 0, shielded=False))
    assert (kernel.where(VCPU0), kernel.where(VCPU1)) == ("qemu-launcher/5", f"qemu-launcher/pool/{NAMES[0]}/0")
    assert not (kernel.mount / "qemu-launcher/4").exists()
    kernel.pin(0, one(VCPU0, 2, 3), one(VCPU1, 2, 3))
    assert kernel.v1.shielded_threads(SCOPES[0]) == has({VCPU0: {2, 3}, VCPU1: {2, 3}})
    assert sorted(path.name for path in kernel.mount.glob("qemu-launcher/*/")) == ["2-3", "pool"]


def test_a_container_loses_the_cpus_and_gets_them_back(kernel: Kernel) -> None:
    kernel.group("docker", "0-7")
    kernel.group("docker/a", "0-7", 500)
    kernel.group("docker/b", "3-5", 501)
    kernel.group("docker/new", "0")
    (kernel.mount / "docker/new/cpuset.cpus").write_text("")
    before = kernel.tree()
    kernel.pin(0, one(VCPU0, 4), one(VCPU1, 5))
    assert [kernel.cpus(f"docker{name}") for name in ("", "/a", "/b", "/new")] == ["0-3,6-7", "0-3,6-7", "3", ""]
    assert (kernel.where(500), kernel.where(501)) == ("docker/a", "docker/b"), "its tasks are where they were"
    assert json.loads(kernel.memory.read_text())["docker/b"][0] == "3-5"
    kernel.group("docker/late", "0-3,6-7", 502)
    with pytest.raises(Conflict, match=r"^CPUs 3-5 are all that there are in the cpuset 'docker/b'$"):
        kernel.v1.settle({SCOPES[0]: frozenset({3, 4, 5})})
    kernel.reconcile({})
    assert kernel.tree() == {**before, "docker/late": "0-7\n"}, "it has copied what was left of the one above"
    assert not kernel.memory.exists()


def test_cpus_that_another_cpuset_has_for_itself(kernel: Kernel) -> None:
    kernel.group("rt", "6-7", 500)
    (kernel.mount / "rt/cpuset.cpu_exclusive").write_text("1")
    with pytest.raises(Conflict, match=r"^CPUs 6 belong to another cpuset alone \(cpu_exclusive\), or are offline$"):
        kernel.pin(0, one(VCPU0, 6))
    kernel.reconcile({})
    kernel.pin(0, one(VCPU0, 4))
    assert kernel.cpus("qemu-launcher") == "0-5"
    assert kernel.cpus("rt") == "6-7"
    kernel.reconcile({})
    assert kernel.cpus("rt") == "6-7"


def test_a_cpu_that_goes_offline_ends_the_shield(kernel: Kernel) -> None:
    kernel.pin(0, one(VCPU0, 4), one(VCPU1, 5))
    kernel._real["write_text"](kernel.mount / "qemu-launcher/4/cpuset.cpus", "\n")
    assert kernel.v1.shielded_threads(SCOPES[0]) is None


def test_a_pool_that_was_let_in_ends_the_shield(kernel: Kernel) -> None:
    kernel.pin(0, one(VCPU0, 4))
    (kernel.mount / "qemu-launcher/pool/cpuset.cpus").write_text("0-7")
    assert kernel.v1.shielded_threads(SCOPES[0]) is None
    kernel.v1.settle({SCOPES[0]: frozenset({4})})
    assert kernel.v1.shielded_threads(SCOPES[0]) == has({VCPU0: {4}})


@pytest.mark.parametrize("remembers", [False, True])
def test_what_taskset_has_chosen_holds_on(kernel: Kernel, remembers: bool) -> None:
    """All of it is back in the end, however many shields there were."""
    kernel.remembers = remembers
    kernel.asked[HOST] = chosen = frozenset(range(6))
    for cpus in ((4, 5), (2, 3)):
        kernel.pin(0, one(VCPU0, cpus[0]), one(VCPU1, cpus[1]))
        assert kernel.affinity(HOST) == chosen - {*cpus}
        kernel.reconcile({})
        assert kernel.affinity(HOST) == chosen


@pytest.mark.parametrize("remembers", [False, True])
def test_what_the_kernel_gives_all_tasks_but_not_all_cpus(kernel: Kernel, remembers: bool) -> None:
    """With isolcpus=6,7: nobody has asked for it, so no kernel remembers it."""
    forget = kernel._forget
    kernel.remembers = remembers
    kernel.asked[HOST] = chosen = frozenset(range(6))
    kernel._forget = lambda tid: kernel.asked.pop(tid, None)  # type: ignore[assignment,method-assign]
    kernel.pin(0, one(VCPU0, 4))
    assert kernel.affinity(HOST) == chosen - {4}
    kernel._forget = forget  # type: ignore[method-assign]
    kernel.reconcile({})
    assert kernel.affinity(HOST) == chosen


def test_what_the_kernel_remembers_is_not_more_than_was_chosen(kernel: Kernel) -> None:
    kernel.remembers = True
    kernel.asked[HOST] = frozenset({0, 1})
    kernel.asked[KTHREAD + 1] = frozenset({4})  # nothing is left of it meanwhile
    kernel._real["write_text"](kernel.mount / "tasks", kernel._real["read_text"](kernel.mount / "tasks") + "3\n")
    kernel.pin(0, one(VCPU0, 4))
    assert kernel.affinity(HOST) == {0, 1}
    assert kernel.affinity(3) == {0, 1, 2, 3, 5, 6, 7}
    kernel.reconcile({})
    assert kernel.affinity(HOST) == {0, 1}
    assert kernel.affinity(3) == {4}


def test_cpus_come_back_while_run_is_full(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.group("docker", "0-7", 500)
    kernel.pin(0, one(VCPU0, 4))
    assert kernel.cpus("docker") == "0-3,5-7"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(v1, "remember", full)
    kernel.reconcile({})
    assert kernel.cpus("docker") == "0-7"
    assert not kernel.memory.exists()


@pytest.mark.parametrize("spare", range(8))
def test_cpusets_that_cannot_be_opened_just_now_are_not_empty(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """Any user can fill the host's table of open files, where its limit is low; Python 3.13's Path.glob hides that."""
    kernel.group("docker", "0-7", 500)
    kernel.pin(0, one(VCPU0, 4), one(VCPU1, 5, shielded=False))
    with monkeypatch.context() as patch:
        left, scandir = itertools.count(spare, -1), os.scandir

        def full(path: Any) -> Any:
            if next(left) <= 0:
                raise OSError(errno.ENFILE, "Too many open files in system")
            return scandir(path)

        patch.setattr(os, "scandir", full)
        with contextlib.suppress(OSError):
            assert kernel.v1.shielded_threads(SCOPES[0]) == has({VCPU0: {4}})
        with contextlib.suppress(OSError):
            kernel.v1.settle({SCOPES[0]: frozenset({4})})
        assert next(left) < 0
    assert kernel.v1.shielded_threads(SCOPES[0]) == has({VCPU0: {4}}), "its shield is still there"
    assert kernel.where(VCPU1) == f"qemu-launcher/pool/{NAMES[0]}/5"
    kernel.reconcile({})
    assert kernel.cpus("docker") == "0-7"
    assert kernel.where(HOST) == "."


def test_a_pool_without_cpus_is_refused(kernel: Kernel) -> None:
    """Others have the rest for themselves alone."""
    kernel.group("rt", "0-1", 500)
    (kernel.mount / "rt/cpuset.cpu_exclusive").write_text("1")
    with pytest.raises(Conflict, match=r"^CPUs 2-7 are all that no other cpuset has"):
        kernel.pin(0, one(VCPU0, 2, 3, 4), one(VCPU1, 5, 6, 7))
    kernel.reconcile({})
    assert kernel.tree() == {".": "0-7\n", "rt": "0-1\n"}


def test_processes_that_are_at_home_cost_one_look(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them there are: their user may have made thousands."""
    kernel.pin(0, one(VCPU0, 4), one(VCPU1, 5))
    monkeypatch.setattr(V1, "processes", lambda *_: [])
    me = os.getpid()
    monkeypatch.setattr(Partition, "processes", lambda *_: [me] * 50)
    monkeypatch.setattr(Target, "cgroup", lambda _: SCOPES[0])
    monkeypatch.setattr(Target, "tids", lambda _: {HOST})
    monkeypatch.setattr(Target, "task_start_time", lambda *_: 1)
    looks = list[Path]()
    tasks = v1._tasks

    def counted(place: Path) -> set[str]:
        looks.append(place)
        return tasks(place)

    monkeypatch.setattr(v1, "_tasks", counted)
    kernel.v1._gather(SCOPES[0], {kernel.mount}, kernel.mount / "qemu-launcher/pool", frozenset())
    assert len(looks) == 1


def test_who_is_ending_and_does_not_end_keeps_no_cpus(kernel: Kernel) -> None:
    """In a file system of its own, say: it is listed for as long as that likes, and "moved" without an error."""
    kernel.ending = {HOST}
    kernel.pin(0, one(VCPU0, 4))
    kernel.pin(1, one(OTHER0, 6), beside=(4,))
    kernel.ending = {HOST, VCPU0}
    for _ in range(2):
        with contextlib.suppress(OSError):  # which is logged
            kernel.v1.withdraw(SCOPES[0], math.inf)
        kernel.v1.settle({SCOPES[1]: frozenset({6})})
        assert kernel.cpus("qemu-launcher/pool") == "0-5,7"
    kernel.v1.withdraw(SCOPES[1], math.inf)
    kernel.v1.settle({})
    assert kernel.where(OTHER0) == "."
    assert kernel.cpus_of(VCPU0) == {4}, "its cpuset stays until it has ended"
    kernel.ending = set()
    kernel.reconcile({})
    assert sorted(kernel.tree()) == ["."]


def test_who_is_ending_among_all_others_keeps_nobody_from_anything(kernel: Kernel) -> None:
    kernel.pin(0, one(VCPU0, 4))
    kernel.ending = {HOST}
    for _ in range(2):
        kernel.reconcile({})
        assert kernel.cpus("qemu-launcher/pool") == "0-7"
        kernel.pin(1, one(OTHER0, 6, shielded=False))
        assert kernel.cpus_of(OTHER0) == {6}
        kernel.v1.withdraw(SCOPES[1], math.inf)
    kernel.ending = set()
    kernel.reconcile({})
    assert sorted(kernel.tree()) == ["."]


def test_threads_whose_only_cpu_goes_offline_are_not_lost(kernel: Kernel) -> None:
    """The kernel puts them into our topmost cpuset, whose CPUs are all there are, other VMs' among them."""
    kernel.pin(1, one(OTHER0, 6))
    kernel.pin(0, one(VCPU0, 4), one(VCPU1, 2, shielded=False), beside=(6,))
    kernel.offline(4)
    kernel.offline(2)
    assert kernel.where(VCPU0) == "qemu-launcher"
    assert kernel.where(VCPU1) == f"qemu-launcher/pool/{NAMES[0]}"
    assert kernel.v1.shielded_threads(SCOPES[0]) is None
    kernel.v1.withdraw(SCOPES[0], math.inf)
    kernel.v1.settle({SCOPES[1]: frozenset({6})})
    assert {kernel.where(VCPU0), kernel.where(VCPU1)} == {"qemu-launcher/pool"}
    assert kernel.cpus("qemu-launcher/pool") == "0-1,3,5,7"
    kernel.reconcile({})
    assert sorted(kernel.tree()) == ["."]


@pytest.mark.parametrize("living", [False, True])
def test_a_cpu_that_goes_and_returns_unseen_costs_a_container_no_other(kernel: Kernel, *, living: bool) -> None:
    """Nor does it when the helper is killed at any step after that."""
    kernel.group("docker", "0-7", 500)
    kernel.pin(0, one(VCPU0, 4))
    kernel.offline(2)
    kernel.online(2)
    assert kernel.cpus("docker") == "0-1,3,5-7"
    if living:
        kernel.v1.settle({SCOPES[0]: frozenset({4})})
    for kernel.steps in range(100):
        with contextlib.suppress(Killed):
            kernel.reconcile({})
            break
    kernel.steps = -1
    kernel.reconcile({})
    assert kernel.cpus("docker") == "0-7"


def test_a_cpuset_that_anothers_vm_leaves_nothing_is_no_reason_to_refuse(kernel: Kernel) -> None:
    """Somebody makes one of a shielded CPU alone; it is he who loses, not whoever comes next."""
    kernel.pin(0, one(VCPU0, 4))
    kernel.group("docker", "4")
    kernel.v1.settle({SCOPES[1]: frozenset({6}), SCOPES[0]: frozenset({4})})
    with pytest.raises(Conflict, match="'docker'"):
        kernel.v1.settle({SCOPES[0]: frozenset({4}), SCOPES[1]: frozenset({6})})


def test_a_thread_that_the_kernel_does_not_move(kernel: Kernel) -> None:
    with pytest.raises(Failed, match=f"^Threads {KTHREAD} did not get CPUs 4$"):
        kernel.pin(0, one(KTHREAD, 4))
    kernel.reconcile({})
    assert kernel.tree() == {".": "0-7\n"}


def test_all_threads_of_the_scopes_processes_are_gathered(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are in no cpuset of the VM's, where QEMU was before it had any."""
    me = os.getpid()
    monkeypatch.setattr(Target, "cgroup", lambda _: SCOPES[0])
    monkeypatch.setattr(Target, "tids", lambda _: {me, KTHREAD})
    monkeypatch.setattr(Target, "task_start_time", lambda *_: 1)
    (kernel.units / SCOPES[0][1:] / "cgroup.procs").write_text(f"{me}\n")
    kernel.group("user", "0-7", me)  # as libpam-cgfs makes them, with all that there is
    kernel.pin(0, one(VCPU0, 4), others=frozenset({2}))
    assert kernel.where(me) == f"qemu-launcher/pool/{NAMES[0]}/2"
    assert kernel.where(KTHREAD) == ".", (
        "as an io_uring worker did, from Linux 5.14 to 6.2 and until their stable updates"
    )
    times = iter(range(100))
    monkeypatch.setattr(Target, "task_start_time", lambda *_: next(times))
    kernel.pin(0, one(VCPU0, 4))
    assert kernel.where(me) == "qemu-launcher/pool", "where the number is another's, it is put where everybody is"


@pytest.mark.parametrize(("cpus", "mems"), [("0-1", "0"), ("0-7", "1")])
def test_whom_somebody_keeps_in_a_cpuset_stays_there(
    kernel: Kernel, cpus: str, mems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shield would free it from there for good: nobody knows where it was. So its VM gets none."""
    (kernel.group("students", cpus) / "cpuset.mems").write_text(mems)
    kernel._real["write_text"](kernel.mount / "tasks", f"{HOST}\n{VCPU1}\n{KTHREAD}\n")
    kernel._real["write_text"](kernel.mount / "students/tasks", f"{VCPU0}\n")
    with pytest.raises(Conflict, match=r"keeps a thread of the VM's in the cpuset '/students', which it would leave$"):
        kernel.pin(0, one(VCPU0, 0, shielded=False))
    me = os.getpid()
    monkeypatch.setattr(Target, "cgroup", lambda _: SCOPES[0])
    monkeypatch.setattr(Target, "tids", lambda _: {me})
    monkeypatch.setattr(Target, "task_start_time", lambda *_: 1)
    (kernel.units / SCOPES[0][1:] / "cgroup.procs").write_text(f"{me}\n")
    kernel._real["write_text"](kernel.mount / "students/tasks", f"{me}\n")
    with pytest.raises(Conflict, match="in the cpuset '/students'"):
        kernel.pin(0, one(VCPU1, 4))
    assert kernel.where(me) == "students"


def test_a_number_that_is_another_tasks_by_now_is_not_moved(kernel: Kernel) -> None:
    """Between the checks and here hundreds of tasks may have been moved: time enough for a number to be used again."""
    kernel.group("docker", "0-7", 500)
    kernel.strangers = {500}
    with pytest.raises(Failed, match=r"^Threads 500 did not get CPUs 4$"):
        kernel.pin(0, one(500, 4))
    assert kernel.where(500) == "docker"
    kernel.reconcile({})


@pytest.mark.parametrize("shielding", [False, True])
def test_a_cpuset_that_ends_meanwhile_keeps_no_other(
    kernel: Kernel, shielding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.group("docker", "0-7")
    kernel.group("docker/a", "0-7", 500)
    if not shielding:
        kernel.pin(0, one(VCPU0, 4))
    going, scandir = kernel.group("user", "0-3"), os.scandir
    kernel.group("user/x", "0-3")

    def after_its_end(path: str | Path) -> object:
        if str(path) == str(going / "x") and going.exists():
            shutil.rmtree(going)
        return scandir(path)

    for scope in kernel.v1.orphans(frozenset()):
        kernel.v1.withdraw(scope, math.inf)
    monkeypatch.setattr(os, "scandir", after_its_end)
    kernel.v1.settle({SCOPES[0]: frozenset({4})} if shielding else {})
    assert not going.exists()
    assert kernel.cpus("docker/a") == ("0-3,5-7" if shielding else "0-7")
    kernel.reconcile({})
    assert sorted(kernel.tree()) == [".", "docker", "docker/a"]


def test_too_many_cpusets_keep_nobody_from_having_his_cpus_back(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v1, "MOST_CPUSETS", 3)
    kernel.group("lxc", "0-7")
    kernel.group("lxc/web", "0-7", 500)
    kernel.pin(0, one(VCPU0, 4))
    names = [f"a{number}" for number in range(20)]
    for name in names:
        kernel.group(name, "0-3")
    with pytest.raises(Conflict, match=r"^CPUs 4-5 are not to be had with more than 3 cpusets$"):
        kernel.v1.settle({SCOPES[0]: frozenset({4, 5})})
    kernel.reconcile({})
    assert (kernel.cpus("lxc/web"), kernel.cpus("lxc"), {*map(kernel.cpus, names)}) == ("0-7", "0-7", {"0-3"})
    assert not kernel.memory.exists()


def test_a_thousand_cpusets_in_one_another(tmp_path: Path) -> None:
    """Any number of them would be looked at, and a function that calls itself for each would end in RecursionError."""
    (tmp_path / "online").write_text("0-7\n")
    (tmp_path / "mountinfo").write_text(f"40 31 0:33 / {tmp_path}/cpuset rw - cgroup cgroup rw,cpuset\n")
    (tmp_path / "cpuset").mkdir()
    here = os.open(tmp_path / "cpuset", os.O_RDONLY)
    try:
        for _ in range(1100):
            os.mkdir("a", dir_fd=here)
            below = os.open("a", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        found = V1(tmp_path / "mountinfo", tmp_path / "memory", tmp_path / "online")._others([])
    finally:
        os.close(here)
        subprocess.run(["rm", "-r", tmp_path / "cpuset"], check=True)  # shutil and pytest are such functions too
    assert len(found) >= 1000


def test_orphans_are_found_by_their_cpusets(kernel: Kernel) -> None:
    kernel.pin(0, one(VCPU0, 4))
    kernel.pin(1, one(OTHER0, 1, shielded=False), beside=(4,))
    assert kernel.v1.orphans(frozenset(SCOPES)) == []
    assert kernel.v1.orphans(frozenset(SCOPES[:1])) == [f"/{NAMES[1]}"]
    assert kernel.v1.orphans(frozenset()) == [f"/{name}" for name in NAMES]
    (kernel.mount / "qemu-launcher/4/cgroup.procs").write_text("200\n")
    assert kernel.v1.processes(f"/{NAMES[0]}") == [200]


@pytest.mark.parametrize("ending", [False, True])
def test_killed_between_any_two_writes(kernel: Kernel, *, ending: bool) -> None:
    """Each time it comes a step further; whatever was left, the next start leaves the host as it was."""
    kernel.group("docker", "0-7")
    kernel.group("docker/a", "2-5", 500)
    before = kernel.tree()
    for most in range(200):
        if ending:
            kernel.pin(0, one(VCPU0, 4), one(VCPU1, 1, shielded=False), others=frozenset({2}))
        kernel.steps, ended = most, True
        try:
            if ending:
                kernel.reconcile({})
            else:
                kernel.pin(0, one(VCPU0, 4), one(VCPU1, 1, shielded=False), others=frozenset({2}))
        except Killed:
            ended = False
        kernel.steps = -1
        kernel.reconcile({})
        assert kernel.tree() == before
        assert {kernel.where(tid) for tid in (HOST, VCPU0, VCPU1, OTHER0, KTHREAD)} == {"."}
        assert not kernel.memory.exists()
        if ended:
            assert most > 10
            break
    else:
        pytest.fail("it never came to its end")


def test_where_it_is_mounted_and_what_it_needs(kernel: Kernel, tmp_path: Path) -> None:
    assert kernel.v1.lacks() == ""
    assert kernel.v1.root == kernel.units
    (tmp_path / "none").write_text("31 22 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n")
    bare = V1(tmp_path / "none", kernel.memory, tmp_path / "online")
    mounted = "mkdir -p /run/cpuset; mount -t cgroup -o cpuset cpuset /run/cpuset"
    wanted = f"Shielding needs cgroup v2; without systemd, before Linux 6.11: {mounted}"
    if not Path("/sys/fs/cgroup/cpuset/cpuset.cpus").exists():
        assert bare.lacks() == wanted
        bare.settle({})
        assert bare.orphans(frozenset()) == []


@pytest.mark.parametrize(("text", "path"), UNIT_LINES)
def test_which_line_names_the_unit(text: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """v2's, wherever systemd uses it: what else a root has mounted under systemd's name says nothing then."""
    with Target(os.getpid()) as process:
        monkeypatch.setattr(Target, "read", lambda *_: text)
        assert process.cgroup() == path
