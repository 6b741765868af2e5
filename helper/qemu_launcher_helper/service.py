"""One call, from the bus to the answer. Read `_serve` first: it is the whole procedure.

table -> identity -> quotas -> arguments -> polkit -> identity again -> operations -> answer -> one log line.

Nothing here acts on the host: operations does, after everything above said yes, and verifies the target itself. There
is no other way in, and no switch that leaves a step out.
"""

import asyncio
import logging
import pwd
import re
import traceback
from collections import Counter
from pathlib import Path

from . import errors
from .arguments import Caller, ListRequest, PinRequest, ReleaseRequest, Request, parse
from .bus import INTERACTIVE, Call, SystemBus
from .contract import CALLS_IN_FLIGHT, DIALOG_QUEUE, IDLE_SECONDS, INTERFACE, METHODS, OBJECT_PATH
from .cpulist import format_cpulist
from .limits import Configuration
from .operations import Operations
from .polkit import Authority
from .quotas import Quotas

# What may appear in a polkit dialog and in a log line: no markup, no second line, no terminal escape can be made of it.
_PLAIN = re.compile(r"[A-Za-z0-9 ,._-]{1,64}")

_log = logging.getLogger(__name__)


class Service:
    """Serves calls: `tasks`. `idle` is set when there has been none for `idle_seconds`."""

    def __init__(
        self, bus: SystemBus, configuration: Configuration, operations: Operations, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        self._bus, self._configuration, self._operations = bus, configuration, operations
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
        if self._senders[sender] > CALLS_IN_FLIGHT + DIALOG_QUEUE:
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
        line = ""
        try:
            answer, action = _method(call)
            caller = await self._identify(call.header.sender)
            with self._quotas.slot(caller.uid):
                line = f"{call.header.member} uid={caller.uid} pid={caller.pid}"
                request = parse(call.header.member, call.body())
                facts = _facts(caller, request)
                line += "".join(f" {name}={value}" for name, value in facts.items())
                _ = self._configuration.settings  # a broken helper.toml: no service at all
                if action is not None and not _is_free(caller, request):
                    await self._authorise(call, caller, action, facts)
                body = await self._operations.perform(caller, request)
            self._bus.reply(call, answer, body)
            _log.info("granted %s", line)
        except errors.Refusal as err:
            self._refuse(call, err)
            if line:  # what comes before is no denial, but noise that anybody can make
                _log.warning("refused %s: %s", line, ascii(str(err)))
        except Exception:  # noqa: BLE001  the journal gets all of it, the caller a fixed text
            _log.error("failed %s: %s", line, ascii(traceback.format_exc()))
            self._refuse(call, errors.Failed("The helper failed; its journal says why"))

    def _refuse(self, call: Call, err: errors.Refusal) -> None:
        self._bus.reply(call, "s", [str(err)], err.wire_name)

    async def _identify(self, sender: str) -> Caller:
        """Ask the bus who owns the connection. Anything but two sensible numbers is a refusal, never a guess."""
        try:
            answer = await self._bus.daemon("GetConnectionCredentials", sender, answer="a{sv}")
        except errors.CallFailed as err:
            raise errors.NotAuthorized("The bus does not say who is calling") from err
        match answer:
            case [{"UnixUserID": int() as uid, "ProcessID": int() as pid}] if 0 <= uid < 2**32 - 1 and pid > 0:
                if uid != self._overflow_uid:
                    return Caller(sender, uid, pid, _user_name(uid))
        raise errors.NotAuthorized("The bus does not say who is calling")

    async def _authorise(self, call: Call, caller: Caller, action: str, details: dict[str, str]) -> None:
        granted, challenge = await self._authority.check(caller, action, details)
        if not granted and challenge and call.header.flags & INTERACTIVE:
            with self._quotas.counted(caller.uid, -1):
                granted = await self._authority.dialog(caller, action, details)
        # That was the attacker's time: the connection must still be there, and the same one's.
        if not granted or await self._identify(caller.sender) != caller:
            raise errors.NotAuthorized(f"polkit does not allow {action} to {caller.user} in this session")


def _method(call: Call) -> tuple[str, str | None]:
    """The signature of the answer, and the polkit action, of a call that is in the table."""
    header = call.header
    if header.member not in METHODS or (header.path, header.interface) != (OBJECT_PATH, INTERFACE):
        raise errors.UnknownMethod("There is no such method")
    wanted, answer, action = METHODS[header.member]
    if header.signature != wanted:
        raise errors.InvalidArguments(f"{header.member} takes arguments of signature '{wanted}'")
    return answer, action


def _is_free(caller: Caller, request: Request) -> bool:
    """Whether everybody may ask this, as it is about his own VMs."""
    match request:
        case ReleaseRequest(uid=caller.uid) | ListRequest(all=False):
            return True
    return False


def _user_name(uid: int) -> str:
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = ""
    return name if _PLAIN.fullmatch(name) else f"uid {uid}"


def _facts(caller: Caller, request: Request) -> dict[str, str]:
    """What polkit's dialogs and rules and the log may know: generated, with fixed keys, in a harmless alphabet."""
    facts = {"user": caller.user}
    facts |= {key: str(getattr(request, key)) for key in ("vm", "policy", "priority", "bytes") if hasattr(request, key)}
    if isinstance(request, PinRequest):
        cpus = {cpu for pin in request.pins for cpu in pin.cpus}
        facts["cpus"] = text if len(text := format_cpulist(cpus)) <= 64 else f"{len(cpus)} CPUs"
    return facts
