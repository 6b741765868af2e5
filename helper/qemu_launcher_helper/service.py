"""One call, from the bus to the answer. Read `_serve` first: it is the whole procedure.

table -> identity -> quotas -> arguments -> polkit -> identity again -> operations -> answer -> one log line.

Nothing here acts on the host: operations does, after everything above said yes, and verifies the target itself. There
is no other way in, and no switch that leaves a step out.
"""

import asyncio
import itertools
import logging
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from . import contract, limits
from .bus import INTERACTIVE, Call, SystemBus, Variant
from .contract import CALLS_IN_FLIGHT, CALLS_PER_WINDOW, INTERFACE, METHODS, OBJECT_PATH, Caller
from .cpuset.cpulist import cpulist
from .operations import Operations
from .records import MECHANISM, read_all, tell

POLKIT = ("org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority", "org.freedesktop.PolicyKit1.Authority")


class Service:
    """Serves calls: `tasks`. `idle` is set when there has been none for `idle_seconds`, or half of that."""

    def __init__(self, bus: SystemBus, operations: Operations, idle_seconds: float = contract.IDLE_SECONDS) -> None:
        self._bus, self._operations, self._authority, self._quotas = bus, operations, Authority(bus), Quotas()
        # _strangers: calls by connection, until the bus has said whose it is.
        self.tasks, self._strangers = set[asyncio.Task[None]](), Counter[str]()
        self.idle, self._look_seconds, self._called = asyncio.Event(), idle_seconds / 2, True
        self._look()

    def receive(self, call: Call) -> None:
        """Begin to serve `call`. The bus calls this for every method call that reaches us."""
        if self._strangers[call.header.sender] >= CALLS_IN_FLIGHT or len(self.tasks) >= contract.MAX_CALLS:
            self._bus.reply(call, "s", ["Too many calls at a time"], contract.LimitExceeded.wire_name)
            return
        self._called = True
        self._strangers[call.header.sender] += 1
        self.tasks.add(task := asyncio.create_task(self._serve(call)))
        task.add_done_callback(self.tasks.discard)

    def _look(self) -> None:
        """Be idle if nothing came since the last look; but where nobody starts us when a VM ends, stay with each."""
        asyncio.get_running_loop().call_later(self._look_seconds, self._look)
        if not (self._called or self.tasks or (MECHANISM.resident and any(read_all()))):
            self.idle.set()
        self._called = bool(self.tasks)

    async def _serve(self, call: Call) -> None:
        """Answer one call. Whatever happens, the caller gets an answer, and it is ours."""
        header, member, facts = call.header, call.header.member, dict[str, str]()
        try:
            try:
                if (header.path, header.interface) != (OBJECT_PATH, INTERFACE) or member not in METHODS:
                    raise contract.UnknownMethod("There is no such method")
                wanted, answer, action, _ = METHODS[member]
                if header.signature != wanted:
                    raise contract.InvalidArguments(f"{member} takes arguments of signature '{wanted}'")
                caller = await self._identify(header.sender)
            finally:
                self._strangers -= Counter([header.sender])
            with self._quotas.slot(caller.account):
                facts = {"uid": str(caller.uid), "pid": str(caller.pid)}
                arguments = contract.parse(member, call.body())
                # The pins of a check are numbered, and no threads.
                named = arguments.get("tids") or [pin.tid for pin in arguments.get("pins", ()) if "pid" in arguments]
                facts |= (details := _details(caller, arguments)) | {"tids": cpulist(named)}
                own = arguments.get("uid") == caller.uid or arguments.get("everybody") is False
                if action is not None and not (action == contract.MANAGE_OTHERS and own):
                    await self._authorise(call, caller, action, details)
                settings = limits.load() if member != "Release" else limits.Settings()  # what may be given back: all
                body = await self._operations.perform(caller, settings, member, arguments)
            tell(logging.INFO, "granted", member, facts)
            self._bus.reply(call, answer, body)
        except contract.Refusal as err:
            if facts:  # what comes before is no denial, but noise that anybody can make
                tell(logging.WARNING, "refused", member, facts, str(err))
            self._bus.reply(call, "s", [str(err)], err.wire_name)
        except Exception:  # noqa: BLE001  the journal gets all of it, the caller a fixed text
            tell(logging.CRITICAL, "failed", member, facts, traceback.format_exc())
            self._bus.reply(call, "s", ["The helper failed; its journal says why"], contract.Failed.wire_name)

    async def _identify(self, sender: str) -> Caller:
        """Ask the bus who owns the connection. Anything but two sensible numbers is a refusal, never a guess.

        Not GetConnectionCredentials: dbus-broker puts a descriptor into its answer, and hangs up on who takes none.
        """
        for _ in range(contract.IDENTIFY_TRIES):
            with suppress(contract.CallFailed, ValueError):  # the latter: an empty body
                [uid] = await self._bus.daemon("GetConnectionUnixUser", sender, answer="u")
                [pid] = await self._bus.daemon("GetConnectionUnixProcessID", sender, answer="u")
                if uid not in (limits.OVERFLOW_UID, 2**32 - 1) and pid > 0:
                    return Caller(sender, uid, pid, *limits.account(uid))
        raise contract.NotAuthorized("The bus does not say who is calling")

    async def _authorise(self, call: Call, caller: Caller, action: str, details: dict[str, str]) -> None:
        granted, challenge = await self._authority.check(caller, action, details)
        if not granted and challenge and call.header.flags & INTERACTIVE:
            with counted(self._quotas.in_flight, caller.account, -1):
                granted = await self._authority.dialog(caller, action, details)
        # That was the attacker's time: the connection must still be there, and the same one's.
        if not granted or await self._identify(caller.sender) != caller:
            how = " without a password" if challenge and not call.header.flags & INTERACTIVE else ""
            raise contract.NotAuthorized(f"polkit does not allow {action} to {caller.user} in this session{how}")


