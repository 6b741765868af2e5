"""The control socket as a client meets it: with a QEMU of the test's own behind it."""

import asyncio
import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qemu_launcher import control, power, runtime, status
from qemu_launcher.control import Busy, State
from qemu_launcher.errors import LauncherError
from qemu_launcher.procfs import Process
from qemu_launcher.qmp import ConnectionLost
from qemu_launcher.record import RUNNING, STARTING, UNHELD, Record
from qemu_launcher.runtime import Found

ME = Process.of(os.getpid())
NOBODY = Process(1 << 22, 1)  # no PID reaches this


@dataclass
class FakeQemu:
    """Answers QMP in a thread. `before_greeting` is called when a client has come; at `leaves_at` QEMU ends."""

    answers: dict[str, Any] = field(default_factory=dict)
    before_greeting: Any = lambda: None
    asked: list[str] = field(default_factory=list)
    leaves_at: str | None = None  # a command, or "greeting"

    def serve(self, listening: socket.socket) -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            with client, suppress(OSError):  # it may have left again
                self._speak(client)

    def _speak(self, client: socket.socket) -> None:
        self.before_greeting()
        if self.leaves_at == "greeting":
            return
        client.sendall(b'{"QMP": {}}\n')
        with client.makefile("r") as file:
            for line in file:
                request = json.loads(line)
                self.asked.append(request["execute"])
                if request["execute"] == self.leaves_at:
                    return
                answer = {"return": self.answers.get(request["execute"], {}), "id": request["id"]}
                client.sendall(json.dumps(answer).encode() + b"\n")


@contextmanager
def served(place: Path, name: str, qemu: FakeQemu) -> Iterator[Path]:
    path = place / f"{name}.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        with serving(listening, qemu):
            yield path


@contextmanager
def serving(listening: socket.socket, qemu: FakeQemu) -> Iterator[None]:
    thread = threading.Thread(target=qemu.serve, args=(listening,))
    thread.start()
    try:
        yield
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextmanager
def full_queue(place: Path) -> Iterator[tuple[Path, socket.socket, ExitStack]]:
    """A control socket on which nobody is served yet, with as many clients as find a place."""
    path = place / "x.sock"
    with socket.socket(socket.AF_UNIX) as listening, ExitStack() as clients:
        listening.bind(str(path))
        listening.listen(1)
        with suppress(BlockingIOError):
            while True:
                clients.enter_context(runtime.connected(path))
        yield path, listening, clients


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # sun_path holds 108 bytes
    return Path()


def vm(name: str, path: Path | None, **fields: Any) -> Found:
    return Found(name, Record(**{"launcher": ME, "qemu": ME, "state": RUNNING, **fields}), path)


async def states(found: Sequence[Found]) -> list[State]:
    return list(await asyncio.gather(*map(control.state_of, found)))


def test_all_are_asked_at_the_same_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each greets when all have been called upon: one after the other, the first would never answer."""
    running = FakeQemu({"query-status": {"status": "running"}, "query-cpus-fast": []})
    running.before_greeting = threading.Barrier(3, timeout=10).wait
    with served(place, "a", running) as a, served(place, "b", running) as b, served(place, "c", running) as c:
        found = [vm("a", a), vm("b", b), vm("c", c)]
        assert asyncio.run(states(found)) == [State("running", control_socket="ok")] * 3
        monkeypatch.setattr(runtime, "find_all", lambda: found)
        pictures = asyncio.run(status.pictures_of(None))
        assert [picture.title for picture in pictures] == [f"{name}: running, PID {os.getpid()}" for name in "abc"]


def test_who_does_not_greet_is_busy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "GREETING_TIMEOUT", 0.01)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / "x.sock"))
        listening.listen(1)
        found = vm("x", place / "x.sock")
        assert asyncio.run(control.state_of(found)) == State("running", "control socket busy", "busy")
        with pytest.raises(Busy, match=r"^the control socket of x is busy"):
            asyncio.run(control.ask(found, "query-status"))


def test_full_queue_is_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several commands at a time: who finds no place in QEMU's queue tries again, and does not say that it is busy."""
    qemu = FakeQemu({"query-status": {"status": "running"}})
    waited: list[float] = []
    with full_queue(place) as (path, listening, clients), ExitStack() as server:

        async def wait(seconds: float) -> None:
            if not waited:
                clients.close()
                server.enter_context(serving(listening, qemu))
            waited.append(seconds)

        monkeypatch.setattr(asyncio, "sleep", wait)
        assert asyncio.run(control.state_of(vm("x", path))) == State("running", control_socket="ok")
    assert waited


