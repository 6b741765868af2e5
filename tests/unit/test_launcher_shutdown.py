"""How signals become a power-down and a cut, without waiting for time to pass: what is asked, and which limit is set.

QEMU and its monitor are played here, since only the launcher's own decisions matter; tests/qemu has the real ones.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, cast

import pytest

from qemu_launcher import shutdown
from qemu_launcher.notify import Manager
from qemu_launcher.process import QUIT_GRACE, Ending, Qemu
from qemu_launcher.qmp import Qmp
from qemu_launcher.shutdown import STANDING, Shutdown, Signals
from qemu_launcher.voice import Voice


@pytest.fixture(autouse=True)
def no_wait_for_qemu_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has to tell in these stories it tells at once."""
    monkeypatch.setattr(shutdown, "TOGETHER", 0.02)


class Monitor:
    """Answers every command but those that `hang`, and tells what it was asked, and when for a power-down."""

    def __init__(self, state: str = "running", hang: str = "") -> None:
        self.pressed = asyncio.Event()
        self.asked: list[str] = []
        self.state = state
        self.hang = hang
        self.leaving = asyncio.Event()

    def listen(self, listener: Any) -> None:
        self._hear = listener

    def happens(self, event: str) -> None:
        """QEMU tells; what it says of itself is understood by then, as by the real one (test_launcher_qmp.py)."""
        (self.leaving.set if event == "SHUTDOWN" else self.leaving.clear)()
        self._hear({"event": event})

    async def execute(self, command: str) -> dict[str, str]:
        self.asked.append(command)
        if command == "system_powerdown":
            self.pressed.set()
        if command == self.hang:
            await asyncio.Event().wait()
        return {"status": self.state}


class Child:
    """Takes signals, and ends when the test says so."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self.sent: list[signal.Signals] = []

    def send(self, number: signal.Signals) -> None:
        self.sent.append(number)


class Scene(NamedTuple):
    """A VM that runs, and a launcher that waits for its end."""

    child: Child
    monitor: Monitor
    signals: Signals
    down: Shutdown

    async def ask(self) -> None:
        """Ctrl-C, until the power button is pressed; what was asked up to then is forgotten."""
        self.signals.put(signal.SIGINT)
        await self.monitor.pressed.wait()
        self.monitor.asked.clear()

    async def until_told_to_quit(self) -> None:
        while "quit" not in self.monitor.asked:
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def running(timeout: float | None = None, state: str = "running") -> AsyncIterator[Scene]:
    """In the end QEMU ends well, and the launcher with it."""
    child, monitor, signals = Child(), Monitor(state), Signals()
    down = Shutdown(cast(Qemu, child), cast(Qmp, monitor), Voice("vm", quiet=False), Manager(), timeout)
    ending = asyncio.ensure_future(down.until_ended(signals))
    await asyncio.sleep(0)
    yield Scene(child, monitor, signals, down)
    child.ended.set_result(Ending(0))
    assert await asyncio.wait_for(ending, 60) == 0


async def limit_after(timeout: float | None, *numbers: signal.Signals) -> tuple[float | None, int]:
    """The time limit that is armed once all of these signals have been acted on, in seconds from now; QEMU's status."""
    child, monitor, signals = Child(), Monitor(), Signals()
    shutdown = Shutdown(cast(Qemu, child), cast(Qmp, monitor), Voice("vm", quiet=False), Manager(), timeout)
    ending = asyncio.ensure_future(shutdown.until_ended(signals))
    for number in numbers:
        signals.put(number)
    await monitor.pressed.wait()
    while not signals._queue.empty():
        await asyncio.sleep(0)
    for _ in range(5):  # the turns of the loop in which the last one is acted on
        await asyncio.sleep(0)
    deadline = shutdown._deadline
    child.ended.set_result(Ending(0))
    status = await ending
    return None if deadline is None else deadline - asyncio.get_running_loop().time(), status


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM,),
        (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP),
        (signal.SIGINT, signal.SIGTERM),
    ],
)
def test_infinity_sets_no_limit(numbers: tuple[signal.Signals, ...]) -> None:
    assert asyncio.run(limit_after(None, *numbers)) == (None, 0)


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGHUP,), (signal.SIGHUP, signal.SIGHUP)])
def test_only_sigterm_sets_a_limit(numbers: tuple[signal.Signals, ...]) -> None:
    assert asyncio.run(limit_after(1000.0, *numbers)) == (None, 0)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)])
