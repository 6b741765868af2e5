"""Whom the helper acts on: attacks A5, A6, A7 and A20, with programs of real users against the real kernel.

Each refusal has its control beside it: the same call about the caller's own child reaches the act and changes it.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from system import host
from system.claims import Answer, Child, Claimant
from system.people import User, service_command
from system.stepping import Stepping

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


class State(NamedTuple):
    """All of a process that the helper could change."""

    scheduling: dict[int, tuple[str, int, bool]]
    cpus: dict[int, frozenset[int]]
    cgroups: dict[int, Path]
    limits: str


def state(pid: int) -> State:
    tids = host.tids(pid)
    return State(
        {tid: host.scheduling(tid) for tid in tids},
        {tid: host.cpus_of(pid, tid) for tid in tids},
        {tid: host.cgroup(pid, tid) for tid in tids},
        (host.PROC / f"{pid}/limits").read_text(),
    )


class NumberTaken(Exception):  # noqa: N818  that is what happened
    """Somebody else has it: the kernel starts threads of its own whenever it likes."""


@contextmanager
def born_as(pid: int, user: User) -> Iterator[int]:
    """A process of `user`'s with this number, which must be free; NumberTaken when it is not for a while."""
    command = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups", "sleep", "600"]
    with ExitStack() as stack:
        for _ in range(50):
            LAST_PID.write_text(str(pid - 1))
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
            if process.pid == pid:
                host.wait_for("it has become that user's", lambda: host.status(pid)["Name"] == "sleep")
                yield pid
                return
            process.kill()
        raise NumberTaken(pid)


def calls(program: Claimant, pid: int, tids: list[int], vm: str = "vm") -> dict[str, Callable[[], Answer]]:
    """The three operations on this process, and these threads."""
    pins = [[tid, [4 + place], True] for place, tid in enumerate(tids)]
    return {
        "memlock": lambda: program.call("SetMemlock", "ust", pid, vm, 64 << 20),
        "pin": lambda: program.call("PinThreads", "usa(uaub)au", pid, vm, pins, []),
        "schedule": lambda: program.call("SetScheduler", "usausu", pid, vm, tids, "batch", 0),
    }


@contextmanager
def inherited(
    child: Child, number: int, heir: User, call: Callable[[], Answer], stepping: Stepping, step: str
) -> Iterator[tuple[int, Callable[[], Answer]]]:
    """While the helper stands at `step` of `call`, the child has ended, and a number of its is a process of `heir`'s.

    Gives that, and what lets the helper go on and returns its answer. NumberTaken when it is somebody else's.
    """
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    with stepping.halted_at(step) as halt:

        def answer() -> Answer:
            halt.close()
            thread.join(host.PATIENCE)
            return answers[0]

        thread.start()
        host.wait_for(f"the helper comes to: {step}", lambda: halt.reached)
        os.kill(child.pid, 9)
        host.wait_for("the number is free", lambda: not (host.PROC / str(child.pid)).exists())
        try:
            with born_as(number, heir) as pid:
                yield pid, answer
        finally:
            answer()


def until_free(tried: Callable[[], None]) -> None:
    """Try it again with another child as long as the number of the last one was taken before."""
    for _ in range(5):
        with suppress(NumberTaken):
            return tried()
    pytest.fail("the number was somebody else's each time")


@pytest.mark.attack("A5")
@pytest.mark.parametrize(
    ("step", "during", "whose"),
    [
        ("record", "memlock", "pid"),
        ("before scope", "memlock", "pid"),
        ("before limit", "memlock", "pid"),
        ("before move", "pin", "tid"),
        ("before one thread", "schedule", "tid"),
    ],
)
def test_a5_a_number_that_becomes_anothers(
    program: Claimant, carol: User, stepping: Stepping, step: str, during: str, whose: str
) -> None:
    """Between the last look at the target and the act on it, the target ends and its number is a process of carol's."""
    program.disown()

    def tried() -> None:
        child = program.spawn(1)
        if during == "schedule":
            assert program.pin(child, "vm", 4).error == "ok"
        number, call = child.pid if whose == "pid" else child.tids[0], calls(program, child.pid, child.tids)[during]
        with inherited(child, number, carol, call, stepping, step) as (victim, answer):
            before = state(victim)
            assert before.scheduling[victim] == ("other", 0, False)
            assert answer().error in ("TargetRefused", "Failed")
            assert host.is_alive(victim)

            def is_where_she_was() -> bool:
                now = state(victim)
                # The dead VM's CPUs may come back to her only now.
                more = all(now.cpus[tid] >= cpus for tid, cpus in before.cpus.items())
                return more and now._replace(cpus=before.cpus) == before

            host.wait_for("she is where she was", is_where_she_was, seconds=30)

    until_free(tried)


