"""vCPUs that are plugged in while the guest runs, with a real QEMU. (Unplugging takes a guest that agrees.)"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import AS_A_USER, Home, Run
from qemu.private_bus import PrivateBus, private_bus
from qemu.test_imports import GUARDED

ALL = sorted(os.sched_getaffinity(0))
FIRST, LAST = ALL[0], ALL[-1]
GROWING: tuple[Any, ...] = ({"cpu": "qemu64"}, {"smp": "1,sockets=1,cores=3,threads=1,maxcpus=3"})
needs_two_cpus = pytest.mark.skipif(len(ALL) < 2, reason="optional: needs two CPUs")


def plug(run: Run, core: int) -> int:
    """Plug a vCPU in over the control socket, and return its TID."""
    qmp = run.qmp()
    place = {"socket-id": 0, "core-id": core, "thread-id": 0}
    qmp("device_add", driver="qemu64-x86_64-cpu", id=f"cpu{core}", **place)
    (vcpu,) = [vcpu for vcpu in qmp("query-cpus-fast") if vcpu["props"]["core-id"] == core]
    qmp.close()
    return int(vcpu["thread-id"])


@needs_two_cpus
def test_new_vcpu_is_pinned_by_the_map(home: Home, bus: PrivateBus) -> None:
    """Also the last of three before the second; and `status` shows it."""
    home.define(
        qemu=GROWING,
        vcpu_pinning={0: {0: {0: FIRST}, 1: {0: f"{FIRST}-{LAST}"}, 2: {0: LAST}}},
        isolation="affinity",
        emulator_pinning=FIRST,
        scheduler="batch",
    )
    run = home.start(env=bus.environment)
    assert f"1 vCPU on {FIRST}" in run.wait_running()
    third = plug(run, 2)
    run.wait_line(rf"^vm-under-test: vCPU 2 \(socket 0, core 2, thread 0\) was plugged in: on CPU {LAST}, batch$")
    assert os.sched_getaffinity(third) == {LAST}
    assert os.sched_getscheduler(third) == os.SCHED_BATCH
    assert os.sched_getaffinity(run.qemu_pid) == {FIRST}
    second = plug(run, 1)
    run.wait_line(rf"vCPU 1 .* was plugged in: on CPU {FIRST}-{LAST}, batch$")
    assert os.sched_getaffinity(second) == set(range(FIRST, LAST + 1))
    assert dict(run.record()["vcpus"]).keys() == {0, 1, 2}
    shown = home.ask("status", "vm-under-test").stdout
    assert all(str(tid) in shown for tid in (second, third)), shown
    assert bus.calls() == []


@needs_two_cpus
def test_helper_is_told_the_whole_map_and_all_that_are_real_time(home: Home, bus: PrivateBus) -> None:
    """Nobody is asked for a password, nothing is imported, and the guest's own run is not disturbed."""
    home.define(qemu=GROWING, vcpu_pinning=[LAST, FIRST], isolation="cpuset")
    run = home.start(
        env={**bus.environment, "DISPLAY": ":0"}, argv=[sys.executable, "-c", GUARDED, "run", "vm-under-test"]
    )
    run.wait_running()
    tid = plug(run, 1)
    run.wait_line(rf"vCPU 1 .* was plugged in: on CPU {FIRST}$")
    calls = bus.calls()
    boot = run.record()["vcpus"][0][1]
    assert [call["body"][2] for call in calls if call["member"] == "PinThreads"][-1] == [
        [boot, [LAST], False],
        [tid, [FIRST], False],
    ]
    assert calls[0]["flags"] & 4, "at its start a person may be asked"
    assert not calls[-1]["flags"] & 4
    assert "IMPORTED AFTER CONT" not in run.output


@needs_two_cpus
def test_bus_that_goes_once_more_after_a_vcpu_was_plugged_in(home: Home) -> None:
    """What joined it again for the first vCPU joins it again for the second."""
    with tempfile.TemporaryDirectory(prefix="ql-bus-") as folder:
        with private_bus(Path(folder)) as bus:
            home.define(qemu=GROWING, vcpu_pinning=[LAST, FIRST, FIRST], isolation="cpuset")
            run = home.start(env=bus.environment)
            run.wait_running()
        run.wait_line("warning: lost the system bus; ")
        for core in (1, 2):
            with private_bus(Path(folder)) as bus:
                tid = plug(run, core)
                run.wait_line(rf"vCPU {core} .* was plugged in: on CPU {FIRST}$")
                assert os.sched_getaffinity(tid) == {FIRST}
        assert "is not tuned as defined" not in run.output


@needs_two_cpus
def test_vcpu_that_the_helper_refuses_runs_on_with_a_warning(home: Home, bus: PrivateBus) -> None:
    text = "CPUs 4 are held by VM win11 of bob; free for you: 8-11"
    bus.plan(PinThreads=["act", "act", {"error": ["org.qemulauncher.Error.Conflict", text]}])
    home.define(qemu=GROWING, vcpu_pinning=[LAST, FIRST], isolation="cpuset")
    run = home.start(env=bus.environment)
    run.wait_running()
    plug(run, 1)
    run.wait_line(rf"warning: vCPU 1 .* was plugged in and is not tuned as defined: {text}; the guest runs on")
    assert run.qmp()("query-status")["status"] == "running"


