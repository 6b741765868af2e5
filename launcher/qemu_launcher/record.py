"""What a VM's lock file says: who its launcher and its QEMU are, and whether its guest was ever let run.

    starting   QEMU may exist, but has been given no `cont`: without its launcher it will never run
    unheld     written before an untuned QEMU is executed: nothing will hold its guest, which may run at any moment
    running    written when QEMU has answered, before `cont` is sent

What was granted by then, isolation and CPUs, is written down as well: `status` compares it with what is left.

So a guest that ran is never taken for one that did not, whenever the launcher dies.

Processes are named by PID and start time, and by the boot that both count from, so that a record of the past names
nobody. What is no record, an empty file or one that is being written at this moment, is None.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .cpulist import format_cpulist, parse_cpulist
from .procfs import Process

STARTING, UNHELD, RUNNING = "starting", "unheld", "running"


@dataclass(frozen=True, slots=True)
class Record:
    """The content of a lock file."""

    launcher: Process | None = None
    qemu: Process | None = None
    state: str = STARTING
    definition: str = ""
    vcpus: Mapping[int, int] = field(default_factory=dict)  # vCPU index -> TID
    isolation: str = ""  # of the pinned vCPUs when the guest was let run; empty without pinning
    cpus: frozenset[int] = frozenset()  # that they were pinned to
    boot: str = ""  # procfs.boot_id

    def encode(self) -> bytes:
        """As one line of JSON."""

        def pair(process: Process | None) -> list[int] | None:
            return None if process is None else [process.pid, process.start_time]

        value = {
            "launcher": pair(self.launcher),
            "qemu": pair(self.qemu),
            "state": self.state,
            "definition": self.definition,
            "vcpus": sorted(self.vcpus.items()),
            "isolation": self.isolation,
            "cpus": format_cpulist(self.cpus),
            "boot": self.boot,
        }
        return json.dumps(value).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> "Record | None":
        """None for what is no record: an empty file, or one that is being written at this moment."""

        def process(pair: Any) -> Process | None:
            return None if pair is None else Process(int(pair[0]), int(pair[1]))

        try:
            value = json.loads(data)
            return cls(
                launcher=process(value["launcher"]),
                qemu=process(value["qemu"]),
                state=str(value["state"]),
                definition=str(value["definition"]),
                vcpus={int(index): int(tid) for index, tid in value["vcpus"]},
                isolation=str(value.get("isolation", "")),  # a launcher of before an upgrade may not have written these
                cpus=parse_cpulist(str(value.get("cpus", ""))),
                boot=str(value.get("boot", "")),
            )
        except (ValueError, KeyError, TypeError, IndexError):
            return None
