"""Whatever fails, or ends, at whichever step of the helper's: after its next start the host is sound.

The steps are counted by the helper as it comes to them (faulty_helper.py); no list of them is kept anywhere. At each
(of a loop that does the same for many tasks, in the first turn, a middle one and the last) one thing happens: an error
of the kernel's or systemd's, or the death of the helper, of the VM or of its caller. Then:

- the guest is not half tuned: what the helper says is granted holds, or nothing does (test_crash_only.expect_sound);
- with the VM gone no shield, scope or record is left, and each task of the host may use all the CPUs it could before;
- the next VM of the same name is pinned and shielded, and gets its memory. The next point begins with just that, so it
  is looked at closely after some of them only.

Each run on Debian 13 kills the helper at each of its steps, tries all where real time is taken back, and a tenth of
each other kind; elsewhere it tries a few of each. QEMU_LAUNCHER_ROUNDS=N has it try N of each kind, `make
test-exhaustive` all; QEMU_LAUNCHER_SEED=N chooses others, QEMU_LAUNCHER_SHARE=2/3 the second third of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from system import host
from system.claims import Answer, Apprentice, Child, Claimant
from system.faults import Faults, NotComeBy, Point, answer_or_halt, often, say, some, tellable, try_all
from system.test_crash_only import expect_sound, leave_scope, limits_of

WHY = "each mechanism has steps of its own"
pytestmark = pytest.mark.hosts("trixie", more=("bookworm", "legacy", "openrc", "openrc-v1"), why=WHY)

VM = "vm"
ERRORS = ("EINVAL", "EIO", "ENOSPC", "EBUSY")
Call = tuple[Any, ...]
Steps = list[tuple[int, str]]  # when it comes, from 0, and what it is
ENUMERATED: dict[tuple[str, ...], Steps] = {}


def calls(program: Claimant, child: Child) -> list[Call]:
    """A VM's life: each operation once for the first time, once more with something else, and the end of all."""
    first, second, third = child.tids

    def pins(*cpus: int) -> list[Any]:
        shielded = [[tid, [cpu], True] for tid, cpu in zip((first, second), cpus, strict=True)]
        return [*shielded, [third, [2], False]]

    return [
        ("SetMemlock", "ust", child.pid, VM, 64 << 20),
        ("PinThreads", "usa(uaub)au", child.pid, VM, pins(4, 5), [1]),
        ("SetScheduler", "usausu", child.pid, VM, [first, second], "fifo", 1),
        ("PinThreads", "usa(uaub)au", child.pid, VM, pins(5, 4), [1]),
        ("SetScheduler", "usausu", child.pid, VM, [first, second], "rr", 2),
        ("SetMemlock", "ust", child.pid, VM, 32 << 20),
        ("Release", "us", program.user.uid, VM),
    ]


def live(program: Claimant, child: Child, until: int = 7) -> Answer:
    """Live so, up to the first call that is refused; the last answer."""
    answer = Answer("ok", [])
    for call in calls(program, child)[:until]:
        answer = program.call(*call)
        if answer.error != "ok":
            break
    return answer


class Affinities:
    """Where each task of the host may run, while there is no VM."""

    def __init__(self) -> None:
        self._before = self._now()

    def expect_back(self) -> None:
        """No task has fewer CPUs than before, nor has a new one. (The kernel lets some of its own have more.)

        Those that the kernel alone may move are left out: it sends the rescuers of its work queues, rcu_gp say, to the
        CPU where they are needed, and leaves them there.
        """
        # The kernel gives its own workers their CPUs back in a work item of its own: not at once on a busy host.
        end = time.monotonic() + host.PATIENCE
        while (lost := self._lost()) and time.monotonic() < end:
            time.sleep(0.3)
        assert lost == {}, "tasks that have lost CPUs"
        assert host.born_of_us() == host.online()

    def _lost(self) -> dict[tuple[int, int, int], list[int]]:
        return {key: sorted(cpus) for key, cpus in self._now().items() if not cpus >= self._before.get(key, cpus)}

    @staticmethod
    def _now() -> dict[tuple[int, int, int], frozenset[int]]:
        ours_to_move = [thread for thread in host.threads() if not thread.belongs_to_its_cpu]
        return {(thread.pid, thread.tid, thread.born): thread.cpus for thread in ours_to_move}


@pytest.fixture
def affinities() -> Affinities:
    """Taken before the test."""
    return Affinities()


def steps(faults: Faults, during: str, least: int, *kinds: str) -> Steps:
    """What was counted; and nothing went past the count, nor has it become less than it was when this was written."""
    found = faults.steps()
    assert [name for name in found if name.startswith("missed:")] == []
    assert len(found) >= least, f"only {len(found)} steps of {kinds} during {during}: {found}"
    say(f"{len(found)} steps of {'/'.join(kinds)} during {during}")
    return [(at, found[at]) for at in tellable(found)]


