"""What the helper would answer if the VM were started now: the requests of a start, asked and not made.

Why it exists: limits, other VMs and polkit's rules are the helper's to know. The requests are those that `tune` would
make, from the same `plan`; the helper has a twin of each that answers by the same code and changes nothing. They carry
no PID, since there is no QEMU yet, and in place of thread IDs numbers from 2 on. Nobody is asked for a password: where
polkit would want one, that is the finding.

No method raises TuningFailed, or waits for ever: a helper that is not there, not willing, or too old is a finding.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from .. import access, plan
from ..definition import VmDefinition
from ..errors import PasswordWanted, TuningFailed
from ..helper_proxy import Helper, Pins
from ..limits import Limits
from ..plan import MemlockNeed
from ..sizes import format_limit
from ..threads import Ids, Iothread, Threads, Vcpu
from . import asked
from .finding import Finding, Severity

_FIRST_TID = 2
_LIMIT_EXCEEDED = f"{access.ERROR_PREFIX}LimitExceeded"
_UNKNOWN = "org.freedesktop.DBus.Error.UnknownMethod"
_NOT_POLKITS = {
    f"{access.ERROR_PREFIX}{name}" for name in ("LimitExceeded", "Conflict", "Unsupported", "TargetRefused")
}


class Asker:
    """One connection, and what came of it. `gave_up`: nobody will answer, and that has been told."""

    def __init__(self, helper: Helper, *, person_there: bool, fatal: bool) -> None:
        self.findings: list[Finding] = []
        self.limits: Limits | None = None
        self.gave_up = False
        self._helper = helper
        self._person_there = person_there
        self._severity: Severity = "error" if fatal else "warning"

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Who answers, for the head of a report."""
        if self.limits is None:
            return [("helper", "gives no answer")]
        return [("helper", self.limits.version), ("shielding", self.limits.shielding)]

    async def get_limits(self) -> None:
        """Who answers, and what this user may have."""
        self.limits = await self._answer("limits", "", lambda: self._helper.get_limits(os.geteuid()))

    async def memlock(self, vm: str, need: MemlockNeed) -> None:
        """SetMemlock."""
        answer = await self._answer("memlock", "lock memory", lambda: self._helper.check_memlock(vm, need.wanted))
        if answer is None:
            return
        try:
            plan.check_granted(need, answer)
        except TuningFailed as err:
            self._add(self._severity, "memlock", err.message, err.hint)
            return
        self._add("ok", "memlock", f"the helper would let QEMU lock {format_limit(answer, 'all memory')}")

    async def pins(self, vm: str, pins: Pins, others: frozenset[int]) -> None:
        """PinThreads."""
        answer = await self._answer("pinning", "pin threads", lambda: self._helper.check_pins(vm, pins, others))
        if answer is not None:
            how = "pin and shield" if any(shielded for _, _, shielded in pins) else "pin"
            plural = "s" * (len(pins) != 1)
            self._add("ok", "pinning", f"the helper would {how} {len(pins)} thread{plural} as wanted")

    async def probe(self, vm: str, cpu: int) -> int:
        """What polkit says to the three requests, in the smallest form of each. Returns how many it says yes to."""
        pin = (_FIRST_TID, frozenset({cpu}), True)
        answers = [
            await self._answer("polkit", "lock memory", lambda: self._helper.check_memlock(vm, 1 << 20)),
            await self._answer("polkit", "pin threads", lambda: self._helper.check_pins(vm, [pin])),
            await self._answer("polkit", "set policies", lambda: self._helper.check_scheduler(vm, [pin], "other", 0)),
        ]
        return sum(answer is not None for answer in answers)

    async def scheduler(self, vm: str, pins: Pins, policy: str, priority: int) -> None:
        """SetScheduler."""
        answer = await self._answer(
            "scheduler", f"set policy {policy}", lambda: self._helper.check_scheduler(vm, pins, policy, priority)
        )
        if answer is not None:
            self._add("ok", "scheduler", f"the helper would set policy {policy}, priority {priority}")

    async def _answer(self, about: str, act: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """The answer, True in place of none; None if it was a refusal, or there was nobody to ask."""
        if self.gave_up:
            return None
        try:
            answer = await call()
        except TuningFailed as err:
            if about == "polkit" and err.wire_name in _NOT_POLKITS:
                return True  # polkit had said yes, before limits and other VMs were looked at
            self._refused(about, act, err)
            return None
        return True if answer is None else answer

    def _refused(self, about: str, act: str, err: TuningFailed) -> None:
        name = err.wire_name or ""
        if name == _UNKNOWN:
            version = self.limits.version if self.limits else "of another version"
            text = f"qemu-launcher-helper {version} cannot say whether it would {act}"
            self._add("warning", about, text, "install launcher and helper from one package")
        elif isinstance(err, PasswordWanted):
            if self._person_there:
                self._add("note", about, f"a start will ask for a password to {act}")
            else:
                self._add(
                    self._severity,
                    about,
                    f"polkit wants a password to {act}, and nobody is there who could be asked",
                    "start it in a terminal or on the desktop, or have an administrator change polkit's rule",
                )
        else:
            hint = (
                "qemu-launcher limits shows what you may have, and who says so" if name == _LIMIT_EXCEEDED else err.hint
            )
            self._add(self._severity, about, err.message, hint)
            # Anything else says the same to every question.
            self.gave_up = name not in {*_NOT_POLKITS, access.NOT_AUTHORIZED}

    def _add(self, severity: Severity, about: str, text: str, fix: str | None = None) -> None:
        self.findings.append(Finding(severity, about, text, fix))


@contextlib.asynccontextmanager
async def asking(*, person_there: bool, fatal: bool) -> AsyncIterator[Asker | Finding]:
    """A connection that lets nobody be asked for anything; a Finding where there is no bus.

    `fatal`: what is refused here would keep the VM from starting. `person_there`: a start could ask for a password.
    """
    try:
        helper = await Helper.connected(interactive=False)
    except TuningFailed as err:
        yield Finding("error" if fatal else "warning", "helper", err.message, err.hint)
        return
    try:
        yield Asker(helper, person_there=person_there, fatal=fatal)
    finally:
        await helper.close()


async def start(asker: Asker, definition: VmDefinition, need: MemlockNeed | None) -> None:
    """What a start would ask for, in its order. Raises TuningFailed for a plan that cannot be made."""
    name = definition.name
    if need is not None and not need.unaided:
        await asker.memlock(name, need)
    wanted = plan.thread_plan(*imagined(definition))
    pins = {pin.tid: (pin.tid, pin.cpus, pin.shielded) for pin in wanted.pins}
    if wanted.by_helper:
        await asker.pins(name, list(pins.values()), wanted.others)
    anywhere = wanted.others or frozenset(os.sched_getaffinity(0))  # where a thread without a pin will be
    if wanted.vcpu_policy is not None and wanted.vcpu_policy.priority:
        scheduled = [pins.get(tid, (tid, anywhere, False)) for tid in wanted.scheduled]
        await asker.scheduler(name, scheduled, *wanted.vcpu_policy)
    if wanted.emulator is not None and wanted.emulator.priority:
        emulator = [(_FIRST_TID, anywhere, False)]
        await asker.scheduler(name, emulator, *wanted.emulator)


def imagined(definition: VmDefinition) -> tuple[VmDefinition, Threads]:
    """The threads that QEMU would have, as far as the definition tells: each vCPU one, and each iothread it names.

    In place of TIDs are numbers that no two have. Which vCPU is where is QEMU's to say, and nothing that the helper is
    asked depends on it: so in the definition that goes with them vCPUs are pinned by their index. Those that may be
    plugged in later are among them.
    """
    pinning = definition.pinning
    pinned = len(pinning.sets) if pinning is not None else 0
    if pinning is not None:
        definition = definition._replace(pinning=pinning._replace(topology=None, by_index=pinning.sets))
    count = max(pinned, asked.vcpus(definition) or 0)
    vcpus = tuple(Vcpu(index, _FIRST_TID + index, Ids(core=index), index) for index in range(count))
    ids = enumerate(definition.iothread_pinning or {}, _FIRST_TID + count)
    return definition, Threads(vcpus, tuple(Iothread(name, tid) for tid, name in ids), possible=count)
