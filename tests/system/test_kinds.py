"""The other kinds of tuning: none, less than a shield, and what happens when something cannot be had."""

import subprocess
from collections.abc import Callable

import pytest

from system import host, watch
from system.fixtures import stop_helper
from system.people import User
from system.vms import HELPER_UNIT, Launch, define, refused

pytestmark = pytest.mark.hosts("trixie", "bookworm", why="it is what each mechanism is there for")

# The launcher, listing each module that it imports in its log. Its first line has -I, which keeps PYTHONVERBOSE= away.
VERBOSE = "python3 -I -v /usr/bin/qemu-launcher"


def imported(running: Launch) -> set[str]:
    """The modules that a VERBOSE launcher has imported so far."""
    return {line.split("'")[1] for line in running.said.splitlines() if line.startswith("import '")}


def activations() -> int:
    """How often systemd has started the helper since boot, by its journal's word; failed starts included."""
    fields = ["journalctl", "--no-pager", "-o", "cat", "_PID=1", f"UNIT={HELPER_UNIT}", "JOB_TYPE=start"]
    return len(subprocess.run(fields, check=True, capture_output=True, text=True).stdout.splitlines())


@pytest.mark.parametrize(("arguments", "launcher"), [((), {}), (("--untuned",), {"vcpu_pinning": [4, 5]})])
def test_without_tuning_the_helper_is_not_needed(
    alice: User, vm: Callable[..., Launch], arguments: tuple[str, ...], launcher: dict[str, object]
) -> None:
    """Not called, not started, and no D-Bus library is imported."""
    define(alice, "plain", launcher, cpus=2)
    stop_helper()
    before = activations()
    with watch.helper_calls() as calls:
        running = vm(alice, "plain", *arguments, program=VERBOSE)
        assert "qemu_launcher.session" in imported(running), "the list is there"
        assert not [name for name in imported(running) if name.split(".")[0] in ("dbus_next", "prctl")]
        assert calls.members() == []
    assert activations() == before
    assert host.helper() is None
    assert host.isolated() == frozenset()
    assert host.scopes() == set()
    assert running.quit() == 0


def test_a_tuned_start_does_import_it(alice: User, vm: Callable[..., Launch]) -> None:
    """The positive control, for both witnesses: imports are listed, and starts of the helper are counted."""
    define(alice, "tuned", {"vcpu_pinning": [4, 5]}, cpus=2)
    stop_helper()
    before = activations()
    running = vm(alice, "tuned", program=VERBOSE)
    assert {"qemu_launcher.session", "dbus_next"} <= imported(running)
    assert activations() > before
    assert running.quit() == 0


def test_confined_but_not_exclusive(alice: User, carol: User, vm: Callable[..., Launch]) -> None:
    """isolation: cpuset. Two VMs of two users may share such CPUs; nobody is kept off them."""
    for user in (alice, carol):
        define(user, "confined", {"vcpu_pinning": [4, 5], "isolation": "cpuset"}, cpus=2)
    machines = [vm(alice, "confined"), vm(carol, "confined")]
    for running in machines:
        assert [host.cpus_of(running.qemu, tid) for tid in running.vcpu_tids] == [{4}, {5}]
        done = running.user.login.run(f"taskset --pid --cpu-list 0 {running.vcpu_tids[0]}")
        assert done.status != 0, "the cpuset holds, unlike an affinity"
        assert "not shielded" in running.said
    assert host.isolated() == frozenset()
    assert host.cpus_of(1) == host.online()
    assert host.born_of_us() == host.online()
    assert [running.quit() for running in machines] == [0, 0]


def test_realtime_needs_a_shield(alice: User) -> None:
    define(
        alice, "confined", {"vcpu_pinning": [4, 5], "isolation": "cpuset", "scheduler": "fifo", "priority": 1}, cpus=2
    )
    status, words = refused(alice, "confined")
    assert status in (1, 2)
    assert "shield" in words, words


