"""Tuning through a helper: what is asked, when, and what happens when it refuses, hangs, dies or lies.

The helper is a fake one on a private bus, since the real one needs a real host; whether the guest was held back is
witnessed by QEMU's own events and states, never by the launcher's words.
"""

import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import AS_A_USER, Home, Run, is_alive, wait_gone, wait_until
from qemu.private_bus import PrivateBus, private_bus

CPU = max(os.sched_getaffinity(0))
SHIELDED: dict[str, Any] = {"vcpu_pinning": [CPU]}
REFUSED = "org.qemulauncher.Error."

needs_two_cpus = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="optional: a shield needs a CPU for the others"
)


def assert_never_ran(run: Run, *, message: str, status: int = 1) -> None:
    """It ended, said why and how to start all the same, and its guest was never let run."""
    assert run.end() == status
    assert message in run.output, run.output
    shown = run.output.rstrip().removesuffix("\nqemu-launcher: and more")
    assert shown.endswith("start it without tuning: qemu-launcher run --untuned vm-under-test")
    assert "running," not in run.output
    assert run.home.leftovers() == []


@needs_two_cpus
def test_order_of_a_start(home: Home, bus: PrivateBus) -> None:
    """PinThreads while the guest stands still, the same map once more when it runs, and nothing else."""
    home.define(**SHIELDED)
    run = home.start(env=bus.environment)
    assert f"1 vCPU on {CPU} (shielded)" in run.wait_running()
    pid = run.qemu_pid
    qmp = run.qmp()
    (vcpu,) = qmp("query-cpus-fast")
    assert os.sched_getaffinity(vcpu["thread-id"]) == {CPU}
    qmp("quit")
    assert run.end() == 0
    expected = [pid, "vm-under-test", [[vcpu["thread-id"], [CPU], True]], []]
    assert [(call["member"], call["body"]) for call in bus.calls()[:1]] == [("PinThreads", expected)]
    assert {json.dumps(call["body"]) for call in bus.calls() if call["member"] == "PinThreads"} == {
        json.dumps(expected)
    }


@needs_two_cpus
def test_map_is_sent_again_after_cont(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads=["act", {"error": [f"{REFUSED}Failed", "the second time it fails"]}])
    home.define(**SHIELDED)
    run = home.start(env=bus.environment)
    run.wait_line("warning: the second time it fails; the guest runs on")
    assert bus.members() == ["PinThreads", "PinThreads"]
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "running"
    qmp("quit")
    assert run.end() == 0


def test_guest_is_paused_until_the_helper_has_answered(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads="hang")
    home.define(**SHIELDED)
    run = home.start(env=bus.environment)
    run.wait_line("waiting for qemu-launcher-helper")
    wait_until(lambda: bus.members() == ["PinThreads"])  # the bus has to start it
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "prelaunch"
    assert "vm-under-test: starting" in home.ask("status").stdout
    run.signal(signal.SIGINT)
    with pytest.raises(EOFError):
        qmp.wait_event("RESUME")
    assert run.end() == 128 + signal.SIGINT
    assert home.leftovers() == []


def test_death_of_qemu_while_the_helper_thinks(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads="hang")
    home.define(**SHIELDED)
    run = home.start(env=bus.environment)
    run.wait_line("waiting for qemu-launcher-helper")
    os.kill(run.qemu_pid, signal.SIGKILL)
    assert run.end() == 137
    assert "QEMU ended by signal 9 (SIGKILL) before the guest ran" in run.output


@pytest.mark.parametrize("name", ["TargetRefused", "LimitExceeded", "Conflict", "Unsupported", "Failed"])
def test_refusal_of_the_helper_is_told_and_nothing_runs(home: Home, bus: PrivateBus, name: str) -> None:
    text = "CPUs 4-7 are held by VM win11 of bob; free for you: 8-11"
    bus.plan(PinThreads={"error": [REFUSED + name, text]})
    home.define(**SHIELDED)
    assert_never_ran(home.start(env=bus.environment), message=f"qemu-launcher: {text}\n")


