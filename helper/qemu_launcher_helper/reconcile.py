"""The one way to clean up: derive the wanted state from the records, /proc and the cgroup tree, and apply it.

Runs when the helper starts (systemd starts it when a scope ends), before each grant and after any failed step.
Guarantees: a record's process that ended leaves no shield and no scope; a process that left its scope, or whose shield
is no longer valid, keeps no real time and no raised limit. Real time always ends before a shield does. A step that
fails for one VM is logged and does not keep the others from being served.
"""

import logging
import resource
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from . import records, scheduling, systemd
from .bus import SystemBus
from .cpuset.partition import Partition
from .errors import Refusal, TargetRefused
from .records import Record
from .target import Target

log = logging.getLogger(__name__)


class Reconciler:
    """Applies the records to the host. Every method is to be called under the operations' lock."""

    def __init__(self, bus: SystemBus, mechanism: Partition) -> None:
        self.bus, self.mechanism = bus, mechanism

    async def run(self) -> list[Record]:
        """Clean up, and return the records whose process lives."""
        live: list[Record] = []
        for record in list(records.read_all()):
            left = record if self._holds(record) else await self.withdraw(record, stray=True)
            live += [left] if left else []
        with _logged("giving CPUs back"):
            for scope in self.mechanism.orphans(frozenset(record.scope for record in live)):
                log.warning("withdrawing a shield without a record: %a", scope)
                self.mechanism.withdraw(scope)
            self.mechanism.settle(self.reserved(live))
        return live

    async def withdraw(self, record: Record, *, stray: bool) -> Record | None:
        """Take every grant of the VM back; return what is left of its record, None when its process has ended.

        Never raises: what fails is logged.
        """
        left = None
        with suppress(TargetRefused), Target(record.pid, record.start_time) as process:
            left = record.without_grants(stray=stray)
            with _logged("taking real time and limits back"):
                _strip(record, process)
        if record.scope:
            with _logged("withdrawing a shield"):
                self.mechanism.withdraw(record.scope)
        if left:
            left.write()
            if stray:
                log.warning("VM %s of uid %d left its scope or lost its shield", record.vm, record.uid)
        else:
            if record.scope:
                with _logged("ending a scope"):
                    await systemd.stop_scope(self.bus, record.scope.rpartition("/")[2])
            record.path.unlink(missing_ok=True)
        return left

    def reserved(self, live: Collection[Record]) -> dict[str, frozenset[int]]:
        """Return what each live scope shields."""
        return {record.scope: record.shielded for record in live if record.shielded and not record.stray}

    def _holds(self, record: Record) -> bool:
        """Tell whether the VM lives and is still where its grants put it; a stray need only live."""
        with suppress(TargetRefused), Target(record.pid, record.start_time) as process:
            if record.stray or not record.scope:
                return True
            if not f"{process.cgroup()}/".startswith(f"{record.scope}/"):
                return False
            shielded = self.mechanism.shielded_threads(record.scope) if record.shielded else {}
            # realtime = "anywhere" may be outside a shield: only a lost shield makes such a VM a stray
            return shielded is not None
        return False


@contextmanager
def _logged(step: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, Refusal) as err:
        log.warning("%s failed: %a", step, str(err))


def _strip(record: Record, process: Target) -> None:
    if record.realtime:
        scheduling.take_realtime(process)
    for which, before in (
        (resource.RLIMIT_RTTIME, record.rttime_before),
        (resource.RLIMIT_MEMLOCK, record.memlock_before),
    ):
        if before:
            scheduling.rlimit(process, which, before)
