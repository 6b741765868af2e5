"""The lab, booted: that it is the host it claims to be, and that nothing of it stays."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Vm, boot
from lab.errors import CommandFailed, LabDied, MissingTool
from lab.recipe import PROJECT

pytestmark = pytest.mark.lab

# A shell gives its background jobs an ignored SIGINT, and children keep that; make may be such a job.
BOOT_AND_WAIT = """
import signal, sys
from lab import boot
signal.signal(signal.SIGINT, signal.default_int_handler)
with boot() as vm:
    print(vm.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def vm() -> Iterator[Vm]:
    try:
        with boot() as machine:
            yield machine
    except MissingTool as error:
        pytest.skip(str(error))


# The first ones take the only slot themselves: they come before the shared machine.


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_qemu_ends_with_whoever_started_it(number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "tests")}
    with subprocess.Popen(
        [sys.executable, "-c", BOOT_AND_WAIT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as starter:
        assert starter.stdout is not None
        line = starter.stdout.readline()
        if not line:
            pytest.skip("the lab does not boot here; the other tests say why")
        qemu = os.pidfd_open(int(line))
        starter.send_signal(number)
        try:
            assert select.select([qemu], [], [], 60.0)[0], "QEMU lives on"
        finally:
            os.close(qemu)


def test_panic_is_the_labs_death() -> None:
    with boot() as machine:
        folder = machine.folder
        with pytest.raises(LabDied, match="sysrq triggered crash"):
            machine.run("echo c >/proc/sysrq-trigger", timeout=120.0)
    assert not machine.alive
    assert not folder.exists()


def test_what_is_written_in_one_is_not_in_the_next() -> None:
    with boot() as first:
        first.run("echo x >/root/written && sync")
        assert first.run("cat /root/written").stdout == "x\n"
    with boot() as second:
        assert second.run("test ! -e /root/written").status == 0


def test_failure_shows_console_and_journal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CommandFailed, match="exit status 5"), boot() as machine:  # noqa: PT012 - it is about the block
        machine.run("echo said before | systemd-cat; journalctl --sync")
        machine.run("exit 5")
    shown = capsys.readouterr().err
    assert "console of the lab" in shown
    assert "said before" in shown


def test_it_is_a_whole_host(vm: Vm) -> None:
    assert vm.run("cat /proc/1/comm").stdout == "systemd\n"
    assert vm.run("systemctl is-system-running", check=False).stdout == "running\n"
    assert vm.run("test -e /etc/qemu-launcher-lab -a -e /sys/fs/cgroup/cpuset.cpus.isolated").status == 0
    assert vm.run("busctl --list | grep -c -e login1 -e systemd1 -e PolicyKit1").stdout == "3\n"


def test_its_cpus_are_four_cores_of_two_threads(vm: Vm) -> None:
    siblings = vm.run("cat /sys/devices/system/cpu/cpu*/topology/thread_siblings_list").stdout.split()
    assert sorted(siblings) == [f"{cpu}-{cpu + 1}" for cpu in (0, 0, 2, 2, 4, 4, 6, 6)]


def test_its_clock_is_right(vm: Vm) -> None:
    before = time.time()
    inside = float(vm.run("date +%s.%N").stdout)
    assert before - 5 <= inside <= time.time() + 5


def test_user_has_a_session(vm: Vm) -> None:
    done = vm.run(
        "cat /proc/self/cgroup; echo $XDG_RUNTIME_DIR; id -un; systemctl --user is-active default.target", user="alice"
    )
    cgroup, runtime, name, target = done.stdout.splitlines()
    assert re.fullmatch(r"0::/user\.slice/user-1000\.slice/session-\w+\.scope", cgroup)
    assert (runtime, name, target) == ("/run/user/1000", "alice", "active")


def test_groups_are_those_of_the_moment(vm: Vm) -> None:
    assert vm.run("id -Gn", user="bob").stdout == "bob\n"
    vm.run("groupadd newcomers && usermod -aG newcomers bob")
    assert vm.run("id -Gn", user="bob").stdout == "bob newcomers\n"


def test_files_in_and_out(vm: Vm, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(bytes(range(256)))
    vm.put(tmp_path / "in", "/root/a folder/there")
    assert vm.run(["stat", "-c", "%U:%G", "/root/a folder/there/file"]).stdout == "root:root\n"
    vm.get("/root/a folder/there", tmp_path / "out")
    assert (tmp_path / "out" / "file").read_bytes() == bytes(range(256))


def test_report_has_console_and_journal(vm: Vm) -> None:
    vm.run("echo a line for the report | systemd-cat; journalctl --sync")
    report = vm.report()
    assert "a line for the report" in report
    assert "systemd[1]" in report.partition("--- journal")[2]


def test_orderly_end(vm: Vm) -> None:
    vm.power_off()
    assert not vm.alive
    assert "Power down" in vm.console_tail()
