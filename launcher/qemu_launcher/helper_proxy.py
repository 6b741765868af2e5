"""The helper, as typed methods, and systemd's wish to end a VM.

Why it exists: D-Bus, its library and its error names end here; what leaves this module are values and TuningFailed.
It is imported only when something needs the helper, since importing dbus_next takes as long as QEMU's own start. Nobody
else imports that but `desktop`, and `systembus`, by which both are connected.

The connection on which the helper was called is the Controller= of the VM's scope (systemd.scope's D-Bus interface,
org.freedesktop.systemd1(5)): before systemd ends the scope it sends RequestStop there and waits. So the connection
stays as long as the VM, and everybody on the bus may send us signals: one is believed only if its sender owns systemd's
name at that moment. Nothing that comes over the bus, or its loss, raises anything into the session.

Where polkit may want a password, and only the text agent could ask for it, a call is first made without: the common
answer is yes, and then no agent is started. Only NotAuthorized makes it be repeated, with the agent there (`agent`).

An answer of another shape than the contract's is refused like an error. After any TuningFailed from here the helper
has said no, or is gone: nothing is known of what it did, and the caller undoes through `release`.
The contract is dbus/org.qemulauncher.Helper1.xml; METHODS restates it, and a test compares the two.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from dbus_next import BusType, Message, MessageFlag, MessageType

from . import absence, access, names, systembus
from .errors import TuningFailed
from .limits import Limits
from .patience import retrieved
from .sizes import INFINITY
from .systembus import Bus

BUS_NAME = "org.qemulauncher.Helper1"
INTERFACE = "org.qemulauncher.Helper1"
OBJECT_PATH = "/org/qemulauncher/Helper1"

# member: (signature of what goes in, signature of what comes out)
METHODS = {
    "SetMemlock": ("ust", "t"),
    "PinThreads": ("usa(uaub)au", ""),
    "SetScheduler": ("usausu", ""),
    "CheckMemlock": ("st", "t"),
    "CheckPins": ("sa(uaub)au", ""),
    "CheckScheduler": ("sa(uaub)su", ""),
    "Release": ("us", ""),
    "ListVms": ("b", "a(susutss)"),
    "GetLimits": ("", "a{sv}"),
    "GetLimitsOf": ("u", "a{sv}"),
}

Pins = Sequence[tuple[int, frozenset[int], bool]]  # TID, CPUs, shielded
Trace = Callable[[str], None]
Agent = Callable[[], contextlib.AbstractAsyncContextManager[None]]

SYSTEMD = "org.freedesktop.systemd1"
_DAEMON = {"destination": "org.freedesktop.DBus", "path": "/org/freedesktop/DBus", "interface": "org.freedesktop.DBus"}

# dbus-daemon gives up on an activation after 25 s and answers itself; on a busy host, where many VMs start at once, the
# helper may still be coming, and the call, which has not reached it, is made once more. What is left is a helper that
# hangs, and a person in front of polkit's dialog, who may be looking for the administrator.
CONNECT_TIMEOUT = 30.0  # seconds
CALL_TIMEOUT = 60.0
DIALOG_TIMEOUT = 600.0
# More than this the helper does not read, nor answer (contract.py): 255 vCPUs fit, with 19 CPUs for each of them.
MAX_MESSAGE_BYTES = 24 * 1024
_ADDED_BY_BUS = 272  # bytes; our unique name, which may have 255 (D-Bus specification, "Valid Names")


class GrantedVm(NamedTuple):
    """One VM that holds a grant, as ListVms tells it. `start_time`: clock ticks since boot."""

    vm: str
    uid: int
    user: str
    pid: int
    start_time: int
    cpulist: str
    mechanism: str


class Helper:
    """A connection to the helper. Made by `connected`, ended by `close`."""

    def __init__(self, bus: Bus, *, interactive: bool, agent: Agent | None, trace: Trace) -> None:
        self._bus = bus
        self._trace = trace
        self._interactive = interactive
        self._agent = agent
        self._lost = asyncio.ensure_future(bus.wait_for_disconnect())
        self._lost.add_done_callback(retrieved)
        self._checks: dict[str, asyncio.Task[None]] = {}  # by sender

    @classmethod
    async def connected(cls, *, interactive: bool, agent: Agent | None = None, trace: Trace | None = None) -> Self:
        """Join the system bus. `interactive`: polkit may ask the person in front of this terminal or display.

        `agent`: a context in which a polkit agent asks on this terminal; entered only when a question is to be asked.
        `trace` is told each call and its answer.
        """
        address = systembus.address()
        try:
            bus = Bus(bus_address=address, bus_type=BusType.SYSTEM)
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    await bus.connect()
            except BaseException:
                bus.leave()
                raise
        except Exception as err:  # the library raises anything from OSError to bare Exception
            raise TuningFailed(
                f"there is no system bus at {address}: {getattr(err, 'strerror', None) or err or type(err).__name__}",
                absence.remedy(),
                wire_name=access.NO_BUS,
            ) from err
        trace = trace or (lambda _: None)
        trace(f"joined the system bus at {address}")
        return cls(bus, interactive=interactive, agent=agent, trace=trace)

    def wake(self) -> None:
        """Have the helper started while we do something else. Whether that worked, the first call will tell."""
        silent = MessageFlag.NO_REPLY_EXPECTED
        message = Message(**_DAEMON, member="StartServiceByName", signature="su", body=[BUS_NAME, 0], flags=silent)
        if self._bus.connected:
            self._bus.send(message).add_done_callback(retrieved)

    def on_request_stop(self, vm: str, act: Callable[[], None]) -> None:
        """Call `act` whenever systemd wants the scope of our `vm` to end. It must not block."""
        path = scope_path(os.geteuid(), vm)

        async def check(sender: str) -> None:
            if await self._owner(SYSTEMD) == sender:
                act()

        def receive(message: Any) -> None:
            # Sent to us alone, so that no match rule is needed (and none is added: it would let others' signals in).
            what = (message.message_type, message.path, message.interface, message.member)
            # One question about each sender at a time: no impostor can push the real one out.
            if (
                what == (MessageType.SIGNAL, path, f"{SYSTEMD}.Scope", "RequestStop")
                and message.sender not in self._checks
            ):
                task = self._checks[message.sender] = asyncio.ensure_future(check(message.sender))
                task.add_done_callback(lambda _: self._checks.pop(message.sender, None))

        self._bus.add_message_handler(receive)

    def ask_nobody(self) -> None:
        """From now on no call waits for a person."""
        self._interactive = False

    @property
    def is_lost(self) -> bool:
        """Whether the bus has gone."""
        return bool(self._lost.done())

    async def until_lost(self) -> None:
        """Return when the bus has closed the connection."""
        await asyncio.wait([self._lost])

    async def set_memlock(self, pid: int, vm: str, size: int) -> int:
        """Let `pid` lock `size` bytes, INFINITY for as much as this user may. Returns what was granted, in bytes."""
        (granted,) = await self._call("SetMemlock", pid, vm, size, may_ask=True)
        return _as_size("SetMemlock", granted)

    async def pin_threads(self, pid: int, vm: str, pins: Pins, others: frozenset[int] = frozenset()) -> None:
        """Pin threads; the whole map, every time. `others`: CPUs of all other threads."""
        await self._call("PinThreads", pid, vm, _wire_pins(pins), sorted(others), may_ask=True)

    async def set_scheduler(self, pid: int, vm: str, tids: Sequence[int], policy: str, priority: int) -> None:
        """Set policy and priority of `tids`."""
        await self._call("SetScheduler", pid, vm, list(tids), policy, priority, may_ask=True)

    async def check_memlock(self, vm: str, size: int) -> int:
        """What `set_memlock` would return now. This and the next two change nothing, and nobody is asked."""
        (granted,) = await self._call("CheckMemlock", vm, size)
        return _as_size("CheckMemlock", granted)

    async def check_pins(self, vm: str, pins: Pins, others: frozenset[int] = frozenset()) -> None:
        """Raise what `pin_threads` would raise now. There are no threads yet: the TIDs are any numbers from 2 on."""
        await self._call("CheckPins", vm, _wire_pins(pins), sorted(others))

    async def check_scheduler(self, vm: str, pins: Pins, policy: str, priority: int) -> None:
        """The same of `set_scheduler`, for all threads of `pins`, if they were pinned so."""
        await self._call("CheckScheduler", vm, _wire_pins(pins), policy, priority)

    async def release(self, uid: int, vm: str) -> None:
        """Give back all that a VM was granted. One's own never waits for a person."""
        await self._call("Release", uid, vm, may_ask=uid != os.geteuid())

    async def list_vms(self, *, everybodys: bool = False, may_ask: bool = True) -> list[GrantedVm]:
        """The VMs that hold a grant: one's own, or everybody's, for which polkit `may_ask` for a password."""
        (rows,) = await self._call("ListVms", everybodys, may_ask=everybodys and may_ask)
        try:
            return [GrantedVm(*row) for row in rows]
        except TypeError as err:
            raise _nonsense("ListVms") from err

    async def get_limits(self, uid: int) -> Limits:
        """What `uid` may have: oneself, or another, for which polkit may ask for a password."""
        own = uid == os.geteuid()
        member = "GetLimits" if own else "GetLimitsOf"
        (facts,) = await self._call(member, *(() if own else (uid,)), may_ask=not own)
        try:
            return Limits.read({key: variant.value for key, variant in facts.items()})
        except ValueError as err:
            raise _nonsense(member) from err

    async def close(self) -> None:
        """Leave the bus. A call that is still under way is given up; the helper notices."""
        self._bus.leave()
        for task in (checks := list(self._checks.values())):
            task.cancel()
        await asyncio.wait([self._lost, *checks])

    async def _call(self, member: str, *body: Any, may_ask: bool = False) -> list[Any]:
        """The answer's values. `may_ask`: whether the helper may have polkit put a question to a person."""
        ask = may_ask and self._interactive
        if not (ask and self._agent is not None):
            return await self._ask_once(member, body, interactive=ask)
        try:
            return await self._ask_once(member, body, interactive=False)
        except TuningFailed as err:
            if err.wire_name != access.NOT_AUTHORIZED:
                raise
        async with self._agent():
            return await self._ask_once(member, body, interactive=True)

    async def _ask_once(self, member: str, body: Sequence[Any], *, interactive: bool) -> list[Any]:
        wanted, answered = METHODS[member]
        message = Message(
            destination=BUS_NAME,
            path=OBJECT_PATH,
            interface=INTERFACE,
            member=member,
            signature=wanted,
            body=list(body),
            flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE,
        )
        size = len(message._marshall()) + _ADDED_BY_BUS  # noqa: SLF001  the library has no public codec
        if size > MAX_MESSAGE_BYTES:
            raise TuningFailed(
                f"{member} would be a message of {-(-size >> 10)} KiB, and qemu-launcher-helper reads no more than "
                f"{MAX_MESSAGE_BYTES >> 10} KiB: too many host CPUs for each of too many threads",
                "give each vCPU fewer host CPUs to choose from; or write isolation: affinity, which needs no helper",
            )
        self._trace(f"helper > {member}({', '.join(map(repr, body))}){', may ask for a password' * interactive}")
        began, patience = time.monotonic(), DIALOG_TIMEOUT if interactive else CALL_TIMEOUT
        reply = await self._reply(member, message, patience)
        if reply.error_name == access.NOT_YET_STARTED:
            self._trace(f"helper < {reply.error_name}: it is still starting; asked once more")
            message.serial = 0  # a new one
            reply = await self._reply(member, message, patience)
        took = f"{(time.monotonic() - began) * 1000:.0f} ms"
        if reply.message_type is MessageType.ERROR:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            self._trace(f"helper < {reply.error_name}: {text!r}, {took}")
            raise access.explained(reply.error_name or "", text)
        if reply.signature != answered:
            raise _nonsense(member)
        body_out: list[Any] = reply.body
        self._trace(f"helper < {', '.join(map(repr, body_out)) or 'done'}, {took}")
        return body_out

    async def _reply(self, member: str, message: Any, seconds: float) -> Any:
        """The answer to a call; the library itself waits for ever, also on a connection that is lost."""
        if not self._bus.connected:
            raise TuningFailed("the system bus has closed the connection", access.LOOK_AT_JOURNAL)
        call = asyncio.ensure_future(self._bus.call(message))
        try:
            await asyncio.wait([call, self._lost], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if call.done() and call.exception() is None:
                return call.result()
            if call.done() or self._lost.done():
                raise TuningFailed(
                    f"the system bus closed the connection while {member} was under way", access.LOOK_AT_JOURNAL
                )
            raise TuningFailed(f"qemu-launcher-helper did not answer {member}", access.LOOK_AT_JOURNAL)
        finally:
            call.cancel()

    async def _owner(self, name: str) -> str | None:
        """Unique name of the connection that owns `name` now; None if nobody does, or the bus does not say."""
        message = Message(**_DAEMON, member="GetNameOwner", signature="s", body=[name])
        try:
            reply = await self._reply(message.member, message, CALL_TIMEOUT)
        except TuningFailed:
            return None
        return str(reply.body[0]) if reply.message_type is MessageType.METHOD_RETURN and reply.body else None


def scope_path(uid: int, vm: str) -> str:
    """Object path of a VM's scope, escaped as sd_bus_path_encode(3) tells."""
    label = "".join(char if char.isascii() and char.isalnum() else f"_{ord(char):02x}" for char in names.scope(uid, vm))
    return f"/org/freedesktop/systemd1/unit/{label}"


def _wire_pins(pins: Pins) -> list[list[Any]]:
    return [[tid, sorted(cpus), shielded] for tid, cpus, shielded in pins]


def _as_size(member: str, value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= INFINITY:
        raise _nonsense(member)
    return value


def _nonsense(member: str) -> TuningFailed:
    return TuningFailed(
        f"qemu-launcher-helper answered {member} with something that the contract does not know",
        "launcher and helper may be of different versions: reinstall the package",
    )
