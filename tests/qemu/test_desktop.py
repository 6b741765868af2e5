"""What the launcher asks of a desktop's services: that the host stays awake, on a private bus with stand-ins."""

import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import Home, wait_until
from qemu.private_bus import private_bus
from qemu.test_imports import guarded

LOGIND = "org.freedesktop.login1"
NOTIFICATIONS = "org.freedesktop.Notifications"


class Service:
    """One of the two, to be started by the bus when it is first asked."""

    def __init__(self, place: Path, address: str, name: str) -> None:
        self._place = place
        self.env = {"DBUS_SYSTEM_BUS_ADDRESS": address}
        script = Path(__file__).with_name("fake_desktop.py")
        (place / f"services/{name}.service").write_text(
            f"[D-BUS Service]\nName={name}\nExec={sys.executable} {script} {name} {place}/plan {place}/log\n"
        )

    def plan(self, **answer: Any) -> None:
        (self._place / "plan").write_text(json.dumps(answer))

    @property
    def asked(self) -> list[dict[str, Any]]:
        log = self._place / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def service(name: str) -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="ql-bus-") as folder:
        place = Path(folder) / "bus"
        (place / "services").mkdir(parents=True)
        prepared = Service(place, f"unix:path={place}/socket", name)
        with private_bus(place, helper=False):
            yield prepared


@pytest.fixture
def logind() -> Iterator[Service]:
    yield from service(LOGIND)


def test_host_stays_awake_while_the_vm_runs(home: Home, logind: Service) -> None:
    """Asked for before the guest runs, and nothing is imported after that; given back when it has ended."""
    home.define(inhibit_sleep=True)
    run = home.start(argv=guarded(home), env=logind.env)
    run.wait_running()
    assert logind.asked == [
        {
            "member": "Inhibit",
            "signature": "ssss",
            "body": ["sleep", "qemu-launcher", "virtual machine vm-under-test runs", "block"],
        }
    ]
    run.signal(signal.SIGINT)
    run.wait_line("asked the guest")
    assert len(logind.asked) == 1
    run.signal(signal.SIGINT)
    assert run.end() == 0
    assert "IMPORTED AFTER CONT" not in run.output
    wait_given_back(logind)


def test_a_killed_launcher_lets_the_host_sleep(home: Home, logind: Service) -> None:
    """The descriptor is the launcher's alone: QEMU, which lives on, has not inherited it."""
    home.define(inhibit_sleep=True)
    run = home.start(env=logind.env)
    run.wait_running()
    run.process.kill()
    wait_given_back(logind)


def wait_given_back(logind: Service) -> None:
    wait_until(lambda: {"given_back": True} in logind.asked)


def test_refused(home: Home, logind: Service) -> None:
    logind.plan(error=["org.freedesktop.DBus.Error.AccessDenied", "Permission denied"])
    home.define(inhibit_sleep=True)
    run = home.start(env=logind.env)
    run.wait_running()
    assert (
        "vm-under-test: warning: the host may go to sleep while it runs: logind says: Permission denied\n"
        "    logind grants it to those who are logged in at this host, else as polkit's rules say:\n"
        "    org.freedesktop.login1.inhibit-block-sleep; to do without: inhibit_sleep: false\n"
    ) in run.output


def test_no_answer(home: Home, logind: Service) -> None:
    logind.plan(silent=True)
    home.define(inhibit_sleep=True)
    hasty = home.with_changed("from qemu_launcher import desktop; desktop._LOCK_TIMEOUT = 3.0")
    run = home.start(argv=hasty, env=logind.env)
    run.wait_running()
    assert "the host may go to sleep while it runs: logind does not answer" in run.output


def test_no_bus(home: Home) -> None:
    home.define(inhibit_sleep=True)
    run = home.start()
    run.wait_running()
    assert "the host may go to sleep while it runs: logind cannot be asked: " in run.output


def test_not_asked_for(home: Home, logind: Service) -> None:
    home.define()
    home.start(env=logind.env).wait_running()
    assert logind.asked == []


# The stand-in is a program of its own, which the bus has to start.
PATIENT = "from qemu_launcher import desktop; desktop._NOTICE_TIMEOUT = 60.0"


@pytest.fixture
def notifications() -> Iterator[Service]:
    for prepared in service(NOTIFICATIONS):
        prepared.env = {"DBUS_SESSION_BUS_ADDRESS": prepared.env["DBUS_SYSTEM_BUS_ADDRESS"]}
        yield prepared


@pytest.mark.parametrize("command", ["run", "start"])
def test_error_without_a_terminal_is_shown(home: Home, notifications: Service, command: str) -> None:
    """The whole message, once, whoever of the two has found the error; it is no markup."""
    home.environment["XDG_STATE_HOME"] = str(home.configuration)
    home.define(binary="<b>no-such-qemu & co</b>")
    done = home.ask(command, "vm-under-test", env=notifications.env, change=PATIENT)
    assert done.returncode == 2
    [asked] = notifications.asked
    program, replaces, _icon, title, text, actions, hints, expires = asked["body"]
    assert asked["member"] == "Notify"
    assert asked["signature"] == "susssasa{sv}i"
    assert (program, replaces, title, actions, expires) == (
        "qemu-launcher",
        "0",
        "Virtual machine vm-under-test",
        "[]",
        "-1",
    )
    assert text == done.stderr.strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert "cannot start" in text
    assert "urgency" in hints


def test_wrong_definition_is_shown(home: Home, notifications: Service) -> None:
    home.define(nonsense=True)
    for command in ("run", "start"):
        assert home.ask(command, "vm-under-test", env=notifications.env, change=PATIENT).returncode == 2
    assert [":3:3: unknown key" in asked["body"][4] for asked in notifications.asked] == [True, True]


def test_script_is_shown_nothing(home: Home, notifications: Service) -> None:
    home.define(nonsense=True)
    assert home.ask("command", "vm-under-test", env=notifications.env).returncode == 2
    assert notifications.asked == []


def test_error_on_a_terminal_is_not_shown_twice(home: Home, notifications: Service) -> None:
    import os
    import pty
    import subprocess

    home.define(nonsense=True)
    ours, theirs = pty.openpty()
    environment = {**home.environment, **notifications.env}
    done = subprocess.run(home.command("run", "vm-under-test"), env=environment, stderr=theirs, check=False)
    os.close(theirs)
    assert done.returncode == 2
    assert b"unknown key" in os.read(ours, 65536)
    os.close(ours)
    assert notifications.asked == []


@pytest.mark.parametrize("answer", [{"silent": True}, {"error": ["org.freedesktop.DBus.Error.Failed", "no"]}])
def test_notification_server_that_fails_is_no_second_error(
    home: Home, notifications: Service, answer: dict[str, Any]
) -> None:
    notifications.plan(**answer)
    home.define(nonsense=True)
    hasty = "from qemu_launcher import desktop; desktop._NOTICE_TIMEOUT = 1.0"
    done = home.ask("run", "vm-under-test", env=notifications.env, change=hasty)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr == home.ask("run", "vm-under-test").stderr


def test_no_session_bus_is_no_second_error(home: Home) -> None:
    home.define(nonsense=True)
    gone = {"DBUS_SESSION_BUS_ADDRESS": "unix:path=/nowhere"}
    assert home.ask("run", "vm-under-test", env=gone).stderr == home.ask("run", "vm-under-test").stderr
