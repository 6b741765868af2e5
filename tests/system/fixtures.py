"""Fixtures of the system tests, and the watch over what each test leaves behind.

Registered as a plugin by conftest.py, and only inside the lab. `host_as_before` runs after every test: whatever a VM
ended by, its host must be as it was, within the time that the helper takes to be started and to clean up. So every
test here is one of crash-only behaviour too. While a VM that several tests share is still running, it waits for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from system import host
from system.claims import Claimant
from system.people import DESK, User, let_into_group
from system.vms import HELPER_UNIT, Launch, running
from system.watch import INTERFACE

TOML = Path("/etc/qemu-launcher/helper.toml")
# What desktop sessions hand down (RLIMIT_RTTIME, microseconds, soft and hard), under which real time is soon killed.
DESKTOP_RTTIME = (200_000, 200_000)
POLKIT_RULE = Path("/etc/polkit-1/rules.d/10-system-test.rules")
ADMINISTRATORS_RULE = Path("/etc/polkit-1/rules.d/20-administrators-test.rules")


@pytest.fixture(scope="session")
def members() -> Iterator[tuple[User, User]]:
    """alice and carol, who are in the group, each with a login; all is logged out of in the end."""
    DESK.mkdir(mode=0o755, exist_ok=True)
    for name in ("alice", "carol"):
        let_into_group(name)
    alice, carol = User("alice"), User("carol")
    yield alice, carol
    for user in (alice, carol):
        user.log_out()


@pytest.fixture
def alice(members: tuple[User, User]) -> User:
    """A member of the group."""
    return members[0]


@pytest.fixture
def carol(members: tuple[User, User]) -> User:
    """Another one."""
    return members[1]


@pytest.fixture(scope="module")
def bob() -> Iterator[User]:
    """A user who is not in the group; his login, which takes seconds, serves all tests of a module."""
    user = User("bob")
    yield user
    user.log_out()


@pytest.fixture
def vm() -> Iterator[Callable[..., Launch]]:
    """Starts VMs and waits until they run: vm(user, name, ...); all end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **more: stack.enter_context(running(*arguments, **more))


class Program:
    """A program of alice's, under the limits of a desktop, in a login of its own. Started when it is first needed."""

    def __init__(self, user: User) -> None:
        self._user = user
        self._claimant: Claimant | None = None

    def get(self) -> Claimant:
        """The program; another one, when somebody has ended it meanwhile."""
        if self._claimant is None or not self._claimant.is_alive:
            self.end()
            self._claimant = Claimant(self._user, "prlimit", "--rttime={}:{}".format(*DESKTOP_RTTIME))
        return self._claimant

    def end(self) -> None:
        """End it, and its login."""
        claimant, self._claimant = self._claimant, None
        if claimant is not None:
            claimant.close()


@pytest.fixture(scope="session")
def alices_program(members: tuple[User, User]) -> Iterator[Program]:
    """One for all tests: to start it takes as long as some of them."""
    program = Program(members[0])
    yield program
    program.end()


@pytest.fixture(scope="module")
def program_of_alice(alices_program: Program) -> Claimant:
    """A program of alice's, for all tests of a module."""
    return alices_program.get()


@pytest.fixture
def program(program_of_alice: Claimant) -> Iterator[Claimant]:
    """A program of alice's, without children; those that it makes end with the test.

    The call is a faster way to have the helper clean up than to have it leave, see `host_as_before`.
    """
    yield program_of_alice
    if program_of_alice.end_all():
        program_of_alice.call("GetLimits", "")


class Shared:
    """A VM that the tests of one module share."""

    def __init__(self) -> None:
        self.launch: Launch | None = None


SHARED = Shared()


@pytest.fixture(autouse=True)
def host_as_before() -> Iterator[None]:
    """See to it that nothing is left of the test's VMs; what is left fails the test, and is removed for the next.

    A helper that serves would clean up when it leaves, 15 s after its last call, as test_ends.py shows; it is called
    instead, upon which it does so at once. One that is not there yet, or just starting, is left to systemd.
    """
    yield
    if SHARED.launch is not None and SHARED.launch.is_alive:
        return
    try:
        host.wait_until_as_before(call_helper)
    except BaseException:
        clean_up()
        raise


