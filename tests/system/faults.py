"""A helper in which any step can fail, kill it or wait, in place of the installed one: faulty_helper.py says how."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest

from system import host
from system.claims import copied
from system.fixtures import start_helper, stop_helper
from system.people import OUT_OF_SESSION
from system.stepping import FOLDER, replaced_helper

# How many points of each kind are tried: enough to see them all within some runs; 100000 for every one.
ROUNDS = int(os.environ.get("QEMU_LAUNCHER_ROUNDS", "4"))
LONGEST_TURN, MOST_TURNS = 6, 3  # steps of one turn of a loop; turns that are all tried
CLOSE_LOOK = 8  # points, after which a VM is started that nothing happens to
MOST_WRONG = 5  # points, after which a row ends
SEED = int(os.environ.get("QEMU_LAUNCHER_SEED", "1"))
# Which part of these this run tries: 2/3 is the second of three, which labs can try side by side.
SHARE, SHARES = map(int, os.environ.get("QEMU_LAUNCHER_SHARE", "1/1").split("/"))


def say(line: str) -> None:
    """Write a line into what pytest keeps of the test."""
    sys.stdout.write(f"{line}\n")


class Point(NamedTuple):
    """One step of the helper's, and what happens there."""

    at: int
    name: str
    do: str

    def __str__(self) -> str:
        return f"{self.do} at step {self.at}, {self.name}"