def test_sigterm_sets_the_limit(numbers: tuple[signal.Signals, ...]) -> None:
    limit, status = asyncio.run(limit_after(1000.0, *numbers))
    assert limit is not None
    assert 0 < limit <= 1000
    assert status == 0


@pytest.mark.parametrize("timeout", [None, 1000.0])
@pytest.mark.parametrize(
    "state",
    ["prelaunch", "inmigrate", "preconfig", "shutdown", "postmigrate", "guest-panicked", "internal-error"],
)
def test_guest_that_hears_nothing_is_cut_off_though_its_monitor_hangs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], state: str, timeout: float | None
) -> None:
    """QEMU gets what `quit` would have been, and no more time than a QEMU that quits."""
    monkeypatch.setattr(shutdown, "_ANSWER_TIMEOUT", 0.05)

    async def story() -> tuple[list[signal.Signals], float | None]:
        child = Child()
        monitor = Monitor(state, hang="quit")
        down = Shutdown(cast(Qemu, child), cast(Qmp, monitor), Voice("vm", quiet=False), Manager(), timeout)
        await down._on_signal(signal.SIGTERM)
        left = None if down._deadline is None else down._deadline - asyncio.get_running_loop().time()
        return child.sent, left

    sent, left = asyncio.run(story())
    assert sent == [signal.SIGTERM]
    assert left is not None
    assert 0 < left <= QUIT_GRACE
    assert capfd.readouterr().err == "", "nobody has tried to press its power button"


@pytest.mark.parametrize("hang", ["query-status", "system_powerdown"])
def test_hanging_monitor_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], hang: str
) -> None:
    monkeypatch.setattr(shutdown, "_ANSWER_TIMEOUT", 0.05)

    async def story() -> None:
        monitor = cast(Qmp, Monitor(hang=hang))
        await Shutdown(cast(Qemu, Child()), monitor, Voice("vm", quiet=False), Manager(), None)._on_signal(
            signal.SIGINT
        )

    asyncio.run(story())
    assert capfd.readouterr().err == "vm: the guest cannot be asked to power down: QEMU does not answer\n"


@pytest.mark.parametrize("state", STANDING)
def test_guest_that_stands_still_is_asked_and_its_user_told(capfd: pytest.CaptureFixture[str], state: str) -> None:
    async def story() -> Monitor:
        monitor = Monitor(state)
        await Shutdown(cast(Qemu, Child()), cast(Qmp, monitor), Voice("vm", quiet=False), Manager(), None)._on_signal(
            signal.SIGINT
        )
        return monitor

    assert asyncio.run(story()).pressed.is_set()
    assert capfd.readouterr().err.endswith(", and hears that when it goes on: qemu-launcher resume vm\n")


async def after_guest_is_down(state: str, *, hang: str = "") -> tuple[list[str], list[signal.Signals], float | None]:
    """The guest powers down when asked: what QEMU, in this state now, is asked and sent, and the limit that is set."""
    async with running() as vm:
        await vm.ask()
        vm.monitor.state, vm.monitor.hang = state, hang
        vm.monitor.happens("SHUTDOWN")
        vm.monitor.happens("STOP")
        while not vm.monitor.asked:
            await asyncio.sleep(0)
        await asyncio.sleep(4 * shutdown._ANSWER_TIMEOUT)
        return vm.monitor.asked, vm.child.sent, vm.down._deadline


