"""Who may manage others' VMs: who has a rule of polkit's, or knows an administrator's password; and nobody else.

One VM of alice's stands through all of it, untouched. Nobody has a terminal, so that polkit's question is a no; but in
the last tests, where polkit's own text agent asks for root's password on one.
"""

from __future__ import annotations

import os
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from system import host
from system.fixtures import SHARED
from system.people import User, folder_of
from system.test_administrators import TUNING, expect_tuned, rows
from system.vms import Launch, define, running

REFUSED = "polkit does not allow org.qemulauncher.manage-others to {} in this session"


@pytest.fixture(scope="module")
def shielded(members: tuple[User, User]) -> Iterator[Launch]:
    """A VM of alice's on CPUs 4 and 5, in real time, which makes no more calls."""
    define(members[0], "vm", TUNING, cpus=2)
    try:
        with running(members[0], "vm") as launch:
            SHARED.launch = launch
            yield launch.until_settled()
    finally:
        SHARED.launch = None


def test_an_administrator_sees_all_vms(
    administrator: User, alice: User, shielded: Launch, vm: Callable[..., Launch]
) -> None:
    define(administrator, "own", {"vcpu_pinning": [6, 7]}, cpus=2)
    own = vm(administrator, "own")
    define(alice, "untuned", cpus=2)
    vm(alice, "untuned")
    assert rows(administrator.command("status", "--all-users")) == [
        ["VM", "owner", "PID", "CPUs", "mechanism"],
        ["vm", "alice", str(shielded.qemu), "4-5", host.mechanism()],
        ["own", "carol", str(own.qemu), "6-7", host.mechanism()],
    ]


def test_who_is_no_administrator_is_refused(carol: User, bob: User, shielded: Launch) -> None:
    """carol, without the rule, is a member like any other; bob does not even come through to polkit."""
    for user, why in ((carol, REFUSED.format("carol")), (bob, "bob is not a member of the group qemu-launcher")):
        for words in (("status", "--all-users"), ("release", "vm", "--owner", "alice"), ("limits", "--owner", "alice")):
            done = user.command(*words)
            assert (done.status, done.stdout) == (1, ""), done
            assert why in done.stderr
    expect_tuned(shielded)


def test_the_rule_is_for_carol_alone(
    administrator: User, alice: User, shielded: Launch, vm: Callable[..., Launch]
) -> None:
    define(administrator, "own", {"vcpu_pinning": [6, 7]}, cpus=2)
    vm(administrator, "own")
    for words in (("status", "--all-users"), ("release", "own", "--owner", "carol"), ("limits", "--owner", "carol")):
        done = alice.command(*words)
        assert (done.status, done.stdout) == (1, ""), done
        assert REFUSED.format("alice") in done.stderr
    assert host.isolated() == {4, 5, 6, 7}


# A terminal


@pytest.fixture
def root_password() -> Iterator[str]:
    """One that root has for a while: by default, administrators are who knows it."""
    subprocess.run(["chpasswd"], input="root:tortoise", text=True, check=True)
    yield "tortoise"
    subprocess.run(["usermod", "--password", "*", "root"], check=True)


def _shows_what_is_typed(script: int) -> bool:
    """Whether the terminal that this script(1) has made echoes."""
    [child] = Path(f"/proc/{script}/task/{script}/children").read_text().split()
    number = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[7 - 3])  # proc_pid_stat(5): tty_nr
    terminal = os.open(f"/dev/pts/{os.minor(number)}", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)
    finally:
        os.close(terminal)


def typed(user: User, command: str, answer: str) -> tuple[int, str]:
    """Run a command on a terminal of its own, and answer its one question; its exit status, and what was to be seen."""
    folder = folder_of(user.name)
    log, keys = user.file(folder / "terminal.log", ""), folder / "keys"
    keys.unlink(missing_ok=True)
    os.mkfifo(keys)
    os.chown(keys, user.uid, user.gid)
    keyboard = os.open(keys, os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = user.login.spawn(f"exec script -qec '{command}' /dev/null <{keys}", log)
        host.wait_for("the question", lambda: "Password:" in log.read_text() or not host.is_alive(pid))
        # The agent asks, and only then has the terminal show and keep nothing of what is typed.
        host.wait_for("it hears", lambda: not host.is_alive(pid) or not _shows_what_is_typed(pid))
        os.write(keyboard, f"{answer}\n".encode())
        host.wait_for("the end of the command", lambda: not host.is_alive(pid))
        return user.login.wait(pid), log.read_text()
    finally:
        os.close(keyboard)


def test_a_password_on_a_terminal(alice: User, shielded: Launch, root_password: str) -> None:
    status, seen = typed(alice, "qemu-launcher status --all-users", root_password)
    assert "Authentication is required for alice to see or end the tuning of other users" in seen
    assert seen.count("Password:") == 1
    assert status == 0, seen
    assert host.mechanism() in seen.rpartition("Password:")[2]
    assert root_password not in seen
    assert host.processes("pkttyagent") == []


def test_a_wrong_password_on_a_terminal(carol: User, shielded: Launch, root_password: str) -> None:
    status, seen = typed(carol, "qemu-launcher release vm --owner alice", "hare")
    assert "Password:" in seen
    assert status == 1, seen
    assert REFUSED.format("carol") in seen
    expect_tuned(shielded)
    assert host.processes("pkttyagent") == []
