"""When vCPUs come and go: who is asked when, and that nothing of it ends a run. QEMU is played by a list of answers."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from qemu_launcher import hotplug, procfs
from qemu_launcher.errors import LauncherError, QmpError
from qemu_launcher.hotplug import Hotplug
from qemu_launcher.qmp import ConnectionLost, Event, ProtocolError, QmpRefused
from qemu_launcher.threads import Ids, Threads, Vcpu

MAIN = 100


def vcpus(*tids: int) -> Threads:
    return Threads(tuple(Vcpu(i, tid, Ids(core=i), i) for i, tid in enumerate(tids)), (), (), 4)


class World:
    """A QEMU with threads, a monitor that tells them, and what was done about it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tids = [MAIN, 200]
        self.answers: list[Threads | Exception] = []
        self.asked = 0
        self.acted: list[list[int]] = []
        self.looks = 0
        self.listener: Callable[[Event], None] | None = None
        self.looked = asyncio.Event()
        monkeypatch.setattr(procfs, "tids", self.look)
        monkeypatch.setattr(hotplug, "LOOK", 0.001)

    def look(self, pid: int) -> tuple[int, ...]:
        assert pid == MAIN
        self.looks += 1
        self.looked.set()
        return tuple(self.tids)

    async def read(self) -> Threads:
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else vcpus(*(tid for tid in self.tids if 200 <= tid < 300))
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def act(self, found: Threads) -> None:
        self.acted.append([vcpu.tid for vcpu in found.vcpus])

    def listen(self, listener: Callable[[Event], None]) -> None:
        self.listener = listener

    async def looks_later(self, count: int = 3) -> None:
        goal = self.looks + count
        while self.looks < goal:
            self.looked.clear()
            await self.looked.wait()


def played(
    monkeypatch: pytest.MonkeyPatch,
    story: Callable[[World, "asyncio.Task[None]"], Any],
    failure: Exception | None = None,
) -> World:
    async def play() -> World:
        world = World(monkeypatch)
        qmp: Any = world
        watch = Hotplug(MAIN, vcpus(200), world.read, world.act).watch(qmp)
        task = asyncio.ensure_future(watch)
        async with asyncio.timeout(60):
            await world.looks_later()
            await story(world, task)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is failure
        return world

    return asyncio.run(play())


def test_nothing_new_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World, _: Any) -> None:
        await world.looks_later(20)

    world = played(monkeypatch, story)
    assert (world.asked, world.acted) == (1, [])


def test_worker_that_comes_and_goes_asks_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World, _: Any) -> None:
        world.tids = [MAIN, 200, 500]
        await world.looks_later()
        world.tids = [MAIN, 200]
        await world.looks_later()

    world = played(monkeypatch, story)
    assert (world.asked, world.acted) == (2, [])


def test_vcpu_that_comes_while_a_worker_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads as before, but others."""

    async def story(world: World, _: Any) -> None:
        world.tids = [MAIN, 200, 500]
        await world.looks_later()
        world.tids = [MAIN, 200, 201]
        await world.looks_later()

    assert played(monkeypatch, story).acted == [[200, 201]]


def test_vcpu_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World, _: Any) -> None:
        world.tids = [MAIN, 200, 201]
        await world.looks_later()
        world.tids = [MAIN, 200]
        await world.looks_later()

    assert played(monkeypatch, story).acted == [[200, 201], [200]]


@pytest.mark.parametrize(("event", "asked"), [("ACPI_DEVICE_OST", 2), ("DEVICE_DELETED", 2), ("RTC_CHANGE", 1)])
def test_events_that_are_reason_to_look(monkeypatch: pytest.MonkeyPatch, event: str, asked: int) -> None:
    async def story(world: World, _: Any) -> None:
        assert world.listener is not None
        world.listener({"event": event, "data": {}})
        await world.looks_later()

    assert played(monkeypatch, story).asked == asked


@pytest.mark.parametrize("error", [QmpRefused("query-cpus-fast", {"desc": "not now"}), LauncherError("a stranger")])
def test_look_that_failed_is_made_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def story(world: World, _: Any) -> None:
        world.answers = [error]
        world.tids = [MAIN, 200, 201]
        await world.looks_later()
        world.tids = [MAIN, 200, 201, 500]
        await world.looks_later()

    assert played(monkeypatch, story).acted == [[200, 201]]


def test_full_machine_is_looked_at_once_a_vcpu_was_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be plugged in until then, and nobody wakes up for it."""

    async def play() -> World:
        world = World(monkeypatch)
        qmp: Any = world
        world.tids = [MAIN, 200, 201, 202, 203]
        task = asyncio.ensure_future(Hotplug(MAIN, vcpus(200, 201, 202, 203), world.read, world.act).watch(qmp))
        async with asyncio.timeout(60):
            await asyncio.sleep(0.05)
            assert world.looks == 0
            assert world.listener is not None
            world.tids.remove(203)
            world.listener({"event": "DEVICE_DELETED", "data": {}})
            await world.looks_later()
            world.tids.append(204)
            while len(world.acted) < 2:
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return world

    assert asyncio.run(play()).acted == [[200, 201, 202], [200, 201, 202, 204]]


def test_end_of_qemu_ends_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World, task: "asyncio.Task[None]") -> None:
        world.answers = [ConnectionLost("gone")]
        world.tids = []
        await asyncio.wait([task])

    assert played(monkeypatch, story).acted == []


@pytest.mark.parametrize("kind", [QmpError, ProtocolError])
def test_answer_that_cannot_be_understood_ends_the_watch_with_it(
    monkeypatch: pytest.MonkeyPatch, kind: type[QmpError]
) -> None:
    """Not in silence: whoever waits for the watch says that nobody watches any more."""
    answer = kind("QEMU described a vCPU as 'x'")

    async def story(world: World, task: "asyncio.Task[None]") -> None:
        world.answers = [answer]
        world.tids = [MAIN, 200, 201]
        await asyncio.wait([task])

    assert played(monkeypatch, story, answer).acted == []
