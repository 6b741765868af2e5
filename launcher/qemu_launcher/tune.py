"""Tuning one VM: memory lock before QEMU exists, pins and scheduling before its guest runs, all of it read back.

Why it exists: the session says when, this module does it, with the user's own rights where they do and through the
helper where they do not. dbus_next is imported here, and only when the helper is needed.

When something cannot be had, TuningFailed goes up and the guest does not run; with `on_tuning_failure: continue` the
user is warned instead, what was done already is undone, and the rest of the tuning is left out: a VM is tuned as
defined or not at all.
"""

import contextlib
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from . import access, agent, cgroups, plan, procfs, readback, restrictions, terminal, unaided
from .cpulist import format_cpulist
from .definition import Scheduling, VmDefinition
from .errors import TuningFailed
from .patience import patiently
from .plan import MemlockNeed, ThreadPlan
from .process import Qemu
from .threads import Threads
from .voice import Voice, format_size

if TYPE_CHECKING:
    from .helper_proxy import Helper

T = TypeVar("T")

_EMULATOR_ATTEMPTS = 3


class Tuning:
    """What one VM is given. An async context manager; the steps are called in the order they are written in.

    `on_stop` is called when systemd, which has made the VM's scope for us, wants it to end. `spelled`: how the VM is
    named on the command line.
    """

    def __init__(
        self, definition: VmDefinition, spelled: str, voice: Voice, on_stop: Callable[[], None], *, untuned: bool
    ) -> None:
        self._definition = definition
        self._spelled = spelled
        self._voice = voice
        self._on_stop = on_stop
        self._left_out = untuned
        self._memlock: MemlockNeed | None = None
        self._granted: int | None = None
        self._plan: ThreadPlan | None = None
        self._helper: Helper | None = None
        self._scope: Path | None = None  # stays None where there is no systemd, or no cgroup v2, to have made one
        self._terminal = terminal.modes_now()  # before QEMU may change them
        self._qemu: Qemu | None = None
        self._is_asking = False
        self._by_helper = False  # whether the helper has done, or may have done, something that can be undone

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
    def soft_memlock(self) -> int | None:
        """The limit that the child gives itself, in bytes; None when it is to stay as it is."""
        return self._memlock.wanted if self._memlock and self._memlock.unaided and not self._left_out else None

    async def __aenter__(self) -> Self:
        await self._attempt(self._look_ahead())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave_bus()

    async def before_exec(self, qemu: Qemu) -> None:
        """QEMU waits at its gate: get its memory lock from the helper, if that is where it must come from."""
        self._qemu = qemu
        if self._memlock is not None and not self._memlock.unaided:
            await self._attempt(self._lift_memlock(self._memlock, qemu), qemu)

    async def while_starting(self) -> None:
        """QEMU starts: use the time to join the bus and have the helper started."""
        if not self._left_out and plan.needs_helper(self._definition, self._memlock):
            await self._attempt(self._wake_helper())

    async def before_cont(self, qemu: Qemu, threads: Threads) -> None:
        """QEMU is paused and its threads are known: pin, schedule, and read back everything."""
        await self._attempt(self._tune_threads(qemu, threads), qemu)

    async def after_cont(self, qemu: Qemu) -> None:
        """Once more the same map: threads born inside a vCPU's cgroup move out. The guest runs: no failure ends it.

        Nobody is asked for a password any more. Then stay on the bus, to hear systemd; to be cancelled when QEMU has
        ended.
        """
        if self._helper is not None:
            self._helper.ask_nobody()
        if self._plan is not None and self._by_helper and not self._left_out and self._placed_by_helper(self._plan):
            try:
                await self._pin_by_helper(self._plan, qemu)
                self._check(readback.thread_differences(qemu.pid, self._plan))
            except TuningFailed as err:
                if err.wire_name == access.NOT_AUTHORIZED:  # a password is asked for each time, and was given once
                    self._voice.note("its threads are not sorted once more: that would need another password")
                else:
                    self._voice.warn(f"{err.message}; the guest runs on", err.hint)
        if self._helper is not None and self._by_helper:
            await self._helper.until_lost()
            self._voice.warn("lost the system bus; systemd cannot ask for a power-down any more, the guest runs on")
        await self._leave_bus()

    async def after_end(self) -> None:
        """QEMU is gone. A process it left behind may keep its scope, and with it the CPUs, alive: give them back."""
        await self._leave_bus()
        if self._by_helper and (self._scope is None or cgroups.is_populated(self._scope)):
            await self._release()

    def suspicion(self) -> str | None:
        """Why QEMU may have ended by itself before its guest ran, as a hint; None when tuning has no part in it."""
        return None if self._left_out else plan.memlock_suspicion(self._definition, self._granted)

    def summary(self) -> str:
        """What the VM has been given: `4 vCPUs on 4-7 (shielded), fifo 1, 25 GiB lockable`."""
        if self._left_out:
            return "untuned"
        words = []
        if self._plan is not None and self._plan.cpus:
            count = sum(len(pin.vcpus) for pin in self._plan.pins)
            how = {"shield": "shielded", "cpuset": "confined, not shielded"}.get(
                self._plan.isolation or "", "nothing is shielded"
            )
            words.append(f"{count} vCPU{'s' * (count != 1)} on {format_cpulist(self._plan.cpus)} ({how})")
        if self._plan is not None and self._plan.policy is not None:
            words.append(str(procfs.Scheduling(self._plan.policy, self._plan.priority, reset_on_fork=False)))
        if self._plan is not None:
            words += _summary_of_others(self._plan)
        if self._granted is not None:
            unlimited = self._granted == procfs.INFINITY
            words.append("all memory lockable" if unlimited else f"{format_size(self._granted)} lockable")
        return ", ".join(words) or "untuned"

    # What a failure means

    async def _attempt(self, step: Coroutine[Any, Any, None], qemu: Qemu | None = None) -> None:
        if self._left_out:
            step.close()
            return
        try:
            await step
        except TuningFailed as err:
            if self._definition.on_tuning_failure != "continue":
                err.hint = with_way_out(err.hint, self._spelled)
                raise
            self._voice.warn(f"{err.message}; it starts without tuning (on_tuning_failure: continue)", err.hint)
            self._left_out = True
            await self._undo(qemu, err.message)

    async def _undo(self, qemu: Qemu | None, why: str) -> None:
        """Take back what was done, as far as it can be taken back; a failure here is only worth a warning."""
        if self._by_helper:
            await self._release(known=why)
        if self._plan is not None and qemu is not None:
            for tid in procfs.tids(qemu.pid):
                with contextlib.suppress(OSError):
                    os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))
                    os.sched_setaffinity(tid, os.sched_getaffinity(0))
        await self._leave_bus()

    # The steps

    async def _look_ahead(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        hard_limit = procfs.INFINITY if hard == resource.RLIM_INFINITY else hard
        memory_total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._memlock = plan.memlock_need(self._definition, hard_limit, memory_total)
        if self._memlock is not None and self._memlock.unaided:
            self._granted = min(self._memlock.wanted, hard_limit)

    async def _lift_memlock(self, need: MemlockNeed, qemu: Qemu) -> None:
        helper = await self._join_bus()
        self._by_helper = True
        self._granted = await self._patiently(helper.set_memlock(qemu.pid, self._definition.name, need.wanted))
        plan.check_granted(need, self._granted)
        self._check(readback.memlock_differences(qemu.pid, self._granted, exactly=True))

    async def _wake_helper(self) -> None:
        if self._helper is None:
            (await self._join_bus()).wake()

    async def _tune_threads(self, qemu: Qemu, threads: Threads) -> None:
        wanted = plan.thread_plan(self._definition, threads)
        self._plan = wanted
        if self._placed_by_helper(wanted):
            await self._pin_by_helper(wanted, qemu)
        else:
            unaided.pin(wanted, qemu.pid)
        if wanted.policy is not None:
            policy = Scheduling(wanted.policy, wanted.priority)
            if policy.priority:
                await self._schedule_by_helper(wanted.scheduled, policy, qemu)
            else:
                unaided.schedule(wanted.scheduled, policy)
        if wanted.emulator is not None:
            await self._schedule_emulator(wanted, wanted.emulator, qemu)
        differences = readback.thread_differences(qemu.pid, wanted)
        if self._granted is not None and self._memlock is not None:
            differences += readback.memlock_differences(qemu.pid, self._granted, exactly=not self._memlock.unaided)
        self._check(differences)
        self._scope = cgroups.scope_of(qemu.pid)

    @staticmethod
    def _placed_by_helper(wanted: ThreadPlan) -> bool:
        return bool(wanted.pins) and wanted.isolation != "affinity"

    async def _pin_by_helper(self, wanted: ThreadPlan, qemu: Qemu) -> None:
        helper = await self._join_bus()
        self._by_helper = True
        pins = [(pin.tid, pin.cpus, pin.shielded) for pin in wanted.pins]
        with self._place_of_refusal(qemu):
            await self._patiently(helper.pin_threads(qemu.pid, self._definition.name, pins, wanted.others))

    async def _schedule_by_helper(self, tids: Sequence[int], policy: Scheduling, qemu: Qemu) -> None:
        helper = await self._join_bus()
        self._by_helper = True
        name = self._definition.name
        with self._place_of_refusal(qemu):
            await self._patiently(helper.set_scheduler(qemu.pid, name, tids, policy.policy, policy.priority))

    async def _schedule_emulator(self, wanted: ThreadPlan, policy: Scheduling, qemu: Qemu) -> None:
        """Those there are; what they make later inherits from them, but for real time, which no child is given."""
        if not policy.priority:
            unaided.schedule_all(wanted, policy, qemu.pid)
            return
        for attempt in range(1, _EMULATOR_ATTEMPTS + 1):
            tids = unaided.emulator_tids(wanted, qemu.pid)
            try:
                await self._schedule_by_helper(tids, policy, qemu)
            except TuningFailed:
                # A worker that ended between our look and the helper's is no reason to give up; another refusal is.
                if attempt == _EMULATOR_ATTEMPTS or set(tids) <= set(procfs.tids(qemu.pid)):
                    raise
            else:
                return

    @contextlib.contextmanager
    def _place_of_refusal(self, qemu: Qemu) -> Iterator[None]:
        """Tell with which option the user has made his QEMU one that the helper does not know for his."""
        try:
            yield
        except TuningFailed as err:
            if err.wire_name == access.TARGET_REFUSED:
                is_own = procfs.owner(qemu.pid) in (os.geteuid(), None)
                mark, hint = restrictions.helper_refused(self._definition.options, procfs.comm(qemu.pid), is_own=is_own)
                err.message = err.message if mark is None else f"{mark}: {err.message}"
                err.hint = err.hint or hint
            raise

    def _check(self, differences: list[str]) -> None:
        if differences:
            more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
            said = "qemu-launcher-helper reported success, but " if self._by_helper else ""
            raise TuningFailed(f"{said}{differences[0]}{more}")

    # The helper

    async def _join_bus(self) -> "Helper":
        if self._helper is None:
            from . import helper_proxy  # noqa: PLC0415  an untuned VM must not pay for dbus_next

            self._helper = await helper_proxy.Helper.connected(
                interactive=agent.somebody_is_there(), agent=self._asking if agent.is_possible() else None
            )
            self._helper.on_request_stop(self._definition.name, self._on_stop)
        return self._helper

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """The text agent on our terminal. A QEMU that has its monitor there (-nographic) must not take the password:

        it stands still meanwhile, and the terminal is as it was before QEMU.
        """
        with contextlib.ExitStack() as stack:
            if self._qemu is not None and terminal.modes_now() != self._terminal:
                self._qemu.send(signal.SIGSTOP)
                stack.callback(self._qemu.send, signal.SIGCONT)
                stack.enter_context(terminal.with_modes(self._terminal))
            self._is_asking = True
            stack.callback(setattr, self, "_is_asking", False)
            async with agent.registered():
                yield

    async def _leave_bus(self) -> None:
        helper, self._helper = self._helper, None
        if helper is not None:
            await helper.close()

    async def _release(self, known: str = "") -> None:
        # Over a new connection. The old one may be lost; and as long as it is there systemd, told to end what is left
        # in the scope, would ask us to do it.
        await self._leave_bus()
        try:
            helper = await self._join_bus()
            await self._patiently(helper.release(os.geteuid(), self._definition.name))
        except TuningFailed as err:
            # Who is not let in, or finds no helper, was granted nothing, and has read why already.
            if err.message != known:
                self._voice.warn(f"its CPUs could not be given back: {err.message}", err.hint)
        finally:
            self._by_helper = False
            await self._leave_bus()

    async def _patiently(self, call: Coroutine[Any, Any, T]) -> T:
        def tell() -> None:
            if not self._is_asking:  # else the question is on the screen, and perhaps half of an answer
                self._voice.note("waiting for qemu-launcher-helper, or for your answer")

        return await patiently(call, tell)


def with_way_out(hint: str | None, spelled: str) -> str:
    """`hint`, and how to start all the same the VM that is `spelled` so on the command line."""
    without = f"start it without tuning: qemu-launcher run --untuned {spelled}"
    return f"{hint}\n{without}" if hint else without


def _summary_of_others(wanted: ThreadPlan) -> list[str]:
    """`iothreads on 0-1`, `emulator threads on 0-1, batch`."""
    words = []
    iothreads = [pin for pin in wanted.pins if pin.iothread is not None]
    if iothreads:
        cpus = frozenset[int]().union(*(pin.cpus for pin in iothreads))
        words.append(f"{len(iothreads)} iothread{'s' * (len(iothreads) != 1)} on {format_cpulist(cpus)}")
    if wanted.others or wanted.emulator:
        place = f" on {format_cpulist(wanted.others)}" if wanted.others else ""
        policy = f" {wanted.emulator}" if wanted.emulator else ""
        words.append(f"emulator threads{place}{policy}")
    return words