def test_helper_that_dies_in_a_call(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads="die")
    home.define(**SHIELDED)
    run = home.start(env=bus.environment)
    assert_never_ran(run, message="qemu-launcher-helper ended without an answer")
    assert "journalctl -u qemu-launcher-helper" in run.output


def test_answer_of_another_shape(home: Home, bus: PrivateBus) -> None:
    bus.plan(SetMemlock={"return": "plenty", "signature": "s"})
    home.define(rlimit_memlock="1G")
    assert_never_ran(home.start(env=bus.environment), message="something that the contract does not know")


def test_bus_that_dies_in_a_call(home: Home) -> None:
    with tempfile.TemporaryDirectory(prefix="ql-bus-") as place:
        with private_bus(Path(place) / "bus") as bus:
            bus.plan(PinThreads="hang")
            home.define(**SHIELDED)
            run = home.start(env=bus.environment)
            run.wait_line("waiting for qemu-launcher-helper")
        assert_never_ran(run, message="the system bus closed the connection while PinThreads was under way")


def test_no_bus(home: Home) -> None:
    home.define(**SHIELDED)
    run = home.start()
    assert_never_ran(run, message="there is no system bus at unix:path=")
    assert "sudo apt install ./build/qemu-launcher" in run.output


def test_helper_not_installed(home: Home) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="ql-bus-") as place,
        private_bus(Path(place) / "bus", helper=False) as bus,
    ):
        home.define(**SHIELDED)
        run = home.start(env=bus.environment)
        assert_never_ran(run, message="qemu-launcher-helper is not installed")
        assert "sudo apt install ./build/qemu-launcher" in run.output


def test_bus_policy_that_lets_nobody_in(home: Home) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="ql-bus-") as place,
        private_bus(Path(place) / "bus", policy='<deny send_destination="org.qemulauncher.Helper1"/>') as bus,
    ):
        home.define(**SHIELDED)
        run = home.start(env=bus.environment)
        assert_never_ran(run, message="group qemu-launcher")
        assert bus.calls() == []