@pytest.fixture
def helper_toml() -> Iterator[Callable[..., None]]:
    """Writes /etc/qemu-launcher/helper.toml as an administrator: helper_toml(text, mode=0o644)."""
    TOML.parent.mkdir(exist_ok=True)

    def write(text: str, mode: int = 0o644) -> None:
        TOML.write_text(text)
        TOML.chmod(mode)

    yield write
    TOML.unlink(missing_ok=True)


@pytest.fixture
def polkit_rule() -> Iterator[Callable[[str], None]]:
    """Makes polkit answer `result` ("NO", "AUTH_ADMIN", ...) for all actions of ours."""

    def write(result: str) -> None:
        POLKIT_RULE.write_text(
            "polkit.addRule(function (action, subject) {\n"
            f'    if (action.id.indexOf("org.qemulauncher.") === 0) return polkit.Result.{result};\n'
            "});\n"
        )
        POLKIT_RULE.chmod(0o644)
        reload_polkit()

    yield write
    POLKIT_RULE.unlink(missing_ok=True)
    reload_polkit()


@pytest.fixture
def administrator(carol: User) -> Iterator[User]:
    """carol, to whom polkit says yes."""
    ADMINISTRATORS_RULE.write_text(
        "polkit.addRule(function (action, subject) {\n"
        '    if (action.id === "org.qemulauncher.manage-others" && subject.user === "carol")\n'
        "        return polkit.Result.YES;\n"
        "});\n"
    )
    ADMINISTRATORS_RULE.chmod(0o644)
    reload_polkit()
    yield carol
    ADMINISTRATORS_RULE.unlink()
    reload_polkit()


@contextlib.contextmanager
def offline(*cpus: int) -> Iterator[None]:
    """These CPUs are, for the block: as an administrator does it, or a host that repairs itself."""
    files = [Path(f"/sys/devices/system/cpu/cpu{cpu}/online") for cpu in cpus]
    with contextlib.ExitStack() as stack:
        for file in files:
            file.write_text("0")
            stack.callback(file.write_text, "1")
        yield


def reload_polkit() -> None:
    """Have polkitd read its rules anew; it would by itself, but only at some time after they changed."""
    subprocess.run(["systemctl", "restart", "polkit.service"], check=True)


def stop_helper() -> None:
    """End the helper in order, as `systemctl stop` does; the next call starts another."""
    if host.has_systemd():
        subprocess.run(["systemctl", "stop", HELPER_UNIT], check=True)
    elif (pid := host.helper()) is not None:
        os.kill(pid, signal.SIGTERM)
        host.wait_for("the helper ends", lambda: not host.is_alive(pid))


def call_helper() -> None:
    """Have a helper that serves look at its records, which it does before it answers.

    None is started for that, but on a host where nothing else would ever start it.
    """
    limits = (INTERFACE, "/org/qemulauncher/Helper1", INTERFACE, "GetLimits")
    command = ["busctl", "call", "--quiet", "--auto-start=no", *limits]
    if not host.has_systemd():
        command = [
            *("dbus-send", "--system", "--print-reply", f"--dest={INTERFACE}"),
            limits[1],
            f"{INTERFACE}.GetLimits",
        ]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_helper() -> None:
    """Have the helper started, as systemd does it when the scope of a VM ends."""
    subprocess.run(["systemctl", "start", HELPER_UNIT], check=True)


def clean_up() -> None:
    """Make the host fit for the next test, by force."""
    for pid in host.processes("qemu-system-x86_64"):
        os.kill(pid, signal.SIGKILL)
    if not host.has_systemd():
        call_helper()
        return
    subprocess.run(["systemctl", "stop", "qemu-launcher-*.scope"], check=False)
    stop_helper()
    start_helper()
    stop_helper()
