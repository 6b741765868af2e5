"""The privileged operations, each as: reconcile, verify, check the limits, record, act, verify again.

One lock is held over all of it. There is no `await` between the last verification of a target and the act on it. When
a step fails after the record was written, all grants of that VM are withdrawn by the same code that
reconcile uses: a VM is tuned as asked or not at all.
"""

import asyncio
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from . import arguments, claims, scheduling, systemd
from .arguments import Caller, Request, Typed
from .bus import SystemBus
from .contract import INFINITY, REALTIME_POLICIES, VERSION
from .cpulist import format_cpulist
from .cpuset.partition import Partition
from .errors import Conflict, Failed, TargetRefused, Unsupported
from .limits import Configuration, Limits
from .reconcile import Reconciler
from .records import Record
from .target import Target


@dataclass(frozen=True, slots=True)
class Work:
    """One authorised request about one verified process: whose, within which limits, beside which live VMs."""

    caller: Caller
    limits: Limits
    live: list[Record]
    target: Target
    record: Record


class Operations:
    """What the dispatcher calls once polkit has said yes."""

    def __init__(self, bus: SystemBus, configuration: Configuration) -> None:
        self.bus, self.configuration = bus, configuration
        self.mechanism = Partition()
        self.reconciler = Reconciler(bus, self.mechanism)
        self._lock = asyncio.Lock()

    async def reconcile(self) -> None:
        """Bring the host to what the records say; see reconcile.py."""
        async with self._lock:
            await self.reconciler.run()

    async def perform(self, caller: Caller, request: Request) -> list[Any]:
        """Do what the authorised `caller` asks and return the reply's body; Refusal otherwise."""
        async with self._lock:
            live = await self.reconciler.run()
            limits = self.configuration.limits_for(caller.uid)
            match request:
                case arguments.ListRequest():
                    return [[self._row(record) for record in live if request.all or record.uid == caller.uid]]
                case arguments.LimitsRequest():
                    return [self._limits(limits, live)]
                case arguments.ReleaseRequest():
                    return await self._release(request, live)
            with Target(request.pid) as target:
                self._verify(target, caller, request.vm)
                record = _record_of(target, caller, request.vm, limits, live)
                work = Work(caller, limits, live, target, record)
                match request:
                    case arguments.MemlockRequest():
                        return await self._set_memlock(work, request)
                    case arguments.PinRequest():
                        return await self._pin_threads(work, request)
                    case arguments.SchedulerRequest():
                        return await self._set_scheduler(work, request)

    async def _set_memlock(self, work: Work, request: arguments.MemlockRequest) -> list[Any]:
        granted = claims.grant_memlock(request.bytes, work.record, work.limits, work.live, claims.lockable_bytes())
        before = work.record.memlock_before or scheduling.rlimit(work.target, resource.RLIMIT_MEMLOCK)
        async with self._granting(work, memlock=granted, memlock_before=before):
            limit = resource.RLIM_INFINITY if granted == INFINITY else granted
            scheduling.rlimit(work.target, resource.RLIMIT_MEMLOCK, (limit, limit))
        return [granted]

    async def _pin_threads(self, work: Work, request: arguments.PinRequest) -> list[Any]:
        if lacking := self.mechanism.lacks():
            raise Unsupported(lacking)
        target = work.target
        target.verify_comm(self.configuration.settings.comm)
        start_times = target.verify_threads(pin.tid for pin in request.pins)
        shielded = claims.union(pin.cpus for pin in request.pins if pin.shielded)
        pinned = claims.union(pin.cpus for pin in request.pins if not pin.shielded)
        claim = replace(work.record, shielded=shielded, pinned=pinned)
        reserved = claims.check(claim, request.others, work.limits, claims.read_cores(), work.live)
        async with self._granting(work, shielded=reserved, pinned=pinned) as granted:
            still = self.mechanism.shielded_threads(granted.scope) if reserved == work.record.shielded else None
            stay = [pin.tid for pin in request.pins if pin.shielded and (still or {}).get(pin.tid) == pin.cpus]
            scheduling.take_realtime(target, stay)  # whoever leaves a shielded CPU leaves real time first
            others = [record for record in work.live if record.key != granted.key]
            self.mechanism.settle(self.reconciler.reserved([*others, granted]))
            self.mechanism.apply(granted.scope, request.pins, reserved, request.others)
            if target.verify_threads(start_times) != start_times:
                raise TargetRefused("a thread changed while it was pinned")
        return []

    async def _set_scheduler(self, work: Work, request: arguments.SchedulerRequest) -> list[Any]:
        target, record = work.target, work.record
        target.verify_comm(self.configuration.settings.comm)
        start_times = target.verify_threads(request.tids)
        shielded = self.mechanism.shielded_threads(record.scope) if record.shielded else None
        realtime = frozenset(record.realtime) - frozenset(request.tids)
        scheduling.check(request, work.limits, shielded or {}, realtime)
        if request.policy in REALTIME_POLICIES:
            realtime |= frozenset(request.tids)
        before = record.rttime_before or scheduling.rlimit(target, resource.RLIMIT_RTTIME)
        async with self._granting(work, realtime=tuple(sorted(realtime)), rttime_before=before if realtime else None):
            # Desktop sessions hand down a hard limit of 200 ms, under which a busy FIFO vCPU is killed in 0.3 s.
            scheduling.rlimit(target, resource.RLIMIT_RTTIME, scheduling.UNLIMITED if realtime else before)
            scheduling.set_policy(target, start_times, request.policy, request.priority)
        return []

    async def _release(self, request: arguments.ReleaseRequest, live: list[Record]) -> list[Any]:
        for record in live:
            if record.key == (request.uid, request.vm):
                await self.reconciler.withdraw(record, stray=False)
                await self.reconciler.run()
        return []

    def _row(self, record: Record) -> list[Any]:
        cpus = format_cpulist(record.shielded | record.pinned)
        name = self.mechanism.name if cpus else "none"
        return [record.vm, record.uid, claims.user_name(record.uid), record.pid, record.start_time, cpus, name]

    def _limits(self, limits: Limits, live: list[Record]) -> dict[str, Typed]:
        cores = claims.read_cores()
        cpus = claims.union(cores) if limits.cpus is None else limits.cpus
        return {
            "version": Typed("s", VERSION),
            "mechanism": Typed("s", "none" if self.mechanism.lacks() else self.mechanism.name),
            "reason": Typed("s", self.mechanism.lacks() or "the kernel has remote cpuset partitions"),
            "limits_source": Typed("s", limits.source),
            "cpus": Typed("s", format_cpulist(cpus)),
            "max_cpus": Typed("u", len(cpus) if limits.max_cpus is None else limits.max_cpus),
            "max_vms": Typed("u", limits.max_vms),
            "memlock": Typed("t", claims.lockable_bytes() if limits.memlock is None else min(limits.memlock, INFINITY)),
            "policies": Typed("as", sorted(limits.policies)),
            "max_priority": Typed("u", limits.max_priority),
            "realtime": Typed("s", limits.realtime),
            "free_cpus": Typed("s", format_cpulist(claims.free_for(limits, cores, live))),
        }

    def _verify(self, target: Target, caller: Caller, vm: str) -> tuple[str, str]:
        return target.verify(caller, systemd.scope_name(caller.uid, vm), self.configuration.settings.services)

    @asynccontextmanager
    async def _granting(self, work: Work, **grants: Any) -> AsyncIterator[Record]:
        """Record, move the target into its scope, verify, let the caller act, verify again; or withdraw everything."""
        caller, target, vm = work.caller, work.target, work.record.vm
        name = systemd.scope_name(caller.uid, vm)
        slice_path, unit = self._verify(target, caller, vm)
        record = replace(work.record, scope=f"{slice_path}/{name}", **grants)
        record.write()
        try:
            if unit != name:
                await systemd.start_scope(self.bus, target, record, unit)
            # systemd moved a number: only a process that passes every check again, from inside the scope, is ours.
            if self._verify(target, caller, vm)[1] != name:
                raise Failed(f"systemd did not move process {target.pid} into its scope")
            yield record
            self._verify(target, caller, vm)
        except BaseException as err:
            await self.reconciler.withdraw(record, stray=False)
            await self.reconciler.run()
            if isinstance(err, OSError):
                raise Failed(f"the kernel refused a step of tuning {vm}: error {err.errno}") from err
            raise


def _record_of(target: Target, caller: Caller, vm: str, limits: Limits, live: list[Record]) -> Record:
    """Return the VM's record, or a new one; Conflict when the name belongs to another live process."""
    for record in live:
        if record.key == (caller.uid, vm):
            if (record.pid, record.start_time) != (target.pid, target.start_time):
                raise Conflict(f"VM {vm} is running already, as process {record.pid}")
            if record.stray:
                raise TargetRefused(f"VM {vm} left its scope or lost its shield; it has to be started anew")
            return record
    claims.check_count(caller.uid, limits, live)
    return Record(caller.uid, vm, target.pid, target.start_time, int(time.time()))
