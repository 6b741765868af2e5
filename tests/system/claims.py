"""Claims on the helper without launcher and QEMU: what any program of a user's could ask for, seconds cheaper.

A `Claimant` is a process in a login of its user. Its children sleep under QEMU's name, so the helper tunes them as it
would a QEMU; "it is really QEMU" is no boundary anyway (qemu-launcher-helper(8), THREAT MODEL).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from system import host
from system.people import DESK, User, login_command

_TESTS = Path(__file__).resolve().parent.parent


class Answer(NamedTuple):
    """`error`: the last part of the D-Bus error's name, "ok" without one. `text`: what it says."""

    error: str
    body: list[Any]

    @property
    def text(self) -> str:
        """The sentence for the user."""
        return str(self.body[0]) if self.body else ""


class Child(NamedTuple):
    """What plays QEMU, and its threads besides the first."""

    pid: int
    tids: list[int]


class Claimant:
    """The program, running. A context manager; leaving it ends the program and its children."""

    def __init__(
        self, user: User, *inside: str, start: Callable[..., list[str]] = login_command, patient: bool = True
    ) -> None:
        """`inside`: words before its own command; `start`: makes the whole command, of a user's name and a command.

        `patient`: whether a refusal for the number of calls is waited out.
        """
        self._become(user, patient=patient)
        self._process = subprocess.Popen(
            start(user.name, *inside, "/usr/bin/python3", str(_copied_script())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def _become(self, user: User, *, patient: bool) -> None:
        self.user = user
        self._patient = patient
        self._children: set[int] = set()
        self._grandchildren: set[int] = set()
        self._disowns = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the program and its children."""
        try:
            if self.is_alive:
                self.end_all()
        finally:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(host.PATIENCE)

    @property
    def is_alive(self) -> bool:
        """Whether the program still runs."""
        return self._process.poll() is None

    def spawn(self, threads: int, *, spin: bool = False) -> Child:
        """Make a child, whose threads sleep or keep their CPUs busy."""
        answer = self._ask(do="spawn", threads=threads, spin=spin)
        self._children.add(answer["pid"])
        return Child(answer["pid"], answer["tids"])

    def tell(self, child: Child, do: str, **order: Any) -> dict[str, Any]:
        """Have a child do something, see claimant.py."""
        answer = self._ask(do="tell", pid=child.pid, order={"do": do, **order})
        self._grandchildren.update(answer.get("pids", ()))
        return answer

    def disown(self) -> None:
        """Have children that end vanish at once, their numbers free, until `end_all`."""
        self._ask(do="disown")
        self._disowns = True

    def end(self, pid: int) -> None:
        """Kill a child."""
        self._children.discard(pid)
        self._ask(do="end", pid=pid)

    def end_all(self) -> int:
        """Kill all children that are left, and theirs, and own those to come; how many children there were."""
        left = sorted(self._children)
        for pid in left:
            self.end(pid)
        for pid in self._grandchildren:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._grandchildren.clear()
        if self._disowns:
            self._ask(do="own")
            self._disowns = False
        return len(left)

    def set_memlock(self, child: Child, vm: str, size: int) -> Answer:
        """SetMemlock."""
        return self.call("SetMemlock", "ust", child.pid, vm, size)

    def pin(self, child: Child, vm: str, *cpus: int, shielded: bool = True) -> Answer:
        """PinThreads: the i-th thread to the i-th CPU."""
        pins = [[tid, [cpu], shielded] for tid, cpu in zip(child.tids, cpus, strict=False)]
        return self.call("PinThreads", "usa(uaub)au", child.pid, vm, pins, [])

    def schedule(self, child: Child, vm: str, policy: str, priority: int, threads: int | None = None) -> Answer:
        """SetScheduler, for the first `threads` threads or for all."""
        return self.call("SetScheduler", "usausu", child.pid, vm, child.tids[:threads], policy, priority)

    def call(self, member: str, signature: str, *body: Any) -> Answer:
        """Call the helper. Tests of one user follow each other fast: what counts as too many calls in 20 s waits."""
        while True:
            answer = self._reply(do="call", member=member, signature=signature, body=body)
            if not self._patient or not _is_too_much(answer):
                return answer
            time.sleep(1)

    def calls(self, wanted: Sequence[tuple[str, str, list[Any]]]) -> list[Answer]:
        """Make some calls at once, at most 4, each (member, signature, body); the answers, in that order."""
        answers: dict[int, Answer] = {}
        while left := [number for number in range(len(wanted)) if number not in answers]:
            calls = [{"member": wanted[n][0], "signature": wanted[n][1], "body": wanted[n][2]} for n in left]
            got = zip(left, map(_answer, self._ask(do="calls", calls=calls)["answers"]), strict=True)
            answers |= {number: answer for number, answer in got if not (self._patient and _is_too_much(answer))}
            if len(answers) < len(wanted):
                time.sleep(1)
        return [answers[number] for number in range(len(wanted))]

    def manager(self, member: str, signature: str, *body: Any) -> Answer:
        """Call systemd."""
        return self._reply(do="manager", member=member, signature=signature, body=body)

    def begin(self, member: str, signature: str, *body: Any) -> None:
        """Call the helper, and do not wait for the answer; `finish` does."""
        self._tell(do="call", member=member, signature=signature, body=body)

    def finish(self) -> Answer:
        """The answer to what was begun; "died" when the caller has."""
        answer = self._hear()
        return _answer(answer) if answer else Answer("died", [])

    @property
    def descriptor(self) -> int:
        """For select(2): readable when there is an answer."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def _reply(self, **order: Any) -> Answer:
        return _answer(self._ask(**order))

    def _ask(self, **order: Any) -> dict[str, Any]:
        self._tell(**order)
        return self._hear()

    def _tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], host.PATIENCE)
        assert ready, f"no answer to the claimant of {self.user.name}"
        line = stdout.readline()
        assert line, f"the claimant of {self.user.name} died"
        answer: dict[str, Any] = json.loads(line)
        return answer


class Apprentice(Claimant):
    """A claimant that another has made, seconds cheaper than a login of its own; for who is to be killed."""

    def __init__(self, master: Claimant) -> None:
        self._become(master.user, patient=False)
        self._process = master._process
        self.pid: int = master._ask(do="apprentice")["pid"]
        self._master = master

    def close(self) -> None:
        """Leave its master as it was without it."""
        self.end_all()
        self._master.end(self.pid)

    def end(self, pid: int) -> None:
        """Kill a child, which is nobody's when this program is gone."""
        self._children.discard(pid)
        if host.is_alive(self.pid):
            self._ask(do="end", pid=pid)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _tell(self, **order: Any) -> None:
        super()._tell(do="tell", pid=self.pid, order=order)


def _answer(answer: dict[str, Any]) -> Answer:
    return Answer(answer["error"].rpartition(".")[2] if answer["error"] else "ok", answer["body"])


def _is_too_much(answer: Answer) -> bool:
    return answer.text.startswith("You make too many calls")


def copied(*names: str) -> Path:
    """Copies files of the tests' own to where users and sandboxed services can read them; the folder."""
    folder = DESK / "scripts"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(_TESTS / name, folder)
    return folder


def _copied_script() -> Path:
    assert sys.version_info >= (3, 11)
    return copied("system/claimant.py", "bus/client.py") / "claimant.py"


def end(program: Claimant, *children: Child) -> None:
    """These VMs end, and a helper has been started since."""
    for child in children:
        program.end(child.pid)
    assert program.call("GetLimits", "").error == "ok"
