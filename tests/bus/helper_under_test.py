"""The real helper, privileges dropped, with a recording in the place of the operations; the bus starts it.

Arguments: the world's folder, seconds until idle. The recording is every refusal test's positive control: what is in
acts.jsonl reached the act.
"""

import asyncio
import functools
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "helper"))

from qemu_launcher_helper import __main__ as helper, limits
from qemu_launcher_helper.bus import Variant
from qemu_launcher_helper.contract import Caller, Conflict

FOLDER = Path(sys.argv[1])


class Recording:
    """Writes down what the real operations would be asked to do."""

    def __init__(self, bus: object) -> None:
        self._file = os.open(FOLDER / "acts.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.fchmod(self._file, 0o644)  # for clients to read, whatever the helper's umask

    async def reconcile(self) -> None:
        pass

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
        if member == "SetMemlock":
            return [arguments["bytes"]]
        if member == "ListVms":
            return [[["win11", caller.uid, caller.user, 4242, 123456, "4-7", "partition"]]]
        if member.startswith("GetLimits"):
            texts = {"version": Variant("s", "0.1.0"), "policies": Variant("as", ["other", "fifo"])}
            return [texts | {"memlock": Variant("t", 5)}]
        return []


def main() -> int:
    logging.basicConfig(filename=FOLDER / "helper.log", level=logging.INFO, format="%(message)s")
    limits.PATH = f"{FOLDER}/helper.toml"
    helper.serve = functools.partial(helper.serve, f"{FOLDER}/bus", float(sys.argv[2]), Recording)
    sys.argv[1:] = ["--serve"]
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