class Authority:
    """polkit: may a caller do this? Anything but a clear yes is a no, and so is no polkit at all.

    The subject is the caller's bus name, which the bus vouches for and never gives to anybody else; never a PID. The
    question is asked without interaction first, which never waits on a person; only if polkit would want a password,
    and the caller said that he is ready for that, does the call wait for the one dialog its user may have open.

    https://www.freedesktop.org/software/polkit/docs/latest/eggdbus-interface-org.freedesktop.PolicyKit1.Authority.html
    """

    def __init__(self, bus: SystemBus, dialog_seconds: float = contract.DIALOG_SECONDS) -> None:
        self._bus, self._dialog_seconds, self._numbers = bus, dialog_seconds, itertools.count()
        # Per account: the dialog that is open, and calls that wait for their turn.
        self._turns, self._asked = defaultdict[int, asyncio.Lock](asyncio.Lock), Counter[int]()

    async def check(self, caller: Caller, action: str, details: dict[str, str], dialog: str = "") -> tuple[bool, bool]:
        """Return (yes, a password might make it a yes). No person is asked, unless under the name `dialog`.

        Never raises for what polkit answers, or does not: that is (False, False).
        """
        # 1 is CheckAuthorizationFlags' AllowUserInteraction. It is dialog() that ends one: polkit has to be told.
        flags, seconds = (1, 2 * self._dialog_seconds) if dialog else (0, contract.CALL_SECONDS)
        body = [["system-bus-name", {"name": Variant("s", caller.sender)}], action, details, flags, dialog]
        try:
            match await self._bus.call(POLKIT, "CheckAuthorization", "(sa{sv})sa{ss}us", body, "(bba{ss})", seconds):
                case [[granted, challenge, _]]:
                    return granted is True, challenge is True
        except contract.CallFailed as err:
            logging.warning("polkit gave no answer: %a", str(err))
        return False, False

    async def dialog(self, caller: Caller, action: str, details: dict[str, str]) -> bool:
        """Let polkit ask a person; return whether that led to a yes. One dialog per user at a time.

        Takes up to `dialog_seconds`, and as long for each call queued before: the attacker's time, verify everything
        again afterwards. Ends early when the caller leaves the bus. Raises LimitExceeded when too many wait already.
        """
        waiting, busy = self._asked[caller.account], len(+self._asked) >= contract.MAX_DIALOGS
        if waiting > contract.DIALOG_QUEUE or (not waiting and busy):
            raise contract.LimitExceeded("Too many calls wait for a password already")
        with counted(self._asked, caller.account):
            async with self._turns[caller.account]:
                name = f"qemu-launcher-{next(self._numbers)}"
                asking = asyncio.create_task(self.check(caller, action, details, name))
                end = time.monotonic() + self._dialog_seconds
                while not asking.done() and time.monotonic() < end and await self._bus.is_there(caller.sender):
                    await asyncio.wait({asking}, timeout=contract.DIALOG_PAUSE)
                if asking.cancel():
                    with suppress(contract.CallFailed):
                        await self._bus.call(POLKIT, "CancelCheckAuthorization", "s", [name], "")
                [answer] = await asyncio.gather(asking, return_exceptions=True)
                return answer in [(True, False), (True, True)]


class Quotas:
    """How many calls a user may make, whatever they ask for: in flight, and in the last WINDOW_SECONDS.

    A refused call counts for nothing, so a user who stops flooding is served again. It is not logged either: what shows
    a flood is that as many calls as there may be were granted, and nobody can make the journal forget the others.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self.in_flight = clock, Counter[int]()
        self._calls: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=CALLS_PER_WINDOW))

    @contextmanager
    def slot(self, account: int) -> Iterator[None]:
        """Hold one of the user's slots for the block; `account` is as in Caller. Raises LimitExceeded."""
        calls, now = self._calls[account], self._clock()
        many = len(calls) == CALLS_PER_WINDOW and calls[0] > now - contract.WINDOW_SECONDS
        if many or self.in_flight[account] >= CALLS_IN_FLIGHT:
            most = f"{CALLS_IN_FLIGHT} at a time and {CALLS_PER_WINDOW} in {contract.WINDOW_SECONDS:.0f} s"
            raise contract.LimitExceeded(f"You make too many calls, at most {most} are served; try again later")
        calls.append(now)
        with counted(self.in_flight, account):
            yield


@contextmanager
def counted(counter: Counter[int], account: int, number: int = 1) -> Iterator[None]:
    """Count the block for this user; -1 lends a slot out, while a call only waits for a person."""
    counter[account] += number
    try:
        yield
    finally:
        counter[account] -= number


def _details(caller: Caller, arguments: dict[str, Any]) -> dict[str, str]:
    """What polkit's dialogs and rules and the log may know: generated, with fixed keys, in a harmless alphabet.

    cpus: all that would be held or used, in whole cores where shielded; "many" for what is too long to be told.
    """
    facts = {"user": caller.user} | ({"owner": limits.account(arguments["uid"])[0]} if "uid" in arguments else {})
    facts |= {key: str(arguments[key]) for key in ("vm", "policy", "priority", "bytes") if key in arguments}
    if "others" in arguments:
        pins, cores = arguments["pins"], limits.read_cores()
        shield = limits.union(pin.cpus for pin in pins if pin.shielded)
        cpus = arguments["others"].union(*(pin.cpus for pin in pins), *(core for core in cores if core & shield))
        facts["cpus"] = text if len(text := cpulist(cpus)) <= 64 else "many"
    return facts
