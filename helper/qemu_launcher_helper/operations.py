"""The privileged operations, each as: reconcile, verify, check the limits, record, act, verify again.

All of it is one step, as nothing else runs between two `await`s, but for one wait: systemd may take as long over a
scope as the caller's session likes. Calls about the same user wait for that, others are served; the record, written
before, keeps what was claimed, and everything is verified again. When a step fails after the record was written, all
grants of that VM are withdrawn by the same code that reconcile uses: a VM is tuned as asked or not at all.

Each VM has a systemd scope of its own. Nothing of what systemd is told comes from a user but the PID and the validated
VM name; and as it answers before it has moved the process, the target is verified after that.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from resource import RLIM_INFINITY, RLIMIT_MEMLOCK, RLIMIT_RTTIME
from typing import Any, NamedTuple

from . import contract, limits
from .bus import SYSTEMD, SystemBus, Variant
from .contract import Caller, CallFailed, Conflict, Failed, LimitExceeded, Pin, TargetRefused, Unsupported
from .cpuset.cpulist import cpulist
from .limits import Limits, Settings
from .records import MECHANISM, PENDING, Record, reconcile, settle
from .target import Target


class Operations:
    """What the dispatcher calls once polkit has said yes."""

    def __init__(self, bus: SystemBus) -> None:
        self._bus, self._turns = bus, defaultdict[int, asyncio.Lock](asyncio.Lock)  # by whose VMs it is about

    async def perform(self, caller: Caller, settings: Settings, member: str, arguments: dict[str, Any]) -> list[Any]:
        """Do what the authorised `caller` asks and return the reply's body.

        `member` is one of METHODS, `arguments` are what contract.parse made of its body. Raises Refusal; when an act of
        it has failed, no grant of the VM is left, or if it was a repeated call, those that hold as before.
        """
        uid = arguments.get("uid", caller.uid)
        try:
            async with self._turns[uid]:
                operation = Operation(caller, settings, settings.limits_for(uid), reconcile(), self._bus)
                answer = await getattr(operation, contract.METHODS[member][3])(**arguments)
                return [] if answer is None else [answer]
        except ProcessLookupError as err:
            raise TargetRefused("The VM, or one of its threads, has ended meanwhile") from err


class Operation(NamedTuple):
    """One authorised call: whose, within which limits (of the user it is about), beside which live VMs."""

    caller: Caller
    settings: Settings
    limits: Limits
    live: list[Record]
    bus: SystemBus

    async def set_memlock(self, pid: int, vm: str, bytes: int) -> int:  # noqa: A002  the wire's word
        """Raise the target's RLIMIT_MEMLOCK to as much of `bytes` as the caller may have; return that."""
        with Target(pid) as target:
            record = self._record_of(target, vm)
            granted = limits.grant_memlock(bytes, record, self.limits, self.live, limits.lockable_bytes())
            before = record.memlock_before or target.rlimit(RLIMIT_MEMLOCK)
            async with self._granting(target, record._replace(memlock=granted, memlock_before=before)):
                target.rlimit(RLIMIT_MEMLOCK, (granted if granted < 2**63 else RLIM_INFINITY,) * 2)
        return granted

    async def pin_threads(self, pid: int, vm: str, pins: tuple[Pin, ...], others: frozenset[int]) -> None:
        """Put every thread of the target where the map wants it."""
        with Target(pid) as target:
            before = self._record_of(target, vm, self.settings.comm)
            start_times = target.verify_threads(pin.tid for pin in pins)
            wanted = self._placed(before, pins, others)
            async with self._granting(target, wanted):
                still = MECHANISM.shielded_threads(before.scope) or {} if wanted.shielded == before.shielded else {}
                stay = [pin.tid for pin in pins if pin.shielded and still.get(pin.tid) == pin.cpus]
                # Whoever leaves a shielded CPU leaves real time first.
                target.take_realtime([*stay, *(before.realtime if self.limits.realtime == "anywhere" else ())])
                settle([wanted, *(record for record in self.live if record.key != wanted.key)])
                MECHANISM.apply(wanted.scope, pins, wanted.shielded, others)
                if target.verify_threads(start_times) != start_times:
                    raise TargetRefused("A thread changed while it was pinned")

    async def set_scheduler(self, pid: int, vm: str, tids: tuple[int, ...], policy: str, priority: int) -> None:
        """Set policy and priority of threads of the target; while any has real time, lift its limit on that."""
        with Target(pid) as target:
            record = self._record_of(target, vm, self.settings.comm)
            start_times = target.verify_threads(tids)
            shielded = MECHANISM.shielded_threads(record.scope) or {}
            realtime = {*record.realtime} - {*tids} | {*(tids if policy in contract.REALTIME_POLICIES else ())}
            limits.check_policy(policy, priority, self.limits, realtime & {*tids, *shielded}, shielded)
            before = record.rttime_before or (target.rlimit(RLIMIT_RTTIME) if realtime else None)
            granted = record._replace(realtime=tuple(sorted(realtime)), scheduled=f"{policy} {priority} {sorted(tids)}")
            # What was before stays on record also when no real time is left: this call, too, may end halfway.
            async with self._granting(target, granted._replace(rttime_before=before)):
                if before:
                    # Desktop sessions hand down a hard limit of 200 ms; under it a busy FIFO vCPU is killed in 0.3 s.
                    target.set_rttime((RLIM_INFINITY, RLIM_INFINITY) if realtime else before, realtime)
                target.set_policy(start_times, policy, priority)
                if (MECHANISM.shielded_threads(record.scope) or {}) != shielded:
                    raise TargetRefused(f"VM {vm} lost its shield meanwhile")

    async def check_memlock(self, vm: str, bytes: int) -> int:  # noqa: A002
        """Answer as set_memlock would for a VM that is still to be started; this and the next two change nothing."""
        return limits.grant_memlock(bytes, self._record(vm), self.limits, self.live, limits.lockable_bytes())

    async def check_pins(self, vm: str, pins: tuple[Pin, ...], others: frozenset[int]) -> None:
        """Answer as pin_threads would."""
        self._placed(self._record(vm), pins, others)

    async def check_scheduler(self, vm: str, pins: tuple[Pin, ...], policy: str, priority: int) -> None:
        """Answer as set_scheduler would for all threads of `pins`, if they were pinned so."""
        self._record(vm)
        shielded = {pin.tid: pin.cpus for pin in pins if pin.shielded}
        limits.check_policy(policy, priority, self.limits, [pin.tid for pin in pins], shielded)

    async def release(self, uid: int, vm: str) -> None:
        """Take all grants of a VM back; harmless when it has none."""
        reconcile(release=f"{uid}-{vm}")

    async def list_vms(self, *, everybody: bool) -> list[Any]:
        """Return a row for each VM that holds a grant: the caller's own, or everybody's."""
        mine = [vm for vm in self.live if everybody or vm.uid == self.caller.uid]
        rows = [(vm.vm, vm.uid, limits.account(vm.uid)[0], vm.pid, vm.start_time, cpulist(vm.cpus)) for vm in mine]
        return [[*row, MECHANISM.name if row[-1] else "none"] for row in rows]

    async def get_limits(self, **_: int) -> dict[str, Variant]:
        """Return what the caller, or the user he asks about, may have, and who decides it."""
        own, cores, lacking = self.limits, limits.read_cores(), MECHANISM.lacks()
        cpus = limits.union(cores) if own.cpus is None else own.cpus
        facts = {name: getattr(own, name) for name in ("realtime", "deadline", "max_vms", "max_priority")}
        facts |= {"limits_source": own.source, "policies": sorted(own.policies), "version": contract.VERSION}
        facts |= {"mechanism": "none" if lacking else MECHANISM.name, "reason": lacking or MECHANISM.reason}
        facts |= {"cpus": cpulist(cpus), "free_cpus": cpulist(limits.free_for(own, cores, self.live))}
        facts |= {"max_cpus": len(cpus) if own.max_cpus is None else own.max_cpus}
        facts |= {"memlock": limits.lockable_bytes() if own.memlock is None else own.memlock}
        return {name: Variant({str: "s", int: "t", bool: "b", list: "as"}[type(x)], x) for name, x in facts.items()}

    def _placed(self, record: Record, pins: tuple[Pin, ...], others: frozenset[int]) -> Record:
        """Return the record with what `pins` hold, within all limits."""
        if lacking := MECHANISM.lacks():
            raise Unsupported(lacking)
        shielded, pinned = (limits.union(p.cpus for p in pins if p.shielded == kind) for kind in (True, False))
        placed = " ".join(f"{pin.tid}:{cpulist(pin.cpus)}" for pin in pins) + f" {cpulist(others)}"
        asked = record._replace(shielded=shielded, pinned=pinned, placed=placed)
        return limits.check_cpus(asked, others, self.limits, limits.read_cores(), self.live)

    def _record_of(self, target: Target, vm: str, comm: Iterable[str] = ("*",)) -> Record:
        """Verify the target; return the VM's record, or a new one."""
        home = MECHANISM.home(target.verify(self.caller, vm, self.settings.services, comm), self.caller.uid)
        return self._record(vm, target.pid, target.start_time, f"{home}/{contract.SCOPE.format(self.caller.uid, vm)}")

    def _record(self, vm: str, pid: int = 0, start_time: int = 0, scope: str = "") -> Record:
        """Return the VM's record, or a new one within the limits. Conflict when the VM is another live process."""
        for record in self.live:
            if record.key == f"{self.caller.uid}-{vm}":
                if (record.pid, record.start_time) != (pid, start_time):
                    raise Conflict(f"VM {vm} is running already, as process {record.pid}")
                if record.stray:
                    raise TargetRefused(f"VM {vm} left its scope or lost its shield; it has to be started anew")
                return record
        if (count := sum(record.uid == self.caller.uid for record in self.live)) >= self.limits.max_vms:
            raise LimitExceeded(f"You have {count} VMs, and may have {self.limits.max_vms} ({self.limits.source})")
        return Record(self.caller.uid, vm, pid, start_time, scope)

    @asynccontextmanager
    async def _granting(self, target: Target, record: Record) -> AsyncIterator[None]:
        """Record, move the target into its scope, verify, let the caller act, verify again; or withdraw everything."""
        repeated = record in self.live
        record._replace(settled=repeated).write()
        try:
            unit = target.verify(self.caller, record.vm, self.settings.services)
            if unit != record.scope and not record.settled and not MECHANISM.enclose(record.scope, target):
                await self._start_scope(target, record, *unit.split("/")[-2:])
            # A number was moved: only a process that passes every check again, from inside the scope, is ours.
            self._verify_inside(target, record)
            yield
            self._verify_inside(target, record)
            record._replace(settled=True).write()
        except BaseException as err:
            # A repeated call that fails, say because the launcher died meanwhile, takes nothing away that still holds.
            reconcile(release=None if repeated else record.key)
            if isinstance(err, OSError | Failed) and not target.is_alive():
                raise ProcessLookupError from err  # its threads and groups go one by one: the kernel says many things
            raise

    def _verify_inside(self, target: Target, record: Record) -> None:
        if target.verify(self.caller, record.vm, self.settings.services) != record.scope:
            raise TargetRefused(f"Process {target.pid} is not, or not any more, in the scope of VM {record.vm}")

    async def _start_scope(self, target: Target, record: Record, above: str, unit: str) -> None:
        """Move the target into record.scope; others are served meanwhile. `unit`: where it lives, in slice `above`."""
        slice_path, _, name = record.scope.rpartition("/")
        properties = [
            ["Description", Variant("s", f"Virtual machine {record.vm} of {self.caller.user}")],
            ["PIDs", Variant("au", [target.pid])],
            ["Slice", Variant("s", slice_path.rpartition("/")[2])],
            ["DelegateControllers", Variant("as", ["cpuset"])],
            # Without it a scope that failed (SIGKILL of QEMU) stays loaded and blocks the VM's next start.
            ["CollectMode", Variant("s", "inactive-or-failed")],
            # The helper is not resident: systemd starts it to reconcile when the scope ends.
            *([end, Variant("as", ["qemu-launcher-helper.service"])] for end in ("OnSuccess", "OnFailure")),
            # Stopping runs in the opposite order: at logout and shutdown the launcher has time to power the guest down.
            # It ends with the slice that its user is in, also where it cannot be in there itself (pool.py).
            *([relation, Variant("as", [other])] for relation, other in (("Before", unit), ("PartOf", above))),
            # Whoever stops the scope has systemd ask the launcher first (RequestStop), which powers the guest down.
            ["Controller", Variant("s", self.caller.sender)],
        ]
        PENDING.add(record.key)
        try:
            # A scope that ended, and whose OnSuccess= had us started, stays loaded until systemd looks at it again; it
            # does when a reference to it goes.
            for member in ("RefUnit", "UnrefUnit"):
                with suppress(CallFailed):
                    await self.bus.call(SYSTEMD, member, "s", [name], "")
            await self.bus.start_unit(name, properties)
            if not target.is_alive():
                MECHANISM.give_back(target.pid, record.scope)
                # Of a process that is dead, but not reaped, systemd makes a scope that nobody ends, and that is in the
                # way of the VM's next start.
                with suppress(CallFailed):
                    await self.bus.call(SYSTEMD, "StopUnit", "ss", [name, "fail"], "o")
            self.live[:] = reconcile()  # what others did meanwhile; and whether our own record is still there
        except CallFailed as err:
            raise Failed(f"systemd does not make a scope for VM {record.vm}, {err.name}: try again") from err
        finally:
            PENDING.discard(record.key)
        if record.key not in {live.key for live in self.live}:
            raise TargetRefused(f"VM {record.vm} has ended meanwhile")
