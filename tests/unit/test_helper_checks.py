"""What would be answered for a VM that is still to be started: as the real call, and without doing anything."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from qemu_launcher_helper import limits, records
from qemu_launcher_helper.contract import Caller, Pin, Refusal
from qemu_launcher_helper.limits import Limits, Settings
from qemu_launcher_helper.operations import Operation
from qemu_launcher_helper.records import Record

ALICE, BOB = 1000, 1001
GIB = 2**30
CORES = [frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5}), frozenset({6, 7})]
HELD = Record(BOB, "work", 4711, 99, "/bob.scope", memlock=4 * GIB, shielded=frozenset({6, 7}))
OWN = Record(ALICE, "old", 4712, 99, "/alice.scope", memlock=4 * GIB, shielded=frozenset({4, 5}))


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Four cores of two siblings, 16 GiB, a kernel that can shield, and a place where nothing may be written."""
    monkeypatch.setattr(limits, "read_cores", lambda: CORES)
    monkeypatch.setattr(limits, "lockable_bytes", lambda: 14 * GIB)
    monkeypatch.setattr(limits, "account", {ALICE: ("alice", ALICE), BOB: ("bob", BOB)}.__getitem__)
    monkeypatch.setattr(records.MECHANISM, "lacks", lambda: "")
    monkeypatch.setattr(records, "GRANTS", tmp_path / "grants")
    monkeypatch.setattr(limits, "RT_RUNTIME", tmp_path / "sched_rt_runtime_us")
    (tmp_path / "sched_rt_runtime_us").write_text("950000\n")
    return tmp_path


def answer(call: str, *arguments: Any, own: Limits | None = None, live: tuple[Record, ...] = (HELD,)) -> str:
    """What alice is told: the value as text, or the refusal's class and text."""
    caller = Caller(":1.7", ALICE, 4000, "alice", ALICE)
    operation = Operation(caller, Settings(), own or Limits(), list(live), None)  # type: ignore[arg-type]  # no bus
    checking: Coroutine[Any, Any, Any] = getattr(operation, call)(*arguments)
    try:
        return str(asyncio.run(checking))
    except Refusal as err:
        return f"{type(err).__name__}: {err}"


def pins(*cpus: int, shielded: bool = True) -> tuple[Pin, ...]:
    return tuple(Pin(number, frozenset({cpu}), shielded) for number, cpu in enumerate(cpus, 2))


NONE = frozenset[int]()


@pytest.mark.parametrize(
    ("call", "arguments", "own", "expected"),
    [
        ("check_memlock", ("win11", 2 * GIB), None, str(2 * GIB)),
        ("check_memlock", ("win11", 20 * GIB), None, str(14 * GIB)),
        ("check_memlock", ("win11", 20 * GIB), Limits(memlock=3 * GIB), str(3 * GIB)),
        ("check_pins", ("win11", pins(2, 3), NONE), None, "None"),
        ("check_pins", ("win11", pins(2, 6), NONE), None, "Conflict: CPUs 6-7 are held by VM work of bob"),
        ("check_pins", ("win11", pins(2, 9), NONE), None, "InvalidArguments: CPUs 9 do not exist or are offline"),
        ("check_pins", ("win11", pins(2, 4), NONE), Limits(cpus=frozenset({2, 3})), "LimitExceeded: CPUs 4-5 are not"),
        ("check_pins", ("win11", pins(2, 4), NONE), Limits(max_cpus=2), "LimitExceeded: Your VMs would hold 4 CPUs"),
        ("check_pins", ("win11", pins(2), NONE), Limits(max_vms=0), "LimitExceeded: You have 0 VMs"),
        ("check_pins", ("win11", pins(2), frozenset({2})), None, "InvalidArguments: CPUs 2 are asked for both"),
        ("check_scheduler", ("win11", pins(2, 4), "fifo", 1), None, "None"),
        ("check_scheduler", ("win11", pins(2, 4), "batch", 0), None, "None"),
        ("check_scheduler", ("win11", pins(2, 2), "fifo", 1), None, "TargetRefused: Real time for two threads on one"),
        ("check_scheduler", ("win11", pins(0, 4), "fifo", 1), None, "LimitExceeded: Real time on CPU 0 needs"),
        ("check_scheduler", ("win11", pins(2, 4), "fifo", 50), None, "LimitExceeded: Priority 50 is above yours, 10"),
        ("check_scheduler", ("win11", pins(2, shielded=False), "rr", 1), None, "TargetRefused: Real time needs every"),
        ("check_scheduler", ("win11", pins(2, shielded=False), "rr", 1), Limits(realtime="anywhere"), "None"),
        ("check_scheduler", ("win11", pins(2), "fifo", 1), Limits(policies=frozenset({"other"})), "LimitExceeded: Po"),
    ],
)
def test_answers(host: Path, call: str, arguments: Any, own: Limits | None, expected: str) -> None:
    found = answer(call, *arguments, own=own)
    assert found == expected or (":" in expected and found.startswith(expected))
    assert not (host / "grants").exists()


def test_what_ones_other_vms_hold_counts() -> None:
    assert answer("check_memlock", "win11", 20 * GIB, live=(HELD, OWN)) == str(10 * GIB)
    assert answer("check_pins", "win11", pins(4), NONE, live=(HELD, OWN)).startswith("Conflict: CPUs 4-5 are held by")


@pytest.mark.parametrize(
    ("call", "arguments"),
    [("check_memlock", (GIB,)), ("check_pins", (pins(2), NONE)), ("check_scheduler", (pins(2), "fifo", 1))],
)
def test_a_vm_that_runs(call: str, arguments: Any) -> None:
    expected = "Conflict: VM old is running already, as process 4712"
    assert answer(call, "old", *arguments, live=(HELD, OWN)) == expected


def test_a_kernel_that_cannot_shield(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records.MECHANISM, "lacks", lambda: "Too old")
    assert answer("check_pins", "win11", pins(2), NONE) == "Unsupported: Too old"