def test_qemu_that_writes_its_images_back_has_all_the_time_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under -no-shutdown it answers nobody meanwhile, and nobody has asked for more than that the guest powers down."""
    monkeypatch.setattr(shutdown, "_ANSWER_TIMEOUT", 0.05)
    asked, sent, limit = asyncio.run(after_guest_is_down("running", hang="query-status"))
    assert ({*asked}, sent, limit) == ({"query-status"}, [], None)
    assert len(asked) > 1


def test_qemu_that_stays_without_its_guest_is_told_to_quit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "_ANSWER_TIMEOUT", 0.05)
    asked, sent, limit = asyncio.run(after_guest_is_down("shutdown"))
    assert (asked, sent) == (["query-status", "quit"], [])
    assert limit is not None


@pytest.mark.parametrize("states", [["guest-panicked"], ["internal-error"], ["finish-migrate", "postmigrate"]])
def test_guest_that_goes_otherwise_than_asked(monkeypatch: pytest.MonkeyPatch, states: list[str]) -> None:
    """-action panic=pause, an error of KVM's, a migration: nobody would hear the power button any more."""
    monkeypatch.setattr(shutdown, "_LOOK", 0.02)

    async def story() -> list[str]:
        async with running() as vm:
            await vm.ask()
            vm.monitor.state = states[0]
            vm.monitor.happens("STOP")
            while not vm.monitor.asked:
                await asyncio.sleep(0)
            vm.monitor.state = states[-1]  # no event tells of this one
            await vm.until_told_to_quit()
            return vm.monitor.asked

    assert asyncio.run(asyncio.wait_for(story(), 60)) == ["query-status"] * len(states) + ["quit"]


def test_guest_that_its_user_pauses_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "_ANSWER_TIMEOUT", 0.05)

    async def story() -> list[str]:
        async with running() as vm:
            await vm.ask()
            vm.monitor.state = "paused"
            vm.monitor.happens("STOP")
            while not vm.monitor.asked:
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            return vm.monitor.asked

    assert asyncio.run(asyncio.wait_for(story(), 60)) == ["query-status"]


def test_guest_that_was_reset_can_go_down_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """-no-shutdown: down by itself, reset and let go on, and only then asked by us."""
    monkeypatch.setattr(shutdown, "_ANSWER_TIMEOUT", 0.05)

    async def story() -> list[str]:
        async with running() as vm:
            vm.monitor.happens("SHUTDOWN")
            vm.monitor.happens("STOP")
            while vm.down._guest_stands.is_set():
                await asyncio.sleep(0)
            vm.monitor.happens("RESUME")
            vm.signals.put(signal.SIGINT)
            await vm.monitor.pressed.wait()
            vm.monitor.state = "shutdown"
            vm.monitor.happens("SHUTDOWN")
            vm.monitor.happens("STOP")
            await vm.until_told_to_quit()
            return vm.monitor.asked

    assert asyncio.run(asyncio.wait_for(story(), 60)) == ["query-status", "system_powerdown", "query-status", "quit"]