def test_affinity_is_the_users_own_business(alice: User, vm: Callable[..., Launch]) -> None:
    """isolation: affinity. sched_setaffinity(2) on her own threads, no helper, and no shield either."""
    define(alice, "affine", {"vcpu_pinning": [4, 5], "isolation": "affinity", "scheduler": "batch"}, cpus=2)
    stop_helper()
    with watch.helper_calls() as calls:
        running = vm(alice, "affine")
        assert calls.members() == []
    assert host.helper() is None
    assert [host.cpus_of(running.qemu, tid) for tid in running.vcpu_tids] == [{4}, {5}]
    assert [host.scheduling(tid)[0] for tid in running.vcpu_tids] == ["batch", "batch"]
    assert host.isolated() == frozenset()
    assert host.cpus_of(1) == host.online()
    assert "nothing is shielded" in running.said
    assert running.quit() == 0


def test_it_starts_untuned_where_the_definition_says_so(bob: User, vm: Callable[..., Launch]) -> None:
    """on_tuning_failure: continue, of somebody whom the bus refuses."""
    define(bob, "anyway", {"vcpu_pinning": [4, 5], "on_tuning_failure": "continue"}, cpus=2)
    running = vm(bob, "anyway")
    assert "bob is not a member of the group qemu-launcher; it starts without tuning" in running.said
    assert "anyway: running, untuned" in running.said
    assert "given back" not in running.said, "he was granted nothing"
    assert [host.cpus_of(running.qemu, tid) for tid in running.vcpu_tids] == [host.online()] * 2
    assert running.quit() == 0


def test_what_was_done_already_is_undone_then(
    alice: User, helper_toml: Callable[..., None], vm: Callable[..., Launch]
) -> None:
    """The pins are granted, the policy is not; the guest runs on all CPUs, and nothing stays shielded."""
    helper_toml('[[limits]]\npolicies = ["other"]\n')
    tuning = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1, "on_tuning_failure": "continue"}
    define(alice, "anyway", tuning, cpus=2)
    running = vm(alice, "anyway")
    assert "Policy fifo is none of yours, other (/etc/qemu-launcher/helper.toml, [[limits]] entry 1)" in running.said
    assert [host.cpus_of(running.qemu, tid) for tid in running.vcpu_tids] == [host.online()] * 2
    assert [host.scheduling(tid)[0] for tid in running.vcpu_tids] == ["other"] * 2
    assert host.isolated() == frozenset()
    assert running.quit() == 0


def test_less_memory_than_asked_for_is_refused_with_both_numbers(alice: User, helper_toml: Callable[..., None]) -> None:
    helper_toml('[[limits]]\nmemlock = "100M"\n')
    define(alice, "large", {"rlimit_memlock": "400M"}, {"m": "128M"}, cpus=1)
    status, words = refused(alice, "large")
    assert status == 1
    assert "QEMU must be able to lock 400 MiB, but only 100 MiB was granted" in words, words


@pytest.mark.parametrize(("cpus", "topology"), [(1, [2]), (6, [2, 3, 4, 5, 6, 7])])
def test_four_calls_whatever_the_number_of_vcpus(
    alice: User, vm: Callable[..., Launch], cpus: int, topology: list[int]
) -> None:
    """For four vCPUs, see test_main_job.py."""
    tuning = {"vcpu_pinning": topology, "scheduler": "fifo", "priority": 1, "rlimit_memlock": "400M"}
    define(alice, "counted", tuning, cpus=cpus)
    with watch.helper_calls() as calls:
        running = vm(alice, "counted").until_settled()
        host.wait_for("the last call is written down", lambda: len(calls.members()) >= 4)
        assert calls.members() == ["SetMemlock", "PinThreads", "SetScheduler", "PinThreads"]
    assert [host.cpus_of(running.qemu, tid) for tid in running.vcpu_tids] == [{cpu} for cpu in topology]
    assert running.quit() == 0
