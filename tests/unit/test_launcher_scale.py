"""A VM of many vCPUs: whatever the launcher does about each of them, it does not do for each pair of them.

Counted are Python's own instructions, so that no clock, and no other program, has a part in it. What is pure is counted
here; what is read from /proc and from the cgroup tree, in tests/system/test_scale.py.
"""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from qemu_launcher import definition as definitions, fitting, host, plan, procfs, readback, status, table, threads
from qemu_launcher.control import State
from qemu_launcher.procfs import Process, Scheduling
from qemu_launcher.record import Record

FEW, MANY = 64, 1020
TID, OTHERS = 5_000_000, 9_000_000  # the first of the vCPUs' and of others; no process has such a number, nor have we
# Twice as many vCPUs are twice the work and a little more: numbers get longer, tables are made larger.
SLACK = 1.15


def instructions(act: Callable[[], object]) -> int:
    """How many bytecode instructions of Python it takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.disable()  # whose callbacks are Python too, of other libraries
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def text(count: int, *, by_place: bool, isolation: str = "cpuset") -> bytes:
    """A definition of so many vCPUs, each with a CPU of its own."""
    if by_place:
        cores = "".join(f"      {core}: {{0: {2 * core}, 1: {2 * core + 1}}}\n" for core in range(count // 2))
        pinning = f"  vcpu_pinning:\n    0:\n{cores}"
    else:
        pinning = f"  vcpu_pinning: [{', '.join(map(str, range(count)))}]\n"
    keys = f"  binary: q\n  isolation: {isolation}\n  scheduler: fifo\n  priority: 1\n{pinning}"
    return f"launcher:\n{keys}qemu:\n- smp: {count},sockets=1,cores={count // 2},threads=2\n".encode()


def answers(count: int) -> tuple[list[Any], list[Any]]:
    """QEMU's: of the vCPUs that are there, and of those that may be."""
    props = [{"socket-id": 0, "core-id": index // 2, "thread-id": index % 2} for index in range(count)]
    there = [{"cpu-index": index, "thread-id": TID + index, "props": one} for index, one in enumerate(props)]
    return there, [{"props": one, "vcpus-count": 1, "qom-path": "/x"} for one in props]


def planned(count: int, *, by_place: bool = False, isolation: str = "cpuset") -> plan.ThreadPlan:
    """What is to be done with the threads."""
    definition = definitions.parse(text(count, by_place=by_place, isolation=isolation), Path("/x/a.yml"), "a")
    return plan.thread_plan(definition, threads.read_threads(*answers(count), []))


def expect_linear(name: str, work: Callable[[int], Callable[[], object]]) -> None:
    """`work`: makes what is to be counted, for so many vCPUs."""
    few, many = (instructions(work(count)) / count for count in (FEW, MANY))
    sys.stdout.write(f"{name}: {few:.0f} instructions for each of {FEW} vCPUs, {many:.0f} for each of {MANY}\n")
    assert many <= few * SLACK


@pytest.mark.parametrize("by_place", [False, True])
def test_the_definition(by_place: bool) -> None:
    def work(count: int) -> Callable[[], object]:
        data = text(count, by_place=by_place)
        return lambda: definitions.parse(data, Path("/x/a.yml"), "a")

    expect_linear(f"definition, {'by place' if by_place else 'a list'}", work)


def test_the_host() -> None:
    def work(count: int) -> Callable[[], object]:
        definition = definitions.parse(text(count, by_place=False, isolation="shield"), Path("/x/a.yml"), "a")
        cpus = frozenset(range(count))
        here = host.Host(cpus, cpus, {cpu: frozenset({cpu & ~1, cpu | 1}) for cpu in cpus})
        return lambda: fitting.validate_against_host(definition, here)

    expect_linear("against the host", work)


@pytest.mark.parametrize("by_place", [False, True])
def test_the_plan(by_place: bool) -> None:
    def work(count: int) -> Callable[[], object]:
        there, possible = answers(count)
        definition = definitions.parse(text(count, by_place=by_place), Path("/x/a.yml"), "a")
        return lambda: plan.thread_plan(definition, threads.read_threads(there, possible, []))

    expect_linear(f"plan, {'by place' if by_place else 'a list'}", work)


@pytest.mark.parametrize("isolation", ["shield", "cpuset"])
def test_the_look_at_the_kernel(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many emulator threads as vCPUs, as those are that no key names."""

    def work(count: int) -> Callable[[], object]:
        wanted = planned(count, isolation=isolation)
        where = {pin.tid: pin.cpus for pin in wanted.pins}
        everybody = (*where, *range(OTHERS, OTHERS + count))
        monkeypatch.setattr(procfs, "tids", lambda _: everybody)
        monkeypatch.setattr(procfs, "allowed_cpus", lambda _, tid: where.get(tid, frozenset({4000})))
        monkeypatch.setattr(procfs, "scheduling", lambda _: Scheduling("fifo", 1, reset_on_fork=True))

        def look() -> None:
            assert readback.thread_differences(os.getpid(), wanted, ()) == []

        return look

    expect_linear(f"read back, {isolation}", work)


def test_the_record() -> None:
    def work(count: int) -> Callable[[], object]:
        cpus = frozenset(range(count))
        record = Record(Process(1, 1), Process(2, 2), vcpus={i: TID + i for i in range(count)}, cpus=cpus)

        def there_and_back() -> None:
            assert Record.decode(record.encode()) == record

        return there_and_back

    expect_linear("lock file", work)


def test_the_picture() -> None:
    def work(count: int) -> Callable[[], object]:
        scheduling = Scheduling("fifo", 1, reset_on_fork=True)
        vcpus = [status.Vcpu(i, TID + i, frozenset({i}), True, "isolated", scheduling) for i in range(count)]
        picture = status.Picture("a", State("running"), pid=2, vcpus=tuple(vcpus))
        record = Record(vcpus={}, isolation="shield", cpus=frozenset(range(count)))

        def show() -> None:
            assert status.lost_shield("a", record, vcpus, record.cpus) is None
            status.draw([picture], page := table.PlainPage())
            assert page.text
            picture.as_json()

        return show

    expect_linear("status", work)
