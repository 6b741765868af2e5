"""The installed helper, counted: every step of its work can fail, kill it, or wait. For tests only.

Started in the helper's place by a unit drop-in, see faults.py, with the same sandbox and privileges. This process has
imported everything and serves nobody: for each order on the socket ORDERS it ends the helper that it forked last, with
SIGKILL, and forks another. So a helper is started in milliseconds that would need seconds under emulation. One that has
not counted anything yet takes one more order about calls, on the connection of its first.

A step is one call from the helper's code by which something outside of its own memory changes, or is asked:

    act:   a write, mkdir, rmdir, unlink, chmod or rename; prlimit, sched_setscheduler; the raising of a capability
    ask:   a call to systemd; "... answered" is the moment after its answer
    end:   everything has been done, and nothing has been answered yet
    look:  a fact is read, about the target, the cgroup tree or the records

They are counted as the code comes to them, not listed: a write that is new in the helper is a step by itself. An audit
hook sees to it that no change of a file gets past the count ("missed:").

An order is one JSON object, the answer to it "ready" once that helper serves (or "gone" if it ended before):

    {"during": "calls"/"start"/"nothing", "kinds": ["act", ...], "at": N, "do": "kill"/"wait"/"lose"/NAME OF AN ERROR}

"at": which step, from 0; "lose": systemd did what was asked, and no answer came. Before a "wait" it says "reached" on
the socket, and goes on once it is sent anything. The names of all steps so far are lines of the file STEPS.
"""

import asyncio
import errno
import itertools
import json
import os
import re
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.append("/usr/lib/python3/dist-packages")

from qemu_launcher_helper import __main__ as helper, bus, contract, operations, privileges, records

contract.CALLS_PER_WINDOW = 100_000

FOLDER = Path("/run/qemu-launcher")
ORDERS, STEPS = FOLDER / "orders", FOLDER / "steps"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NOTHING = "nothing"
POLL = select.select  # itself, whatever is put in its place
CHANGES = ("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.chmod", "os.link", "os.symlink", "os.truncate")