class Faults:
    """The helper's other end."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._buffer = b""
        self._is_new = False  # has been started for no order, and has served nobody yet

    def order(self, during: str = "nothing", *kinds: str, at: int = -1, do: str = "count") -> bool:
        """Have a helper started anew, the last one being killed; whether it serves, or has ended before it did."""
        self.close()
        self._socket, self._buffer = socket.socket(socket.AF_UNIX), b""
        host.wait_for("the faulty helper takes orders", self._connected)
        self._send(during, *kinds, at=at, do=do)
        self._is_new = during == "nothing"
        return self._heard() == b"ready"

    def order_calls(self, *kinds: str, at: int = -1, do: str = "count") -> None:
        """The same, to a helper that serves: the one that is there, if it is new and has nothing to do yet."""
        if self._is_new:
            self._is_new = False
            self._send("calls", *kinds, at=at, do=do)
        else:
            assert self.order("calls", *kinds, at=at, do=do)

    def reached(self) -> bool:
        """Wait until the helper stands at its step; False when it has ended without."""
        return self._heard() == b"reached"

    def _send(self, during: str, *kinds: str, at: int, do: str) -> None:
        assert self._socket is not None
        order = {"during": during, "kinds": kinds, "at": at, "do": do}
        self._socket.sendall(json.dumps(order).encode() + b"\n")

    def go(self) -> None:
        """Let it go on."""
        assert self._socket is not None
        self._socket.sendall(b"go")

    def steps(self) -> list[str]:
        """What it has come by so far."""
        return (FOLDER / "steps").read_text().splitlines()

    def close(self) -> None:
        """Hang up; that helper goes on."""
        if self._socket is not None:
            self._socket.close()

    @property
    def descriptor(self) -> int:
        """For select(2), beside others."""
        assert self._socket is not None
        return self._socket.fileno()

    def _connected(self) -> bool:
        assert self._socket is not None
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            self._socket.connect(str(FOLDER / "orders"))
            return True
        return False

    def _heard(self) -> bytes:
        assert self._socket is not None
        while b"\n" not in self._buffer:
            assert select.select([self._socket], [], [], host.PATIENCE)[0], "the faulty helper says nothing"
            data = self._socket.recv(64)
            if not data:
                return b""
            self._buffer += data
        word, _, self._buffer = self._buffer.partition(b"\n")
        return word


def tellable(names: Sequence[str]) -> list[int]:
    """Which of these steps can be told apart: all, but of a loop the turns between its first, a middle and its last.

    With cpusets of v1 each task of the host is moved by itself, hundreds of times in a VM's life.
    """
    kept, at = list[int](), 0
    while at < len(names):
        for length in range(1, LONGEST_TURN + 1):
            turn, turns = names[at : at + length], 1
            while names[at + turns * length : at + (turns + 1) * length] == turn:
                turns += 1
            if turns > MOST_TURNS:
                break
        else:
            length, turns = 1, 1
        for number in sorted({0, turns // 2, turns - 1}):
            kept += range(at + number * length, at + (number + 1) * length)
        at += turns * length
    return kept


def often(points: Sequence[Point]) -> int:
    """How many of these are tried in every run: all, on Debian 13."""
    return len(points) if host.has_systemd() and host.mechanism() == "partition" else ROUNDS


def sampled(points: Sequence[Point], what: str, rounds: int = ROUNDS) -> list[Point]:
    """As many of them as this run is to try, chosen by the seed; and a line on standard output that says so.

    Chosen by what they are called, not by where they stand: how often systemd is asked for a job varies.
    """
    seen: Counter[str] = Counter()

    def rank(point: Point) -> bytes:
        name = f"{point.name} {point.do}"
        seen[name] += 1
        return hashlib.sha256(f"{SEED} {what} {name} {seen[name]}".encode()).digest()

    ranked = sorted((rank(point), point) for point in points)
    chosen = sorted(point for _, point in ranked[:rounds][SHARE - 1 :: SHARES])
    how = f"mechanism {host.mechanism()}, QEMU_LAUNCHER_SEED={SEED} QEMU_LAUNCHER_SHARE={SHARE}/{SHARES}"
    say(f"{what}: {len(chosen)} of {len(points)} points, {how}")
    return chosen


class NotComeBy(Exception):  # noqa: N818  that is what happened
    """The step was not reached this time: how often systemd is asked, or a list read again, is not always the same."""


def try_all(
    points: Sequence[Point],
    what: str,
    tried: Callable[[Point], None],
    rounds: int = ROUNDS,
    now_and_then: Callable[[], None] = lambda: None,
) -> None:
    """Try those that are this run's; all that is wrong is told, not only the first."""
    wrong, passed_by = list[str](), 0
    began = time.monotonic()
    chosen = sampled(points, what, rounds)
    for number, point in enumerate(chosen, 1):
        try:
            try:
                tried(point)
            except NotComeBy:
                passed_by += 1
                say(f"not come by: {point}")
            if number % CLOSE_LOOK == 0 or number == len(chosen):
                now_and_then()
        except (AssertionError, OSError) as err:
            wrong.append(f"{point}: {str(err)[:1500]}")
            if len(wrong) == MOST_WRONG:
                break
    seconds = (time.monotonic() - began) / max(1, len(chosen))
    say(f"{what}: {len(chosen) - len(wrong) - passed_by} passed, {passed_by} not come by, {seconds:.1f} s each")
    assert not wrong, "\n".join(wrong)
    assert passed_by <= max(1, len(chosen) // 4), "the steps are no longer the same ones"
    assert passed_by < len(chosen) or not chosen, "nothing was tried"


@pytest.fixture(scope="module")
def faulty_unit() -> Iterator[None]:
    """The unit with the other program in it. Not Type=dbus: systemd would end it when one of its helpers is killed."""
    program = "faulty_helper.py"
    with replaced_helper(program, "Type=exec") if host.has_systemd() else helper_without_unit(program):
        yield
    for name in ("orders", "steps"):
        (FOLDER / name).unlink(missing_ok=True)


@contextlib.contextmanager
def helper_without_unit(name: str) -> Iterator[None]:
    """A program of the tests' where there are no units: it has the helper's name on the bus before anybody asks for it.

    It confines itself as the helper does, so it is root's until then, as below dbus-daemon.
    """
    stop_helper()
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    script = copied(f"system/{name}") / name
    command = [*OUT_OF_SESSION, "/usr/bin/python3", "-IS", str(script), "--serve"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def faults(faulty_unit: None) -> Iterator[Faults]:
    """A helper in which something goes wrong. It is sound again afterwards, for what the fixtures ask of it."""
    if host.has_systemd():
        start_helper()  # host_as_before may have stopped it
    helper = Faults()
    assert helper.order()
    yield helper
    helper.order()
    helper.close()


def answer_or_halt(program: Any, faults: Faults) -> bool:
    """Wait for what comes first: True when the helper stands at its step, False when the call was answered."""
    ready = select.select([faults.descriptor, program.descriptor], [], [], host.PATIENCE)[0]
    assert ready, "neither an answer nor a halt"
    return faults.descriptor in ready and faults.reached()


class Affinities:
    """Where each task of the host may run, while there is no VM."""

    def __init__(self) -> None:
        self._before = self._now()

    def expect_back(self) -> None:
        """No task has fewer CPUs than before, nor has a new one. (The kernel lets some of its own have more.)

        Those that the kernel alone may move are left out: it sends the rescuers of its work queues, rcu_gp say, to the
        CPU where they are needed, and leaves them there.
        """
        # The kernel gives its own workers their CPUs back in a work item of its own: not at once on a busy host.
        end = time.monotonic() + host.PATIENCE
        while (lost := self._lost()) and time.monotonic() < end:
            time.sleep(0.3)
        assert lost == {}, "tasks that have lost CPUs"
        assert host.born_of_us() == host.online()

    def _lost(self) -> dict[tuple[int, int, int], list[int]]:
        return {key: sorted(cpus) for key, cpus in self._now().items() if not cpus >= self._before.get(key, cpus)}

    @staticmethod
    def _now() -> dict[tuple[int, int, int], frozenset[int]]:
        ours_to_move = [thread for thread in host.threads() if not thread.belongs_to_its_cpu]
        return {(thread.pid, thread.tid, thread.born): thread.cpus for thread in ours_to_move}


@pytest.fixture
def affinities() -> Affinities:
    """Taken before the test."""
    return Affinities()