@pytest.mark.attack("A5")
def test_a5_a_number_that_becomes_another_of_ones_own(program: Claimant, alice: User, stepping: Stepping) -> None:
    """It does not go to its parent's group, as anybody else's would: its user can have it adopted by PID 1."""
    program.disown()

    def tried() -> None:
        child = program.spawn(1)
        call = calls(program, child.pid, child.tids)["memlock"]
        with inherited(child, child.pid, alice, call, stepping, "before scope") as (heir, answer):
            assert host.slice_of(alice.uid) not in host.cgroup(heir).parents
            assert answer().error == "TargetRefused"
            host.wait_for("it has ended with the VM's scope", lambda: not host.is_alive(heir))

    until_free(tried)


def strangers(program: Claimant, other: Claimant) -> dict[str, tuple[int, list[int], int | None]]:
    """What is not a QEMU of the program's own: a PID, TIDs, and the process that must not change."""
    mine, hers, second = program.spawn(1), other.spawn(1), program.spawn(1)
    assert other.pin(hers, "hers", 6).error == "ok"
    helper = host.helper()
    assert helper is not None
    kernel = next(thread.pid for thread in host.threads() if thread.of_kernel and thread.pid != 2)
    return {
        "another user's VM": (hers.pid, hers.tids, hers.pid),
        "TID of another user's VM": (mine.pid, hers.tids, hers.pid),
        "TID of another process of one's own": (mine.pid, second.tids, second.pid),
        "one's own login": (host.parent(mine.pid), [host.parent(mine.pid)], host.parent(mine.pid)),
        "a thread as process": (mine.tids[0], mine.tids, mine.pid),
        "the helper": (helper, [helper], helper),
        "PID 1": (1, [1], 1),
        "a kernel thread": (kernel, [kernel], kernel),
        "0": (0, [0], None),
        "-1": (2**32 - 1, [2**32 - 1], None),
        "a free number": (2**22 - 1, [2**22 - 1], None),
    }


@pytest.mark.attack("A6")
def test_a6_whom_one_may_not_name(program: Claimant, carol: User) -> None:
    with Claimant(carol) as other:
        everybody = strangers(program, other)
        for what, (pid, tids, victim) in everybody.items():
            before = state(victim) if victim else None
            for name, call in calls(program, pid, tids, vm="mine").items():
                if name == "memlock" and what.startswith("TID"):
                    continue  # it names no threads
                answer = call()
                assert answer.error == "TargetRefused", (what, name, answer)
            assert before is None or victim is None or state(victim) == before, what
        assert host.isolated() == {6, 7}, "hers alone"
        # Control: the same calls about a child of one's own.
        child = program.spawn(1)
        for name, call in calls(program, child.pid, child.tids, vm="control").items():
            before = state(child.pid)
            assert call().error == "ok", name
            assert state(child.pid) != before, name


@pytest.fixture(params=["user", "user and pid"])
def elsewhere(request: pytest.FixtureRequest, alice: User) -> Iterator[tuple[str, Claimant]]:
    """A program of alice's that has gone into namespaces of its own, where it may call itself anything."""
    pid = ["--pid", "--fork"] if "pid" in request.param else []
    with Claimant(alice, "unshare", "--user", "--map-current-user", *pid) as program:
        yield request.param, program


@pytest.mark.attack("A7")
def test_a7_a_target_in_namespaces_of_its_own(elsewhere: tuple[str, Claimant], program: Claimant) -> None:
    kind, hidden = elsewhere
    child = hidden.spawn(1)
    real = child.pid
    if "pid" in kind:
        real = next(pid for pid in host.pids() if host.namespaced(pid) == child.pid)
    assert host.status(real)["Name"] == "qemu-system-x86"
    before = state(real)
    refused = hidden.call("SetMemlock", "ust", real, "vm", 64 << 20)
    assert refused.error == "TargetRefused"
    assert "is in another" in refused.text
    assert "namespace" in refused.text
    assert state(real) == before
    if "pid" not in kind:
        # Moving out of the namespace again, or into it after the check, is no way: it is a fact of the process.
        assert hidden.call("SetScheduler", "usausu", real, "vm", child.tids, "batch", 0).error == "TargetRefused"
    control = program.spawn(1)
    assert program.set_memlock(control, "vm", 64 << 20).error == "ok"


