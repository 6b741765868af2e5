"""One call, from the bus to the answer. Read `_serve` first: it is the whole procedure.

table -> identity -> quotas -> arguments -> polkit -> identity again -> operations -> answer -> one log line.

Nothing here acts on the host: operations does, after everything above said yes, and verifies the target itself. There
is no other way in, and no switch that leaves a step out.
"""

import asyncio
import logging
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import contract, errors, limits
from .arguments import Caller, parse
from .bus import INTERACTIVE, Call, SystemBus, Variant
from .contract import CALLS_IN_FLIGHT, CALLS_PER_WINDOW, WINDOW_SECONDS
from .cpulist import format_cpulist
from .operations import Operations
from .polkit import Authority


class Service:
    """Serves calls: `tasks`. `idle` is set when there has been none for `idle_seconds`."""

    def __init__(self, bus: SystemBus, operations: Operations, idle_seconds: float = contract.IDLE_SECONDS) -> None:
        self._bus, self._operations = bus, operations
        self._authority, self._quotas = Authority(bus), Quotas()
        self.tasks: set[asyncio.Task[None]] = set()
        self._senders: Counter[str] = Counter()
        # What the kernel shows for a user it cannot name, proc_sys_kernel(5): such a caller could be anybody.
        self._overflow_uid = int(Path("/proc/sys/kernel/overflowuid").read_text())
        self.idle, self._idle_seconds = asyncio.Event(), idle_seconds
        self._timer = asyncio.get_running_loop().call_later(idle_seconds, self.idle.set)

    def receive(self, call: Call) -> None:
        """Begin to serve `call`. The bus calls this for every method call that reaches us."""
        sender = call.header.sender
        # Until the bus has said whose connection this is, a flood is counted by connection.
        if self._senders[sender] > CALLS_IN_FLIGHT + contract.DIALOG_QUEUE:
            self._refuse(call, errors.LimitExceeded("Too many calls of this connection are unanswered"))
            return
        self._timer.cancel()
        self._senders[sender] += 1
        task = asyncio.create_task(self._serve(call))
        self.tasks.add(task)
        task.add_done_callback(lambda _: self._finished(task, sender))

    def _finished(self, task: "asyncio.Task[None]", sender: str) -> None:
        self.tasks.discard(task)
        self._senders -= Counter([sender])
        if not self.tasks:
            self._timer = asyncio.get_running_loop().call_later(self._idle_seconds, self.idle.set)

    async def _serve(self, call: Call) -> None:
        """Answer one call. Whatever happens, the caller gets an answer, and it is ours."""
        header, member, line = call.header, call.header.member, ""
        try:
            here = (header.path, header.interface) == (contract.OBJECT_PATH, contract.INTERFACE)
            if not here or member not in contract.METHODS:
                raise errors.UnknownMethod("There is no such method")
            wanted, answer, action, _ = contract.METHODS[member]
            if header.signature != wanted:
                raise errors.InvalidArguments(f"{member} takes arguments of signature '{wanted}'")
            caller = await self._identify(header.sender)
            with self._quotas.slot(caller.uid):
                line = f"{member} uid={caller.uid} pid={caller.pid}"
                arguments = parse(member, call.body())
                facts = _facts(caller, arguments)
                line += "".join(f" {name}={value}" for name, value in facts.items())
                own = arguments.get("uid") == caller.uid or arguments.get("everybody") is False
                if action is not None and not (action == contract.MANAGE_OTHERS and own):
                    await self._authorise(call, caller, action, facts)
                body = await self._operations.perform(caller, limits.load(), member, arguments)
            logging.info("granted %s", line)
            self._bus.reply(call, answer, body)
        except errors.Refusal as err:
            if line:  # what comes before is no denial, but noise that anybody can make
                logging.warning("refused %s: %a", line, str(err))
            self._refuse(call, err)
        except Exception:  # noqa: BLE001  the journal gets all of it, the caller a fixed text
            logging.critical("failed %s: %a", line, traceback.format_exc())
            self._refuse(call, errors.Failed("The helper failed; its journal says why"))

    def _refuse(self, call: Call, err: errors.Refusal) -> None:
        self._bus.reply(call, "s", [str(err)], err.wire_name)

    async def _identify(self, sender: str) -> Caller:
        """Ask the bus who owns the connection. Anything but two sensible numbers is a refusal, never a guess."""
        with suppress(errors.CallFailed):
            match await self._bus.daemon("GetConnectionCredentials", sender, answer="a{sv}"):
                case [
                    {"UnixUserID": Variant(signature="u", value=uid), "ProcessID": Variant(signature="u", value=pid)}
                ]:
                    if uid not in (self._overflow_uid, 2**32 - 1) and pid > 0:
                        return Caller(sender, uid, pid, limits.user_name(uid))
        raise errors.NotAuthorized("The bus does not say who is calling")

    async def _authorise(self, call: Call, caller: Caller, action: str, details: dict[str, str]) -> None:
        granted, challenge = await self._authority.check(caller, action, details)
        if not granted and challenge and call.header.flags & INTERACTIVE:
            with self._quotas.counted(caller.uid, -1):
                granted = await self._authority.dialog(caller, action, details)
        # That was the attacker's time: the connection must still be there, and the same one's.
        if not granted or await self._identify(caller.sender) != caller:
            raise errors.NotAuthorized(f"polkit does not allow {action} to {caller.user} in this session")


class Quotas:
    """How many calls a user may make, whatever they ask for: in flight, and in the last WINDOW_SECONDS.

    A refused call counts for nothing, so a user who stops flooding is served again; a flood is logged once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_flight: Counter[int] = Counter()
        self._calls: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=CALLS_PER_WINDOW))
        self._told: defaultdict[int, float] = defaultdict(lambda: -WINDOW_SECONDS)

    @contextmanager
    def slot(self, uid: int) -> Iterator[None]:
        """Hold one of the user's slots for the block. Raises LimitExceeded."""
        calls, now = self._calls[uid], self._clock()
        recent = now - WINDOW_SECONDS
        if self._in_flight[uid] >= CALLS_IN_FLIGHT or (len(calls) == CALLS_PER_WINDOW and calls[0] > recent):
            if self._told[uid] <= recent:
                self._told[uid] = now
                logging.warning("refused uid=%d: too many calls", uid)
            most = f"{CALLS_IN_FLIGHT} at a time and {CALLS_PER_WINDOW} in {WINDOW_SECONDS:.0f} s"
            raise errors.LimitExceeded(f"You make too many calls, at most {most} are served; try again later")
        calls.append(now)
        with self.counted(uid, 1):
            yield

    @contextmanager
    def counted(self, uid: int, number: int) -> Iterator[None]:
        """Count the block as that many calls in flight; -1 lends the slot out while a call only waits for a person."""
        self._in_flight[uid] += number
        try:
            yield
        finally:
            self._in_flight[uid] -= number


def _facts(caller: Caller, arguments: dict[str, Any]) -> dict[str, str]:
    """What polkit's dialogs and rules and the log may know: generated, with fixed keys, in a harmless alphabet."""
    facts = {"user": caller.user}
    facts |= {key: str(arguments[key]) for key in ("vm", "policy", "priority", "bytes") if key in arguments}
    if "pins" in arguments:
        cpus = {cpu for pin in arguments["pins"] for cpu in pin.cpus}
        facts["cpus"] = text if len(text := format_cpulist(cpus)) <= 64 else f"{len(cpus)} CPUs"
    return facts
