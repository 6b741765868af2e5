"""The main job: alice, who is not root, starts a VM that is pinned, shielded, memory-locked and real-time.

One VM is started for all tests of this module, under conditions as on a desktop: a hard RLIMIT_RTTIME of 200 ms, a
MemoryMax= on her slice. Each test reads one claim from /proc or the cgroup tree. The last one ends the VM.
"""

import os
import re
import subprocess
from collections.abc import Iterator

import pytest

from system import host, legacy, watch
from system.fixtures import SHARED
from system.people import User
from system.vms import Launch, define, running
from system.watch import Calls

pytestmark = pytest.mark.hosts(
    "trixie", "bookworm", more=("legacy", "linux-6.8"), why="it is what each mechanism is there for"
)

# 2 cores x 2 threads of the guest on two cores of the host, whose siblings are 4, 5 and 6, 7: (socket, core, thread).
PLACES = {(0, 0, 0): 4, (0, 0, 1): 5, (0, 1, 0): 6, (0, 1, 1): 7}
PINNING = {0: {0: {0: 4, 1: 5}, 1: {0: 6, 1: 7}}}
VM_CPUS = frozenset(PLACES.values())
GUEST_RAM = 128 << 20
MEMLOCK = 850 << 20
RTTIME = 200_000  # microseconds
MEMORY_MAX = 1 << 30
# How the kernel and systemd refuse; anything else is a test that did not try what it says.
REFUSAL = re.compile("Permission denied|Operation not permitted|Invalid argument|authentication required")


@pytest.fixture(scope="module")
def calls(members: tuple[User, User]) -> Iterator[Calls]:
    """The calls to the helper during this module."""
    with watch.helper_calls() as seen:
        yield seen


@pytest.fixture(scope="module")
def win11(members: tuple[User, User], calls: Calls) -> Iterator[Launch]:
    """alice's VM, running."""
    alice, _ = members
    tuning = {"vcpu_pinning": PINNING, "scheduler": "fifo", "priority": 1, "rlimit_memlock": "850M"}
    define(alice, "win11", tuning, {"m": "128M"}, {"overcommit": "mem-lock=on"}, cpus=4, spin=True)
    assert alice.login.run("true").status == 0  # her slice exists from here on
    slice_name = f"user-{alice.uid}.slice"
    subprocess.run(["systemctl", "set-property", "--runtime", slice_name, f"MemoryMax={MEMORY_MAX}"], check=True)
    try:
        with running(alice, "win11", before=f"ulimit -R {RTTIME};") as launch:
            SHARED.launch = launch
            yield launch.until_settled()
    finally:
        SHARED.launch = None
        subprocess.run(["systemctl", "set-property", "--runtime", slice_name, "MemoryMax=infinity"], check=True)


def expect_vcpus_tuned(vm: Launch) -> None:
    """What must hold of the vCPUs while the VM runs, whatever happens around it."""
    for vcpu in vm.vcpus:
        wanted = frozenset({PLACES[vcpu.socket, vcpu.core, vcpu.thread]})
        assert host.cpus_of(vm.qemu, vcpu.tid) == wanted, f"{vcpu}"
        assert host.scheduling(vcpu.tid) == ("fifo", 1, True), f"{vcpu}"
    assert host.isolated() == VM_CPUS
    assert host.cpus_of(1) == host.online() - VM_CPUS


def expect_tuned(vm: Launch) -> None:
    """The same, and that nobody else in the whole host may run on its CPUs."""
    expect_vcpus_tuned(vm)
    assert host.trespassers(VM_CPUS, vm.vcpu_tids, since=host.born(vm.qemu)) == []


def test_each_vcpu_runs_on_its_cpu_alone(win11: Launch) -> None:
    assert {vcpu[:3] for vcpu in win11.vcpus} == set(PLACES)
    for vcpu in win11.vcpus:
        assert host.cpus_of(win11.qemu, vcpu.tid) == {PLACES[vcpu.socket, vcpu.core, vcpu.thread]}


def test_these_cpus_are_nobody_elses(win11: Launch) -> None:
    assert host.isolated() == VM_CPUS


def test_all_other_threads_of_the_host_keep_off(win11: Launch) -> None:
    """PID 1, every user thread, QEMU's own emulator threads, and every kernel thread that the mechanism can move."""
    assert host.trespassers(VM_CPUS, win11.vcpu_tids, since=host.born(win11.qemu)) == []
    assert host.cpus_of(1) == host.online() - VM_CPUS
    emulators = host.tids(win11.qemu) - set(win11.vcpu_tids)
    assert emulators
    for tid in emulators:
        assert host.cpus_of(win11.qemu, tid) == host.online() - VM_CPUS


def test_only_threads_that_belong_to_their_cpu_are_exempt(win11: Launch) -> None:
    """The exemption above is no loophole: it covers kernel threads alone, and those of other CPUs as well."""
    exempt = [thread for thread in host.threads() if thread.belongs_to_its_cpu]
    assert exempt
    assert all(thread.of_kernel for thread in exempt)


