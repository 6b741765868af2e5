"""What has been granted, to which process, and the one way to clean up.

A record is a root-owned file below /run, one per VM. It is written (temp + rename) *before* the act it describes, so
that a helper killed between any two steps leaves at worst a record of something that did not happen; reconcile takes
that back. A record counts while the process with that PID and that start time lives.

`reconcile` derives the wanted state from the records, /proc and the cgroup tree, and applies it. It runs when the
helper starts (systemd starts it when a scope ends), before each grant and after any failed step. Guarantees: a record's
process that ended leaves no shield and no scope; a process that left its scope, or whose shield is no longer valid,
keeps no real time and no raised limit. Real time always ends before a shield does. A step that fails for one VM is
logged and does not keep the others from being served.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from resource import RLIMIT_MEMLOCK
from typing import NamedTuple

from .contract import MESSAGE_ID, TargetRefused
from .cpuset import MECHANISM as MECHANISM  # noqa: PLC0414  for all who act on the records
from .cpuset.cpulist import cpulist
from .target import Target

GRANTS = Path("/run/qemu-launcher/grants")
# Keys of VMs whose scope systemd is making just now: what is claimed for them counts, though nothing is settled.
PENDING: set[str] = set()


class Record(NamedTuple):
    """One VM's grants. Byte limits are (soft, hard) pairs as prlimit(2) gives them, -1 for infinity."""

    uid: int
    vm: str
    pid: int
    start_time: int  # clock ticks since boot
    scope: str  # cgroup path of its own scope, which may not be there yet
    memlock: int = 0  # bytes granted, counted against the uid
    memlock_before: tuple[int, int] | None = None
    rttime_before: tuple[int, int] | None = None
    shielded: frozenset[int] = frozenset()  # whole cores
    pinned: frozenset[int] = frozenset()  # CPUs of unshielded pins
    realtime: tuple[int, ...] = ()
    placed: str = ""  # the last map as it was asked for; with the next, what tells a repeated call from a new one
    scheduled: str = ""
    settled: bool = False  # everything above has been done; what a helper did not live to finish is taken back
    stray: bool = False  # left its scope or lost its shield; it keeps nothing, but its CPUs still count against its uid

    @property
    def key(self) -> str:
        """What names a VM on this host, and its record below GRANTS."""
        return f"{self.uid}-{self.vm}"

    @property
    def cpus(self) -> frozenset[int]:
        """All CPUs that its threads are pinned to, or kept for them."""
        return self.shielded | self.pinned

    def write(self) -> None:
        """Put the record on disk, whole or not at all."""
        GRANTS.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A name no VM can have: the rule for VM names has no dot.
        temporary = GRANTS / f"{self.key}.new"
        temporary.write_text(json.dumps(self._asdict(), default=sorted))
        temporary.replace(GRANTS / self.key)


def read_all() -> Iterator[Record]:
    """Yield every record. A file that is no record is reported, removed and skipped: its scope is then an orphan."""
    # All are read before any is judged: one that cannot be read just now is no wrong one.
    for path, text in [(path, path.read_bytes()) for path in sorted(GRANTS.iterdir() if GRANTS.exists() else ())]:
        try:
            raw = {key: tuple(x) if isinstance(x, list) else x for key, x in json.loads(text).items()}
            record = Record(**raw | {"shielded": frozenset(raw["shielded"]), "pinned": frozenset(raw["pinned"])})
            if record.key != path.name:
                raise ValueError("its name and its content differ")
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            logging.warning("removing %a, which is no record: %a", path.name, str(err))
            path.unlink(missing_ok=True)
        else:
            yield record


def reconcile(release: str | None = None) -> list[Record]:
    """Clean up, and return the records whose process lives. `release`: key of a VM that is to lose its grants."""
    # Threads that are born while they are moved, or that do not end, must not keep others waiting, in however many VMs
    # there are such. Each group is gone over once; what is not done by then is tried again next time.
    end = time.monotonic() + 1.0
    kept = (r if r.key != release and _holds(r) else _withdraw(r, end, stray=r.key != release) for r in [*read_all()])
    live = [record for record in kept if record]
    for scope in MECHANISM.orphans(known := frozenset(record.scope for record in live)):
        logging.warning("withdrawing a shield without a record: %a", scope)
        with logged("giving CPUs back"):
            MECHANISM.take_realtime(scope)
            MECHANISM.withdraw(scope, end)
    MECHANISM.tidy(known)
    with logged("giving CPUs back"):
        settle(live)
    return live


