"""A VM's life with a helper to which something happens at one of its steps, and what has to be so afterwards.

The steps are counted by the helper as it comes to them (faulty_helper.py); no list of them is kept anywhere. At each
(of a loop that does the same for many tasks, in the first turn, a middle one and the last) one thing happens: an error
of the kernel's or systemd's, or the death of the helper, of the VM or of its caller. Then:

- the guest is not half tuned: what the helper says is granted holds, or nothing does (test_crash_only.expect_sound);
- with the VM gone no shield, scope or record is left, and each task of the host may use all the CPUs it could before;
- the next VM of the same name is pinned and shielded, and gets its memory. The next point begins with just that, so it
  is looked at closely after some of them only.

Each run on Debian 13 kills the helper at each of its steps, and tries all where real time is taken back; of all else
`QEMU_LAUNCHER_ROUNDS=N` tries N points of each kind instead of a few, `make test-exhaustive` all. QEMU_LAUNCHER_SEED=N
chooses others, QEMU_LAUNCHER_SHARE=2/3 the second third of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from system import host
from system.claims import Answer, Child, Claimant
from system.faults import ROUNDS, Affinities, Faults, Point, say, tellable, try_all
from system.test_crash_only import expect_sound, limits_of

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


def granted(program: Claimant, faults: Faults) -> tuple[Child, dict[str, tuple[int, int]]]:
    """A VM that has everything, and its limits before."""
    assert faults.order()
    child = program.spawn(3)
    before = limits_of(child)
    assert live(program, child, 3).error == "ok"
    return child, before


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
    rounds: int = ROUNDS,
) -> None:
    """Try those that are this run's."""
    try_all(points, what, tried, rounds, now_and_then=lambda: expect_next_start(program, faults))
