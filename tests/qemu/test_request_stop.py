"""systemd wants the VM's scope to end and asks the launcher, its controller: RequestStop is SIGTERM by another way.

systemd is a peer of the test's own on the private bus, since only the lab has a real one.
"""

import asyncio
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dbus_next import BusType, Message, MessageType
from dbus_next.aio import MessageBus

from qemu.launched import PATIENCE, Home, Run, wait_until
from qemu.private_bus import PrivateBus, private_bus
from qemu.test_imports import guarded

CPU = max(os.sched_getaffinity(0))
SYSTEMD = "org.freedesktop.systemd1"
UNIT = f"/org/freedesktop/systemd1/unit/qemu_2dlauncher_2d{os.geteuid()}_2dvm_2dunder_2dtest_2escope"

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="optional: a shield needs a CPU for the others"
)


class Peer:
    """One more client of the bus."""

    def __init__(self, runner: asyncio.Runner, bus: PrivateBus) -> None:
        self._run = runner.run
        self._bus = self._run(self._connected(bus.address))

    async def _connected(self, address: str) -> Any:
        return await MessageBus(bus_address=address, bus_type=BusType.SYSTEM).connect()

    def own(self, name: str) -> None:
        self._run(self._bus.request_name(name))

    def disown(self, name: str) -> None:
        self._run(self._bus.release_name(name))

    def request_stop(self, whom: str, path: str = UNIT) -> None:
        message = Message(
            message_type=MessageType.SIGNAL,
            destination=whom,
            path=path,
            interface=f"{SYSTEMD}.Scope",
            member="RequestStop",
        )

        async def sent() -> None:
            await self._bus.send(message)

        self._run(sent())

    def wait_handled(self, whom: str) -> None:
        """Returns when `whom` has taken what we have sent, the question that it causes, and the answer to that."""
        for _ in range(4):
            self.ping(whom)

    def ping(self, whom: str) -> None:
        message = Message(destination=whom, path="/", interface="org.freedesktop.DBus.Peer", member="Ping")
        reply = self._run(self._bus.call(message))
        assert reply.message_type is MessageType.METHOD_RETURN

    def disconnect(self) -> None:
        async def gone() -> None:
            self._bus.disconnect()
            await self._bus.wait_for_disconnect()

        self._run(gone())


@contextmanager
def peers(bus: PrivateBus, count: int) -> Iterator[list[Peer]]:
    with asyncio.Runner() as runner:
        clients = [Peer(runner, bus) for _ in range(count)]
        yield clients
        for client in clients:
            client.disconnect()


def started(home: Home, bus: PrivateBus, *options: str, **launcher: Any) -> tuple[Run, str]:
    """A running VM, and the unique name of its launcher on the bus."""
    home.define(vcpu_pinning=[CPU], **launcher)
    run = home.start("vm-under-test", *options, env=bus.environment)
    run.wait_running()
    return run, bus.calls()[0]["sender"]


def test_systemd_is_obeyed_as_sigterm_is(home: Home, bus: PrivateBus) -> None:
    run, launcher = started(home, bus, shutdown_timeout=30)
    qmp = run.qmp()
    with peers(bus, 1) as (systemd,):
        systemd.own(SYSTEMD)
        systemd.request_stop(launcher)
        qmp.wait_event("POWERDOWN")
        assert run.wait_line("asked the guest").endswith(
            "power down within 30 s; to cut its power: qemu-launcher kill vm-under-test"
        )
    qmp("quit")
    assert run.end() == 0


def test_guest_that_does_not_listen_is_cut_off_after_the_timeout(home: Home, bus: PrivateBus) -> None:
    """Also with every import forbidden since `cont`."""
    home.define(vcpu_pinning=[CPU], shutdown_timeout=1)
    run = home.start(argv=guarded(home), env=bus.environment)
    run.wait_running()
    with peers(bus, 1) as (systemd,):
        systemd.own(SYSTEMD)
        systemd.request_stop(bus.calls()[0]["sender"])
        assert run.end() == 0
    assert "the guest did not power down within 1 s: cutting the power" in run.output
    assert "IMPORTED AFTER CONT" not in run.output
    assert bus.members()[-1] == "Release"


def test_new_owner_of_the_name_is_obeyed(home: Home, bus: PrivateBus) -> None:
    """systemd that was re-executed has a new connection; the old one has lost its say."""
    run, launcher = started(home, bus, "--debug", shutdown_timeout=1)
    with peers(bus, 2) as (before, after):
        before.own(SYSTEMD)
        before.disown(SYSTEMD)
        after.own(SYSTEMD)
        assert_ignored(before, run, launcher)
        after.request_stop(launcher)
        run.wait_line("asked the guest")
        assert run.end() == 0
    assert run.output.count("heard SIGTERM") == 1


