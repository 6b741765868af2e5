"""How signals become a power-down and a cut, without waiting for time to pass: what is asked, and which limit is set.

QEMU and its monitor are played here, since only the launcher's own decisions matter; tests/qemu has the real ones.
"""

import asyncio
import signal
from typing import Any, cast

import pytest

from qemu_launcher.notify import Manager
from qemu_launcher.process import Ending, Qemu
from qemu_launcher.qmp import Qmp
from qemu_launcher.shutdown import Shutdown, Signals
from qemu_launcher.voice import Voice


class Monitor:
    """Answers every command, and tells when the power button has been pressed."""

    def __init__(self) -> None:
        self.pressed = asyncio.Event()

    def listen(self, listener: Any) -> None:
        pass

    async def execute(self, command: str) -> dict[str, str]:
        if command == "system_powerdown":
            self.pressed.set()
        return {"status": "running"}


class Child:
    def __init__(self) -> None:
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()


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
