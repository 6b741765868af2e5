"""One VM of up to 255 vCPUs, on a host of 8 CPUs, or 64: each vCPU costs what it costs in a small VM.

Nothing is asserted of a clock. Counted are the launcher's calls, and how often the helper reads or writes anything over
them, and how much. Times are printed, `pytest -rP` shows them. What is pure in the launcher is in
tests/unit/test_launcher_scale.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from system import host
from system.claims import Answer, Child, Claimant
from system.people import User
from system.vms import Launch, define

SIZES = (1, 8, 64, 255)  # vCPUs; 255 is the most that a PC has without a unit for the remapping of interrupts
# The large ones take an emulated host a minute: `make test` tries some, `make test-exhaustive` all.
EXHAUSTIVE = int(os.environ.get("QEMU_LAUNCHER_ROUNDS", "0")) >= 100
STARTED = SIZES if EXHAUSTIVE else (64,)
CLAIMED = (8, 64, 255)
MANY = ("many-cpus",) if EXHAUSTIVE else ()

pytestmark = pytest.mark.hosts("trixie", more=MANY, why="numbers are the same to every mechanism, and take time")


def cpus_of_vcpus(count: int) -> list[int]:
    """The host CPU of each: several share one."""
    return [index % len(host.online()) for index in range(count)]


def start_large(user: User, count: int) -> Launch:
    """A VM of so many vCPUs, when all has been done that its launcher has to do.

    Paused (-S), or its firmware would wake them all. A microvm: QEMU takes ten times as long to make a PC of 255 vCPUs.
    """
    tuning = {"isolation": "cpuset", "scheduler": "batch", "rlimit_memlock": 64 << 20}
    machine = {"machine": "microvm,pic=off,pit=off,rtc=off,isa-serial=off"}
    topology = {"smp": f"{count},sockets=1,cores={count},threads=1"}
    define(user, "large", {**tuning, "vcpu_pinning": cpus_of_vcpus(count)}, machine, topology, "S")
    launch = Launch(user, "large", "--debug")
    host.wait_for("its last call is answered", lambda: len(Steps(launch.said).took) == 3 or not launch.is_alive)
    assert launch.is_alive, launch.said
    return launch


class Steps:
    """What a launcher says with --debug of its steps, with the seconds at which they were."""

    def __init__(self, said: str) -> None:
        self._steps = re.findall(r"^large: ([0-9.]+) (.*)$", said, re.MULTILINE)
        self.calls = [re.split("[ (]", text)[2] for _, text in self._steps if text.startswith("helper > ")]
        answers = [text for _, text in self._steps if text.startswith("helper < ")]
        self.took = [int(text.rpartition(", ")[2].removesuffix(" ms")) for text in answers]

    def per_vcpu(self, count: int) -> str:
        """Milliseconds for each vCPU: of the helper's calls, and of the launcher from QEMU's answer until `cont`."""
        pairs = list(zip(self.calls, self.took, strict=True))
        calls = [f"{name} {ms / count:.2f}" for name, ms in pairs if name != "SetMemlock"]
        begun = max(float(at) for at, text in self._steps if text.startswith("QMP < "))
        ready = next(float(at) for at, text in self._steps if text.startswith("read back from the kernel"))
        own = (ready - begun) * 1000 - dict(reversed(pairs))["PinThreads"]
        return ", ".join([f"launcher {own / count:.2f}", *calls])


@pytest.mark.parametrize("count", STARTED)
def test_a_vm_of_so_many_vcpus(alice: User, count: int) -> None:
    launch = start_large(alice, count)
    try:
        steps = Steps(launch.said)
        sys.stdout.write(f"{count} vCPUs, ms for each: {steps.per_vcpu(count)}\n")
        assert steps.calls == ["SetMemlock", "PinThreads", "PinThreads"], "however many they are"
        last = min(count, len(host.online())) - 1
        where = f"{count} vCPUs on 0-{last}" if last else "1 vCPU on 0"
        one = f"{where} (confined, not shielded), batch, 64 MiB lockable, "
        assert f"large: paused, as you asked, {one}" in launch.said

        tids = [vcpu.tid for vcpu in launch.vcpus]
        assert len(tids) == len(set(tids)) == count
        assert [host.cpus_of(launch.qemu, tid) for tid in tids] == [{cpu} for cpu in cpus_of_vcpus(count)]
        assert {host.scheduling(tid) for tid in tids} == {("batch", 0, False)}
        assert {host.cgroup(launch.qemu, tid) for tid in tids} == {launch.scope / f"pinned/{tid}" for tid in tids}
        others = host.tids(launch.qemu) - set(tids)
        assert {host.cgroup(launch.qemu, tid) for tid in others} == {launch.scope / "emulator"}

        if count == max(STARTED):
            expect_status(alice, tids)
        assert launch.quit() == 0
    finally:
        launch.close()


def expect_status(user: User, tids: list[int]) -> None:
    """All of them, in order."""
    [picture] = json.loads(user.command("status", "--json").stdout)
    assert [row["vcpu"] for row in picture["vcpus"]] == list(range(len(tids)))
    assert [row["tid"] for row in picture["vcpus"]] == tids
    assert [row["cpus"] for row in picture["vcpus"]] == [str(cpu) for cpu in cpus_of_vcpus(len(tids))]


def pin(program: Claimant, child: Child) -> Answer:
    """Its threads to their CPUs."""
    pins = [[tid, [cpu], False] for tid, cpu in zip(child.tids, cpus_of_vcpus(len(child.tids)), strict=True)]
    return program.call("PinThreads", "usa(uaub)au", child.pid, "large", pins, [])


def work_of_helper() -> tuple[int, int]:
    """How often it has read or written anything so far, and how many bytes: proc_pid_io(5)."""
    lines = (host.PROC / f"{host.helper()}/io").read_text().splitlines()
    numbers = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    return numbers["syscr"] + numbers["syscw"], numbers["rchar"] + numbers["wchar"]


def test_the_helper_takes_as_many_steps_for_each(program: Claimant, helper_toml: Callable[..., None]) -> None:
    """Whatever it reads or changes, in each of its calls, and as many bytes with it.

    A step taken for each pair of threads would be seen, and a list of all that is read again for each: of the last
    191 threads each would cost four times as much as of the first 56.
    """
    helper_toml('[[limits]]\nrealtime = "anywhere"\n')
    rows: dict[str, list[int]] = {}
    for count in CLAIMED:
        child = program.spawn(count)
        place = host.cgroup(child.pid).parent / f"qemu-launcher-{program.user.uid}-large.scope/pinned"
        program.call("GetLimits", "")  # the helper is there now, and stays for 15 s

        def cost(name: str, call: Callable[[], Answer], count: int = count) -> str:
            before, began = work_of_helper(), time.monotonic()
            answer = call()
            assert answer.error == "ok", answer
            took = (time.monotonic() - began) * 1000
            steps, size = (now - then for now, then in zip(work_of_helper(), before, strict=True))
            rows.setdefault(f"{name}, steps", []).append(steps)
            rows.setdefault(f"{name}, bytes", []).append(size)
            return f"{name} {took / count:.2f} ms, {steps / count:.1f} steps, {size / count:.0f} bytes"

        line = [cost("PinThreads", lambda child=child: pin(program, child))]  # type: ignore[misc]
        assert [host.cpus_of(child.pid, tid) for tid in child.tids] == [{cpu} for cpu in cpus_of_vcpus(count)]
        assert len(list(place.glob("*/"))) == count
        line += [cost("SetScheduler", lambda child=child: program.schedule(child, "large", "fifo", 1))]  # type: ignore[misc]
        assert host.realtime_threads() == set(child.tids)
        line += [cost("Release", lambda: program.call("Release", "us", program.user.uid, "large"))]
        sys.stdout.write(f"{count} threads, for each: {'; '.join(line)}\n")
        assert host.realtime_threads() == set()
        # On a slow host one call may not be enough to take all threads back; the next goes on with it.
        while place.exists():
            assert program.call("GetLimits", "").error == "ok"
        assert {host.cpus_of(child.pid, tid) for tid in child.tids} == {host.online()}
        program.end(child.pid)
    for name, work in rows.items():
        each = [done / count for done, count in zip(work, CLAIMED, strict=True)]
        assert all(more <= fewer for fewer, more in pairwise(each)), f"{name}: {each} for each thread"
        sizes = zip(pairwise(work), pairwise(CLAIMED), strict=True)
        first, last = ((large - small) / (many - few) for (small, large), (few, many) in sizes)
        sys.stdout.write(f"{name}: {first:.1f} for each of the first, {last:.1f} for each of the last\n")
        assert last <= 1.5 * first, f"{name}: {work}"
