"""How signals become a power-down and a cut, without waiting for time to pass: what is asked, and which limit is set.

QEMU and its monitor are played here, since only the launcher's own decisions matter; tests/qemu has the real ones.
"""

import asyncio
import signal
from typing import Any, cast

import pytest

from qemu_launcher import shutdown
from qemu_launcher.notify import Manager
from qemu_launcher.process import QUIT_GRACE, Ending, Qemu
from qemu_launcher.qmp import Qmp
from qemu_launcher.shutdown import NOT_STARTED, Shutdown, Signals
from qemu_launcher.voice import Voice


class Monitor:
    """Answers every command but those that `hang`, and tells when the power button has been pressed."""

    def __init__(self, state: str = "running", hang: str = "") -> None:
        self.pressed = asyncio.Event()
        self._state = state
        self._hang = hang

    def listen(self, listener: Any) -> None:
        pass

    async def execute(self, command: str) -> dict[str, str]:
        if command == "system_powerdown":
            self.pressed.set()
        if command == self._hang:
            await asyncio.Event().wait()
        return {"status": self._state}


class Child:
    """Takes signals, and ends when the test says so."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self.sent: list[signal.Signals] = []

    def send(self, number: signal.Signals) -> None:
        self.sent.append(number)


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
@pytest.mark.parametrize("state", NOT_STARTED)
def test_guest_that_has_not_started_is_cut_off_though_its_monitor_hangs(
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
