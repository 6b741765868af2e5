"""A VM is found as long as it lives: with its launcher, without it, and without its runtime directory.

The launcher is killed at the moments that matter. A wrapper that waits at a FIFO before it becomes QEMU holds the start
still, so that the moment is chosen and not hit by luck.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import Home, Run, hear, is_alive, silent_bus, tell, wait_gone

TUNED: dict[str, Any] = {"scheduler": "batch"}  # tuned without a helper


def held_binary(home: Home) -> tuple[Path, Path]:
    """A `binary:` that says through one FIFO that it is there, and becomes QEMU when another is opened."""
    here, go = home.configuration / "here", home.configuration / "go"
    os.mkfifo(here)
    os.mkfifo(go)
    wrapper = home.configuration / "held-qemu"
    wrapper.write_text(f'#!/bin/sh\necho > {here}\nread line < {go}\nexec qemu-system-x86_64 "$@"\n')
    wrapper.chmod(0o755)
    return here, go


def start_held(home: Home, *, argv: list[str] | None = None, **launcher: Any) -> tuple[Run, Path]:
    here, go = held_binary(home)
    home.define(binary=str(home.configuration / "held-qemu"), **launcher)
    run = home.start(argv=argv)
    hear(here)
    return run, go


def never_started(home: Home) -> int:
    """PID of a QEMU whose launcher was killed before `cont`."""
    run, go = start_held(home, **TUNED)
    pid = run.qemu_pid
    run.process.kill()
    run.process.wait()
    tell(go, "go\n")
    return pid


def test_status_of_a_running_vm(home: Home) -> None:
    home.define(qemu=({"smp": 2},), vcpu_pinning=[0, 0], isolation="affinity", scheduler="batch")
    run = home.start()
    run.wait_running()
    shown = home.ask("status", "vm-under-test")
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == f"vm-under-test: running, PID {run.qemu_pid}"
    assert f"  definition  {home.configuration}/vm-under-test.yml" in lines
    assert f"  launcher    PID {run.process.pid}" in lines
    table = [line.split() for line in lines[lines.index(next(line for line in lines if "vCPU" in line)) + 1 :]]
    assert [(row[0], row[2:]) for row in table] == [(str(i), ["0", "no", "batch", "0"]) for i in range(2)]
    for row in table:
        assert Path(f"/proc/{run.qemu_pid}/task/{row[1]}").exists()
    assert lines[0] in home.ask("status").stdout.splitlines()


def test_status_of_nothing(home: Home) -> None:
    assert "vm-under-test" not in home.ask("status").stdout
    asked = home.ask("status", "vm-under-test")
    assert (asked.returncode, asked.stdout) == (3, "")
    assert "vm-under-test is not running" in asked.stderr
    assert home.ask("stop", "vm-under-test").returncode == 3
    assert home.ask("kill", "vm-under-test").returncode == 3


@pytest.mark.parametrize("where", ["&-", "/dev/full"])
def test_answers_that_nobody_can_read(home: Home, where: str) -> None:
    """What was asked for is done all the same; only `status`, which is nothing but its answer, has failed then."""
    home.define()
    run = home.start()
    run.wait_running()

    def ask(command: str) -> tuple[int, str]:
        argv = ["sh", "-c", f'exec "$@" >{where}', "sh", *home.command(command, run.name)]
        done = subprocess.run(argv, env=home.environment, stderr=subprocess.PIPE, text=True, check=False)
        return done.returncode, done.stderr

    status, message = ask("status")
    assert status == 1
    assert re.fullmatch("qemu-launcher: (standard output is closed|cannot write to standard output: .*)\n", message)
    assert ask("stop") == (0, "")
    assert ask("kill") == (0, "")
    assert run.end() == 0


def test_launcher_killed_before_cont(home: Home) -> None:
    pid = never_started(home)
    shown = home.ask("status", "vm-under-test")
    assert (
        "vm-under-test: never started (its launcher died; qemu-launcher run vm-under-test ends it first)"
        in shown.stdout
    )
    refused = home.ask("stop", "vm-under-test")
    assert refused.returncode == 1
    assert "has never been started" in refused.stderr

    home.define(**TUNED)
    run = home.start()
    run.wait_running()
    assert f"vm-under-test: ended a QEMU (PID {pid}) whose guest had never been started" in run.output
    wait_gone(pid)
    assert run.qemu_pid != pid


def test_guest_of_a_launcher_killed_before_cont_stays_paused(home: Home) -> None:
    pid = never_started(home)
    qmp = home.runs[-1].qmp()
    assert qmp("query-status")["status"] == "prelaunch"
    qmp.close()
    assert home.ask("kill", "vm-under-test").returncode == 0
    wait_gone(pid)


def test_launcher_killed_at_the_gate_leaves_no_child(home: Home) -> None:
    """The helper hangs in SetMemlock: the child waits at its gate, and leaves when the launcher dies."""
    with silent_bus(home) as (bus, env):
        home.define(rlimit_memlock="1G")
        run = home.start(env=env)
        connection, _ = bus.accept()  # nobody ever answers it
        child = int(home.record()["qemu"][0])
        assert is_alive(child)
        assert "starting" in home.ask("status", "vm-under-test").stdout
        run.process.kill()
        run.process.wait()
        wait_gone(child)
        assert home.ask("status", "vm-under-test").returncode == 3
        connection.close()


def test_signal_before_cont_ends_it_without_a_run(home: Home) -> None:
    with silent_bus(home) as (bus, env):
        home.define(rlimit_memlock="1G")
        run = home.start(env=env)
        connection, _ = bus.accept()
        run.signal(signal.SIGINT)
        assert run.end() == 128 + signal.SIGINT
        assert "running" not in run.output
        assert home.leftovers() == []
        connection.close()


@pytest.mark.parametrize(
    ("tuning", "words"),
    [(TUNED, r"preparing memory, [0-9.]+ [KM]iB of 64 MiB"), ({}, "QEMU is still starting")],
    ids=["tuned", "untuned"],
)
def test_word_about_a_start_that_takes_long(home: Home, tuning: dict[str, Any], words: str) -> None:
    """After 3 seconds, which are none here: the first word is due at once, and QEMU is held until it has come."""
    impatient = home.with_changed("from qemu_launcher import patience; patience.FIRST_WORD = 0.0")
    run, go = start_held(home, argv=impatient, **tuning)
    run.wait_line(f"^vm-under-test: {words}$")
    tell(go, "go\n")
    run.wait_running()


def test_untuned_vm_that_is_starting(home: Home) -> None:
    run, go = start_held(home)
    assert f"vm-under-test: starting, PID {run.qemu_pid}\n" in home.ask("status").stdout
    stopped = home.ask("stop", "vm-under-test")
    assert stopped.returncode == 1
    assert "vm-under-test is still starting, and QEMU does not answer yet\n" in stopped.stderr
    tell(go, "go\n")
    run.wait_running()
    assert "vm-under-test: running, PID" in home.ask("status").stdout


def test_untuned_vm_whose_launcher_died_while_it_started_may_run(home: Home) -> None:
    """Nothing holds its guest: it is no VM that never started, which the next start would end."""
    run, go = start_held(home)
    pid = run.qemu_pid
    run.process.kill()
    run.process.wait()
    assert "never started" not in home.ask("status").stdout
    again = home.start()
    assert again.end() == 1
    assert f"vm-under-test is already running (PID {pid})" in again.output
    tell(go, "go\n")
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "running"
    qmp.close()
    assert f"vm-under-test: running, PID {pid}\n" in home.ask("status").stdout


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["the launcher", "the whole group"])
def test_signal_while_qemu_starts(home: Home, send: Callable[[int, int], None]) -> None:
    """Whichever of the two ends first, it is the signal that has ended the start."""
    run, _ = start_held(home, **TUNED)
    send(run.process.pid, signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert "before the guest ran" not in run.output
    assert home.leftovers() == []


@pytest.mark.parametrize("tuning", [{}, TUNED], ids=["untuned", "tuned"])
def test_launcher_killed_later_leaves_the_vm_alone(home: Home, tuning: dict[str, Any]) -> None:
    home.define(**tuning)
    run = home.start()
    run.wait_running()
    pid = run.qemu_pid
    run.process.kill()
    run.process.wait()
    shown = home.ask("status", "vm-under-test").stdout
    assert f"vm-under-test: running, PID {pid}" in shown
    assert "gone; the VM runs without it" in shown
    qmp = run.qmp()
    qmp.close()
    assert home.ask("stop", "vm-under-test").returncode == 0
    again = home.start()
    assert again.end() == 1
    assert f"vm-under-test is already running (PID {pid})" in again.output
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert not is_alive(pid)


def test_vm_whose_runtime_directory_is_gone(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    pid = run.qemu_pid
    run.process.kill()
    run.process.wait()
    shutil.rmtree(home.runtime / "qemu-launcher")
    shown = home.ask("status", "vm-under-test").stdout
    assert re.search(rf"^vm-under-test: running \(control socket unreachable\), PID {pid}$", shown, re.MULTILINE)
    assert "  0     " in shown
    stopped = home.ask("stop", "vm-under-test")
    assert stopped.returncode == 1
    assert "is gone, with the runtime directory" in stopped.stderr
    again = home.start()
    assert again.end() == 1
    assert f"vm-under-test is already running (PID {pid})" in again.output
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert not is_alive(pid)
    assert home.ask("status", "vm-under-test").returncode == 3


def test_vm_of_another_runtime_directory(home: Home, tmp_path: Path) -> None:
    """`status` and `stop` reach it, although they would look for its files elsewhere."""
    home.define()
    run = home.start()
    run.wait_running()
    qmp = run.qmp()
    (tmp_path / "login").mkdir(mode=0o700)
    home.environment["XDG_RUNTIME_DIR"] = str(tmp_path / "login")
    busy = home.ask("stop", "vm-under-test")
    assert "the control socket of vm-under-test is busy" in busy.stderr
    qmp.close()
    assert f"vm-under-test: running, PID {run.qemu_pid}\n" in home.ask("status").stdout
    assert home.ask("stop", "vm-under-test").returncode == 0
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert run.end() == 0


def test_never_started_vm_whose_runtime_directory_is_gone_is_ended_by_the_next_start(home: Home) -> None:
    pid = never_started(home)
    shutil.rmtree(home.runtime / "qemu-launcher")
    home.define(**TUNED)
    run = home.start()
    run.wait_running()
    assert not is_alive(pid)


def test_busy_control_socket(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    qmp = run.qmp()
    stopped = home.ask("stop", "vm-under-test")
    assert stopped.returncode == 1
    assert "the control socket of vm-under-test is busy" in stopped.stderr
    assert "qemu-launcher kill vm-under-test" in stopped.stderr
    assert (
        f"vm-under-test: running (control socket busy), PID {run.qemu_pid}"
        in home.ask("status", "vm-under-test").stdout
    )
    qmp.close()


def test_kill_of_a_stopped_qemu(home: Home) -> None:
    """A QEMU that takes no SIGTERM is killed for good."""
    home.define()
    run = home.start()
    run.wait_running()
    pid = run.qemu_pid
    os.kill(pid, signal.SIGSTOP)
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert not is_alive(pid)
    assert run.end() == 128 + signal.SIGKILL


def test_process_that_qemu_left_behind_is_named(home: Home) -> None:
    """A child that inherited the lock: the VM has ended, and the next start says who is in its way."""
    wrapper = home.configuration / "leaving"
    wrapper.write_text('#!/bin/sh\nsleep 1000 &\nexec qemu-system-x86_64 "$@"\n')
    wrapper.chmod(0o755)
    home.define(binary=str(wrapper))
    run = home.start()
    run.wait_running()
    home.ask("kill", "vm-under-test")
    run.process.wait()
    assert home.ask("status", "vm-under-test").returncode == 3
    again = home.start()
    assert again.end() == 1
    assert re.search(r"processes it left behind still hold its lock: \d+ \(sleep\)", again.output)


def test_second_start_while_the_first_one_starts(home: Home) -> None:
    run, _ = start_held(home, **TUNED)
    second = home.start()
    assert second.end() == 1
    expected = f"vm-under-test is being started already, by the launcher with PID {run.process.pid}\n"
    assert expected in second.output
    run.signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
