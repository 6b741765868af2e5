"""What has been granted, to which process: one root-owned file per VM below /run.

A record is written (temp + rename) *before* the act it describes, so that a helper killed between any two steps
leaves at worst a record of something that did not happen; reconcile takes that back. A record counts while
the process with that PID and that start time lives. Nothing here acts on a process.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from .cpulist import format_cpulist, parse_cpulist

GRANTS = Path("/run/qemu-launcher/grants")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One VM's grants. Byte limits are (soft, hard) pairs as prlimit(2) gives them, -1 for infinity."""

    uid: int
    vm: str
    pid: int
    start_time: int  # clock ticks since boot
    since: int  # seconds since the epoch, for people
    scope: str  # cgroup path, "" until a scope has been asked for
    memlock: int = 0  # bytes granted, counted against the uid
    memlock_before: tuple[int, int] | None = None
    rttime_before: tuple[int, int] | None = None
    shielded: frozenset[int] = field(default=frozenset())  # whole cores
    pinned: frozenset[int] = field(default=frozenset())  # CPUs of unshielded pins
    realtime: tuple[int, ...] = ()
    stray: bool = False  # left its scope or lost its shield; it keeps nothing, but its CPUs still count against its uid

    @property
    def key(self) -> tuple[int, str]:
        """What names a VM on this host."""
        return self.uid, self.vm

    def to_json(self) -> str:
        """Return the text that from_json reads."""
        return json.dumps(
            asdict(self) | {"shielded": format_cpulist(self.shielded), "pinned": format_cpulist(self.pinned)}
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a record; ValueError when it is not one."""
        try:
            raw: dict[str, Any] = json.loads(text)
            raw |= {name: parse_cpulist(raw[name]) for name in ("shielded", "pinned")}
            raw |= {name: tuple(raw[name]) for name in ("memlock_before", "rttime_before") if raw[name] is not None}
            return cls(**(raw | {"realtime": tuple(raw["realtime"])}))
        except (TypeError, KeyError) as err:
            raise ValueError(f"not a record: {err}") from err

    def without_grants(self, *, stray: bool) -> "Record":
        """Return what is left of a live VM's record when its grants were taken back: what still counts."""
        kept = replace(self, memlock_before=None, rttime_before=None, realtime=(), stray=stray)
        return kept if stray else replace(kept, shielded=frozenset(), pinned=frozenset())


def new(uid: int, vm: str, pid: int, start_time: int) -> Record:
    """Return an empty record that begins now."""
    return Record(uid, vm, pid, start_time, int(time.time()), "")


def write(record: Record) -> None:
    """Put the record on disk, whole or not at all."""
    GRANTS.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = _path(record)
    # A name no VM can have: the rule for VM names has no dot.
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(record.to_json())
    temporary.replace(path)


def remove(record: Record) -> None:
    """Forget the record; harmless when it is gone."""
    _path(record).unlink(missing_ok=True)


def read_all() -> Iterator[Record]:
    """Yield every record. A file that is no record is reported, removed and skipped: its scope is then an orphan."""
    try:
        names = sorted(os.listdir(GRANTS))
    except FileNotFoundError:
        return
    for name in names:
        path = GRANTS / name
        try:
            if name.endswith(".new"):
                raise ValueError("the helper died while writing it")
            record = Record.from_json(path.read_text())
            if _path(record) != path:
                raise ValueError("its name and its content differ")
        except (OSError, ValueError) as err:
            log.warning("removing %s: %s", ascii(name), ascii(str(err)))
            path.unlink(missing_ok=True)
        else:
            yield record


def _path(record: Record) -> Path:
    return GRANTS / f"{record.uid}-{record.vm}"