def telling(home: Home, bus: PrivateBus) -> tuple[str, Path]:
    """A binary that is QEMU, and a file that is there once it has been executed: what had been asked of the helper."""
    executed, wrapper = home.configuration / "executed", home.configuration / "wrapper"
    wrapper.write_text(f'#!/bin/sh\ncat {bus.place}/calls.log >{executed}\nexec qemu-system-x86_64 "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper), executed


# A21: a helper that lies


def test_a21_lie_about_pinning(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads="lie")
    home.define(**SHIELDED)
    run = home.start(env=bus.environment)
    run.wait_line("reported success, but")
    (call,) = bus.calls()
    tid = call["body"][2][0][0]
    assert_never_ran(run, message=f"vCPU 0 (TID {tid}) may run on CPUs ")


@needs_two_cpus
def test_a21_one_thread_pinned_wrong(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads={"act_less": 1})
    home.define(qemu=({"smp": 2},), vcpu_pinning=[CPU, CPU], isolation="cpuset")
    run = home.start(env=bus.environment)
    run.wait_line("reported success, but")
    (call,) = bus.calls()
    (first, _, _), (second, _, _) = call["body"][2]
    assert_never_ran(run, message=f"vCPU 1 (TID {second}) may run on CPUs ")
    assert str(first) not in run.output


@needs_two_cpus
def test_a21_pinned_but_not_shielded(home: Home, bus: PrivateBus) -> None:
    """The vCPU is where it belongs, but the rest of the host may still run there."""
    bus.plan(PinThreads={"shield": "qemu"})
    home.define(**SHIELDED)
    assert_never_ran(
        home.start(env=bus.environment), message=f"CPUs {CPU} are not shielded: the launcher itself may run there"
    )


@needs_two_cpus
def test_a21_shield_that_leaves_an_emulator_thread_inside(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads={"shield": "host"})
    home.define(**SHIELDED)
    assert_never_ran(home.start(env=bus.environment), message=f"CPUs {CPU} are not shielded: QEMU's thread ")


def test_a21_lie_about_scheduling(home: Home, bus: PrivateBus) -> None:
    bus.plan(SetScheduler="act")  # the fake never schedules anybody
    home.define(vcpu_pinning=[CPU], isolation="cpuset", scheduler="fifo", priority=3)
    run = home.start(env=bus.environment)
    run.wait_line("reported success, but")
    pin, schedule = bus.calls()
    (tid,) = schedule["body"][2]
    assert (pin["member"], schedule["member"]) == ("PinThreads", "SetScheduler")
    assert schedule["body"][3:] == ["fifo", 3]
    assert_never_ran(run, message=f"vCPU 0 (TID {tid}) is scheduled other, not fifo 3 (reset on fork)")


def test_a21_lie_about_scheduling_of_emulator_threads(home: Home, bus: PrivateBus) -> None:
    bus.plan(SetScheduler="act")  # the fake never schedules anybody
    home.define(emulator_scheduler="fifo")
    run = home.start(env=bus.environment)
    run.wait_line("reported success, but")
    (schedule,) = bus.calls()
    first = min(schedule["body"][2])
    assert_never_ran(run, message=f"the emulator thread {first} is scheduled other, not fifo 1 (reset on fork)")


def test_a21_lie_about_memlock(home: Home, bus: PrivateBus) -> None:
    """Found out while the child still waits at its gate: QEMU is never executed."""
    binary, executed = telling(home, bus)
    home.define(binary=binary, rlimit_memlock="1G")
    run = home.start(env=bus.environment)
    run.wait_line("reported success, but")
    (call,) = bus.calls()
    assert call["body"][1:] == ["vm-under-test", 1 << 30]
    assert_never_ran(run, message=f"QEMU (PID {call['body'][0]}) may lock ")
    assert not executed.exists()


# Memory lock


def memlock_hard() -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]


@pytest.mark.skipif(memlock_hard() < (6 << 20), reason="optional: needs a hard limit above 6 MiB and below infinity")
def test_memlock_is_asked_for_before_qemu_exists(home: Home, bus: PrivateBus) -> None:
    """The fake grants what the process has already: all it can do here. The PID it was told is QEMU's."""
    hard = memlock_hard()
    bus.plan(SetMemlock={"return": hard})
    binary, executed = telling(home, bus)
    home.define(binary=binary, qemu=({"m": "4"},), rlimit_memlock=True)
    run = home.start(env=bus.environment)
    assert "lockable" in run.wait_running()
    (call,) = bus.calls()
    assert call["body"] == [run.qemu_pid, "vm-under-test", 2**64 - 1]
    assert json.loads(executed.read_text()) == call


def test_less_than_asked_is_refused_with_both_numbers(home: Home, bus: PrivateBus) -> None:
    bus.plan(SetMemlock={"return": 512 << 20})
    home.define(rlimit_memlock="1G")
    assert_never_ran(
        home.start(env=bus.environment), message="QEMU must be able to lock 1 GiB, but only 512 MiB was granted"
    )


def test_less_than_guest_ram_is_refused_without_asking(home: Home, bus: PrivateBus) -> None:
    home.define(rlimit_memlock="32M")
    assert_never_ran(home.start(env=bus.environment), message="32 MiB is less than the guest's RAM, 64 MiB", status=2)
    assert bus.calls() == []


