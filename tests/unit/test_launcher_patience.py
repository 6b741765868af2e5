"""Waiting patiently: words while it takes long, and no noise about what nobody waits for any more."""

import asyncio
import gc
import os
from typing import Any

import pytest

from qemu_launcher import patience
from qemu_launcher.errors import LauncherError


def test_words_while_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WORD", 0.0)
    monkeypatch.setattr(patience, "NEXT_WORD", 0.0)

    async def story() -> int:
        told = asyncio.Event()

        async def work() -> int:
            await told.wait()
            return 7

        return await patience.patiently(work(), told.set)

    assert asyncio.run(story()) == 7


def test_failure_at_the_moment_of_cancelling_makes_no_noise() -> None:
    """QEMU dies: the monitor's end and the process's end may come in one turn of the loop, in either order."""
    noise: list[dict[str, Any]] = []

    async def story() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: noise.append(context))
        gate = asyncio.Event()

        async def work() -> None:
            await gate.wait()
            raise LauncherError("the monitor is closed")

        waiting = asyncio.ensure_future(patience.patiently(work(), lambda: None))
        for _ in range(3):
            await asyncio.sleep(0)
        gate.set()
        await asyncio.sleep(0)  # the work has failed, and who waits for it has not been told yet
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()

    asyncio.run(story())
    gc.collect()
    assert noise == []


def test_descriptor_that_has_something_to_read_or_has_ended_or_neither() -> None:
    async def story() -> list[bool]:
        reading, writing = os.pipe()
        try:
            found = [await patience.readable(reading, 0.01)]
            os.write(writing, b"x")
            found.append(await patience.readable(reading))
            os.read(reading, 1)
            found.append(await patience.readable(reading, 0.01))
            os.close(writing)
            found.append(await patience.readable(reading))
            assert not asyncio.get_running_loop().remove_reader(reading), "it is not watched any more"
        finally:
            os.close(reading)
        return found

    assert asyncio.run(story()) == [False, True, False, True]


def test_cancelled_it_cancels_the_work() -> None:
    async def story() -> bool:
        work = asyncio.Event()
        ended = []

        async def endless() -> None:
            try:
                await work.wait()
            finally:
                ended.append(True)

        waiting = asyncio.ensure_future(patience.patiently(endless(), lambda: None))
        for _ in range(3):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        return ended == [True]

    assert asyncio.run(story())