def enumerate_calls(program: Claimant, faults: Faults, least: int, *kinds: str) -> Steps:
    """All steps of a life in which nothing goes wrong."""
    if kinds not in ENUMERATED:
        faults.order_calls(*kinds)
        child = program.spawn(3)
        assert live(program, child).error == "ok"
        ENUMERATED[kinds] = steps(faults, "calls", least, *kinds)
        expect_gone(program, child, faults)
    return ENUMERATED[kinds]


def expect_gone(program: Claimant, child: Child, faults: Faults) -> None:
    """The VM ends, the helper starts: nothing is left."""
    program.end(child.pid)  # one that was killed is still to be reaped
    assert faults.order()
    host.wait_until_as_before()


def expect_next_start(program: Claimant, faults: Faults) -> None:
    """Another process, the same name: it gets its memory and its CPUs."""
    child = program.spawn(3)
    answer = live(program, child, 2)
    assert answer.error == "ok", answer
    assert host.isolated() == {4, 5}
    assert host.limit(child.pid, "Max locked memory") == (64 << 20, 64 << 20)
    assert [host.cpus_of(child.pid, tid) for tid in child.tids] == [{4}, {5}, {2}]
    program.end(child.pid)
    faults.order()
    host.wait_until_as_before()  # else systemd may still have the scope that the next point begins with


@contextlib.contextmanager
def to_its_end(program: Claimant, child: Child, faults: Faults, affinities: Affinities) -> Iterator[None]:
    """Whatever happens in the block, the VM ends and the helper starts; and if it went well, all is as it was."""
    try:
        yield
    finally:
        expect_gone(program, child, faults)
    affinities.expect_back()


def expect_whole(child: Child, before: dict[str, tuple[int, int]], last: Answer) -> None:
    """A VM that still lives, after the helper has been started again, is tuned as granted or not at all."""
    expect_sound(child, before)
    claimed = host.exclusive()
    assert bool(claimed) == bool(host.isolated()), claimed
    if last.error == "ok":
        return
    for tid in host.realtime_threads():
        assert host.cpus_of(child.pid, tid) <= host.isolated()


def try_with(
    program: Claimant,
    faults: Faults,
    points: list[Point],
    what: str,
    tried: Callable[[Point], None],
    rounds: int | None = None,
) -> None:
    """Try those that are this run's."""
    rounds = some(points) if rounds is None else rounds
    try_all(points, what, tried, rounds, now_and_then=lambda: expect_next_start(program, faults))


def test_a17_each_step_fails_once(program: Claimant, faults: Faults, affinities: Affinities) -> None:
    found = enumerate_calls(program, faults, 130, "act", "ask")
    points = [
        Point(at, name, do)
        for at, name in found
        if not name.endswith(" answered")
        for do in ((*ERRORS, "lose") if name.startswith("ask:") else ERRORS)
        if not (name.startswith("ask:") and do in ERRORS[1:])  # whatever systemd says, a refusal is a refusal
    ]

    def one(point: Point) -> None:
        faults.order_calls("act", "ask", at=point.at, do=point.do)
        child = program.spawn(3)
        before = limits_of(child)
        with to_its_end(program, child, faults, affinities):
            last = live(program, child)
            if len(faults.steps()) <= point.at:
                raise NotComeBy
            assert faults.order()
            expect_whole(child, before, last)

    try_with(program, faults, points, "an error at a step of a call", one)


def test_a17_killed_before_each_step(program: Claimant, faults: Faults, affinities: Affinities) -> None:
    found = enumerate_calls(program, faults, 140, "act", "ask", "end")

    def one(point: Point) -> None:
        faults.order_calls("act", "ask", "end", at=point.at, do="kill")
        child = program.spawn(3)
        before = limits_of(child)
        with to_its_end(program, child, faults, affinities):
            last = live(program, child)
            if last.error == "ok":
                raise NotComeBy
            assert last.error == "NoReply", last
            assert faults.order()
            expect_whole(child, before, last)

    points = [Point(at, name, "SIGKILL of the helper") for at, name in found]
    try_with(program, faults, points, "death of the helper at a step of a call", one, often(points))


# With cpusets of v1 a step is a task of the host's, of which there are never as many as a moment ago.
@pytest.mark.hosts("trixie", more=("bookworm", "openrc"), why="its steps have to be the same ones each time")
def test_a17_killed_while_real_time_is_taken_back(program: Claimant, faults: Faults, affinities: Affinities) -> None:
    """The last call of a life: what the record says by then must do for what is still so."""

    def halfway() -> tuple[Child, dict[str, tuple[int, int]], Call]:
        child, before = granted(program, faults)
        return child, before, ("SetScheduler", "usausu", child.pid, VM, child.tids[:2], "other", 0)

    child, _, call = halfway()
    assert faults.order("calls", "act", "end")
    assert program.call(*call).error == "ok"
    found = steps(faults, "SetScheduler to other", 5, "act", "end")
    expect_gone(program, child, faults)

    def one(point: Point) -> None:
        child, before, call = halfway()
        with to_its_end(program, child, faults, affinities):
            assert faults.order("calls", "act", "end", at=point.at, do=point.do)
            last = program.call(*call)
            assert last.error == "NoReply" if point.do == "kill" else last.error != "NoReply", last
            assert faults.order()
            expect_whole(child, before, last)
            assert host.isolated() or host.realtime_threads() == set()

    points = [
        Point(at, name, do)
        for at, name in found
        for do in (*ERRORS[:1], "kill")
        if do == "kill" or not name.startswith("end:")
    ]
    try_with(program, faults, points, "an error or death while real time is taken back", one, often(points))


