"""How many calls a user may make, whatever they ask for. Counts only.

Refuses what is beyond the limits of contract (LimitExceeded), and logs that once per flood: the journal is part of the
host. A refused call counts for nothing, so a user who stops flooding is served again.
"""

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .contract import CALLS_IN_FLIGHT, CALLS_PER_WINDOW, WINDOW_SECONDS
from .errors import LimitExceeded

_log = logging.getLogger(__name__)


class Quotas:
    """Calls in flight and calls in the last WINDOW_SECONDS, per uid."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_flight: Counter[int] = Counter()
        self._calls: defaultdict[int, deque[float]] = defaultdict(deque)
        self._told: dict[int, float] = {}

    @contextmanager
    def slot(self, uid: int) -> Iterator[None]:
        """Hold one of the user's slots for the block."""
        calls, now = self._calls[uid], self._clock()
        while calls and calls[0] <= now - WINDOW_SECONDS:
            calls.popleft()
        if self._in_flight[uid] >= CALLS_IN_FLIGHT or len(calls) >= CALLS_PER_WINDOW:
            if self._told.get(uid, -WINDOW_SECONDS) <= now - WINDOW_SECONDS:
                self._told[uid] = now
                _log.warning("refused uid=%d: too many calls", uid)
            most = f"{CALLS_IN_FLIGHT} at a time and {CALLS_PER_WINDOW} in {WINDOW_SECONDS:.0f} s"
            raise LimitExceeded(f"This user makes too many calls, at most {most} are served; try again a little later")
        calls.append(now)
        with self.counted(uid, 1):
            yield

    @contextmanager
    def counted(self, uid: int, number: int) -> Iterator[None]:
        """Count the block as that many calls in flight; -1 lends the slot out while a call only waits for a person."""
        self._in_flight[uid] += number
        try:
            yield
        finally:
            self._in_flight[uid] -= number
