"""What has been granted, to which process: one root-owned file per VM below /run.

A record is written (temp + rename) *before* the act it describes, so that a helper killed between any two steps
leaves at worst a record of something that did not happen; reconcile takes that back. A record counts while
the process with that PID and that start time lives. Nothing here acts on a process.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

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
    scope: str = ""  # cgroup path, once a scope has been asked for
    memlock: int = 0  # bytes granted, counted against the uid
    memlock_before: tuple[int, int] | None = None
    rttime_before: tuple[int, int] | None = None
    shielded: frozenset[int] = frozenset()  # whole cores
    pinned: frozenset[int] = frozenset()  # CPUs of unshielded pins
    realtime: tuple[int, ...] = ()
    stray: bool = False  # left its scope or lost its shield; it keeps nothing, but its CPUs still count against its uid

    @property
    def key(self) -> tuple[int, str]:
        """What names a VM on this host."""
        return self.uid, self.vm

    @property
    def path(self) -> Path:
        """Where the record is kept."""
        return GRANTS / f"{self.uid}-{self.vm}"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `write` wrote; TypeError or ValueError when it is no record."""
        raw: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in json.loads(text).items()}
        return cls(**raw | {"shielded": frozenset(raw["shielded"]), "pinned": frozenset(raw["pinned"])})

    def write(self) -> None:
        """Put the record on disk, whole or not at all."""
        GRANTS.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A name no VM can have: the rule for VM names has no dot.
        temporary = self.path.with_name(f"{self.path.name}.new")
        temporary.write_text(json.dumps(asdict(self), default=sorted))
        temporary.replace(self.path)

    def without_grants(self, *, stray: bool) -> "Record":
        """Return what is left of a live VM's record when its grants were taken back: what still counts."""
        left = replace(self, memlock_before=None, rttime_before=None, realtime=(), stray=stray)
        return left if stray else replace(left, shielded=frozenset(), pinned=frozenset())


def read_all() -> Iterator[Record]:
    """Yield every record. A file that is no record is reported, removed and skipped: its scope is then an orphan."""
    for path in sorted(GRANTS.glob("*")):
        try:
            record = Record.from_json(path.read_text())
            if record.path != path:
                raise ValueError("its name and its content differ")
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as err:
            log.warning("removing %a, which is no record: %a", path.name, str(err))
            path.unlink(missing_ok=True)
        else:
            yield record
