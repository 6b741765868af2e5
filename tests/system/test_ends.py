"""However a VM ends, its host is as it was before: no scope, no isolated CPU, PID 1 on all CPUs, no record.

`quit` is the end of test_main_job.py. Here the helper is often still there when the VM ends, so that systemd cannot
start it; and in the last tests nobody is left who could tidy up but the kernel, systemd and the helper's next start.
"""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from system import host
from system.fixtures import stop_helper
from system.people import User
from system.vms import Launch, define, refused

pytestmark = pytest.mark.hosts("trixie", "bookworm", more=("legacy",), why="it is what each mechanism is there for")

TUNING = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1}


def kill_qemu(vm: Launch) -> None:
    os.kill(vm.qemu, signal.SIGKILL)


def kill_launcher_then_qemu(vm: Launch) -> None:
    os.kill(vm.pid, signal.SIGKILL)
    host.wait_for("the launcher is gone", lambda: not vm.is_alive)
    assert host.is_alive(vm.qemu), "the guest outlives its launcher"
    assert host.isolated() == {4, 5}
    os.kill(vm.qemu, signal.SIGKILL)


def terminate_qemu(vm: Launch) -> None:
    os.kill(vm.qemu, signal.SIGTERM)


def stop_scope(vm: Launch) -> None:
    subprocess.run(["systemctl", "stop", vm.scope.name], check=True)


def stop_user_slice(vm: Launch) -> None:
    subprocess.run(["systemctl", "stop", vm.user.slice.name], check=True)


def terminate_user(vm: Launch) -> None:
    subprocess.run(["loginctl", "terminate-user", vm.user.name], check=True)


def expect_everything_back(vm: Launch, end: Callable[[Launch], None]) -> None:
    """End the VM that runs on CPUs 4 and 5, and see that it leaves nothing behind."""
    assert host.isolated() == {4, 5}
    assert host.cpus_of(1) == host.online() - {4, 5}
    assert [host.scheduling(tid)[0] for tid in vm.vcpu_tids] == ["fifo", "fifo"]
    end(vm)
    host.wait_for("QEMU is gone", lambda: not host.tids(vm.qemu))
    host.wait_until_as_before()
    assert host.born_of_pid_1() == host.online()


@pytest.mark.parametrize(
    "end", [kill_qemu, kill_launcher_then_qemu, terminate_qemu, stop_scope, stop_user_slice, terminate_user]
)
def test_it_leaves_nothing_behind(alice: User, vm: Callable[..., Launch], end: Callable[[Launch], None]) -> None:
    """The helper has left before; systemd starts it when the scope ends."""
    define(alice, "ends", {**TUNING, "shutdown_timeout": 3}, cpus=2)
    running = vm(alice, "ends").until_settled()
    stop_helper()
    expect_everything_back(running, end)


def test_it_leaves_nothing_behind_while_the_helper_is_there(alice: User, vm: Callable[..., Launch]) -> None:
    """systemd does not start what runs already; the helper looks once more before it leaves.

    The launcher's exit status is QEMU's, 128 + N for signal N; and the next start is not hindered by the one killed.
    """
    define(alice, "ends", TUNING, cpus=2)
    first = vm(alice, "ends")
    os.kill(first.qemu, signal.SIGKILL)
    assert first.until_ended() == 128 + signal.SIGKILL
    second = vm(alice, "ends").until_settled()
    assert host.helper() is not None
    expect_everything_back(second, kill_qemu)


def define_wrapped(user: User, **launcher: object) -> Path:
    """A VM whose binary forks a sleeper, inside the scope, and becomes QEMU; the file with the sleeper's PID.

    The memory lock brings the process into its scope before it executes anything, and its children with it. The sleeper
    lets go of all that it inherited, as a daemon does.
    """
    sleeper = user.file(user.home / "sleeper.pid", "")
    script = f"""\
#!/bin/bash
for fd in /proc/$$/fd/*; do fds+=("${{fd##*/}}"); done
( for fd in "${{fds[@]}}"; do eval "exec $fd>&-"; done 2>/dev/null; exec sleep 7777 ) &
echo $! >{sleeper}
exec qemu-system-x86_64 "$@"
"""
    wrapper = user.file(user.home / "wrapper", script, mode=0o755)
    define(user, "wrapped", {**TUNING, "binary": str(wrapper), "rlimit_memlock": "64M", **launcher}, cpus=2)
    return sleeper


def test_a_child_that_qemu_leaves_behind_does_not_keep_the_cpus(alice: User, vm: Callable[..., Launch]) -> None:
    sleeper = define_wrapped(alice)
    running = vm(alice, "wrapped")
    child = int(sleeper.read_text())
    assert host.cgroup(child).is_relative_to(running.scope)
    assert not host.cpus_of(child) & {4, 5}
    running.quit()
    host.wait_until_as_before()
    assert not host.is_alive(child), "what is left in the scope is ended"


@pytest.mark.hosts("legacy", more=("trixie", "bookworm"), why="elsewhere the helper ends what is left in a scope")
def test_nor_does_one_whose_start_failed(alice: User) -> None:
    """Its memory was granted, and brought it into its scope; then it asks for a priority that she may not have."""
    sleeper = define_wrapped(alice, priority=99)
    status, words = refused(alice, "wrapped")
    assert status == 1
    assert "99" in words, words
    host.wait_until_as_before()
    assert not host.is_alive(int(sleeper.read_text())), "the next start would take it for the VM"


def test_nor_does_one_whose_launcher_was_killed(alice: User, vm: Callable[..., Launch]) -> None:
    """Nobody releases the VM, and its scope does not end; the helper sees it at its next start, whatever starts it.

    In the legacy hierarchy no file ends what is in a scope. It stays there, as any process of hers, until she ends it.
    """
    sleeper = define_wrapped(alice)
    running = vm(alice, "wrapped").until_settled()
    stop_helper()
    os.kill(running.pid, signal.SIGKILL)
    os.kill(running.qemu, signal.SIGKILL)
    host.wait_for("QEMU is gone", lambda: not host.tids(running.qemu))
    child = int(sleeper.read_text())
    assert host.is_alive(child)
    assert host.scopes() == {running.scope.name}
    helper = "org.qemulauncher.Helper1"
    alice.login.run(f"busctl call {helper} /org/qemulauncher/Helper1 {helper} GetLimits", check=True)
    if host.mechanism() == "cpuset-v1":
        assert host.traces() == [f"the scope {running.scope.name} is still there"]
        assert host.cpus_of(child) == host.online()
        assert f"wrapped is already running (PID {child})" in refused(alice, "wrapped")[1]
        assert alice.command("kill", "wrapped").status == 0
    host.wait_until_as_before()
