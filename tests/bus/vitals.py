"""What an attack must not change: the helper's process, its memory, its descriptors, and what honest callers wait.

Times are compared within one run, with and without the attack, or with what this machine needs for other work. The
bounds are far from what is usual: they tell a helper that was blocked from one that was busy, on any machine.
"""

import os
import select
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bus.calls import CALLS, FREE, using
from bus.client import Client
from bus.world import User, World, as_user, wait_until

MIB = 2**20
# The unit's MemoryMax= is 128 MiB.
MOST = 110 * MIB
# What `work` takes of the CPU where the bounds were chosen, in seconds.
WORK = 0.025
# What makes a median of answers during an attack.
ANSWERS = 15


def peak(pid: int) -> int:
    """Peak resident memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def cpu_seconds(pid: int) -> float:
    """What a process has used of the CPU; other than time on the wall, this is the same on a busy machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def slowness() -> float:
    """How many times as much of the CPU as where the bounds were chosen Python needs here, for the same; at least 1."""

    def work() -> float:
        began = time.process_time()
        for number in range(200_000):
            len(str(number).encode())
        return time.process_time() - began

    return max(1.0, min(work() for _ in range(3)) / WORK)


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def served(host: World, user: User) -> int:
    """Be served once, and return the helper's PID."""
    assert using(host, user, lambda client: client.call("GetLimits").short) == "ok"
    return host.helper_pid()


Timed = list[tuple[str, float]]


class Answers:
    """An honest caller's answers and how long each took, before and during the attack."""

    def __init__(self) -> None:
        self.before: Timed = []
        self.during: Timed = []

    def medians(self) -> tuple[float, float]:
        """What an answer usually took, before and during the attack, in seconds."""
        usual, attacked = (statistics.median(took for _, took in timed) for timed in (self.before, self.during))
        return usual, attacked

    def __str__(self) -> str:
        usual, attacked = self.medians()
        longest = max(took for _, took in self.during)
        return f"median {usual * 1e3:.1f} ms before, {attacked * 1e3:.1f} ms attacked, longest {longest:.2f} s"


@contextmanager
def unhurt(
    host: World,
    honest: User,
    *,
    member: str = "SetMemlock",
    most: int = MOST,
    cpu: float = 10.0,
    slowest: float = 100.0,
    ratio: float | None = None,
) -> Iterator[int]:
    """Attack in the block: the helper lives on, as small as before, and serves `honest`, who calls `member`, meanwhile.

    `cpu`: seconds of the CPU that the helper may use for it: it works one call after the other, so that is what the
    last in the queue waits. `slowest`: on the wall, which others' work adds to; it finds who waits for ever. Both are
    for a machine of the usual speed, and more on a slower one. `ratio`: how many times as long as before the usual
    answer may take, for an attack that lasts over many answers. The honest caller makes at most 57 calls in 20 s, three
    fewer than his quota. Yields the helper's PID.
    """
    pid = served(host, honest)
    files, used, pace = descriptors(pid), cpu_seconds(pid), slowness()
    ready, stop = os.pipe(), os.pipe()
    child = as_user(honest, lambda: _call(host.socket, member, lambda: os.write(ready[1], b"x"), stop[0]))
    try:
        os.read(ready[0], 1)
        yield pid
    finally:
        os.write(stop[1], b"x")
        times: Answers = child.result()
        for end in (*ready, *stop):
            os.close(end)
    used, pace = cpu_seconds(pid) - used, max(pace, slowness())  # others' work may have begun, or ended, meanwhile
    print(f"{times}, {used:.2f} s of the CPU, {pace:.1f} times the usual, VmHWM {peak(pid) / MIB:.0f} MiB")  # noqa: T201
    assert {answer for answer, _ in (*times.before, *times.during)} == {"ok"}
    assert max(took for _, took in times.during) < slowest * pace
    assert used < cpu * pace
    if ratio is not None:
        usual, attacked = times.medians()
        assert len(times.during) >= ANSWERS, "the attack was over before it could be judged"
        assert attacked < ratio * usual
    assert host.helper_pid() == pid
    assert peak(pid) < most
    wait_until(lambda: descriptors(pid) == files, "descriptors to be closed")


def _call(path: str, member: str, ready: Callable[[], object], stop: int) -> Answers:
    times = Answers()
    with Client(path) as client:

        def call() -> tuple[str, float]:
            start = time.monotonic()
            return client.call(member, *(CALLS | FREE)[member]).short, time.monotonic() - start

        times.before = [call() for _ in range(10)]
        ready()
        while not times.during or not select.select([stop], [], [], 0.1 if len(times.during) < 25 else 0.8)[0]:
            times.during.append(call())
    return times
