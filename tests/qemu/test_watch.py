"""`status --json` and `status --watch` of real VMs."""

import json
import os
import re

import pytest

from qemu.launched import PATIENCE, Home, silent_bus
from qemu.screen import on_terminal

VM = "vm-under-test"
QUICK = "from qemu_launcher import watch; watch.INTERVAL = 0.05"
FRAME = "\x1b[H"


def test_json_has_what_the_picture_has(home: Home) -> None:
    home.define(qemu=({"smp": 2},), vcpu_pinning=[0, 0], isolation="affinity", scheduler="batch")
    run = home.start()
    run.wait_running()
    done = home.ask("status", "--json", VM)
    assert (done.returncode, done.stderr) == (0, "")
    (vm,) = json.loads(done.stdout)
    memory, vcpus = vm.pop("memory"), vm.pop("vcpus")
    assert vm == {
        "name": VM,
        "state": "running",
        "remark": None,
        "pid": run.qemu_pid,
        "control_socket": "ok",
        "definition": f"{home.configuration}/{VM}.yml",
        "launcher": run.process.pid,
        "scope": None,
        "warnings": [],
    }
    assert sorted(memory) == ["lockable", "locked", "used"]
    assert memory["used"] > 1 << 20
    for index, vcpu in enumerate(vcpus):
        tid = vcpu.pop("tid")
        assert os.path.isdir(f"/proc/{run.qemu_pid}/task/{tid}")  # noqa: PTH112
        assert vcpu == {
            "vcpu": index,
            "cpus": "0",
            "shielded": False,
            "shield": None,
            "policy": "batch",
            "priority": 0,
            "reset_on_fork": False,
        }
    assert len(vcpus) == 2
    assert VM in [entry["name"] for entry in json.loads(home.ask("status", "--json").stdout)]


def test_json_of_a_vm_that_only_starts(home: Home) -> None:
    """Held at its gate: there is a child, and no QEMU yet."""
    with silent_bus(home) as (bus, env):
        home.define(rlimit_memlock="1G")
        home.start(env=env)
        connection, _ = bus.accept()
        (vm,) = json.loads(home.ask("status", "--json", VM).stdout)
        assert (vm["state"], vm["control_socket"], vm["vcpus"]) == ("starting", None, [])
        connection.close()


def test_json_of_a_busy_vm_and_of_none(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    qmp = run.qmp()
    (vm,) = json.loads(home.ask("status", "--json", VM).stdout)
    assert (vm["state"], vm["control_socket"], vm["remark"]) == ("running", "busy", "control socket busy")
    qmp.close()
    home.ask("kill", VM)
    done = home.ask("status", "--json", VM)
    assert (done.returncode, done.stdout) == (3, "")
    assert VM not in [entry["name"] for entry in json.loads(home.ask("status", "--json").stdout)]


def test_watch_shows_what_becomes_of_a_vm_until_it_ends(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    with on_terminal(home, "status", "--watch", VM, term="xterm", change=QUICK) as screen:
        screen.wait(f"{VM}: running, PID {run.qemu_pid}")
        assert "every 0 s; Ctrl-C ends this" in screen.wait(FRAME)
        assert home.ask("pause", VM).returncode == 0
        screen.wait(f"{VM}: paused, PID {run.qemu_pid}")
        assert home.ask("kill", VM).returncode == 0
        screen.wait(f"{VM} has ended\n")
        assert screen.process.wait(PATIENCE) == 0


def test_watch_of_all_goes_on_when_nothing_runs_and_ends_with_ctrl_c(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    with on_terminal(home, "status", "--watch", term="xterm", change=QUICK, size=(100, 80)) as screen:
        screen.wait(f"{VM}: running")
        assert home.ask("kill", VM).returncode == 0
        while f"{VM}: " in screen.wait(FRAME):
            pass
        screen.type("\x03")
        assert screen.process.wait(PATIENCE) == 0
        assert "Traceback" not in screen.shown


def test_small_terminal_is_not_scrolled(home: Home) -> None:
    home.define(qemu=({"smp": 4},))
    home.start().wait_running()
    with on_terminal(home, "status", "--watch", VM, term="xterm", change=QUICK, size=(6, 80)) as screen:
        screen.wait(FRAME)
        lines = screen.wait(FRAME).splitlines()
        assert len(lines) == 6
        assert re.match(r"\.\.\. and [0-9]+ lines more, for which this terminal is too small", lines[3])
        assert "Ctrl-C ends this" in lines[4]


@pytest.mark.parametrize(
    ("term", "message"),
    [("dumb", "this one cannot be redrawn (TERM is dumb, or not set)"), (None, "standard output is none\n")],
)
def test_what_cannot_be_redrawn(home: Home, term: str | None, message: str) -> None:
    if term is None:
        done = home.ask("status", "--watch")
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        return
    with on_terminal(home, "status", "--watch", term=term) as screen:
        screen.wait(message)
        assert screen.process.wait(PATIENCE) == 2


def test_watch_of_what_does_not_run(home: Home) -> None:
    with on_terminal(home, "status", "--watch", VM, term="xterm") as screen:
        screen.wait(f"{VM} is not running")
        assert screen.process.wait(PATIENCE) == 3