class Counter:
    """Counts the steps of one helper, and does at one of them what was ordered."""

    def __init__(self, order: dict[str, Any], test: socket.socket) -> None:
        self._order, self._test = order, test
        self._steps = os.open(STEPS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._numbers = itertools.count()
        self._inside = False  # a step of its own, in which the library may come by here again
        self._counts = False
        self._last = ""
        sys.addaudithook(self._audit)

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Count in this block, if that is what was ordered."""
        if self._order["during"] == NOTHING and POLL([self._test], [], [], 0)[0]:
            more = self._test.recv(4096)  # nothing, once the test has hung up
            self._order = json.loads(more) if more else self._order
        before, self._counts = self._counts, what == self._order["during"]
        try:
            yield
        finally:
            self._counts = before

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._counts or self._inside:
            return
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
            self._write(f"missed:{event} {arguments[0]}")

    def _write(self, line: str) -> None:
        os.write(self._steps, line.encode() + b"\n")

    def reached(self, name: str, real: Callable[[], Any], spoil: Callable[[], object] = lambda: None) -> Any:
        """Count the step, and take it; or what was ordered instead. `spoil`: what is left of a step that fails."""
        if self._inside or not self._counts:
            return real()
        self._inside = True
        try:
            do = self._due(name)
            if do is not None:
                spoil()
                raise OSError(getattr(errno, do), os.strerror(getattr(errno, do)))
            return real()
        finally:
            self._inside = False

    async def asked(self, name: str, real: Callable[[], Any]) -> Any:
        """The same for a call to systemd, which can also fail after it was heard."""
        if not self._counts or name == self._last == "ask:GetJob":  # as often as systemd wants: one step
            return await real()
        do, self._last = self._due(name), name
        if do == "lose":
            await real()
            raise contract.CallFailed("timeout", "no answer")
        if do is not None:
            raise contract.CallFailed("org.freedesktop.DBus.Error.Failed", do)
        answer = await real()
        self._due(f"{name} answered")
        return answer

    def _due(self, name: str) -> str | None:
        """Count; the error that is to happen here, if one is."""
        if name.partition(":")[0] not in self._order["kinds"]:
            return None
        self._write(name)
        if next(self._numbers) != self._order.get("at"):
            return None
        match self._order["do"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "wait":
                self._test.sendall(b"reached\n")
                self._test.recv(16)
            case str(error):
                return error
        return None


def plain(words: object) -> str:
    """A step's name in which nothing is but what comes again: no PIDs, no TIDs."""
    return re.sub(r"\b[0-9]{2,}\b", "N", str(words))


def count_in(counter: Counter, owner: Any, name: str, kind: Callable[..., str], *, halves: bool = False) -> None:
    """Make a step of each call of `owner.name`. `halves`: a failing write has done half of it, unless to a cgroup."""
    real: Callable[..., Any] = getattr(owner, name)

    def counted(*arguments: Any, **more: Any) -> Any:
        def half() -> None:
            path, text = arguments[0], arguments[1]
            if not path.is_relative_to("/sys"):
                real(path, text[: len(text) // 2])

        step = f"{kind(*arguments)}:{name} {plain(arguments[0])}"
        return counter.reached(step, lambda: real(*arguments, **more), half if halves else lambda: None)

    setattr(owner, name, counted)


def patch(counter: Counter) -> None:
    """Put the counter in."""
    count_in(counter, Path, "write_text", lambda *_: "act", halves=True)
    for name in ("mkdir", "rmdir", "unlink", "chmod", "replace"):
        count_in(counter, Path, name, lambda *_: "act")
    for name in ("read_text", "read_bytes", "exists", "is_dir"):
        count_in(counter, Path, name, lambda *_: "look")
    count_in(counter, os, "listdir", lambda *_: "look")
    count_in(counter, os, "pidfd_open", lambda *_: "look")
    count_in(counter, os, "sched_getscheduler", lambda *_: "look")
    count_in(counter, os, "sched_getparam", lambda *_: "look")
    count_in(counter, select, "select", lambda *_: "look")
    count_in(counter, os, "sched_setscheduler", lambda *_: "act")
    count_in(counter, resource, "prlimit", lambda *arguments: "act" if len(arguments) > 2 else "look")

    raised = privileges.raised

    def raised_if(name: str) -> Any:
        counter.reached(f"act:raise {name}", lambda: None)
        return raised(name)

    privileges.raised = raised_if

    call, perform, reconcile = bus.SystemBus.call, operations.Operations.perform, records.reconcile

    async def call_counted(self: Any, to: Any, member: str, *more: Any, **others: Any) -> Any:
        def real() -> Any:
            return call(self, to, member, *more, **others)

        return await (counter.asked(f"ask:{member}", real) if to == bus.SYSTEMD else real())

    async def perform_counted(self: Any, caller: Any, settings: Any, member: str, arguments: Any) -> Any:
        with counter.during("calls"):
            answer = await perform(self, caller, settings, member, arguments)
            with suppress(OSError):  # nothing is done any more, so nothing can fail
                counter.reached(f"end:{member}", lambda: None)
            return answer

    def reconcile_at_start() -> Any:
        with counter.during("start"):
            return reconcile()

    bus.SystemBus.call = call_counted  # type: ignore[method-assign]
    operations.Operations.perform = perform_counted  # type: ignore[method-assign]
    records.reconcile = reconcile_at_start  # type: ignore[assignment]  # __main__ alone looks it up in there


def serve(order: dict[str, Any], test: socket.socket) -> int:
    """Be the helper."""
    counter = Counter(order, test)
    patch(counter)
    owned = bus.SystemBus.call

    async def call_and_tell(self: Any, to: Any, member: str, *more: Any, **others: Any) -> Any:
        answer = await owned(self, to, member, *more, **others)
        if member == "RequestName":
            test.sendall(b"ready\n")
        return answer

    bus.SystemBus.call = call_and_tell  # type: ignore[method-assign]
    helper.serve.__defaults__ = (bus.SOCKET, 3600.0, operations.Operations)
    return helper.main()


def main() -> None:
    """Fork a helper for each order; only the newest lives."""
    ORDERS.unlink(missing_ok=True)
    pid = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(ORDERS))
        listening.listen()
        while True:
            test, _ = listening.accept()
            with test, test.makefile("r") as lines:
                order = json.loads(lines.readline())
                if pid:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                pid = os.fork()
                if pid == 0:
                    listening.close()
                    try:
                        status = serve(order, test)
                    except BaseException:  # noqa: BLE001  a forked child must not run on into its parent's code
                        sys.excepthook(*sys.exc_info())
                        status = 70
                    os._exit(status)


if __name__ == "__main__":
    asyncio.set_event_loop(None)
    main()
