"""How much one user can take: attacks A8 to A11, A16 and A19, and what a hostile reader of the helper thought of.

Whatever a user runs, and whatever it asks for: real-time threads, locked memory and CPUs stay within the limits of his
uid, and everybody else is served meanwhile.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from system import host
from system.claims import Answer, Child, Claimant
from system.fixtures import offline, start_helper, stop_helper
from system.people import User
from system.stepping import Stepping
from system.test_crash_only import leave_scope
from system.vms import HELPER_UNIT

# How often: enough to see it happen; QEMU_LAUNCHER_ROUNDS=1000 for a long look.
ROUNDS = int(os.environ.get("QEMU_LAUNCHER_ROUNDS", "24"))
RT_RUNTIME = Path("/proc/sys/kernel/sched_rt_runtime_us")


@contextmanager
def memory_max(user: User, size: str) -> Iterator[None]:
    """What the auditor's page tells an administrator to set: on the slice that has the user's VMs."""
    unit = f"qemu-{user.uid}.slice" if host.mechanism() == "pool" else f"user-{user.uid}.slice"
    subprocess.run(["systemctl", "set-property", "--runtime", unit, f"MemoryMax={size}"], check=True)
    try:
        yield
    finally:
        subprocess.run(["systemctl", "set-property", "--runtime", unit, "MemoryMax=infinity"], check=True)


def locked_by(user: User) -> int:
    """Bytes that all processes of `user` have locked."""
    total = 0
    for pid in host.pids():
        try:
            if host.status(pid)["Uid"].split()[0] == str(user.uid):
                total += host.locked(pid)
        except (FileNotFoundError, ProcessLookupError, KeyError):
            continue
    return total


@pytest.mark.attack("A8")
def test_a8_a_program_that_asks_for_everything(
    alice: User, program: Claimant, helper_toml: Callable[..., None]
) -> None:
    helper_toml('[[limits]]\nmax_cpus = 4\nmax_vms = 2\nmemlock = "64M"\nmax_priority = 3\n')
    child, other, third = program.spawn(8), program.spawn(2), program.spawn(1)
    everything = 2**64 - 1
    assert program.set_memlock(child, "a", everything).body == [64 << 20]
    assert program.set_memlock(other, "b", everything).error == "LimitExceeded"
    assert program.pin(child, "a", 0, 1, 2, 3, 4, 5, 6, 7).error == "LimitExceeded"
    assert program.pin(child, "a", 4, 5).error == "ok"
    assert program.pin(other, "b", 6, 7).error == "ok"
    assert program.pin(third, "c", 2).error == "LimitExceeded"
    for policy in ("fifo", "rr"):
        assert program.schedule(child, "a", policy, 99, threads=2).error == "LimitExceeded"
        assert program.schedule(child, "a", policy, 3).error == "TargetRefused", "not all of them are shielded"
        assert program.schedule(child, "a", policy, 3, threads=2).error == "ok"
    assert host.realtime_threads() == set(child.tids[:2])

    # A process's limits are its children's: only the slice of the user's VMs bounds their sum.
    with memory_max(alice, "600M"):
        answer = program.tell(child, "fork", count=40, lock=32 << 20)
        assert answer["locked"] >= 1
        # 40 times 32 MiB is more: some could not, or were killed for it after they could.
        assert 32 << 20 <= locked_by(alice) <= 600 << 20
    pids = program.tell(other, "fork", count=500, lock=0)["pids"]
    assert len(pids) == 500
    assert host.realtime_threads() == set(child.tids[:2]), "no child is real-time"
    assert host.isolated() == {4, 5, 6, 7}
    allowed = host.online() - host.isolated()
    assert {host.cpus_of(pid) for pid in pids} == {allowed}, "and none is on a shielded CPU"


def answer_times(user: User, count: int = 5, longest: int = 25) -> list[float]:
    """How long the host takes to answer somebody else: systemd, and the helper; `longest` seconds."""
    times = []
    helper = "org.qemulauncher.Helper1 /org/qemulauncher/Helper1 org.qemulauncher.Helper1"
    ask = f"busctl --timeout={longest} call {helper} GetLimits"
    for _ in range(count):
        began = time.monotonic()
        subprocess.run(["systemctl", "show", "--property=ActiveState", "init.scope"], check=True, capture_output=True)
        user.login.run(ask, check=True)
        times.append(time.monotonic() - began)
    return times


@pytest.mark.attack("A9")
def test_a9_real_time_that_never_rests(program: Claimant, carol: User) -> None:
    """On every CPU that may be shielded: what is left answers, and no task of the host waits behind the spinners."""
    before = min(answer_times(carol, longest=240))
    spinners = []
    for name, cpu in ("a", 2), ("b", 4), ("c", 6):
        child = program.spawn(1, spin=True)
        for answer in program.pin(child, name, cpu), program.schedule(child, name, "fifo", 10):
            assert answer.error == "ok", answer
        spinners.append(child)
    tids = {child.tids[0] for child in spinners}
    assert host.realtime_threads() == tids
    assert host.isolated() == {2, 3, 4, 5, 6, 7}
    since = max(host.born(child.pid) for child in spinners)
    assert host.trespassers(host.isolated(), tids, since=since) == []
    during = max(answer_times(carol, longest=240))  # the helper may have left, and starts slowly beside them
    assert {host.status(child.pid, child.tids[0])["State"][0] for child in spinners} == {"R"}
    sys.stdout.write(f"answers during / before: {during / before:.1f}\n")


class Racer:
    """One user's random claims. What is wrong is kept for the test to see."""

    def __init__(self, program: Claimant, seed: int) -> None:
        self.program, self.random = program, random.Random(seed)
        self.children = [(f"vm{number}", program.spawn(2)) for number in range(3)]
        self.answers: dict[str, int] = {}
        self.wrong: list[str] = []

    def run(self, rounds: int) -> None:
        """Claim and release."""
        for _ in range(rounds):
            name, child = self.random.choice(self.children)
            if self.random.random() < 0.3:
                answer = self.program.call("Release", "us", self.program.user.uid, name)
            else:
                cpus = self.random.sample(sorted(host.online()), k=self.random.choice([1, 2, 2]))
                shielded = self.random.random() < 0.8
                answer = self.program.pin(child, name, *cpus, shielded=shielded)
                if answer.error == "ok":
                    self.check(child, cpus, shielded=shielded)
            self.answers[answer.error] = self.answers.get(answer.error, 0) + 1

    def check(self, child: Child, cpus: list[int], *, shielded: bool) -> None:
        """Nobody else changes what is one's own."""
        for tid, cpu in zip(child.tids, cpus, strict=False):
            if host.cpus_of(child.pid, tid) != {cpu}:
                self.wrong.append(f"{tid} is on {host.cpus_of(child.pid, tid)}, not on {cpu}")
        if shielded and not set(cpus) <= host.isolated():
            self.wrong.append(f"{cpus} are not all isolated: {host.isolated()}")
        own = f"qemu-launcher-{self.program.user.uid}-"
        held = {path: claimed for path, claimed in host.exclusive().items() if own in path and path.endswith("vcpus")}
        if len(frozenset[int]().union(*held.values())) > 4:
            self.wrong.append(f"more than the limit of four: {held}")