def until_halt(program: Claimant, child: Child, faults: Faults, act: Callable[[], object]) -> Answer:
    """Live, and have `act` happen while the helper stands at its step; the last answer."""
    halted, answer = False, Answer("ok", [])
    for call in calls(program, child):
        program.begin(*call)
        if not halted and answer_or_halt(program, faults):
            halted = True
            act()
            faults.go()
        answer = program.finish()
        if answer.error != "ok":
            break
    if not halted:
        raise NotComeBy
    return answer


@pytest.mark.parametrize("reaped", [False, True])
def test_a17_the_vm_ends_at_each_step(program: Claimant, faults: Faults, affinities: Affinities, reaped: bool) -> None:
    found = enumerate_calls(program, faults, 600, "act", "ask", "end", "look")
    if reaped:
        program.disown()  # at once, as by a launcher, although its parent waits for the helper

    def one(point: Point) -> None:
        faults.order_calls("act", "ask", "end", "look", at=point.at, do="wait")
        child = program.spawn(3)
        with to_its_end(program, child, faults, affinities):
            answer = until_halt(program, child, faults, lambda: program_end(child))
            assert "journal" not in answer.text, "the helper has no words for it"

    def program_end(child: Child) -> None:
        os.kill(child.pid, signal.SIGKILL)
        host.wait_for("the VM has ended", lambda: not host.is_alive(child.pid))

    points = [Point(at, name, "SIGKILL of the VM") for at, name in found]
    try_with(program, faults, points, f"death of the VM at a step of a call (reaped: {reaped})", one)


def test_a17_the_caller_ends_at_each_step(program: Claimant, faults: Faults, affinities: Affinities) -> None:
    found = enumerate_calls(program, faults, 600, "act", "ask", "end", "look")

    def one(point: Point) -> None:
        faults.order_calls("act", "ask", "end", "look", at=point.at, do="wait")
        with Apprentice(program) as caller:
            child = caller.spawn(3)
            before = limits_of(child)

            def end() -> None:
                os.kill(caller.pid, signal.SIGKILL)
                host.wait_for("the caller has ended", lambda: not host.is_alive(caller.pid))

            last = until_halt(caller, child, faults, end)
            assert last.error == "died"
            assert faults.order()
            expect_whole(child, before, last)
        expect_gone(program, child, faults)
        affinities.expect_back()

    points = [Point(at, name, "SIGKILL of the caller") for at, name in found]
    try_with(program, faults, points, "death of the caller at a step of a call", one)


def leave(program: Claimant, child: Child) -> None:
    leave_scope(program, child.pid)


def end(program: Claimant, child: Child) -> None:
    program.end(child.pid)


def granted(program: Claimant, faults: Faults) -> tuple[Child, dict[str, tuple[int, int]]]:
    """A VM that has everything, and its limits before."""
    assert faults.order()
    child = program.spawn(3)
    before = limits_of(child)
    assert live(program, child, 3).error == "ok"
    return child, before


def test_a17_each_step_after_the_vm_has_ended(program: Claimant, faults: Faults, affinities: Affinities) -> None:
    clean_up(program, faults, affinities, end, 4)


@pytest.mark.hosts("trixie", more=("bookworm", "legacy"), why="it is systemd that lets users move their processes")
def test_a17_each_step_after_the_vm_has_left_its_scope(
    program: Claimant, faults: Faults, affinities: Affinities
) -> None:
    clean_up(program, faults, affinities, leave, 11)


def clean_up(
    program: Claimant, faults: Faults, affinities: Affinities, how: Callable[[Claimant, Child], None], least: int
) -> None:
    """The helper starts because a VM has ended or left its scope. That start fails, or dies; the next is sound."""
    kinds = ("act",)
    child, _ = granted(program, faults)
    how(program, child)
    faults.order("start", *kinds)
    found = steps(faults, "start", least, *kinds)
    expect_gone(program, child, faults)

    def one(point: Point) -> None:
        child, before = granted(program, faults)
        with to_its_end(program, child, faults, affinities):
            how(program, child)
            faults.order("start", *kinds, at=point.at, do=point.do)
            if len(faults.steps()) <= point.at:
                raise NotComeBy
            faults.order()
            if how is leave:
                expect_whole(child, before, Answer("stray", []))
                assert limits_of(child) == before
                assert host.realtime_threads() == set()
                assert host.isolated() == frozenset()

    points = [Point(at, name, do) for at, name in found for do in (*ERRORS, "kill")]
    try_with(program, faults, points, f"an error or death at a step of the clean-up ({how.__name__})", one)