def test_queue_that_stays_full_is_busy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "GREETING_TIMEOUT", 0.1)
    with full_queue(place) as (path, _, _):
        assert asyncio.run(control.state_of(vm("x", path))).control_socket == "busy"


def test_nobody_listens(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as once:
        once.bind(str(place / "x.sock"))
    found = vm("x", place / "x.sock")
    words = "^nobody listens on the control socket of x: Connection refused$"
    with pytest.raises(LauncherError, match=words) as caught:
        asyncio.run(control.ask(found, "query-status"))
    assert caught.value.hint == "cut its power with: qemu-launcher kill x"
    unreachable = State("running", "control socket unreachable", "unreachable")
    assert asyncio.run(states([found, vm("x", None), vm("x", place)])) == [unreachable] * 3


@pytest.mark.parametrize("moment", ["greeting", "qmp_capabilities", "query-status"])
def test_vm_that_ends_while_it_is_asked_is_named(place: Path, moment: str) -> None:
    with served(place, "x", FakeQemu(leaves_at=moment)) as path:
        found = vm("x", path)
        with pytest.raises(ConnectionLost, match=r"^x gave no answer: QEMU closed its monitor$") as caught:
            asyncio.run(control.ask(found, "query-status"))
        assert caught.value.hint == "see whether it still runs: qemu-launcher status x"
        assert asyncio.run(control.state_of(found)).control_socket == "unreachable"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"qemu": None, "state": STARTING}, "starting"),
        ({"qemu": NOBODY}, "ended (its launcher is about to end too)"),
        ({"launcher": NOBODY, "state": STARTING}, "never started (its launcher died; qemu-launcher run x ends it"),
        ({"state": STARTING}, "starting"),
        ({"state": UNHELD}, "starting"),
    ],
)
def test_states_for_which_nobody_is_asked(fields: dict[str, Any], words: str) -> None:
    assert str(asyncio.run(control.state_of(vm("x", None, **fields)))).startswith(words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"launcher": NOBODY, "state": STARTING}, "has never been started"),
        ({"state": STARTING}, "its launcher lets the guest run when it is tuned, and nobody else may"),
        ({"qemu": None, "state": STARTING}, "its launcher lets the guest run when it is tuned, and nobody else may"),
        ({"state": UNHELD}, None),
        ({"launcher": NOBODY, "state": UNHELD}, None),
        ({}, None),
    ],
)
def test_who_is_held(fields: dict[str, Any], words: str | None) -> None:
    if words is None:
        control.refuse_held(vm("x", None, **fields))
        return
    with pytest.raises(LauncherError, match=words):
        control.refuse_held(vm("x", None, **fields))


def test_vm_that_was_started_anew_meanwhile_is_not_let_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record that was looked at is of the one before; the one behind the socket is held."""
    qemu = FakeQemu({"query-status": {"status": "prelaunch"}})
    with served(place, "x", qemu) as path:
        seen = iter([vm("x", path), vm("x", path, state=STARTING)])
        monkeypatch.setattr(runtime, "find", lambda name: next(seen))
        with pytest.raises(LauncherError, match="nobody else may"):
            power.resume("x")
    assert "cont" not in qemu.asked


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("paused", "running", "running again"),
        ("prelaunch", "running", "started"),
        ("inmigrate", "inmigrate", "it runs as soon as its migration has arrived"),
        ("suspended", "suspended", "told to go on, but QEMU says: suspended"),
    ],
)
def test_resume_tells_what_became_of_it(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: str,
    after: str,
    words: str,
) -> None:
    qemu = FakeQemu()
    answers = iter([before, after])

    class Answers(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            return {"status": next(answers)} if key == "query-status" else default

    qemu.answers = Answers()
    with served(place, "x", qemu) as path:
        monkeypatch.setattr(runtime, "find", lambda name: vm("x", path))
        assert power.resume("x") == 0
    assert capsys.readouterr().out == f"x: {words}\n"