@pytest.mark.attack("A10")
def test_a10_two_users_race(alice: User, carol: User, stepping: Stepping, helper_toml: Callable[..., None]) -> None:
    helper_toml("[[limits]]\nmax_cpus = 4\n")
    cores = [{cpu, cpu + 1} for cpu in range(0, 8, 2)]
    with Claimant(alice) as hers, Claimant(carol) as others:
        racers = [Racer(hers, 1), Racer(others, 2)]
        with ThreadPoolExecutor() as threads:
            races = [threads.submit(racer.run, ROUNDS) for racer in racers]
            while not all(race.done() for race in races):
                isolated = host.isolated()
                assert any(isolated.isdisjoint(core) for core in cores), "a core is always left"
                assert all(core <= isolated or isolated.isdisjoint(core) for core in cores), "whole cores"
                time.sleep(0.05)
        for racer, race in zip(racers, races, strict=True):
            race.result()  # raises what ended it
            assert sum(racer.answers.values()) == ROUNDS
            assert racer.wrong == []
            assert racer.answers.keys() <= {"ok", "Conflict", "LimitExceeded"}, racer.answers
            assert racer.answers["ok"] > ROUNDS // 10
        assert sum(racer.answers.get("Conflict", 0) for racer in racers) > 0, "they did meet"
        sys.stdout.write(f"{[racer.answers for racer in racers]}\n")