def settle(live: Iterable[Record]) -> None:
    """Let the levels above the scopes hold what these VMs shield, and nothing else; pending ones shield nothing yet.

    Whether the kernel lets one have what it claims is not known then: if not, nobody else would get anything either.
    """
    MECHANISM.settle({r.scope: r.shielded for r in live if not r.stray and r.key not in PENDING})


def _withdraw(record: Record, end: float, *, stray: bool) -> Record | None:
    """Take every grant of the VM back; return what is left of its record, None when its process has ended.

    Never raises: what fails is logged, and keeps the record from being settled.
    """
    left = None
    with suppress(TargetRefused), Target(record.pid, record.start_time) as process:
        left = record._replace(settled=False, stray=stray)  # and stays so if a step fails: it is tried again next time
        with logged("taking real time and limits back"):
            if record.rttime_before:
                process.set_rttime(record.rttime_before)
            if record.memlock_before:
                process.rlimit(RLIMIT_MEMLOCK, record.memlock_before)
            left = left._replace(memlock_before=None, rttime_before=None, realtime=())
    with logged("withdrawing a shield"):
        if not left:
            # A child of QEMU's may live on. Not StopUnit: that would ask the launcher first, and wait for its answer.
            MECHANISM.kill(record.scope)
        left = left if stray or not left else left._replace(shielded=frozenset(), pinned=frozenset())
        MECHANISM.withdraw(record.scope, end)
        left = left and left._replace(settled=not (left.realtime or left.memlock_before or left.rttime_before))
    with logged("keeping the record"):
        left.write() if left else (GRANTS / record.key).unlink(missing_ok=True)
    named = record._asdict() | {"cpus": cpulist(record.cpus), "bytes": record.memlock or ""}
    facts = {name: str(named[name]) for name in ("uid", "pid", "vm", "cpus", "bytes")}
    # A stray has left its scope or lost its shield.
    tell(logging.INFO, "released", "VM", facts, "ended" if not left else "stray" if stray else "released")
    return left


def _holds(record: Record) -> bool:
    """Tell whether the VM lives and is still where its grants put it; a stray need only live."""
    with suppress(TargetRefused), Target(record.pid, record.start_time) as process:
        # A first thread that has ended says nothing of where the others are: it names its old cgroup for ever.
        inside = process.status()["State"][0] != "Z" and f"{process.cgroup()}/".startswith(f"{record.scope}/")
        # realtime = "anywhere" may be outside a shield: only a lost shield makes such a VM a stray
        whole = not record.shielded or MECHANISM.shielded_threads(record.scope) is not None
        return record.key in PENDING or (record.settled and (record.stray or (inside and whole)))
    return False


def tell(level: int, verdict: str, operation: str, facts: dict[str, str], reason: str = "") -> None:
    """Log one grant, refusal or release: a line for people, and the same as fields of the journal for programs."""
    text = " ".join([verdict, operation, *(f"{name}={value}" for name, value in facts.items() if value)])
    named = {"verdict": verdict, "operation": operation, **facts, "reason": reason}
    fields = {f"QEMU_LAUNCHER_{name.upper()}": ascii(value)[1:-1] for name, value in named.items()}
    fields |= {"MESSAGE_ID": MESSAGE_ID, "MESSAGE": f"{text}: {reason!a}" if reason else text}
    logging.log(level, "%(MESSAGE)s", fields)


@contextmanager
def logged(step: str) -> Iterator[None]:
    """Log what the block raises, and go on behind it."""
    try:
        yield
    except Exception as err:  # noqa: BLE001  whatever it is, the other VMs are looked after
        logging.warning("%s failed: %a", step, str(err) or type(err).__name__)