def test_what_is_started_later_keeps_off_too(win11: Launch) -> None:
    assert host.born_of_us() == host.online() - VM_CPUS
    assert host.born_of_pid_1() == host.online() - VM_CPUS


def test_vcpus_are_fifo_and_cannot_hand_it_on(win11: Launch) -> None:
    for vcpu in win11.vcpus:
        assert host.scheduling(vcpu.tid) == ("fifo", 1, True)
    assert host.realtime_threads() == set(win11.vcpu_tids), "nothing else on the host became real-time"


def test_memory_is_locked_within_what_was_granted(win11: Launch) -> None:
    assert host.limit(win11.qemu, "Max locked memory") == (MEMLOCK, MEMLOCK)
    assert GUEST_RAM < host.locked(win11.qemu) <= MEMLOCK
    assert host.limit(win11.pid, "Max locked memory")[1] < GUEST_RAM, "the launcher itself got nothing"


def test_the_real_time_brake_is_lifted_from_qemu_alone(win11: Launch) -> None:
    """A busy FIFO vCPU under the desktop's limit is killed by the kernel after 0.2 s; this one has run for longer."""
    assert host.limit(win11.pid, "Max realtime timeout") == (RTTIME, RTTIME), "she did start under the hard limit"
    assert host.limit(win11.qemu, "Max realtime timeout") == (host.INFINITY, host.INFINITY)
    ticks = os.sysconf("SC_CLK_TCK")

    def seconds(tid: int) -> float:
        fields = (host.PROC / f"{win11.qemu}/task/{tid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[14 - 3]) + int(fields[15 - 3])) / ticks

    host.wait_for("a vCPU has run for longer than the limit", lambda: max(map(seconds, win11.vcpu_tids)) > 0.5)
    assert host.is_alive(win11.qemu)


def test_the_guest_runs(win11: Launch) -> None:
    assert win11.witness.state() == "running"
    assert win11.guest_ran


def test_the_users_own_limits_still_apply(win11: Launch, alice: User) -> None:
    """The scope is below her slice, so MemoryMax= counts and bounds what QEMU uses, locked memory included.

    With a pool it cannot be there, as her slice leaves the VM's CPUs; her limits do not count for the VM then.
    """
    assert host.cgroup(win11.qemu).is_relative_to(win11.scope)
    assert host.memory_limit(alice.slice) == MEMORY_MAX
    resident = int(host.status(win11.qemu)["VmRSS"].split()[0]) << 10
    assert resident > GUEST_RAM
    assert host.memory_used(win11.scope) > GUEST_RAM
    if host.mechanism() == "pool":
        assert not win11.scope.is_relative_to(alice.slice)
        assert VM_CPUS.isdisjoint(host.effective(alice.slice))
        assert host.memory_used(alice.slice) < resident
    else:
        assert win11.scope.parent == alice.slice
        assert host.memory_used(alice.slice) > GUEST_RAM


def test_a_start_makes_four_calls(win11: Launch, calls: Calls) -> None:
    assert calls.members()[:4] == ["SetMemlock", "PinThreads", "SetScheduler", "PinThreads"]
    assert len(calls.members()) == 4


def test_status_shows_what_the_kernel_shows(win11: Launch, alice: User) -> None:
    shown = alice.command("status", "win11")
    assert shown.status == 0, shown
    assert f"win11: running, PID {win11.qemu}" in shown.stdout
    rows = [line.split() for line in shown.stdout.splitlines()]
    yes = ["yes"] if host.mechanism() == "partition" else ["yes", f"({host.mechanism()})"]
    for index, vcpu in enumerate(win11.vcpus):
        cpu = PLACES[vcpu.socket, vcpu.core, vcpu.thread]
        assert [str(index), str(vcpu.tid), str(cpu), *yes, "fifo", "(reset", "on", "fork)", "1"] in rows, shown.stdout


def facts(vm: Launch) -> dict[str, object]:
    """What attempts are about: groups that say who may use which CPUs, and what their files are called."""
    tid = vm.vcpu_tids[0]
    common = {
        "pid": vm.qemu,
        "tid": tid,
        "place": host.cpuset_of(vm.qemu, tid),
        "session": host.cpuset_of(vm.pid),
        "emulator": host.emulator_of(vm.scope),
    }
    if host.mechanism() == "cpuset-v1":  # everybody else is in one of two groups, and neither is her own
        whose = {"own": legacy.CPUSETS, "above": legacy.POOL, "shield": legacy.OURS}
        return {**common, **whose, "tasks": "tasks", "member": 0, "kind": "cpuset.sched_load_balance"}
    whose = {"own": vm.user.slice / f"user@{vm.user.uid}.service/app.slice", "above": vm.user.slice}
    shield = {"shield": vm.scope / "vcpus", "member": "member", "kind": "cpuset.cpus.partition"}
    return {**common, **whose, **shield, "tasks": "cgroup.threads"}


def expect_refused(vm: Launch, user: User, attempt: str) -> None:
    """What names the `facts` is refused, and nothing has changed."""
    command = attempt.format(**facts(vm))
    done = user.login.run(command)
    assert done.status != 0, f"it was not refused: {command}"
    assert REFUSAL.search(done.stderr), f"it failed for another reason: {command}: {done.stderr}"
    expect_vcpus_tuned(vm)


@pytest.mark.parametrize(
    "attempt",
    [
        "taskset --pid --cpu-list 0 {tid}",
        "taskset --pid --cpu-list 0-3 {tid}",
        "echo {tid} >{own}/{tasks}",
        "echo {pid} >{own}/cgroup.procs",
        "echo {pid} >{session}/cgroup.procs",
        "echo {tid} >{emulator}/{tasks}",
        "echo 0 >{place}/cpuset.cpus",
        "echo {member} >{shield}/{kind}",
        "mkdir {shield}/mine",
        "rmdir {place}",
        "unshare --cgroup true",
        "unshare --user --map-root-user --cgroup --mount sh -c 'echo {tid} >{emulator}/{tasks}'",
        "chrt --fifo --pid 2 {tid}",
        "chrt --rr --pid 1 {tid}",
        "prlimit --pid {pid} --memlock=unlimited",
        "systemctl set-property --runtime qemu-launcher-1000-win11.scope AllowedCPUs=0-7",
    ],
)
def test_a12_she_cannot_pull_her_vm_out_of_its_shield(win11: Launch, alice: User, attempt: str) -> None:
    expect_refused(win11, alice, attempt)


def test_a12_the_attempts_that_need_a_namespace_get_one(alice: User) -> None:
    """Control: where users may make none at all, the refusals above would prove nothing."""
    alice.login.run("unshare --user --map-root-user --cgroup --mount true", check=True)


@pytest.mark.parametrize(
    "attempt",
    [
        "taskset --pid --cpu-list 4 $$",
        "taskset --cpu-list 4-7 true",
        "echo $$ >{place}/{tasks}",
        "echo $$ >{shield}/{tasks}",
        "echo 4-7 >{above}/cpuset.cpus",
        "echo 4-7 >{own}/cpuset.cpus",
    ],
)
def test_a12_nobody_gets_onto_the_shielded_cpus(win11: Launch, alice: User, attempt: str) -> None:
    expect_refused(win11, alice, attempt)


def test_a12_a_wider_mask_than_the_shield_changes_nothing(win11: Launch, alice: User) -> None:
    """sched_setaffinity(2) accepts any mask that has an allowed CPU in it, and grants no more than the cpuset does."""
    done = alice.login.run(f"taskset --pid --cpu-list 0-7 {win11.vcpu_tids[0]} && taskset --pid --cpu-list 0-7 $$")
    assert done.status == 0, done
    expect_tuned(win11)
    mine = alice.login.run("taskset --cpu-list 0-7 cat /proc/self/status", check=True).stdout
    line = next(line for line in mine.splitlines() if line.startswith("Cpus_allowed_list"))
    assert host.parse(line.split()[1]) == host.online() - VM_CPUS


def test_a12_her_own_service_manager_gives_her_no_shielded_cpu(win11: Launch, alice: User) -> None:
    done = alice.login.run(
        "systemd-run --user --quiet --pipe --wait --collect -p AllowedCPUs=4-7 cat /proc/self/status", check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("Cpus_allowed_list"))
    assert not host.parse(line.split()[1]) & VM_CPUS
    expect_tuned(win11)


@pytest.mark.parametrize("command", ["daemon-reload", "daemon-reexec"])
def test_systemd_changes_nothing_when_it_starts_over(win11: Launch, alice: User, command: str) -> None:
    subprocess.run(["systemctl", command], check=True)
    assert host.born_of_pid_1() == host.online() - VM_CPUS  # it has started over then
    expect_tuned(win11)
    assert "warning" not in alice.command("status", "win11").stdout


def test_nothing_of_ours_keeps_running_as_root(win11: Launch) -> None:
    """The helper has left some time after the last call; the VM is as it was, and its record is kept for later."""
    host.wait_for("the helper has left", lambda: host.helper() is None)
    for name in ("qemu-launcher", "qemu-launcher-helper", "qemu-system-x86_64"):
        for pid in host.processes(name):
            assert "0" not in host.status(pid)["Uid"].split(), f"{name} runs as root, PID {pid}"
    assert win11.record.exists()
    expect_tuned(win11)


def test_quit_gives_everything_back(win11: Launch) -> None:
    """The last test here: QEMU quits, and its exit status is the launcher's."""
    assert win11.quit() == 0
    host.wait_until_as_before()
    assert host.cpus_of(1) == host.online()
    assert host.born_of_us() == host.online()
