"""Whichever step of the helper's fails, or is its last: after its next start the host is sound (lives.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from system import host
from system.claims import Answer, Child, Claimant
from system.faults import Affinities, Faults, NotComeBy, Point, often
from system.lives import (
    ERRORS,
    VM,
    Call,
    enumerate_calls,
    expect_gone,
    expect_whole,
    granted,
    live,
    steps,
    to_its_end,
    try_with,
)
from system.test_crash_only import leave_scope, limits_of

WHY = "each mechanism has steps of its own"
pytestmark = pytest.mark.hosts("trixie", more=("bookworm", "legacy", "openrc", "openrc-v1"), why=WHY)


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


def leave(program: Claimant, child: Child) -> None:
    leave_scope(program, child.pid)


def end(program: Claimant, child: Child) -> None:
    program.end(child.pid)


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