async def asked_while_leaving(number: signal.Signals, *events: str) -> tuple[list[str], float | None]:
    """What QEMU is asked when this signal comes after, or for others than SIGINT just before, these events; the limit.

    SIGINT never reaches QEMU; others can be for the whole process group.
    """
    async with running(1000.0) as vm:
        if number == signal.SIGINT:
            for event in events:
                vm.monitor.happens(event)
        vm.signals.put(number)
        while vm.down._stage is shutdown._Stage.RUNNING:
            await asyncio.sleep(0)
        if number != signal.SIGINT:
            for event in events:
                vm.monitor.happens(event)
        await asyncio.sleep(2 * shutdown.TOGETHER)
        return vm.monitor.asked, vm.down._deadline


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_qemu_that_leaves_is_asked_nothing(number: signal.Signals) -> None:
    """QEMU 7.2 can hang for good in monitor_cleanup() if a command meets it there."""
    asked, limit = asyncio.run(asyncio.wait_for(asked_while_leaving(number, "SHUTDOWN"), 60))
    assert asked == []
    assert (limit is not None) == (number == signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("events", [("SHUTDOWN", "STOP"), ("SHUTDOWN", "RESUME")])
def test_qemu_that_stays_is_asked(number: signal.Signals, events: tuple[str, ...]) -> None:
    asked, _ = asyncio.run(asyncio.wait_for(asked_while_leaving(number, *events), 60))
    assert asked[:2] == ["query-status", "system_powerdown"]


def test_qemu_that_leaves_by_itself_is_not_asked_whether_it_does() -> None:
    """A guest that powers down: QEMU says SHUTDOWN and goes."""

    async def story() -> list[str]:
        async with running() as vm:
            await vm.ask()
            vm.monitor.happens("SHUTDOWN")
            for _ in range(20):
                await asyncio.sleep(0)
            return vm.monitor.asked

    assert asyncio.run(asyncio.wait_for(story(), 60)) == []


async def while_leaving(
    timeout: float | None, *numbers: signal.Signals
) -> tuple[list[str], list[signal.Signals], float | None]:
    """The guest has powered down, QEMU is ending, and these come: what it is asked, what it is sent, and the limit."""
    async with running(timeout) as vm:
        vm.monitor.happens("SHUTDOWN")
        for number in numbers:
            vm.signals.put(number)
            while not vm.signals._queue.empty():
                await asyncio.sleep(0)
            await asyncio.sleep(3 * shutdown.TOGETHER)
        end = vm.down._deadline
        return vm.monitor.asked, vm.child.sent, None if end is None else end - asyncio.get_running_loop().time()


def test_second_ctrl_c_while_qemu_leaves_sends_what_quit_would_have_been(capfd: pytest.CaptureFixture[str]) -> None:
    asked, sent, limit = asyncio.run(while_leaving(None, signal.SIGINT, signal.SIGINT))
    assert (asked, sent) == ([], [signal.SIGTERM])
    assert limit is not None
    assert limit <= QUIT_GRACE
    assert capfd.readouterr().err == "vm: QEMU is ending already; Ctrl-C again cuts the power\n"


def test_ctrl_c_in_the_time_it_is_given_to_end_does_not_kill_it_yet() -> None:
    asked, sent, limit = asyncio.run(while_leaving(0.0, signal.SIGTERM, signal.SIGINT))
    assert (asked, sent) == ([], [signal.SIGTERM, signal.SIGTERM])
    assert limit is not None
    assert limit <= QUIT_GRACE


def test_time_that_runs_out_while_qemu_leaves_does_not_end_it_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """It may be writing its images back; and that the guest did not power down would be untrue."""
    asked, sent, limit = asyncio.run(while_leaving(0.0, signal.SIGTERM))
    assert (asked, sent) == ([], [signal.SIGTERM]), "which is nothing to one that leaves"
    assert limit is not None
    assert QUIT_GRACE < limit <= shutdown._WRITE_BACK
    assert capfd.readouterr().err == (
        "vm: QEMU is ending already; to cut its power: qemu-launcher kill vm\n"
        "vm: QEMU is ending, and is killed if that takes more than another 60 s\n"
    )


def test_migration_that_is_about_to_end_when_the_guest_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "_LOOK", 0.02)

    async def story() -> list[str]:
        async with running(state="finish-migrate") as vm:
            vm.signals.put(signal.SIGINT)
            await vm.monitor.pressed.wait()
            while len(vm.monitor.asked) < 4:
                await asyncio.sleep(0)
            vm.monitor.state = "postmigrate"
            await vm.until_told_to_quit()
            return vm.monitor.asked

    assert asyncio.run(asyncio.wait_for(story(), 60))[:4] == ["query-status", "system_powerdown"] + ["query-status"] * 2
