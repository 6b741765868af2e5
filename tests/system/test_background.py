"""`qemu-launcher start` with a real user manager: a tuned VM that is in no session, and ends with the last one."""

import subprocess
from collections.abc import Iterator

import pytest

from system import host
from system.fixtures import Program
from system.people import User
from system.vms import define

TUNING = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1, "shutdown_timeout": 1}


@pytest.fixture
def in_background(alice: User, alices_program: Program) -> Iterator[User]:
    """alice, with a user manager that knows her groups: one of an earlier login may be there for some seconds yet."""
    manager_ends = ["systemctl", "stop", f"user@{alice.uid}.service"]
    alices_program.end()  # that is a login too
    alice.log_out()
    subprocess.run(manager_ends, check=True)
    yield alice
    alice.log_out()
    subprocess.run(manager_ends, check=True)


def test_start_and_last_logout(in_background: User) -> None:
    alice = in_background
    define(alice, "back", launcher=TUNING, cpus=2)
    done = alice.command("start", "back")
    assert done.status == 0, done.stderr
    *_, running, note = done.stderr.splitlines()  # QEMU has something to say about the lab's CPU first
    assert running.startswith("back: running, 2 vCPUs on 4-5 (shielded), fifo 1, ")
    assert note == "back: it is powered down when your last login ends; to have it stay: loginctl enable-linger"
    assert host.isolated() == {4, 5}
    [qemu] = host.processes("qemu-system-x86_64")
    launcher = host.parent(qemu)
    unit = "qemu-launcher-back.service"
    assert host.cgroup(launcher).name == unit
    assert host.cgroup(launcher).is_relative_to(alice.slice / f"user@{alice.uid}.service")
    shown = alice.login.run(f"systemctl --user show --property=StatusText --value {unit}", check=True)
    assert shown.stdout == "running, 2 vCPUs on 4-5 (shielded), fifo 1\n"

    alice.log_out()
    host.wait_for("QEMU is gone", lambda: not host.is_alive(qemu))
    host.wait_until_as_before()
    subprocess.run(["journalctl", "--sync"], check=True)
    said = subprocess.run(
        ["journalctl", f"_SYSTEMD_USER_UNIT={unit}", "--output=cat"], capture_output=True, text=True, check=True
    )
    # Asked, and cut after the definition's time, since this guest has no ear for its power button.
    assert "back: asked the guest to power down within 1 s" in said.stdout
    assert "back: the guest did not power down within 1 s: cutting the power" in said.stdout
