"""--debug and `debug: true`: every step of a start is told, in its order, and nothing of it without being asked for."""

import os
import re
from typing import Any

import pytest

from qemu.launched import Home
from qemu.private_bus import PrivateBus
from qemu.test_tuning import assert_never_ran

CPU = max(os.sched_getaffinity(0))
PINNED: dict[str, Any] = {"vcpu_pinning": [CPU], "isolation": "cpuset"}
STEP = re.compile(r"^vm-under-test: [0-9]+\.[0-9]{3} ", re.MULTILINE)


def in_order(text: str, *patterns: str) -> None:
    """Each pattern is found, after the one before it."""
    place = 0
    for pattern in patterns:
        found = re.compile(pattern).search(text, place)
        assert found, f"no {pattern!r} after what came before it in:\n{text}"
        place = found.end()


@pytest.mark.parametrize("way", ["option", "key"])
def test_each_step_is_told(home: Home, bus: PrivateBus, way: str) -> None:
    keys: dict[str, Any] = {**PINNED, "env": {"QEMU_AUDIO_DRV": "none"}, "debug": way == "key"}
    path = home.define(**keys)
    run = home.start("vm-under-test", *(["--debug"] if way == "option" else []), env=bus.environment)
    run.wait_running()
    pid = run.qemu_pid
    (vcpu,) = run.qmp()("query-cpus-fast")
    home.ask("kill", run.name)
    assert run.end() == 0
    in_order(
        run.output,
        rf"definition {re.escape(str(path))}\n",
        r"host CPUs [0-9,-]+ are online",
        rf"user {os.geteuid()}, group",
        r"locked .*/vm-under-test\.lock\n",
        rf"PID {pid} will execute, with QEMU_AUDIO_DRV in its environment: qemu-system-x86_64 -readconfig /dev/fd/",
        r"QMP < .*\"QMP\": ",
        r"QMP > .*query-cpus-fast",
        rf"QMP < .*\"thread-id\": {vcpu['thread-id']}",
        rf"vCPU 0 \(socket 0, core 0, thread 0\): TID {vcpu['thread-id']} -> CPU {CPU}\n",
        rf"helper > PinThreads\({pid}, 'vm-under-test', \[\[{vcpu['thread-id']}, \[{CPU}\], False\]\], \[\]\)\n",
        r"helper < done, [0-9]+ ms\n",
        r"read back from the kernel: all as defined",
        r"QMP > .*\"cont\"",
        r"vm-under-test: running, 1 vCPU",
        r"QEMU ended with exit status 0",
    )
    own = [line for line in run.output.splitlines() if STEP.match(line)]
    assert len(own) > 15


def test_refusal_of_the_helper_is_told_as_it_came(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads={"error": ["org.qemulauncher.Error.Conflict", "taken\x1b[31m"]})
    home.define(**PINNED)
    run = home.start("vm-under-test", "-d", env=bus.environment)
    assert_never_ran(run, message="taken")
    in_order(run.output, r"helper < org\.qemulauncher\.Error\.Conflict: 'taken\\x1b\[31m', [0-9]+ ms\n")
    assert "\x1b" not in run.output


@pytest.mark.parametrize(("options", "debug"), [((), False), (("-q",), True)])
def test_nothing_is_told_unless_asked_for(home: Home, options: tuple[str, ...], debug: bool) -> None:
    home.define(debug=debug, scheduler="batch")
    run = home.start("vm-under-test", *options)
    while "vm-under-test: running" not in home.ask("status", "vm-under-test").stdout:
        assert run.process.poll() is None
    home.ask("kill", run.name)
    assert run.end() == 0
    assert not STEP.search(run.output), run.output
    assert "QMP" not in run.output


def test_quiet_and_debug_contradict_each_other(home: Home) -> None:
    home.define()
    answer = home.ask("-q", "-d", "vm-under-test")
    assert answer.returncode == 2
    assert "--quiet and --debug do not go together" in answer.stderr


def test_emulator_threads_on_a_cpu_that_does_not_exist(home: Home) -> None:
    path = home.define(emulator_pinning=8000)
    run = home.start()
    assert_never_ran(run, message=f"{path}:3:21: host CPU 8000 does not exist", status=2)
