"""Tuning one VM: memory lock before QEMU exists, pins and scheduling before its guest runs, all of it read back.

Why it exists: the session says when, this module does it, with the user's own rights where they do and through the
helper (`assistance`) where they do not.

When something cannot be had, TuningFailed goes up and the guest does not run; with `on_tuning_failure: continue` the
user is warned instead, what was done already is undone, and the rest of the tuning is left out: a VM is tuned as
defined or not at all.
"""

import contextlib
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from . import absence, access, cgroups, plan, procfs, readback, unaided
from .assistance import Assistance
from .cpulist import format_cpulist
from .definition import Scheduling, VmDefinition
from .errors import TuningFailed
from .plan import MemlockNeed, ThreadPlan
from .process import Qemu
from .sizes import format_limit
from .threads import Threads
from .voice import Voice

_EMULATOR_ATTEMPTS = 3


class Spelled(NamedTuple):
    """How the VM was named on the command line, and the command: run or start. For hints."""

    vm: str
    command: str


class Tuning:
    """What one VM is given. An async context manager; the steps are called in the order they are written in.

    `on_stop` is called when systemd, which has made the VM's scope for us, wants it to end.
    """

    def __init__(
        self, definition: VmDefinition, spelled: Spelled, voice: Voice, on_stop: Callable[[], None], *, untuned: bool
    ) -> None:
        self._definition = definition
        self._spelled = spelled
        self._voice = voice
        self._left_out = untuned
        self._memlock: MemlockNeed | None = None
        self._granted: int | None = None
        self._plan: ThreadPlan | None = None
        self._emulator_tids: tuple[int, ...] = ()  # of the emulator threads that were given real time
        self._helper = Assistance(definition, voice, on_stop)
        # Where the helper has put it, as the tree says while QEMU lives: also when the step that did so has failed.
        self._scope: Path | None = None
        self._is_complete = False

    @property
    def wanted(self) -> bool:
        """Whether the guest must be held until something has been done."""
        return not self._left_out and self._definition.wants_tuning

    @property
    def placement(self) -> tuple[str, frozenset[int]]:
        """Isolation and CPUs that the vCPUs have been given; ("", nothing) if they have not been pinned."""
        if self._left_out or self._plan is None or not self._plan.cpus:
            return "", frozenset()
        return self._plan.isolation or "", self._plan.cpus

    @property
    def follows_vcpus(self) -> bool:
        """Whether a vCPU that is plugged in is to be tuned as well."""
        return not self._left_out and (self._definition.places_threads or self._definition.schedules_threads)

    @property
    def soft_memlock(self) -> int | None:
        """The limit that the child gives itself, in bytes; None when it is to stay as it is."""
        return self._memlock.wanted if self._memlock and self._memlock.unaided and not self._left_out else None

    async def __aenter__(self) -> Self:
        await self._attempt(self._look_ahead())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._helper.leave()

    async def before_exec(self, qemu: Qemu) -> None:
        """QEMU waits at its gate: get its memory lock from the helper, if that is where it must come from."""
        self._helper.beware_of(qemu)
        if self._memlock is not None and not self._memlock.unaided:
            await self._attempt(self._lift_memlock(self._memlock, qemu), qemu)

    async def while_starting(self) -> None:
        """QEMU starts: use the time to join the bus and have the helper started."""
        if not self._left_out and plan.needs_helper(self._definition, self._memlock):
            await self._attempt(self._helper.wake())

    async def before_cont(self, qemu: Qemu, threads: Threads) -> None:
        """QEMU is paused and its threads are known: pin, schedule, and read back everything."""
        await self._attempt(self._tune_threads(qemu, threads), qemu)

    async def after_cont(self, qemu: Qemu) -> None:
        """Once more the same map: threads born inside a vCPU's cgroup move out. The guest runs: no failure ends it.

        Nobody is asked for a password any more.
        """
        self._helper.ask_nobody()
        if self._plan is None or not self._helper.has_acted or self._left_out or not self._plan.by_helper:
            return
        try:
            await self._helper.pin(self._plan, qemu.pid)
            self._check(readback.thread_differences(qemu.pid, self._plan, self._emulator_tids))
        except TuningFailed as err:
            if err.wire_name == access.NOT_AUTHORIZED:  # a password is asked for each time, and was given once
                self._voice.note("its threads are not sorted once more: that would need another password")
            else:
                self._voice.warn(f"{err.message}; the guest runs on", err.hint)

    async def until_bus_is_lost(self) -> None:
        """Stay on the bus to hear systemd, where there is anything to hear; to be cancelled when QEMU has ended."""
        await self._helper.until_lost()

    async def follow(self, qemu: Qemu, threads: Threads) -> list[str]:
        """vCPUs have come or gone while the guest runs: the whole map anew. A failure is a warning, and it runs on.

        Returns what is good to know of it.
        """
        if self._left_out or self._plan is None:
            return []
        before = self._plan
        new = [vcpu for vcpu in threads.vcpus if vcpu.tid not in before.named]
        names = ", ".join(str(vcpu) for vcpu in new) or "a vCPU"
        try:
            self._plan = wanted = plan.thread_plan(self._definition, threads)
            self._explain(wanted, threads)
            await self._give(wanted, qemu)
            if wanted.emulator is not None and wanted.vcpu_policy is None:
                # QEMU's main thread has made them, and they inherit what is meant for that one.
                unaided.schedule([vcpu.tid for vcpu in new], Scheduling("other", 0))
            self._check(readback.thread_differences(qemu.pid, wanted, self._emulator_tids))
        except TuningFailed as err:
            what = f"{names} was plugged in and is not" if new else "after a vCPU was unplugged the others are not all"
            self._voice.warn(f"{what} tuned as defined: {err.message}; the guest runs on", err.hint)
            return []
        gone = sorted(before.vcpus.keys() - {vcpu.index for vcpu in threads.vcpus})
        return [
            *(f"{vcpu} was plugged in: {wanted.summary_of(vcpu.tid)}" for vcpu in new),
            *(f"vCPU {index} was unplugged" for index in gone),
        ]

    async def after_end(self) -> None:
        """QEMU is gone, however far it came. A process it left behind may keep its scope, and the CPUs: end both.

        Without systemd the helper, too, would see the end of the VM only when it looks again.
        """
        await self._helper.leave()
        if self._scope is not None and cgroups.ends_by_itself(self._scope):
            return
        if self._helper.has_acted and (self._scope is not None or self._is_complete):
            await self._helper.release()
        if self._scope is not None:
            cgroups.end_members(self._scope)

    def suspicion(self) -> str | None:
        """Why QEMU may have ended by itself before its guest ran, as a hint; None when tuning has no part in it."""
        return None if self._left_out else plan.memlock_suspicion(self._definition, self._granted)

    def summary(self) -> str:
        """What the VM has been given: `4 vCPUs on 4-7 (shielded), fifo 1, 25 GiB lockable`."""
        if self._left_out:
            return "untuned"
        words = [] if self._plan is None else self._plan.summary()
        if self._granted is not None:
            words.append(f"{format_limit(self._granted, 'all memory')} lockable")
        return ", ".join(words) or "untuned"

    # What a failure means

    async def _attempt(self, step: Coroutine[Any, Any, None], qemu: Qemu | None = None) -> None:
        if self._left_out:
            step.close()
            return
        try:
            await step
        except TuningFailed as err:
            by_helper = self._memlock is not None and not self._memlock.unaided
            if access.is_absent(err) and self._definition.could_pin_unaided and not by_helper:
                err.hint = f"{err.hint}\n{absence.WITHOUT_HELPER}"
            if self._definition.on_tuning_failure != "continue":
                err.hint = with_way_out(err.hint, self._spelled)
                raise
            self._voice.warn(f"{err.message}; it starts without tuning (on_tuning_failure: continue)", err.hint)
            self._left_out = True
            await self._undo(qemu, err.message)

    async def _undo(self, qemu: Qemu | None, why: str) -> None:
        """Take back what was done, as far as it can be taken back; a failure here is only worth a warning."""
        if self._helper.has_acted:
            await self._helper.release(known=why)
        if self._plan is not None and qemu is not None and not unaided.undo(qemu.pid):
            self._voice.warn("some of its threads keep the policy idle", unaided.IDLE_STAYS)
        await self._helper.leave()

    # The steps

    async def _look_ahead(self) -> None:
        soft_limit, hard_limit = procfs.own_memlock_limit()
        self._memlock = plan.memlock_need(self._definition, soft_limit, hard_limit, procfs.memory_total())
        if self._memlock is not None:
            how = "QEMU raises its own soft limit" if self._memlock.unaided else "the helper is asked for it"
            wanted, hard = (format_limit(size, "as much as there is") for size in (self._memlock.wanted, hard_limit))
            self._voice.step(f"memory lock: {wanted} wanted, hard limit {hard}: {how}")
        if self._memlock is not None and self._memlock.unaided:
            self._granted = min(self._memlock.wanted, hard_limit)

    async def _lift_memlock(self, need: MemlockNeed, qemu: Qemu) -> None:
        with self._watching_scope(qemu):
            self._granted = await self._helper.set_memlock(qemu.pid, need.wanted)
        plan.check_granted(need, self._granted)
        self._check(readback.memlock_differences(qemu.pid, self._granted, exactly=True))

    async def _tune_threads(self, qemu: Qemu, threads: Threads) -> None:
        self._plan = wanted = plan.thread_plan(self._definition, threads)
        self._explain(wanted, threads)
        with self._watching_scope(qemu):
            await self._give(wanted, qemu)
            if wanted.emulator is not None:
                await self._schedule_emulator(wanted, wanted.emulator, qemu)
        differences = readback.thread_differences(qemu.pid, wanted, self._emulator_tids)
        if self._granted is not None and self._memlock is not None:
            differences += readback.memlock_differences(qemu.pid, self._granted, exactly=not self._memlock.unaided)
        self._check(differences)
        self._is_complete = True
        self._voice.step(f"read back from the kernel: all as defined{f', in {self._scope}' if self._scope else ''}")

    @contextlib.contextmanager
    def _watching_scope(self, qemu: Qemu) -> Iterator[None]:
        try:
            yield
        finally:
            self._scope = cgroups.scope_of(qemu.pid) or self._scope

    def _explain(self, wanted: ThreadPlan, threads: Threads) -> None:
        pins = {pin.tid: pin for pin in wanted.pins}
        named = [(str(vcpu), vcpu.tid) for vcpu in threads.vcpus]
        named += [(f"iothread {one.id!r}", one.tid) for one in threads.iothreads]
        for who, tid in named:
            pin = pins.get(tid)
            where = "not pinned" if pin is None else f"CPU {format_cpulist(pin.cpus)}{', shielded' * pin.shielded}"
            self._voice.step(f"{who}: TID {tid} -> {where}")
        if threads.can_grow:
            self._voice.step(f"vCPUs that can still be plugged in: {threads.possible - len(threads.vcpus)}")

    async def _give(self, wanted: ThreadPlan, qemu: Qemu) -> None:
        """Place all threads, and schedule the vCPUs': pins first, since real time is for pinned threads."""
        if wanted.by_helper:
            await self._helper.pin(wanted, qemu.pid)
        else:
            unaided.pin(wanted, qemu.pid, self._voice.step)
        if (policy := wanted.vcpu_policy) is None:
            return
        if policy.priority:
            # All of them, not only new ones: a shield that grows takes real time from everybody in it.
            await self._helper.schedule(wanted.scheduled, policy, qemu.pid)
        else:
            self._voice.step(f"sched_setscheduler: TIDs {', '.join(map(str, wanted.scheduled))} -> {policy}")
            unaided.schedule(wanted.scheduled, policy)

    async def _schedule_emulator(self, wanted: ThreadPlan, policy: Scheduling, qemu: Qemu) -> None:
        """Those there are; what they make later inherits from them, but for real time, which no child is given."""
        if not policy.priority:
            self._voice.step(f"sched_setscheduler: all emulator threads -> {policy}")
            unaided.schedule_all(wanted, policy, qemu.pid)
            return
        for attempt in range(1, _EMULATOR_ATTEMPTS + 1):
            tids = unaided.emulator_tids(wanted, qemu.pid)
            try:
                await self._helper.schedule(tids, policy, qemu.pid)
            except TuningFailed:
                # A worker that ended between our look and the helper's is no reason to give up; another refusal is.
                if attempt == _EMULATOR_ATTEMPTS or set(tids) <= set(procfs.tids(qemu.pid)):
                    raise
            else:
                self._emulator_tids = tids
                return

    def _check(self, differences: list[str]) -> None:
        if differences:
            more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
            said = "qemu-launcher-helper reported success, but " if self._helper.has_acted else ""
            raise TuningFailed(f"{said}{differences[0]}{more}")


def with_way_out(hint: str | None, spelled: Spelled) -> str:
    """`hint`, and how to start it all the same."""
    without = f"start it without tuning: qemu-launcher {spelled.command} --untuned {spelled.vm}"
    return f"{hint}\n{without}" if hint else without
