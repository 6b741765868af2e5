"""Threads that are no vCPUs: iothreads and emulator threads, placed and scheduled, by oneself and by the helper."""

import os
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import Home, Run
from qemu.private_bus import PrivateBus
from qemu.test_tuning import assert_never_ran

ALL = sorted(os.sched_getaffinity(0))
FIRST, LAST = ALL[0], ALL[-1]
QEMU: tuple[Any, ...] = ({"smp": 2}, {"object": "iothread,id=io0"}, {"object": ["iothread", {"id": "io1"}]})
needs_two_cpus = pytest.mark.skipif(len(ALL) < 2, reason="optional: needs two CPUs")


class Seen:
    """The threads of a running QEMU, told apart by QEMU itself."""

    def __init__(self, run: Run) -> None:
        qmp = run.qmp()
        self.vcpus = [vcpu["thread-id"] for vcpu in qmp("query-cpus-fast")]
        self.iothreads = {one["id"]: one["thread-id"] for one in qmp("query-iothreads")}
        named = {*self.vcpus, *self.iothreads.values()}
        tasks = {int(task.name) for task in Path(f"/proc/{run.qemu_pid}/task").iterdir()}
        self.emulator = tasks - named
        qmp.close()


def affinities(tids: Any) -> set[frozenset[int]]:
    return {frozenset(os.sched_getaffinity(tid)) for tid in tids}


@needs_two_cpus
def test_everything_unaided(home: Home, bus: PrivateBus) -> None:
    home.define(
        qemu=QEMU,
        vcpu_pinning=[LAST, f"{FIRST}-{LAST}"],
        isolation="affinity",
        emulator_pinning=FIRST,
        iothread_pinning={"io1": [LAST]},
        emulator_scheduler="batch",
        scheduler="idle",
    )
    run = home.start(env=bus.environment)
    line = run.wait_running()
    assert f"2 vCPUs on {FIRST}-{LAST} (nothing is shielded), idle, 1 iothread on {LAST}" in line
    assert f"emulator threads on {FIRST} batch" in line
    seen = Seen(run)
    assert [os.sched_getaffinity(tid) for tid in seen.vcpus] == [{LAST}, set(range(FIRST, LAST + 1))]
    assert os.sched_getaffinity(seen.iothreads["io1"]) == {LAST}
    # An iothread that no key names goes where the emulator threads go, and is none of them when it comes to policy.
    assert affinities([*seen.emulator, seen.iothreads["io0"]]) == {frozenset({FIRST})}
    assert run.qemu_pid in seen.emulator
    assert {os.sched_getscheduler(tid) for tid in seen.emulator} == {os.SCHED_BATCH}
    assert {os.sched_getscheduler(tid) for tid in seen.iothreads.values()} == {os.SCHED_OTHER}
    assert {os.sched_getscheduler(tid) for tid in seen.vcpus} == {os.SCHED_IDLE}
    assert bus.calls() == []


@needs_two_cpus
def test_emulator_threads_alone_need_no_helper(home: Home, bus: PrivateBus) -> None:
    home.define(emulator_pinning=str(LAST))
    run = home.start(env=bus.environment)
    assert f"running, emulator threads on {LAST}, " in run.wait_running()
    seen = Seen(run)
    assert affinities(seen.emulator) == {frozenset({LAST})}
    assert run.record()["isolation"] == ""
    assert bus.calls() == []


@needs_two_cpus
def test_beside_a_shield(home: Home, bus: PrivateBus) -> None:
    """iothreads are unshielded pins, emulator_pinning is the map's `others`; both times the whole map."""
    if len(Path(f"/sys/devices/system/cpu/cpu{LAST}/topology/thread_siblings_list").read_text().split(",")) > 1:
        pytest.skip("optional: needs CPUs without siblings")
    home.define(
        qemu=({"object": "iothread,id=io0"},),
        vcpu_pinning=[LAST],
        emulator_pinning=[FIRST],
        iothread_pinning={"io0": FIRST},
        emulator_scheduler="batch",
    )
    run = home.start(env=bus.environment)
    assert (
        f"1 vCPU on {LAST} (shielded), 1 iothread on {FIRST}, emulator threads on {FIRST} batch" in run.wait_running()
    )
    seen = Seen(run)
    expected = [
        run.qemu_pid,
        "vm-under-test",
        [[seen.vcpus[0], [LAST], True], [seen.iothreads["io0"], [FIRST], False]],
        [FIRST],
    ]
    home.ask("kill", run.name)
    assert run.end() == 0
    assert [call["body"] for call in bus.calls() if call["member"] == "PinThreads"] == [expected] * 2
    assert "SetScheduler" not in bus.members()


