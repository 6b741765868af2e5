"""The real helper, privileges dropped, with a recording in the place of the operations; the bus starts it.

Arguments: the world's folder, seconds until idle. The recording is every refusal test's positive control: what is in
acts.jsonl reached the act.
"""

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "helper"))

from qemu_launcher_helper import privileges
from qemu_launcher_helper.__main__ import serve
from qemu_launcher_helper.arguments import Caller, MemlockRequest, Request, Typed
from qemu_launcher_helper.errors import Conflict

FOLDER = Path(sys.argv[1])


class Recording:
    """Writes down what the real operations would be asked to do."""

    def __init__(self, bus: object, configuration: object) -> None:
        self._file = os.open(FOLDER / "acts.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    async def reconcile(self) -> None:
        pass

    async def perform(self, caller: Caller, request: Request) -> list[Any]:
        kind = type(request).__name__
        act = {"kind": kind, "uid": caller.uid, "pid": caller.pid, "vm": getattr(request, "vm", None)}
        os.write(self._file, json.dumps(act).encode() + b"\n")
        match getattr(request, "vm", None):
            case "slow":
                await asyncio.Event().wait()
            case "crash":
                raise ZeroDivisionError("a secret of the helper's: \x1b[31m")
            case "taken":
                raise Conflict("CPUs 4-7 are held by VM win11 of bob")
        if isinstance(request, MemlockRequest):
            return [request.bytes]
        if kind == "ListRequest":
            return [[["win11", caller.uid, caller.user, 4242, 123456, "4-7", "partition"]]]
        if kind == "LimitsRequest":
            return [
                {"version": Typed("s", "0.1.0"), "policies": Typed("as", ["other", "fifo"]), "memlock": Typed("t", 5)}
            ]
        return []


def main() -> int:
    os.umask(0o022)
    logging.basicConfig(filename=FOLDER / "helper.log", level=logging.INFO, format="%(message)s")
    privileges.drop()
    return asyncio.run(serve(f"{FOLDER}/bus", f"{FOLDER}/helper.toml", float(sys.argv[2]), Recording))


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        logging.exception("the helper under test died")
        raise
    with (FOLDER / "exits").open("a") as file:
        file.write(f"{os.getpid()} {status}\n")
    raise SystemExit(status)