@pytest.mark.attack("A7")
def test_a7_a_setuid_program_in_flight(program: Claimant) -> None:
    child = program.spawn(0)
    assert program.set_memlock(child, "control", 64 << 20).error == "ok"
    second = program.spawn(0)
    program.tell(second, "exec", argv=["/usr/bin/su", "root", "-c", "true"])
    host.wait_for("it is root's by its effective uid", lambda: host.status(second.pid)["Uid"].split()[1] == "0")
    before = (host.PROC / f"{second.pid}/limits").read_text()
    refused = program.set_memlock(second, "vm", 64 << 20)
    assert (refused.error, refused.text) == ("TargetRefused", f"Process {second.pid} does not run as you")
    assert (host.PROC / f"{second.pid}/limits").read_text() == before


@pytest.mark.attack("A7")
def test_a7_what_calls_itself_qemu_gets_what_limits_allow(program: Claimant, helper_toml: Callable[..., None]) -> None:
    """Another program under QEMU's name, and the real QEMU with foreign code in it: both are served, and bounded."""
    helper_toml('[[limits]]\nmax_cpus = 2\nmemlock = "64M"\nmax_priority = 1\n')
    fake, loaded = program.spawn(2), program.spawn(0)
    assert b"python" in (host.PROC / f"{fake.pid}/exe").readlink().name.encode()
    program.tell(
        loaded,
        "exec",
        argv=["/usr/bin/qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-accel", "tcg,tb-size=8"],
        env={"LD_PRELOAD": "/usr/lib/x86_64-linux-gnu/libmemusage.so"},
    )
    host.wait_for("QEMU has started", lambda: len(host.tids(loaded.pid)) > 1)
    assert (host.PROC / f"{loaded.pid}/exe").readlink().name == "qemu-system-x86_64"
    assert "libmemusage" in (host.PROC / f"{loaded.pid}/maps").read_text()
    for name, child in ("fake", fake), ("loaded", Child(loaded.pid, sorted(host.tids(loaded.pid))[-1:])):
        assert program.set_memlock(child, name, 2**64 - 1).body == [64 << 20]
        assert program.pin(child, name, 4, 5).error == "ok"
        assert program.schedule(child, name, "fifo", 2).error == "LimitExceeded"
        assert program.schedule(child, name, "fifo", 1).error == "ok"
        assert host.realtime_threads() == set(child.tids)
        assert host.isolated() == {4, 5}
        assert program.call("Release", "us", program.user.uid, name).error == "ok"
        program.end(child.pid)


@pytest.mark.attack("A20")
@pytest.mark.parametrize(
    "properties",
    [["MemoryMax=200M"], ["Slice=machine.slice"], ["Slice=user-1002.slice"], ["Slice=user.slice"]],
    ids=["a service with a limit", "a container's slice", "another user's slice", "the slice of all users"],
)
def test_a20_a_target_in_somebody_elses_cgroup(
    alice: User, carol: User, helper_toml: Callable[..., None], properties: list[str]
) -> None:
    """Being moved into a scope would lift what a service's unit says: memory, tasks, devices, addresses."""
    assert carol.uid == 1002
    with Claimant(alice, start=service_command("hers.service", *properties, user="alice")) as program:
        child = program.spawn(1)
        before = state(child.pid)
        for name, call in calls(program, child.pid, child.tids).items():
            refused = call()
            assert refused.error == "TargetRefused", name
            assert "is in no session or service of yours" in refused.text
        assert state(child.pid) == before
        if properties == ["MemoryMax=200M"]:
            # Control: where the administrator names the service, its processes are served.
            helper_toml('services = ["hers.service"]\n')
            assert program.set_memlock(child, "vm", 64 << 20).error == "ok"
            assert host.limit(child.pid, "Max locked memory")[1] == 64 << 20
            slices = host.CGROUP / "system.slice" if host.mechanism() == "partition" else host.VMS
            assert host.cgroup(child.pid).is_relative_to(slices)