@needs_two_cpus
def test_lie_about_the_emulator_threads(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads={"shield": "host"})
    home.define(vcpu_pinning=[LAST], isolation="cpuset", emulator_pinning=FIRST)
    run = home.start(env=bus.environment)
    assert_never_ran(run, message=f"not only on {FIRST}")
    assert "reported success, but the emulator thread " in run.output


def test_real_time_for_emulator_threads_is_the_helpers_to_refuse(home: Home, bus: PrivateBus) -> None:
    text = "Real time needs every thread to be pinned to one shielded CPU of its own"
    bus.plan(SetScheduler={"error": ["org.qemulauncher.Error.TargetRefused", text]})
    home.define(qemu=({"object": "iothread,id=io0"},), emulator_scheduler={"policy": "rr", "priority": 4})
    run = home.start(env=bus.environment)
    assert_never_ran(run, message=f"qemu-launcher: {text}\n")
    (call,) = bus.calls()
    pid, name, tids, *policy = call["body"]
    assert (name, policy) == ("vm-under-test", ["rr", 4])
    assert pid in tids


def test_iothread_that_qemu_does_not_have(home: Home, tmp_path: Path) -> None:
    more = tmp_path / "more.cfg"
    more.write_text('[object "io5"]\n  qom-type = "iothread"\n')
    path = home.define(qemu=({"readconfig": str(more)},), iothread_pinning={"io0": FIRST})
    run = home.start()
    assert_never_ran(run, message=f"qemu-launcher: {path}:", status=2)
    assert "QEMU has no iothread 'io0'\n    it has io5\n" in run.output


def test_iothread_that_the_options_do_not_make(home: Home) -> None:
    path = home.define(iothread_pinning={"io0": FIRST})
    run = home.start()
    assert run.end() == 2
    assert f"{path}:4:10: iothread_pinning names 'io0', and the qemu section has no such iothread" in run.output


# Places


@pytest.mark.parametrize("form", ["through the socket", "die by die"])
def test_dies_of_a_real_machine(home: Home, form: str) -> None:
    """Either form of the map, each vCPU once; QEMU itself tells which is which."""
    if form == "die by die":
        pinning: Any = {
            0: {f"die {die}": {core: {"thread 0": LAST if (die, core) == (1, 1) else FIRST} for core in (0, 1)}
                for die in (0, 1)}
        }  # fmt: skip
    else:
        pinning = {0: {core: {0: LAST if core == 3 else FIRST} for core in range(4)}}
    home.define(
        qemu=({"cpu": "qemu64"}, {"smp": "4,sockets=1,dies=2,cores=2,threads=1"}),
        vcpu_pinning=pinning,
        isolation="affinity",
    )
    run = home.start()
    assert "4 vCPUs on" in run.wait_running()
    for vcpu in run.qmp()("query-cpus-fast"):
        last = (vcpu["props"]["die-id"], vcpu["props"]["core-id"]) == (1, 1)
        assert os.sched_getaffinity(vcpu["thread-id"]) == {LAST if last else FIRST}


def test_place_that_the_machine_does_not_have(home: Home) -> None:
    """Not to be known from -smp, which does not say how many cores there are."""
    path = home.define(
        qemu=({"cpu": "qemu64"}, {"smp": "2,dies=2"}),
        vcpu_pinning={0: {2: {0: FIRST}}},
        isolation="affinity",
    )
    run = home.start()
    assert_never_ran(run, message=f"qemu-launcher: {path}:", status=2)
    what = "QEMU has no vCPU socket 0, core 2, thread 0\n    it has vCPU 0 (socket 0, core 0, thread 0)"
    assert f"{what}; vCPU 1 (socket 0, core 1, thread 0; core 0, die 1)" in run.output


def test_die_that_the_options_do_not_give(home: Home) -> None:
    path = home.define(qemu=({"smp": "2,dies=2"},), vcpu_pinning={0: {"die 2": {0: {0: FIRST}}}}, isolation="affinity")
    run = home.start()
    assert run.end() == 2
    assert f"qemu-launcher: {path}:" in run.output
    assert "vcpu_pinning names die 2, but -smp gives socket 0 only die 0-1" in run.output


@pytest.mark.parametrize("machine", ["microvm", "isapc"])
def test_other_machines(home: Home, machine: str) -> None:
    """Whatever a machine tells of its vCPUs, the three levels find them."""
    home.define(vcpu_pinning={0: {0: {0: LAST}}}, isolation="affinity")
    path = home.configuration / "vm-under-test.yml"
    path.write_text(path.read_text().replace("q35", machine))
    assert machine in path.read_text()
    run = home.start()
    assert f"1 vCPU on {LAST}" in run.wait_running()
    (vcpu,) = run.qmp()("query-cpus-fast")
    assert os.sched_getaffinity(vcpu["thread-id"]) == {LAST}
