"""At whichever step of the helper's a VM or its caller ends: after its next start the host is sound (lives.py)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from system import host
from system.claims import Answer, Apprentice, Child, Claimant
from system.faults import Affinities, Faults, NotComeBy, Point, answer_or_halt
from system.lives import calls, enumerate_calls, expect_gone, expect_whole, to_its_end, try_with
from system.test_crash_only import limits_of

WHY = "each mechanism has steps of its own"
pytestmark = pytest.mark.hosts("trixie", more=("bookworm", "legacy", "openrc", "openrc-v1"), why=WHY)


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
