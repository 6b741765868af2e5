"""The audit trail as an administrator reads it: one structured record per grant, refusal and release, and no others."""

from __future__ import annotations

import json
import subprocess
import time

from system import host
from system.claims import Claimant
from system.fixtures import start_helper, stop_helper

MESSAGE_ID = "5f3c8a1d9e674b0fb2d84c7a61e90f35"  # said in qemu-launcher-helper(8)


def trail(since: float) -> list[dict[str, str]]:
    """The trail's records, oldest first, as programs get them."""
    subprocess.run(["journalctl", "--sync"], check=True)
    command = ["journalctl", "-q", "-t", "qemu-launcher-helper", "-o", "json", f"--since=@{since:.6f}"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [record for record in map(json.loads, lines) if record.get("MESSAGE_ID") == MESSAGE_ID]


def short(record: dict[str, str]) -> tuple[str, str]:
    return record["QEMU_LAUNCHER_VERDICT"], record["QEMU_LAUNCHER_OPERATION"]


def test_one_record_each(program: Claimant) -> None:
    since = time.time()
    child = program.spawn(2)
    assert program.set_memlock(child, "vm", 64 << 20).error == "ok"
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    assert program.schedule(child, "vm", "fifo", 99).error == "LimitExceeded"
    program.end(child.pid)
    stop_helper()
    start_helper()
    host.wait_until_as_before()
    records = trail(since)
    granted = [("granted", member) for member in ("SetMemlock", "PinThreads", "SetScheduler")]
    assert [short(record) for record in records] == [*granted, ("refused", "SetScheduler"), ("released", "VM")]

    memlock, pin, scheduler, refused, released = records
    for record in records:
        assert record["QEMU_LAUNCHER_UID"] == str(program.user.uid)
        assert record["QEMU_LAUNCHER_VM"] == "vm"
        assert record["_UID"] == "0", "the journal itself says who wrote it"
    for record in records[:4]:
        assert record["QEMU_LAUNCHER_USER"] == "alice"
        assert int(record["QEMU_LAUNCHER_PID"]) > 1
    assert memlock["QEMU_LAUNCHER_BYTES"] == str(64 << 20)
    assert pin["QEMU_LAUNCHER_CPUS"] == "4-5"
    assert pin["QEMU_LAUNCHER_TIDS"] == scheduler["QEMU_LAUNCHER_TIDS"] != ""
    assert (scheduler["QEMU_LAUNCHER_POLICY"], scheduler["QEMU_LAUNCHER_PRIORITY"]) == ("fifo", "1")
    assert "Priority 99 is above yours, 10" in refused["QEMU_LAUNCHER_REASON"]
    assert released["QEMU_LAUNCHER_REASON"] == "ended"
    assert released["QEMU_LAUNCHER_CPUS"] == "4-5"


def test_nothing_is_logged_on_idle(program: Claimant) -> None:
    """Neither when the helper starts, nor when it leaves."""
    stop_helper()
    since = time.time()
    start_helper()
    stop_helper()
    assert trail(since) == []