def failures() -> str:
    """What the helper has said of itself that it should never have to say."""
    command = ["journalctl", "--quiet", "-b", "-t", "qemu-launcher-helper", "QEMU_LAUNCHER_VERDICT=failed"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout


@pytest.mark.attack("A11")
@pytest.mark.parametrize("cpus", [[5], [4, 5]], ids=["one", "all"])
def test_a11_a_shielded_cpu_goes_offline(program: Claimant, cpus: list[int]) -> None:
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    before = failures()
    with offline(*cpus):
        # Two real-time threads would share a CPU, or run among the host's: any call finds that out.
        assert program.call("GetLimits", "").error == "ok"
        assert host.realtime_threads() == set()
        assert program.call("Release", "us", program.user.uid, "vm").error == "ok"
        assert host.isolated() == frozenset()
        second = program.spawn(1)
        assert program.pin(second, "second", 5).error == "InvalidArgs"
        assert program.pin(second, "second", 6).error == "ok"
    third = program.spawn(2)
    assert program.pin(third, "third", 4, 5).error == "ok"
    assert program.schedule(third, "third", "fifo", 1).error == "ok"
    assert host.isolated() == {4, 5, 6, 7}
    assert host.realtime_threads() == set(third.tids)
    assert failures() == before


@pytest.mark.attack("A19")
def test_a19_out_of_the_scope_again_and_again(program: Claimant, carol: User) -> None:
    """With a decoy left in every other scope, so that systemd starts nobody: the next call is what ends it."""
    share = len(host.online()) - 2
    most = 0
    for number in range(max(10, ROUNDS // 2)):
        child = program.spawn(2)
        cpus = random.Random(number).choice([(2, 3), (4, 5), (6, 7)])
        assert program.pin(child, f"vm{number}", *cpus).error == "ok"
        assert program.schedule(child, f"vm{number}", "fifo", 1).error == "ok"
        assert host.realtime_threads() == set(child.tids), "those of the rounds before are not any more"
        if number % 2:
            program.tell(child, "fork", count=1, lock=0)
        leave_scope(program, child.pid)
        most = max(most, len(host.realtime_threads()))
        if number % 7 == 6:
            program.end_all()
    assert most <= share
    assert answer_times(carol, 1)
    program.end_all()
    program.call("GetLimits", "")
    host.wait_for("the CPUs are back", lambda: host.isolated() == frozenset())


@pytest.mark.attack("S20")
def test_a_first_thread_that_ends_hides_nothing(program: Claimant) -> None:
    """/proc says of it for ever that it is where it was, while systemd can take the others anywhere."""
    child = program.spawn(2)
    before = host.limit(child.pid, "Max locked memory")
    assert program.set_memlock(child, "vm", 64 << 20).error == "ok"
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    program.tell(child, "fork", count=1, lock=0)
    program.tell(child, "exit_thread")
    host.wait_for("its first thread has ended", lambda: host.status(child.pid)["State"][0] == "Z")
    place = (f"user@{program.user.uid}.service", "/init.scope", [child.pid])
    sys.stdout.write(f"systemd says: {program.manager('AttachProcessesToUnit', 'ssau', *place)}\n")
    assert program.call("GetLimits", "").error == "ok"
    assert host.realtime_threads() == set()
    assert host.isolated() == frozenset()
    assert host.limit(child.tids[0], "Max locked memory") == before


@pytest.mark.attack("S9")
def test_others_real_time_does_not_lose_its_brake(program: Claimant) -> None:
    """rtkit gives real time under a limit of 200 ms; lifting that for vCPUs must not lift it for such a thread."""
    child = program.spawn(3)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    os.sched_setscheduler(child.tids[2], os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(20))
    assert host.realtime_threads() == {child.tids[2]}
    assert program.schedule(child, "vm", "fifo", 1, threads=2).error == "ok"
    assert host.realtime_threads() == set(child.tids[:2])


@pytest.mark.attack("S9")
def test_brake_that_came_back_is_not_taken_from_what_it_holds(program: Claimant) -> None:
    """The process lowers its own limit, which is always allowed, and rtkit believes that."""
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    assert program.pin(child, "vm", 4).error == "ok"
    assert host.realtime_threads() == {child.tids[0]}, "the other one has lost it with its CPU"
    resource.prlimit(child.pid, resource.RLIMIT_RTTIME, (200_000, 200_000))
    os.sched_setscheduler(child.tids[1], os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(20))
    assert program.schedule(child, "vm", "fifo", 1, threads=1).error == "ok"
    assert host.realtime_threads() == {child.tids[0]}


@pytest.mark.attack("S9")
def test_nice_value_of_rtkits_is_not_made_to_be_inherited(program: Claimant) -> None:
    """rtkit gives it with "reset on fork", which nobody without privilege takes away: nor through the helper."""
    child = program.spawn(1)
    os.setpriority(os.PRIO_PROCESS, child.tids[0], -15)
    os.sched_setscheduler(child.tids[0], os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    assert program.pin(child, "vm", 4).error == "ok"
    for policy, priority in (("other", 0), ("fifo", 1), ("batch", 0)):
        assert program.schedule(child, "vm", policy, priority).error == "ok"
        assert host.scheduling(child.tids[0]) == (policy, priority, True)
    os.setpriority(os.PRIO_PROCESS, child.tids[0], 0)
    assert program.schedule(child, "vm", "other", 0).error == "ok"
    assert host.scheduling(child.tids[0]) == ("other", 0, False)


@pytest.mark.attack("S10")
def test_who_has_locked_memory_gets_no_more_of_it_by_asking_for_less(
    program: Claimant, helper_toml: Callable[..., None]
) -> None:
    helper_toml('[[limits]]\nmemlock = "64M"\n')
    first, second = program.spawn(0), program.spawn(0)
    assert program.set_memlock(first, "a", 64 << 20).body == [64 << 20]
    assert program.set_memlock(first, "a", 1).body == [64 << 20], "what is locked under it stays so, and counts"
    assert program.set_memlock(second, "b", 1 << 20).error == "LimitExceeded"


@pytest.mark.attack("S9")
def test_no_real_time_where_nothing_would_stop_it(program: Claimant) -> None:
    child = program.spawn(1)
    assert program.pin(child, "vm", 4).error == "ok"
    usual = RT_RUNTIME.read_text()
    RT_RUNTIME.write_text("-1")
    try:
        assert program.schedule(child, "vm", "fifo", 1).error == "Unsupported"
        assert host.realtime_threads() == set()
    finally:
        RT_RUNTIME.write_text(usual)
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"


@pytest.mark.attack("S8")
def test_a_session_that_resists_its_end_keeps_only_its_own_user_waiting(alice: User, carol: User) -> None:
    """systemd starts a scope after the session beside it has ended; a program that ignores SIGTERM takes its time."""
    stubborn = ("sh", "-c", 'trap "" TERM HUP; exec "$@"', "sh")
    with Claimant(carol) as others, ExitStack() as stack:
        hers = stack.enter_context(Claimant(alice, *stubborn))
        child, other = hers.spawn(0), others.spawn(1)
        session = host.cgroup(child.pid).name
        assert session.startswith("session-")
        assert others.call("GetLimits", "").error == "ok"
        subprocess.run(["systemctl", "stop", "--no-block", session], check=True)
        answers: list[tuple[Answer, float]] = []
        began = time.monotonic()
        call = threading.Thread(
            target=lambda: answers.append((hers.set_memlock(child, "late", 1 << 20), time.monotonic()))
        )
        call.start()
        host.wait_for("her call is under way", lambda: answers or f"{alice.uid}-late" in host.records())
        assert others.pin(other, "vm", 4).error == "ok"
        served = time.monotonic()
        assert others.schedule(other, "vm", "fifo", 1).error == "ok"
        call.join(host.PATIENCE)
        [(answer, came)] = answers
        assert answer.error in ("ok", "Failed", "TargetRefused"), answer
        if came - began > 15:  # as long as the session resists; the helper gives up after 30 s
            assert served < came, "she waits, and nobody else does"
        assert host.isolated() == {4, 5}
        sys.stdout.write(f"she got {answer} after {came - began:.1f} s, carol after {served - began:.1f} s\n")


@pytest.mark.attack("S6")
def test_a_thousand_threads_do_not_hold_the_helper(program: Claimant, carol: User) -> None:
    """They are pinned or refused whole, and meanwhile others are served: busctl waits for 25 s, and no longer."""
    child = program.spawn(2)
    for _ in range(10):
        program.tell(child, "threads", count=100)
    pins = [[tid, [cpu], True] for tid, cpu in zip(child.tids, (4, 5), strict=True)]
    program.begin("PinThreads", "usa(uaub)au", child.pid, "vm", pins, [])
    [meanwhile] = answer_times(carol, 1)
    answer = program.finish()
    assert answer.error in ("ok", "Failed"), answer
    assert host.isolated() == (frozenset({4, 5}) if answer.error == "ok" else frozenset())
    sys.stdout.write(f"{answer.error}; carol waited for {meanwhile:.1f} s\n")
    assert program.call("Release", "us", program.user.uid, "vm").error == "ok"
    assert host.isolated() == frozenset()


@pytest.mark.attack("S10")
def test_sizes_that_no_limit_can_be(program: Claimant, helper_toml: Callable[..., None]) -> None:
    helper_toml('[[limits]]\nmemlock = "infinity"\n')
    child = program.spawn(0)
    for size in (2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1):
        assert program.set_memlock(child, "vm", size).body == [size]
        assert host.limit(child.pid, "Max locked memory") in ((size, size), (host.INFINITY, host.INFINITY))


@pytest.mark.attack("A16")
def test_a16_starting_it_over_and_over(carol: User, program: Claimant) -> None:
    """Through systemd, as anybody may; each time it really starts, and leaves."""
    start = "org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus StartServiceByName su"
    stop_helper()
    for _ in range(3):
        carol.login.run(f"busctl call {start} org.qemulauncher.Helper1 0", check=True)
        assert host.helper() is not None
        stop_helper()
    start_helper()
    assert program.call("GetLimits", "").error == "ok"
    assert subprocess.run(["systemctl", "is-failed", "--quiet", HELPER_UNIT], check=False).returncode != 0
