"""A host without the helper, or without what it needs: VMs that need nothing of it run, the others say what to do."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import Home
from qemu.private_bus import private_bus
from qemu.test_tuning import CPU, SHIELDED, assert_never_ran, needs_two_cpus
from qemu_launcher import absence

OF_THE_ORIGINAL = {"QEMU_LAUNCHER_CPUSET_MOUNT_PATH": "/sys/fs/cgroup/cpuset", "QEMU_LAUNCHER_CPUSET_PREFIX": "vms"}


# Variables of the original tool


@pytest.mark.parametrize(("count", "verb"), [(1, "is"), (2, "are")])
def test_variables_of_the_original_are_told_in_one_line(home: Home, count: int, verb: str) -> None:
    home.define()
    given = dict(list(OF_THE_ORIGINAL.items())[:count])
    run = home.start(env=given)
    run.wait_running()
    told = [line for line in run.output.splitlines() if "CPUSET" in line]
    names = " and ".join(given)
    reason = "shielding is set up by root, see qemu-launcher-helper.toml(5)"
    assert told == [f"vm-under-test: {names} {verb} not read: {reason}"]
    assert home.ask("kill", "vm-under-test").returncode == 0


def test_variables_of_the_original_are_no_matter_to_others(home: Home) -> None:
    home.define()
    run = home.start("vm-under-test", "-q", env=OF_THE_ORIGINAL)
    assert home.ask("command", "vm-under-test", env=OF_THE_ORIGINAL).stderr == ""
    run.wait_recorded()
    home.ask("kill", "vm-under-test")
    assert run.end() == 0
    assert "CPUSET" not in run.output


# Hosts that have no helper

CHANGED_ROOT = """\
from pathlib import Path
from qemu_launcher import absence
look = absence.remedy
absence.remedy = lambda: look(Path({root!r}))
"""
UNAIDED: dict[str, dict[str, Any]] = {
    "untuned": {},
    "affinity": {"vcpu_pinning": [CPU], "isolation": "affinity", "scheduler": "batch"},
}
AIDED: dict[str, dict[str, Any]] = {
    "shield": SHIELDED,
    "cpuset": {"vcpu_pinning": [CPU], "isolation": "cpuset"},
    "real time": {"vcpu_pinning": [CPU], "scheduler": "fifo"},
    "memory": {"rlimit_memlock": "1T"},
}
KINDS = ("no bus", "bus that is none", "no helper", "container", "installed, bus not reloaded", "no cgroups")
KINDS_UNAIDED = (*KINDS, "no sysfs")


class Host:
    """How this host lacks the helper: the environment, and the words before the launcher's."""

    def __init__(self, home: Home, kind: str, place: Path) -> None:
        self.home = home
        self.environment: dict[str, str] = {}
        self.root = place / "root"
        self.root.mkdir(exist_ok=True)
        self.hidden = {"no cgroups": "/sys/fs/cgroup", "no sysfs": "/sys"}.get(kind)
        if kind == "container":
            (self.root / ".dockerenv").touch()
        if kind == "installed, bus not reloaded":
            file = self.root / "usr/share/dbus-1/system-services/org.qemulauncher.Helper1.service"
            file.parent.mkdir(parents=True)
            file.touch()
        if kind == "bus that is none":
            self.environment["DBUS_SYSTEM_BUS_ADDRESS"] = "nonsense"

    def argv(self) -> list[str]:
        change = CHANGED_ROOT.format(root=str(self.root))
        argv = self.home.with_changed(change)
        if self.hidden is None:
            return argv
        # A mount namespace for this one child: nothing of it is seen outside.
        hide = f'mount -t tmpfs -o ro none {self.hidden} && exec "$@"'
        return ["unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh", *argv]


@contextmanager
def lacking(home: Home, kind: str, place: Path) -> Iterator[Host]:
    host = Host(home, kind, place)
    if host.hidden is not None and (
        os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode != 0
    ):
        pytest.skip("optional: a mount namespace of one's own is root's")
    if kind not in ("no helper", "container", "installed, bus not reloaded"):
        yield host
        return
    with tempfile.TemporaryDirectory(prefix="ql-bus-") as short, private_bus(Path(short) / "bus", helper=False) as bus:
        host.environment.update(bus.environment)
        yield host


@pytest.mark.parametrize("kind", KINDS_UNAIDED)
def test_what_needs_no_helper_runs(home: Home, tmp_path: Path, kind: str) -> None:
    with lacking(home, kind, tmp_path) as host:
        for what, launcher in UNAIDED.items():
            if (what, kind) == ("affinity", "no sysfs"):
                continue  # its CPUs cannot be checked: test_tuning.py
            home.define(**launcher)
            run = home.start(argv=host.argv(), env=host.environment)
            running = run.wait_running()
            qmp = run.qmp()
            (vcpu,) = qmp("query-cpus-fast")
            if what == "affinity":
                assert f"1 vCPU on {CPU} (nothing is shielded), batch" in running
                assert os.sched_getaffinity(vcpu["thread-id"]) == {CPU}
            else:
                assert "untuned" in running
            qmp("quit")
            assert run.end() == 0


@needs_two_cpus
@pytest.mark.parametrize("what", AIDED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_the_helper_says_how_to_get_it(home: Home, tmp_path: Path, kind: str, what: str) -> None:
    with lacking(home, kind, tmp_path) as host:
        home.define(**AIDED[what])
        run = home.start(argv=host.argv(), env=host.environment)
        on_a_bus = "DBUS_SYSTEM_BUS_ADDRESS" in host.environment and kind != "bus that is none"
        message = "qemu-launcher-helper is not installed\n" if on_a_bus else "there is no system bus at "
        assert_never_ran(run, message=f"qemu-launcher: {message}")
        if kind == "installed, bus not reloaded":
            assert f"{absence.reload_bus()}\n" in run.output
        else:
            assert (
                "    on Debian: make deb in its sources, then sudo apt install ./build/qemu-launcher_*.deb"
                in run.output
            )
            assert "    on other distributions: sudo make install in its sources" in run.output
        assert ("this is a container (docker): install it on the host" in run.output) == (kind == "container")
        assert ("isolation: affinity; nothing is shielded then" in run.output) == (what in ("shield", "cpuset"))


@needs_two_cpus
def test_tuning_that_is_no_must_is_left_out(home: Home) -> None:
    home.define(**SHIELDED, on_tuning_failure="continue")
    run = home.start()
    assert "untuned" in run.wait_running()
    assert "    to pin without the helper, with your own rights: isolation: affinity" in run.output
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert run.end() == 0


def test_a_user_for_whom_the_bus_is_closed_can_pin_by_himself(home: Home) -> None:
    """Nothing of it is asked for."""
    closed = '<deny send_destination="org.qemulauncher.Helper1"/>'
    with (
        tempfile.TemporaryDirectory(prefix="ql-bus-") as place,
        private_bus(Path(place) / "bus", policy=closed) as bus,
    ):
        home.define(**UNAIDED["affinity"])
        run = home.start(env=bus.environment)
        run.wait_running()
        assert bus.calls() == []
        assert home.ask("kill", "vm-under-test").returncode == 0
        assert run.end() == 0
