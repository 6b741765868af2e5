"""The privileged operations, each as: reconcile, verify, check the limits, record, act, verify again.

One lock is held over all of it. There is no `await` between the last verification of a target and the act on it. When
a step fails after the record was written, all grants of that VM are withdrawn by the same code that
reconcile uses: a VM is tuned as asked or not at all.
"""

import asyncio
import pwd
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from . import arguments, claims, cpuset, memlock, records, scheduling, systemd
from .arguments import Caller, Request, Typed
from .contract import INFINITY, VERSION
from .cpulist import format_cpulist
from .cpuset.mechanism import Shield
from .errors import Conflict, Failed, TargetRefused, Unsupported
from .limits import Configuration, Limits
from .reconcile import Reconciler
from .target import Target

Body = list[Any]  # of a reply, in the contract's order


class Operations:
    """What the dispatcher calls once polkit has said yes."""

    def __init__(self, bus: systemd.Bus, configuration: Configuration) -> None:
        self.bus, self.configuration = bus, configuration
        self.mechanism, self.reason = cpuset.choose()
        self.reconciler = Reconciler(bus, self.mechanism)
        self._lock = asyncio.Lock()

    async def reconcile(self) -> None:
        """Bring the host to what the records say; see reconcile.py."""
        async with self._lock:
            await self.reconciler.run()

    async def perform(self, caller: Caller, request: Request) -> Body:
        """Do what the authorised `caller` asks and return the reply's body; Refusal otherwise."""
        async with self._lock:
            live = await self.reconciler.run()
            match request:
                case arguments.ListRequest():
                    return [[self._row(record) for record in live if request.all or record.uid == caller.uid]]
                case arguments.LimitsRequest():
                    return [self._limits(caller, live)]
                case arguments.ReleaseRequest():
                    return await self._release(request, live)
            with Target(request.pid) as target:
                self._verify(target, caller, request.vm)
                match request:
                    case arguments.MemlockRequest():
                        return await self._set_memlock(caller, request, target, live)
                    case arguments.PinRequest():
                        return await self._pin_threads(caller, request, target, live)
                    case arguments.SchedulerRequest():
                        return await self._set_scheduler(caller, request, target, live)

    async def _set_memlock(
        self, caller: Caller, request: arguments.MemlockRequest, target: Target, live: list[records.Record]
    ) -> Body:
        limits = self.configuration.limits_for(caller.uid)
        record = self._record(target, caller, request.vm, limits, live)
        granted = memlock.grant(request.bytes, record, limits, live, memlock.host_bytes())
        before = record.memlock_before or scheduling.read_rlimit(target, resource.RLIMIT_MEMLOCK)
        async with self._granting(replace(record, memlock=granted, memlock_before=before), caller, target):
            memlock.raise_limit(target, granted)
        return [granted]

    async def _pin_threads(
        self, caller: Caller, request: arguments.PinRequest, target: Target, live: list[records.Record]
    ) -> Body:
        if self.mechanism is None:
            raise Unsupported(self.reason)
        target.verify_comm(self.configuration.settings.comm)
        limits = self.configuration.limits_for(caller.uid)
        record = self._record(target, caller, request.vm, limits, live)
        start_times = target.verify_threads(pin.tid for pin in request.pins)
        shielded = claims.union(pin.cpus for pin in request.pins if pin.shielded)
        pinned = claims.union(pin.cpus for pin in request.pins if not pin.shielded)
        claim = claims.Claim(caller.uid, request.vm, shielded, pinned, request.others)
        reserved = claims.check(claim, limits, claims.read_topology(), live, user_name)
        wanted = replace(record, shielded=reserved, pinned=pinned)
        async with self._granting(wanted, caller, target) as scope:
            still = self.mechanism.shielded_threads(scope) if reserved == record.shielded else None
            # Whoever leaves a shielded CPU leaves real time first.
            scheduling.take_realtime(
                target, [pin.tid for pin in request.pins if pin.shielded and (still or {}).get(pin.tid) == pin.cpus]
            )
            others = [other for other in live if other.key != wanted.key]
            self.mechanism.settle(self.reconciler.reserved([*others, replace(wanted, scope=scope)]))
            self.mechanism.apply(scope, Shield(request.pins, reserved, request.others))
            if target.verify_threads(start_times) != start_times:
                raise TargetRefused("a thread changed while it was pinned")
        return []

    async def _set_scheduler(
        self, caller: Caller, request: arguments.SchedulerRequest, target: Target, live: list[records.Record]
    ) -> Body:
        target.verify_comm(self.configuration.settings.comm)
        limits = self.configuration.limits_for(caller.uid)
        record = self._record(target, caller, request.vm, limits, live)
        start_times = target.verify_threads(request.tids)
        shielded = self.mechanism.shielded_threads(record.scope) if self.mechanism and record.shielded else None
        scheduling.check(request, limits, shielded or {})
        realtime = set(record.realtime) - set(request.tids)
        if request.policy in scheduling.REALTIME:
            realtime |= set(request.tids)
        before = record.rttime_before or scheduling.read_rlimit(target, resource.RLIMIT_RTTIME)
        wanted = replace(record, realtime=tuple(sorted(realtime)), rttime_before=before if realtime else None)
        async with self._granting(wanted, caller, target):
            # Desktop sessions hand down a hard limit of 200 ms, under which a busy FIFO vCPU is killed in 0.3 s.
            scheduling.set_rlimit(target, resource.RLIMIT_RTTIME, scheduling.UNLIMITED if realtime else before)
            scheduling.set_policy(target, start_times, request.policy, request.priority)
        return []

    async def _release(self, request: arguments.ReleaseRequest, live: list[records.Record]) -> Body:
        for record in live:
            if record.key == (request.uid, request.vm):
                await self.reconciler.withdraw(record, stray=False)
                await self.reconciler.run()
        return []

    def _row(self, record: records.Record) -> list[Any]:
        cpus = format_cpulist(record.shielded | record.pinned)
        name = self.mechanism.name if self.mechanism and cpus else "none"
        return [record.vm, record.uid, user_name(record.uid), record.pid, record.start_time, cpus, name]

    def _limits(self, caller: Caller, live: list[records.Record]) -> dict[str, Typed]:
        limits = self.configuration.limits_for(caller.uid)
        topology = claims.read_topology()
        cpus = topology.online if limits.cpus is None else limits.cpus
        return {
            "version": Typed("s", VERSION),
            "mechanism": Typed("s", self.mechanism.name if self.mechanism else "none"),
            "reason": Typed("s", self.reason),
            "limits_source": Typed("s", limits.source),
            "cpus": Typed("s", format_cpulist(cpus)),
            "max_cpus": Typed("u", len(cpus) if limits.max_cpus is None else limits.max_cpus),
            "max_vms": Typed("u", limits.max_vms),
            "memlock": Typed("t", memlock.host_bytes() if limits.memlock is None else min(limits.memlock, INFINITY)),
            "policies": Typed("as", sorted(limits.policies)),
            "max_priority": Typed("u", limits.max_priority),
            "realtime": Typed("s", limits.realtime),
            "free_cpus": Typed("s", format_cpulist(claims.free_for(limits, topology, live))),
        }

    def _verify(self, target: Target, caller: Caller, vm: str) -> tuple[str, str]:
        return target.verify(caller, systemd.scope_name(caller.uid, vm), self.configuration.settings.services)

    def _record(
        self, target: Target, caller: Caller, vm: str, limits: Limits, live: list[records.Record]
    ) -> records.Record:
        """Return the VM's record, or a new one; Conflict when the name belongs to another live process."""
        for record in live:
            if record.key == (caller.uid, vm):
                if (record.pid, record.start_time) != (target.pid, target.start_time):
                    raise Conflict(f"VM {vm} is running already, as process {record.pid}")
                if record.stray:
                    raise TargetRefused(f"VM {vm} left its scope or lost its shield; it has to be started anew")
                return record
        claims.check_count(caller.uid, limits, live)
        return records.Record(caller.uid, vm, target.pid, target.start_time, int(time.time()))

    @asynccontextmanager
    async def _granting(self, record: records.Record, caller: Caller, target: Target) -> AsyncIterator[str]:
        """Record, move the target into its scope, verify, let the caller act, verify again; or withdraw everything."""
        name = systemd.scope_name(caller.uid, record.vm)
        slice_path, unit = self._verify(target, caller, record.vm)
        record = replace(record, scope=f"{slice_path}/{name}")
        record.write()
        try:
            if unit != name:
                await systemd.start_scope(self.bus, target, record, unit, caller.user)
            # systemd moved a number: only a process that passes every check again, from inside the scope, is ours.
            if self._verify(target, caller, record.vm)[1] != name:
                raise Failed(f"systemd did not move process {target.pid} into its scope")
            yield record.scope
            self._verify(target, caller, record.vm)
        except BaseException as err:
            await self.reconciler.withdraw(record, stray=False)
            await self.reconciler.run()
            if isinstance(err, OSError):
                raise Failed(f"the kernel refused a step of tuning {record.vm}: error {err.errno}") from err
            raise


def user_name(uid: int) -> str:
    """Return the account's name, or the number when it has none or one that is no plain word."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
    return name if name.isascii() and name.translate(str.maketrans("", "", "-_.")).isalnum() else str(uid)