def test_hard_limit_that_is_high_enough_needs_no_helper(home: Home, bus: PrivateBus) -> None:
    home.define(qemu=({"m": "4"},), rlimit_memlock="4M")
    run = home.start(env=bus.environment)
    assert "4 MiB lockable" in run.wait_running()
    limits = Path(f"/proc/{run.qemu_pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if "locked memory" in line).split()[3] == str(4 << 20)
    assert bus.calls() == []


@pytest.mark.parametrize("locks", [True, False])
def test_qemu_that_cannot_lock_what_it_maps_is_given_a_hint(home: Home, locks: bool) -> None:
    binary = "qemu-system-x86_64"
    if os.geteuid() == 0:  # root may lock without limit (capabilities(7), CAP_IPC_LOCK)
        wrapper = home.configuration / "wrapper"
        wrapper.write_text(f'#!/bin/sh\nexec setpriv --bounding-set=-ipc_lock {binary} "$@"\n')
        wrapper.chmod(0o755)
        binary = str(wrapper)
    mem_lock = f"mem-lock={'on' if locks else 'off'}"
    home.define(binary=binary, qemu=({"m": "4"}, {"overcommit": mem_lock}), rlimit_memlock="4M")
    run = home.start()
    if not locks:  # the same limit harms nobody who locks nothing
        run.wait_running()
        return
    assert_never_ran(run, message="it may lock 4 MiB; write rlimit_memlock: 3G\n")
    assert "tb-size" in run.output
    assert "its command line, to be run by hand: " in run.output


# What a failed start has left

LINGERING = """\
#!/bin/sh
sleep 1000 >/dev/null 2>&1 </dev/null &
echo $! >{scope}/cgroup.procs
exec qemu-system-x86_64 "$@"
"""
# Where the tree says that QEMU is; nobody but we would see the scope end.
IN_SCOPE = "from qemu_launcher import cgroups; cgroups.scope_of = lambda pid: cgroups.Path({scope!r})"


@pytest.mark.parametrize(
    ("plan", "members"),
    [
        ({"PinThreads": {"error": [f"{REFUSED}Conflict", "they are taken"]}}, ["PinThreads", "Release"]),
        ({"SetScheduler": "die"}, ["PinThreads", "SetScheduler", "Release"]),
    ],
)
def test_what_the_qemu_of_a_failed_start_left_in_its_scope_is_ended(
    home: Home, bus: PrivateBus, plan: dict[str, Any], members: list[str]
) -> None:
    """Else the next start would take it for the VM: what began in the scope holds it, and the CPUs."""
    scope = home.configuration / "qemu-launcher-1000-vm-under-test.scope"
    scope.mkdir()
    binary = home.configuration / "lingering"
    binary.write_text(LINGERING.format(scope=scope))
    binary.chmod(0o755)
    bus.plan(**plan)
    home.define(vcpu_pinning=[CPU], isolation="cpuset", scheduler="fifo", binary=str(binary))
    run = home.start(env=bus.environment, argv=home.with_changed(IN_SCOPE.format(scope=str(scope))))
    assert run.end() == 1
    assert "running," not in run.output
    assert bus.members() == members
    wait_gone(int((scope / "cgroup.procs").read_text()))
    assert "could not be given back" not in run.output


def test_failed_start_that_was_granted_nothing_gives_nothing_back(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads={"error": [f"{REFUSED}NotAuthorized", "not you"]})
    home.define(vcpu_pinning=[CPU], isolation="cpuset")
    assert_never_ran(home.start(env=bus.environment), message="not you")
    assert bus.members() == ["PinThreads"]


# on_tuning_failure: continue


def test_continue_starts_it_untuned_with_a_warning(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads={"error": [f"{REFUSED}Unsupported", "this kernel has no cpuset"]})
    home.define(**SHIELDED, scheduler="fifo", on_tuning_failure="continue")
    run = home.start(env=bus.environment)
    assert "untuned" in run.wait_running()
    assert "warning: this kernel has no cpuset; it starts without tuning" in run.output
    # What may have been done is taken back, and what would have come next is left out.
    assert bus.members() == ["PinThreads", "Release"]
    assert bus.calls()[1]["body"] == [os.geteuid(), "vm-under-test"]
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "running"
    qmp("quit")
    assert run.end() == 0


@needs_two_cpus
def test_continue_undoes_what_a_lying_helper_left_half_done(home: Home, bus: PrivateBus) -> None:
    bus.plan(SetScheduler="lie")
    home.define(vcpu_pinning=[CPU], isolation="cpuset", scheduler="rr", on_tuning_failure="continue")
    run = home.start(env=bus.environment)
    run.wait_running()
    assert bus.members() == ["PinThreads", "SetScheduler", "Release"]
    tid = bus.calls()[0]["body"][2][0][0]
    assert os.sched_getaffinity(tid) == os.sched_getaffinity(run.process.pid)


@needs_two_cpus
def test_continue_gives_back_the_cpus_of_threads_that_keep_the_policy_idle(home: Home, bus: PrivateBus) -> None:
    """The kernel lets no user take that back, and says so at the first thread."""
    bus.plan(SetScheduler={"error": [f"{REFUSED}LimitExceeded", "no real time for you"]})
    home.define(
        vcpu_pinning=[CPU],
        isolation="affinity",
        scheduler="idle",
        emulator_scheduler="rr",
        on_tuning_failure="continue",
    )
    run = home.start(argv=[*AS_A_USER, *home.command("run", "vm-under-test")], env=bus.environment)
    run.wait_running()
    assert "warning: some of its threads keep the policy idle" in run.output
    qmp = run.qmp()
    (vcpu,) = qmp("query-cpus-fast")
    assert os.sched_getscheduler(vcpu["thread-id"]) == os.SCHED_IDLE
    assert os.sched_getaffinity(vcpu["thread-id"]) == os.sched_getaffinity(0)


@pytest.mark.parametrize("options", [(), ("-q",)])
def test_continue_tells_the_remedy_but_not_the_way_out(home: Home, options: tuple[str, ...]) -> None:
    home.define(rlimit_memlock="1G", on_tuning_failure="continue")
    run = home.start("vm-under-test", *options)
    line = run.wait_line("vm-under-test: warning: there is no system bus at")
    assert line.endswith("; it starts without tuning (on_tuning_failure: continue)")
    assert run.wait_line("sudo apt install ./build/qemu-launcher").startswith("    on Debian: make deb in its sources")
    if not options:
        assert "untuned" in run.wait_running()
    assert home.ask("kill", "vm-under-test").returncode == 0
    run.end()
    assert "--untuned" not in run.output


BLIND = "from qemu_launcher import host; host.CPU_FOLDER = 'sys/no-such-folder'"


def test_host_whose_cpus_cannot_be_read(home: Home) -> None:
    home.define(**SHIELDED)
    run = home.start(argv=home.with_changed(BLIND))
    what = "qemu-launcher: cannot read the host's CPUs from /sys/no-such-folder/online: No such file or directory\n"
    assert_never_ran(
        run, message=f"{what}    vcpu_pinning is checked against /sys: mount sysfs there if it is missing\n"
    )


def test_cpus_of_the_host_are_not_asked_for_when_nothing_is_pinned(home: Home) -> None:
    home.define(scheduler="batch")
    run = home.start(argv=home.with_changed(BLIND))
    run.wait_running()


def odd_qemu(home: Home) -> Path:
    wrapper = home.configuration / "odd-qemu"
    script = Path(__file__).with_name("odd_qemu.py")
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


def test_qemu_that_does_not_tell_its_vcpus_cannot_be_tuned(home: Home) -> None:
    home.define(binary=str(odd_qemu(home)), scheduler="batch")
    assert_never_ran(home.start(), message="QEMU refused query-cpus-fast: it is a secret")


def test_qemu_that_does_not_tell_its_vcpus_runs_untuned(home: Home) -> None:
    home.define(binary=str(odd_qemu(home)))
    run = home.start()
    assert "untuned" in run.wait_running()
    assert home.ask("kill", "vm-under-test").returncode == 0


@pytest.mark.parametrize("pinning", [{}, {"isolation": "affinity"}])
def test_way_out_is_named_where_the_host_lacks_a_cpu(home: Home, pinning: dict[str, Any]) -> None:
    home.define(vcpu_pinning=[CPU, 8000, *range(8100, 8120)], qemu=({"smp": 22},), **pinning)
    assert_never_ran(home.start(), message="host CPU 8000 does not exist; this host has ", status=2)


def test_preconfig_cannot_be_tuned(home: Home) -> None:
    path = home.define(qemu=("preconfig",), **SHIELDED)
    assert_never_ran(home.start(), message=f"{path}:11:3: -preconfig stops QEMU before it has made", status=2)
    untuned = home.start("vm-under-test", "--untuned")
    untuned.wait_line("waiting in preconfig, as you asked, untuned")


def test_way_out_of_a_definition_that_was_given_by_its_path(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere, with a space.d" / "vm-under-test.yml"
    path.parent.mkdir()
    home.define(**SHIELDED).rename(path)
    run = home.start(str(path))
    assert run.end() == 1
    assert run.output.rstrip().endswith(f"start it without tuning: qemu-launcher run --untuned '{path}'")


@pytest.mark.parametrize("how", ["by name", "as .yaml", "elsewhere", "elsewhere, with another of its name"])
def test_way_out_leads_out(home: Home, tmp_path: Path, how: str) -> None:
    """The command that is printed starts this very definition."""
    path = home.define(**SHIELDED)
    argument = "vm-under-test"
    if how == "as .yaml":
        path = path.rename(path.with_suffix(".yaml"))
        argument = str(path)
    elif how != "by name":
        place = tmp_path / "it's elsewhere"
        (place / "qemu-launcher").mkdir(parents=True)
        path.rename(place / "qemu-launcher" / path.name)
        if how != "elsewhere":
            home.define(binary="/nowhere/qemu")
        argument = str(place / "qemu-launcher" / path.name)
    run = home.start(argument)
    assert run.end() == 1
    *_, last = run.output.splitlines()
    start, _, command = last.strip().partition(": ")
    assert start == "start it without tuning"
    program, *words = shlex.split(command)
    assert program == "qemu-launcher"
    again = home.start(argv=home.command(*words))
    assert "untuned" in again.wait_running()


@needs_two_cpus
def test_guest_that_its_user_holds_is_tuned_and_stays_paused(home: Home, bus: PrivateBus) -> None:
    home.define(qemu=("S",), **SHIELDED)
    run = home.start(env=bus.environment)
    run.wait_line(rf"^vm-under-test: paused, as you asked, 1 vCPU on {CPU} \(shielded\), ")
    assert bus.members()[0] == "PinThreads"
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "prelaunch"
    (vcpu,) = qmp("query-cpus-fast")
    assert os.sched_getaffinity(vcpu["thread-id"]) == {CPU}
    qmp("cont")
    qmp.wait_event("RESUME")
    assert os.sched_getaffinity(vcpu["thread-id"]) == {CPU}
    qmp("quit")
    assert run.end() == 0


def test_untuned_asks_nobody(home: Home, bus: PrivateBus) -> None:
    home.define(**SHIELDED, scheduler="fifo", rlimit_memlock=True)
    run = home.start("vm-under-test", "--untuned", env=bus.environment)
    assert "untuned" in run.wait_running()
    assert bus.calls() == []


# Unaided


def test_affinity_and_batch_need_no_helper(home: Home, bus: PrivateBus) -> None:
    home.define(
        qemu=({"smp": "2,sockets=1,cores=2,threads=1"},),
        vcpu_pinning={0: {0: {0: CPU}, 1: {0: 0}}},
        isolation="affinity",
        scheduler="batch",
    )
    run = home.start(env=bus.environment)
    assert "(nothing is shielded), batch" in run.wait_running()
    qmp = run.qmp()
    first, second = (vcpu["thread-id"] for vcpu in qmp("query-cpus-fast"))
    assert os.sched_getaffinity(first) == {CPU}
    assert os.sched_getaffinity(second) == {0}
    assert {os.sched_getscheduler(tid) for tid in (first, second)} == {os.SCHED_BATCH}
    assert os.sched_getscheduler(run.qemu_pid) == os.SCHED_OTHER
    qmp.close()
    assert bus.calls() == []


def test_every_vcpu_of_a_machine_with_two_dies_is_pinned(home: Home) -> None:
    home.define(
        qemu=({"cpu": "qemu64"}, {"smp": "8,sockets=1,dies=2,cores=2,threads=2"}),
        vcpu_pinning={0: {core: dict.fromkeys((0, 1), CPU if core == 3 else 0) for core in range(4)}},
        isolation="affinity",
    )
    run = home.start()
    assert "8 vCPUs on" in run.wait_running()
    qmp = run.qmp()
    for vcpu in qmp("query-cpus-fast"):
        last = (vcpu["props"]["die-id"], vcpu["props"]["core-id"]) == (1, 1)
        assert os.sched_getaffinity(vcpu["thread-id"]) == {CPU if last else 0}
    qmp.close()


@needs_two_cpus
def test_vcpus_that_share_a_thread_cannot_be_pinned_apart(home: Home) -> None:
    home.define(qemu=({"smp": 2}, {"accel": "tcg,thread=single"}), vcpu_pinning=[0, CPU], isolation="affinity")
    path = home.configuration / "vm-under-test.yml"
    path.write_text(path.read_text().replace("tcg,thread=multi", "tcg,thread=single"))
    run = home.start()
    assert_never_ran(run, message="are one thread of QEMU's", status=2)
    assert "TCG thread=single" in run.output


def test_vcpu_that_does_not_exist(home: Home) -> None:
    """Of this machine nothing is known by its binary's name."""
    own = home.configuration / "qemu-of-mine"
    own.symlink_to(shutil.which("qemu-system-x86_64") or "")
    path = home.define(binary=str(own), vcpu_pinning=[0, 0], isolation="affinity")
    run = home.start()
    assert_never_ran(run, message=f"{path}:", status=2)
    assert "QEMU has no vCPU 1" in run.output
    assert "it has vCPU 0 (socket 0, core 0, thread 0)" in run.output


def test_pc_without_smp_is_refused_before_it_is_started(home: Home) -> None:
    path = home.define(vcpu_pinning=[0, 0], isolation="affinity")
    run = home.start()
    assert run.end() == 2
    assert f"{path}:" in run.output
    assert home.leftovers() == []
    assert "vcpu_pinning names vCPU 1, but without -smp the guest has only vCPU 0" in run.output
    assert "add - smp: 2 to the section qemu" in run.output


# The end


@needs_two_cpus
def test_launcher_killed_while_the_helper_thinks(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads="hang")
    home.define(**SHIELDED)
    run = home.start(env=bus.environment)
    run.wait_line("waiting for qemu-launcher-helper")
    pid = run.qemu_pid
    run.process.kill()
    run.process.wait()
    assert is_alive(pid)
    assert "never started" in home.ask("status", "vm-under-test").stdout
    bus.plan()
    assert home.ask("kill", "vm-under-test").returncode == 0
    wait_gone(pid)


@needs_two_cpus
@pytest.mark.parametrize(("display", "flag"), [({}, 0), ({"WAYLAND_DISPLAY": "wayland-0"}, 4), ({"DISPLAY": ":0"}, 4)])
def test_polkit_may_ask_only_where_somebody_can_answer(
    home: Home, bus: PrivateBus, display: dict[str, str], flag: int
) -> None:
    """ALLOW_INTERACTIVE_AUTHORIZATION, 0x4 of the message's flags; nobody is asked once the guest runs."""
    home.define(**SHIELDED)
    run = home.start(env={**bus.environment, **display})
    run.wait_running()
    home.ask("kill", run.name)
    assert run.end() == 0
    first, *later = [(call["member"], call["flags"] & 4) for call in bus.calls()]
    assert first == ("PinThreads", flag)
    assert later[-1] == ("Release", 0)
    assert set(later) <= {("PinThreads", 0), ("Release", 0)}