@pytest.mark.parametrize("owned", [True, False])
def test_impostor_is_ignored(home: Home, bus: PrivateBus, owned: bool) -> None:
    run, launcher = started(home, bus)
    with peers(bus, 2) as (systemd, impostor):
        if owned:
            systemd.own(SYSTEMD)
        assert_ignored(impostor, run, launcher)
    assert_first_wish_is_ctrl_c(run)


@pytest.mark.parametrize("path", [UNIT.replace("2dvm", "2dwm"), "/org/freedesktop/systemd1/unit/_2d_2eslice", "/"])
def test_another_scope_is_ignored(home: Home, bus: PrivateBus, path: str) -> None:
    run, launcher = started(home, bus)
    with peers(bus, 1) as (systemd,):
        systemd.own(SYSTEMD)
        assert_ignored(systemd, run, launcher, path)
    assert_first_wish_is_ctrl_c(run)


def assert_ignored(peer: Peer, run: Run, launcher: str, path: str = UNIT) -> None:
    peer.request_stop(launcher, path)
    peer.wait_handled(launcher)
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "running"
    assert "POWERDOWN" not in {event["event"] for event in qmp.events}
    qmp.close()


def assert_first_wish_is_ctrl_c(run: Run) -> None:
    """Ctrl-C asks: would a wish have come before it, it would cut the power without a word."""
    run.signal(signal.SIGINT)
    assert run.wait_line("asked the guest").endswith("asked the guest to power down; Ctrl-C again cuts the power")
    run.signal(signal.SIGINT)
    assert run.end() == 0


def test_stop_before_cont_ends_the_start(home: Home, bus: PrivateBus) -> None:
    bus.plan(PinThreads="hang")
    home.define(vcpu_pinning=[CPU])
    run = home.start(env=bus.environment)
    run.wait_line("waiting for qemu-launcher-helper")
    wait_until(lambda: bus.members() == ["PinThreads"])  # the bus has to start the stand-in
    with peers(bus, 1) as (systemd,):
        systemd.own(SYSTEMD)
        systemd.request_stop(bus.calls()[0]["sender"])
        assert run.end() == 128 + signal.SIGTERM
    assert home.leftovers() == []


def test_controller_has_gone_when_the_rest_of_the_scope_is_released(home: Home, bus: PrivateBus) -> None:
    """Else systemd, told by the helper to end what QEMU left behind, would ask the launcher instead of killing it."""
    run, launcher = started(home, bus)
    home.ask("kill", run.name)
    assert run.end() == 0
    release = bus.calls()[-1]
    assert release["member"] == "Release"
    assert release["sender"] != launcher


def test_bus_that_goes_and_comes_back_disturbs_nobody(home: Home) -> None:
    with tempfile.TemporaryDirectory(prefix="ql-bus-") as name:
        place = Path(name) / "bus"
        with private_bus(place) as bus:
            run, _ = started(home, bus)
        run.wait_line("warning: lost the system bus; ")
        qmp = run.qmp()
        assert qmp("query-status")["status"] == "running"
        with private_bus(place) as bus:
            qmp("quit")
            assert run.end() == 0
            assert bus.members()[-1] == "Release"
    assert run.output.count("lost the system bus") == 1
    assert "Traceback" not in run.output


def test_bus_that_stays_away_costs_a_warning(home: Home) -> None:
    with tempfile.TemporaryDirectory(prefix="ql-bus-") as name:
        with private_bus(Path(name) / "bus") as bus:
            run, _ = started(home, bus)
        run.wait_line("warning: lost the system bus; ")
        run.qmp()("quit")
        assert run.end() == 0
    assert "warning: its CPUs could not be given back: there is no system bus" in run.output
    assert "Traceback" not in run.output


def test_bus_that_hangs_up_at_once_is_an_error(home: Home, tmp_path: Path) -> None:
    """A daemon that has its fill of connections accepts one more and closes it."""
    with tempfile.TemporaryDirectory(prefix="ql-bus-") as name, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{name}/socket")
        listening.listen()

        def hang_up() -> None:
            client, _ = listening.accept()
            client.recv(1)
            client.close()

        daemon = threading.Thread(target=hang_up)
        daemon.start()
        home.define(vcpu_pinning=[CPU])
        run = home.start(env={"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={name}/socket"})
        assert run.end() == 1
        daemon.join(PATIENCE)
    assert "there is no system bus at unix:path=" in run.output
    assert "Traceback" not in run.output
