"""The installed helper with a stop in it: halts, or kills itself, at one step of its work. For tests only.

Started in the helper's place by a unit drop-in, see stepping.py, with the same sandbox and privileges. What is to
happen is read from ORDER, once: `halt STEP` or `kill STEP`. The named step has been done when it happens.

Steps named "before ..." halt after the last look at the target and before the act on it. The number of calls that one
user may make is raised, for tests that make a thousand.

A halt says "halted" into one FIFO and blocks until it can read from another, all threads of it: the caller has no
answer meanwhile, and what the step did can be looked at for as long as the test wants.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = "/usr/lib/python3/dist-packages"
sys.path.append(PACKAGES)

from qemu_launcher_helper import contract  # noqa: E402

contract.CALLS_PER_WINDOW = 100_000

from qemu_launcher_helper import operations, target  # noqa: E402
from qemu_launcher_helper.__main__ import main  # noqa: E402
from qemu_launcher_helper.bus import SystemBus  # noqa: E402
from qemu_launcher_helper.cpuset import MECHANISM  # noqa: E402
from qemu_launcher_helper.records import Record  # noqa: E402

FOLDER = Path("/run/qemu-launcher")
ORDER, HALTED, GO = FOLDER / "order", FOLDER / "halted", FOLDER / "go"


def reached(step: str) -> None:
    """Do what is ordered for this step, if anything is."""
    try:
        order = ORDER.read_text().split(maxsplit=1)
    except FileNotFoundError:
        return
    if order[1] != step:
        return
    ORDER.unlink()
    if order[0] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    with GO.open() as go:  # before it says so: the answer may come at once, and would be lost with its only end
        HALTED.write_text("halted\n")
        go.read()


def stepping(owner: Any, name: str, step: str, least: int = 0) -> None:
    """Have `owner.name` reach `step` whenever it has returned; with `least` arguments or more, if that is said."""
    real: Callable[..., Any] = getattr(owner, name)

    def patched(*arguments: Any, **more: Any) -> Any:
        result = real(*arguments, **more)
        if len(arguments) >= least:
            reached(step)
        return result

    setattr(owner, name, patched)


def stepping_before(owner: Any, name: str, step: Callable[..., str]) -> None:
    """Have `owner.name` reach a step before it does anything; the step's name is made of its arguments, "" is none."""
    real: Callable[..., Any] = getattr(owner, name)

    def patched(*arguments: Any, **more: Any) -> Any:
        reached(step(*arguments))
        return real(*arguments, **more)

    setattr(owner, name, patched)


def stepping_coroutine(owner: Any, name: str, step: Callable[..., str]) -> None:
    """The same for a coroutine; the step's name is made of its arguments."""
    real: Callable[..., Any] = getattr(owner, name)

    async def patched(*arguments: Any, **more: Any) -> Any:
        result = await real(*arguments, **more)
        reached(step(*arguments))
        return result

    setattr(owner, name, patched)


stepping_before(SystemBus, "start_unit", lambda *_: "before scope")
stepping_before(resource, "prlimit", lambda *arguments: "before limit" if len(arguments) > 2 else "")
stepping_before(target, "_set", lambda *_: "before one thread")
stepping_before(Path, "write_text", lambda path, *_: "before move" if path.name == "cgroup.threads" else "")
stepping(Record, "write", "record")
stepping_coroutine(operations.Operation, "_start_scope", lambda *_: "scope")
stepping(target.Target, "rlimit", "limit", least=3)  # with two arguments it only reads
stepping(type(MECHANISM), "settle", "settle")
stepping(type(MECHANISM), "_reserve", "shield")
stepping(type(MECHANISM), "_sweep", "sweep")
stepping(type(MECHANISM), "apply", "pinned")
stepping(target, "_set", "one thread")
stepping(target.Target, "set_policy", "scheduled")
stepping_coroutine(
    operations.Operations,
    "perform",
    lambda _self, _caller, _settings, member, _arguments: member.removeprefix("Set").removesuffix("Threads"),
)

raise SystemExit(main())