def test_vcpu_that_no_key_names_inherits_nothing_of_the_emulator(home: Home) -> None:
    """It is made by QEMU's main thread, whose policy is not meant for it."""
    home.define(qemu=GROWING, emulator_scheduler="batch")
    run = home.start()
    run.wait_running()
    tid = plug(run, 1)
    run.wait_line(r"vCPU 1 .* was plugged in: not pinned$")
    assert os.sched_getscheduler(tid) == os.SCHED_OTHER
    assert os.sched_getscheduler(run.qemu_pid) == os.SCHED_BATCH


@needs_two_cpus
def test_worker_made_after_emulator_threads_were_given_real_time(home: Home, bus: PrivateBus) -> None:
    """It has not inherited it, and is no reason to end a start, or to warn then or when a vCPU is plugged in.

    Real time cannot be had here, so the kernel's answer is given; a thread that is other is played by the launcher's.
    """
    worker = (
        "import os; from qemu_launcher import procfs; from qemu_launcher.assistance import Assistance\n"
        "given, schedule, tids, scheduling = set(), Assistance.schedule, procfs.tids, procfs.scheduling\n"
        "async def scheduled(self, tids, policy, pid):\n"
        "    await schedule(self, tids, policy, pid)\n"
        "    given.update(tids)\n"
        "Assistance.schedule = scheduled\n"
        "procfs.tids = lambda pid: tids(pid) + (os.getpid(),) * bool(given)\n"
        "fifo = procfs.Scheduling('fifo', 1, reset_on_fork=True)\n"
        "procfs.scheduling = lambda tid: fifo if tid in given else scheduling(tid)\n"
    )
    home.define(qemu=GROWING, vcpu_pinning=[LAST, FIRST], isolation="cpuset", emulator_scheduler="fifo")
    run = home.start(env=bus.environment, argv=home.with_changed(worker))
    run.wait_running()
    plug(run, 1)
    run.wait_line(rf"vCPU 1 .* was plugged in: on CPU {FIRST}$")
    assert bus.members() == ["PinThreads", "SetScheduler", "PinThreads", "PinThreads"]
    assert "warning" not in run.output


@needs_two_cpus
def test_vcpu_that_inherits_idle_is_pinned_all_the_same(home: Home) -> None:
    """Nobody but root takes a thread out of it again: a warning, and not the end of the rest."""
    home.define(qemu=GROWING, vcpu_pinning=[FIRST, LAST, LAST], isolation="affinity", emulator_scheduler="idle")
    run = home.start(argv=[*AS_A_USER, *home.command("run", "vm-under-test")])
    run.wait_running()
    tid = plug(run, 1)
    run.wait_line(r"warning: vCPU 1 .* was plugged in and is not tuned as defined: TID \d+ cannot be scheduled other:")
    run.wait_line(
        r"^    who may not raise a thread's priority \(ulimit -e\) can give it the policy idle, and not take it"
    )
    assert os.sched_getaffinity(tid) == {LAST}


def test_watch_that_fails_is_told_and_ends_no_guest(home: Home) -> None:
    """As by a full runtime directory, into whose record the new vCPU is to be written."""
    full = (
        "from qemu_launcher import runtime; update = runtime.Claim.update\n"
        "def updated(self, **changes):\n"
        "    if self.record.state == 'running': raise OSError(28, 'No space left on device')\n"
        "    update(self, **changes)\n"
        "runtime.Claim.update = updated\n"
    )
    home.define(qemu=GROWING, vcpu_pinning=[FIRST, FIRST], isolation="affinity")
    run = home.start(argv=home.with_changed(full))
    run.wait_running()
    plug(run, 1)
    problem = r"OSError: \[Errno 28\] No space left on device"
    run.wait_line(rf"^vm-under-test: warning: cannot look after it any more: {problem}; the guest runs on$")
    run.wait_line("^    vCPUs that are plugged in are not tuned, and systemd cannot ask it to power down$")
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "running"
    qmp("quit")
    assert run.end() == 0
    assert "never retrieved" not in run.output


def test_vcpu_that_cannot_come_is_an_error_at_the_start(home: Home) -> None:
    growing = ({"smp": "1,maxcpus=3"},)
    path = home.define(qemu=growing, vcpu_pinning={0: {3: {0: FIRST}}}, isolation="affinity")
    run = home.start()
    assert run.end() == 2
    assert f"{path}:" in run.output
    assert "QEMU has no vCPU socket 0, core 3, thread 0" in run.output


def test_qemu_is_not_asked_while_nothing_changes(home: Home) -> None:
    """Looking at its threads is all that is done meanwhile: shown by counting what goes to the monitor."""
    counted = (
        "from qemu_launcher import hotplug, qmp; import sys\n"
        "hotplug.LOOK = 0.05\n"
        "execute = qmp.Qmp.execute\n"
        "async def told(self, command, arguments=None):\n"
        "    print('ASKED', command, file=sys.stderr, flush=True)\n"
        "    return await execute(self, command, arguments)\n"
        "qmp.Qmp.execute = told\n"
        "look = hotplug.procfs.tids\n"
        "looks = 0\n"
        "def counting(pid):\n"
        "    global looks\n"
        "    looks += 1\n"
        "    if looks == 100:\n"
        "        print('LOOKED', file=sys.stderr, flush=True)\n"
        "    return look(pid)\n"
        "hotplug.procfs.tids = counting\n"
    )
    home.define(qemu=GROWING, vcpu_pinning=[FIRST, FIRST], isolation="affinity")
    run = home.start(argv=home.with_changed(counted))
    run.wait_line("LOOKED")
    asked = [line.split()[1] for line in run.output.splitlines() if line.startswith("ASKED")]
    assert asked.count("query-cpus-fast") <= 3, json.dumps(asked)
