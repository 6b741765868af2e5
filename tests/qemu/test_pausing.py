"""`pause`, `resume` and `list` with VMs that run, stand still, hang, and were never started."""

import json
import os
import signal
from typing import Any

import pytest

from qemu.launched import Home, tell
from qemu.test_finding import TUNED, never_started, start_held

VM = "vm-under-test"


def listed(home: Home) -> dict[str, dict[str, Any]]:
    """`list --json` by name, without what this machine has besides."""
    done = home.ask("list", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return {entry["name"]: entry for entry in json.loads(done.stdout)}


def test_pause_and_resume(home: Home) -> None:
    home.define(**TUNED)
    run = home.start()
    run.wait_running()
    for command, words, state in (
        ("resume", "it is running already", "running"),
        ("pause", f"paused; it goes on with: qemu-launcher resume {VM}", "paused"),
        ("pause", f"it is paused already; it goes on with: qemu-launcher resume {VM}", "paused"),
        ("resume", "running again", "running"),
    ):
        done = home.ask(command, VM)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{VM}: {words}\n", "")
        assert f"{VM}: {state}, PID {run.qemu_pid}\n" in home.ask("status").stdout
        assert listed(home)[VM]["state"] == state


def test_paused_guest_is_told_to_power_down_when_it_goes_on(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    home.ask("pause", VM)
    done = home.ask("stop", VM)
    assert (done.returncode, done.stdout) == (
        0,
        f"{VM}: asked the guest to power down; it is paused, and hears it when it goes on: qemu-launcher resume {VM}\n",
    )


def test_launcher_that_is_told_to_end_says_that_its_guest_is_paused(home: Home) -> None:
    """Nobody lets it go on by himself: it may have been paused so that its disk can be copied."""
    home.define()
    run = home.start()
    run.wait_running()
    home.ask("pause", VM)
    run.signal(signal.SIGINT)
    run.wait_line(f"^{VM}: it is paused, and hears that when it goes on: qemu-launcher resume {VM}$")
    assert listed(home)[VM]["state"] == "paused"
    run.signal(signal.SIGINT)
    assert run.end() == 0


def test_not_running(home: Home) -> None:
    home.define()
    for command in ("pause", "resume"):
        done = home.ask(command, VM)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith(f"qemu-launcher: {VM} is not running")
    assert listed(home)[VM]["state"] == "not running"


def test_nobody_but_its_launcher_lets_a_guest_run_for_the_first_time(home: Home) -> None:
    """While QEMU starts, and for ever if its launcher dies before it is tuned."""
    run, go = start_held(home, **TUNED)
    for command in ("pause", "resume"):
        done = home.ask(command, VM)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{VM} is still starting: its launcher lets the guest run when it is tuned" in done.stderr
    assert listed(home)[VM]["state"] == "starting"
    tell(go, "go\n")
    run.wait_running()


def test_guest_that_was_never_started_is_not_let_run(home: Home) -> None:
    never_started(home)
    for command in ("pause", "resume"):
        done = home.ask(command, VM)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"the guest of {VM} has never been started: its launcher died before\n" in done.stderr
    assert listed(home)[VM]["state"] == "never started"
    qmp = home.runs[-1].qmp()
    assert qmp("query-status")["status"] == "prelaunch"
    qmp.close()


@pytest.mark.parametrize("tuning", [{}, TUNED], ids=["untuned", "tuned"])
def test_user_s_own_stillness_is_ended_by_resume(home: Home, tuning: dict[str, Any]) -> None:
    """With -S the guest has been tuned, and waits for its user."""
    home.define(qemu=("S",), **tuning)
    run = home.start()
    run.wait_line(rf"^{VM}: paused, as you asked")
    done = home.ask("pause", VM)
    assert done.returncode == 0
    assert done.stdout == f"{VM}: it has not been started yet (prelaunch), and stands still already\n"
    done = home.ask("resume", VM)
    assert (done.returncode, done.stdout) == (0, f"{VM}: started\n")
    assert listed(home)[VM]["state"] == "running"


def test_a_guest_that_is_to_come_stands_still_when_it_has(home: Home) -> None:
    home.define(qemu=({"incoming": "defer"},))
    run = home.start()
    run.wait_line(rf"^{VM}: waiting for its migration")
    done = home.ask("pause", VM)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{VM}: it will stand still when its migration has arrived; ")
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "inmigrate"
    qmp.close()
    done = home.ask("resume", VM)
    assert (done.returncode, done.stdout) == (0, f"{VM}: it runs as soon as its migration has arrived\n")


def test_guest_that_is_down_is_neither_paused_nor_resumed(home: Home) -> None:
    """-no-reboot makes a shutdown of a reset, and -no-shutdown keeps QEMU then."""
    home.define(qemu=("no-reboot", "no-shutdown"))
    run = home.start()
    run.wait_running()
    qmp = run.qmp()
    qmp("system_reset")
    qmp.wait_event("STOP")
    qmp.close()
    done = home.ask("pause", VM)
    assert (done.returncode, done.stdout) == (0, f"{VM}: it stands still already (shutdown)\n")
    done = home.ask("resume", VM)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qemu-launcher: QEMU refused cont: ")
    assert f"it stands still (shutdown); reset it with: qemu-launcher qmp {VM} system_reset\n" in done.stderr
    assert home.ask("qmp", VM, "system_reset").returncode == 0
    assert listed(home)[VM]["state"] == "shutdown"
    run.signal(signal.SIGINT)  # QEMU has said SHUTDOWN twice, and stays
    assert run.end() == 0
    assert "QEMU is ending" not in run.output


def test_vms_that_do_not_answer(home: Home) -> None:
    """One hangs, and another's control socket is taken."""
    runs = {}
    for name in ("hangs", "busy"):
        home.define(name)
        runs[name] = home.start(name)
        runs[name].wait_running()
    client = runs["busy"].qmp()
    os.kill(runs["hangs"].qemu_pid, signal.SIGSTOP)
    try:
        found = listed(home)
        for name, run in runs.items():
            entry = found[name]
            assert (entry["state"], entry["remark"], entry["pid"]) == ("running", "control socket busy", run.qemu_pid)
            for command in ("pause", "resume"):
                refused = home.ask(command, name)
                assert refused.returncode == 1
                assert f"the control socket of {name} is busy" in refused.stderr
    finally:
        os.kill(runs["hangs"].qemu_pid, signal.SIGCONT)
        client.close()


def test_vm_without_its_definition_is_listed(home: Home) -> None:
    path = home.define()
    run = home.start()
    run.wait_running()
    path.unlink()
    entry = listed(home)[VM]
    assert (entry["state"], entry["pid"], entry["definition"]) == ("running", run.qemu_pid, str(path))
    assert entry["remark"] == "its definition is gone"
