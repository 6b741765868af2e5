"""Waiting: for what has no fixed limit, with a word to the user when it takes long; and for a descriptor."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# A start takes a tenth of a second; nobody wonders before three have passed, and nobody wants a line every second.
FIRST_WORD = 3.0  # seconds
NEXT_WORD = 10.0


async def patiently(work: Coroutine[Any, Any, T], tell: Callable[[], None]) -> T:
    """The result of `work`; `tell` is called after 3 s and then every 10 s. Cancelled, it cancels `work`."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(retrieved)
    pause = FIRST_WORD
    try:
        while not (await asyncio.wait([task], timeout=pause))[0]:
            tell()
            pause = NEXT_WORD
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


async def readable(fd: int, seconds: float | None = None) -> bool:
    """Wait until `fd` is readable, or at its end; False after `seconds`, None waits for ever."""
    loop, seen = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, seen.set)
    try:
        async with asyncio.timeout(seconds):
            await seen.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
    return True


def retrieved(future: asyncio.Future[Any]) -> None:
    """Look at the outcome: where it is of no interest any more, asyncio would print it as an error nobody looked at."""
    if not future.cancelled():
        future.exception()
