"""The real helper, privileges dropped; the bus starts it. Its operations are a recording's, or its own.

Arguments: the world's folder, seconds until idle, "recording" or "real". The recording is every refusal test's positive
control: what is in acts.jsonl reached the act. With "real" it is what strace sees.
"""

import asyncio
import functools
import json
import logging
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "helper"))

from qemu_launcher_helper import target

target.SYSTEMD = True  # whatever this machine has: a stand-in for systemd is on the bus (systemd1.py)

from qemu_launcher_helper import __main__ as helper, limits, privileges, records  # noqa: E402
from qemu_launcher_helper.bus import Variant  # noqa: E402
from qemu_launcher_helper.contract import Caller, Conflict  # noqa: E402
from qemu_launcher_helper.operations import Operations  # noqa: E402

FOLDER, IDLE, MODE = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
sys.argv[1:] = ["--serve"]  # as the unit has it, or will have; without it the helper only says what it is for


class Recording:
    """Writes down what the real operations would be asked to do."""

    def __init__(self, bus: object) -> None:
        before = os.umask(0o022)  # for clients to read, and from the beginning, whatever the helper's umask
        self._file = os.open(FOLDER / "acts.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.umask(before)

    async def perform(self, caller: Caller, settings: object, member: str, arguments: dict[str, Any]) -> list[Any]:
        act = {"member": member, "uid": caller.uid, "pid": caller.pid, "vm": arguments.get("vm")}
        os.write(self._file, json.dumps(act).encode() + b"\n")
        match arguments.get("vm"):
            case "slow":
                await asyncio.Event().wait()
            case "crash":
                raise ZeroDivisionError("a secret of the helper's: \x1b[31m")
            case "taken":
                raise Conflict("CPUs 4-7 are held by VM win11 of bob")
        if member in ("SetMemlock", "CheckMemlock"):
            return [arguments["bytes"]]
        if member == "ListVms":
            return [[["win11", caller.uid, caller.user, 4242, 123456, "4-7", "partition"]]]
        if member.startswith("GetLimits"):
            texts = {"version": Variant("s", "0.1.0"), "policies": Variant("as", ["other", "fifo"])}
            return [texts | {"memlock": Variant("t", 5)}]
        return []


def without_sys_resource() -> None:
    """Where root lacks CAP_SYS_RESOURCE (containers, CI), let prlimit(2) be tried all the same, and fail."""
    raised, prlimit = privileges.raised, resource.prlimit

    def lenient(name: str) -> AbstractContextManager[None]:
        return nullcontext() if name == "sys_resource" else raised(name)

    pretended: dict[tuple[int, int], tuple[int, int]] = {}

    def attempt(pid: int, which: int, *limits: Any) -> tuple[int, int]:
        try:
            return prlimit(pid, which, *limits)
        except PermissionError:
            before = pretended.get((pid, which), (65536, 65536))
            pretended[pid, which] = limits[0] if limits else before
            return before

    privileges.raised, resource.prlimit = lenient, attempt  # type: ignore[assignment]  # a stand-in


def look() -> list[object]:
    """Stands for reconcile: there is no record, and no VM. Each look is written down."""
    with (FOLDER / "looks").open("a") as file:
        os.fchmod(file.fileno(), 0o644)  # for clients to read, whatever the helper's umask
        file.write(f"{os.getpid()}\n")
    return []


def main() -> int:
    logging.basicConfig(filename=FOLDER / "helper.log", level=logging.INFO, format="%(message)s")
    limits.PATH = f"{FOLDER}/helper.toml"
    permitted = int(Path("/proc/self/status").read_text().partition("CapPrm:")[2].split()[0], 16)
    if not permitted & 1 << privileges.KEPT["sys_resource"]:
        without_sys_resource()
    acting = Operations if MODE == "real" else Recording
    if acting is Recording:
        vars(records)["reconcile"] = look  # __main__ alone looks it up in there
    helper.serve = functools.partial(helper.serve, f"{FOLDER}/bus", IDLE, acting)
    return helper.main()


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        logging.exception("the helper under test died")
        raise
    with (FOLDER / "exits").open("a") as file:
        file.write(f"{os.getpid()} {status}\n")
    raise SystemExit(status)
