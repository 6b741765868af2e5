"""What is fuzzed, as functions of bytes: each returns None, or raises because the helper broke a promise.

The same functions run under atheris (`make fuzz`), and over the corpus as ordinary tests. They assert what the modules
of the helper say of themselves, and measure time and memory, so that an endless loop is a failure and not a hang.
"""

import asyncio
import atexit
import logging
import resource
import shutil
import signal
import struct
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import SignatureTree
from dbus_next.validators import is_bus_name_valid

from qemu_launcher_helper import contract, limits
from qemu_launcher_helper.bus import Call, SystemBus
from qemu_launcher_helper.contract import CallFailed, Failed, InvalidArguments, TargetRefused
from qemu_launcher_helper.limits import Limits, Settings

from . import wire

# A 64 KiB message costs some 0.1 s at worst, ten times that under atheris; what takes longer has no bound.
CPU_SECONDS = 5.0
# What one input may add to the largest size this process has had. The helper itself has 128 MiB (MemoryMax=).
MEMORY_KIB = 96 * 1024
# Enough for the messages that are drained because of their size, and little enough to make thousands a second.
FILL_BYTES = 3 * contract.MAX_MESSAGE_BYTES

# As short as a call can be: it is parsed again for every input.
LAST = wire.message(
    wire.CALL,
    [(wire.PATH, "/"), (wire.MEMBER, "Last"), (wire.SENDER, ":1.99"), (wire.SIGNATURE, "s")],
    wire.string("x"),
)


class TooCostly(BaseException):
    """No Exception, which the adapter's parser swallows, whatever raised it."""


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TooCostly(f"more than {CPU_SECONDS} s of CPU time for one input")


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TooCostly when the block takes more time or memory than any input may."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not SIGALRM: that is libFuzzer's own.
    old = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if more > MEMORY_KIB:
        raise TooCostly(f"{more} KiB more memory for one input")


# --- the message adapter ----------------------------------------------------------------------------------------------


class Outgoing:
    """Takes what is sent. Lets others run in drain(), as a real socket that is full does."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> None:
        """As StreamWriter.write."""
        self.sent.append(data)

    async def drain(self) -> None:
        """As StreamWriter.drain."""
        await asyncio.sleep(0)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all inputs: making one costs more than most inputs do."""
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


def message(data: bytes) -> None:
    """Let the adapter read `data` as if the bus had sent it.

    Whole messages come first, an ordinary call next, which must be served, and then the rest, which ends the connection
    as documented. Only method calls may reach on_call, each with the bytes of exactly one message, and in order.
    """
    whole, rest = wire.split(data, FILL_BYTES)
    with bounded():
        calls = _loop().run_until_complete(_read(b"".join(whole) + LAST + rest))
    here = iter([*(frame for frame in whole if not wire.is_too_large(frame)), LAST, rest])
    for call in calls:
        assert call.header.message_type is MessageType.METHOD_CALL
        assert call.data[1] == wire.CALL
        assert any(call.data == frame for frame in here), "a call that no single message is"
    ordinary = [call for call in calls if call.data == LAST]
    assert ordinary, "the ordinary call was lost"
    assert (ordinary[-1].header.sender, ordinary[-1].body()) == (":1.99", ["x"])


async def _read(data: bytes) -> list[Call]:
    reader, writer, calls = asyncio.StreamReader(), Outgoing(), list[Call]()
    reader.feed_data(data)
    reader.feed_eof()
    bus = SystemBus(reader, writer)  # type: ignore[arg-type]  # no more of a StreamWriter is used

    def on_call(call: Call) -> None:
        calls.append(call)
        if call.data != LAST:
            _answer(bus, call)

    bus.on_call = on_call
    waiting = asyncio.create_task(bus.daemon("GetId", answer="s"))
    await asyncio.wait({bus.reading})
    err = bus.reading.exception()
    assert err is not None, "reading only ends with an exception"
    if not isinstance(err, OSError | EOFError | KeyError):
        raise err
    try:
        answer = await waiting
    except CallFailed:
        pass
    else:  # nothing where a string should be is what a bus that does not look into bodies lets pass
        assert not answer or [type(value) for value in answer] == [str]
    # The name of a call that waits is of no use to anybody any more.
    assert not bus._waiting
    return calls


def _answer(bus: SystemBus, call: Call) -> None:
    """Do with a call what the service does: look at its header, parse its body and the arguments, answer."""
    header, body = call.header, call.body()
    assert isinstance(body, list)
    if header.member in contract.METHODS and header.signature == contract.METHODS[header.member][0]:
        check_arguments(header.member, body)
    # No bus hands on a call of a sender that is no bus name, and no answer to it can be made.
    if is_bus_name_valid(header.sender):
        bus.reply(call, "s", ["no"], InvalidArguments.wire_name)


# --- the arguments ----------------------------------------------------------------------------------------------------

MEMBERS = tuple(contract.METHODS)
WIRE, TYPED, ANYTHING = range(3)


def arguments(data: bytes) -> None:
    """Let contract.parse have a body made from `data`, whose first byte chooses the member and how it is made.

    WIRE: the rest is the body as it comes on the wire. TYPED: values of the right types, whatever the bytes are.
    ANYTHING: the second wall, values that no codec would give.
    """
    how, index = divmod(data[0] if data else 0, len(MEMBERS))
    member, rest = MEMBERS[index], data[1:]
    with bounded():
        if how % 3 == WIRE:
            check_arguments(member, Call(_header(), wire.call(member, contract.METHODS[member][0], rest)).body())
        elif how % 3 == TYPED:
            check_arguments(member, Values(rest).typed(contract.METHODS[member][0]))
        else:
            refused(member, [Values(rest).anything()] if rest[:1] == b"\0" else Values(rest).list_of_anything())


@cache
def _header() -> Message:
    return Message(contract.BUS_NAME, contract.OBJECT_PATH, member="Ping")


def refused(member: str, body: list[Any]) -> dict[str, Any] | None:
    """Parse; return what came out, None if it was one of the two refusals, in plain words."""
    try:
        return contract.parse(member, body)
    except (InvalidArguments, TargetRefused) as err:
        text = str(err)
    assert text
    assert text.isascii()
    assert text.isprintable()
    return None


def check_arguments(member: str, body: list[Any]) -> None:
    """Parse a body whose values have the right types; what passes is in the ranges that contract.parse documents."""
    named = refused(member, body)
    if named is None:
        return
    assert 2 <= named.get("pid", 2) <= 2**22
    assert 0 <= named.get("uid", 0) < 2**32 - 1
    assert contract.VM_NAME.fullmatch(named.get("vm", "x"))
    assert 1 <= named.get("bytes", 1) < 2**64
    assert isinstance(named.get("everybody", True), bool)
    pins = named.get("pins", ())
    tids = [pin.tid for pin in pins] or named.get("tids", ())
    assert len(tids) == len(set(tids)) <= 1024
    assert all(2 <= tid <= 2**22 for tid in tids)
    assert bool(tids) == (member in ("PinThreads", "SetScheduler", "CheckPins", "CheckScheduler"))
    assert all(pin.cpus and isinstance(pin.shielded, bool) for pin in pins)
    assert all(0 <= cpu < 8192 for cpu in named.get("others", frozenset()).union(*(pin.cpus for pin in pins)))
    if "policy" in named:
        lowest, highest = (1, 99) if named["policy"] in ("fifo", "rr") else (0, 0)
        assert named["policy"] in contract.POLICIES
        assert lowest <= named["priority"] <= highest


class Values:
    """Makes values of `data`, from its beginning; once it is used up, of zeros."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def _take(self, number: int) -> bytes:
        self._at += number
        return self._data[self._at - number : self._at].ljust(number, b"\0")

    def _number(self, number: int) -> int:
        """One byte for the small ones, which most limits are near to; 255 announces one of `number` bytes."""
        small = self._take(1)[0]
        return small if small < 255 else int.from_bytes(self._take(number), "little")

    def _text(self) -> str:
        return self._take(self._number(1) % 64).decode(errors="replace").replace("\0", "?")

    def typed(self, form: str) -> list[Any]:
        """Return values of the types that `form` names."""
        return [self._one(kind) for kind in SignatureTree._get(form).types]

    def _one(self, kind: Any) -> Any:
        match kind.token:
            case "u":
                return self._number(4) % 2**32
            case "t":
                return self._number(8)
            case "b":
                return bool(self._take(1)[0] & 1)
            case "s":
                known = self._take(1)[0]  # few texts that are no policy's and no VM's name get any further
                return contract.POLICIES[known] if known < len(contract.POLICIES) else self._text()
            case "(":
                return [self._one(child) for child in kind.children]
            case token:
                assert token == "a", f"no type of ours: {token}"
                number = min(self._number(2), len(self._data) - self._at + 2)
                return [self._one(kind.children[0]) for _ in range(max(0, number))]

    def list_of_anything(self, depth: int = 0) -> list[Any]:
        """Return a few values of any type."""
        return [self.anything(depth) for _ in range(self._take(1)[0] % 8)]

    def anything(self, depth: int = 0) -> Any:
        """Return a value of any type that Python has and that could be mistaken for one of the wire's."""
        makers: list[Callable[[], Any]] = [
            lambda: None,
            lambda: self._number(8),
            lambda: -self._number(16),
            self._text,
            lambda: self._take(self._number(1) % 8),
            lambda: struct.unpack("<d", self._take(8))[0],  # infinities and no numbers among them
            lambda: bool(self._take(1)[0] & 1),
            lambda: contract.POLICIES[self._take(1)[0] % 5],
            lambda: complex(self._number(2), 1),
            object,
            lambda: self.list_of_anything(depth + 1),
            lambda: tuple(self.list_of_anything(depth + 1)),
            lambda: {self._text(): self.anything(depth + 1)},
            lambda: range(self._number(2)),
        ]
        kind = self._take(1)[0] % (len(makers) if depth < 6 and self._at < len(self._data) else 10)
        return makers[kind]()


# --- helper.toml ------------------------------------------------------------------------------------------------------


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="qemu-launcher-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Lines(logging.Handler):
    """Looks at every line that is logged: one line, in plain characters, whatever the file holds (attack A15)."""

    def emit(self, record: logging.LogRecord) -> None:
        """Look at it."""
        text = record.getMessage()
        if not (text.isascii() and text.isprintable()):
            raise TooCostly(f"a line for the journal that is none: {text!a}")


def helper_toml(data: bytes) -> None:
    """Let limits.load read `data`: Failed, or settings that say what the file says. Needs root, who must own it."""
    path = _folder() / "helper.toml"
    path.write_bytes(data)
    path.chmod(0o644)
    lines, root = Lines(), logging.getLogger()
    root.addHandler(lines)
    try:
        with bounded():
            settings = limits.load(str(path))
    except Failed:
        return
    finally:
        root.removeHandler(lines)
    check_settings(settings, tomllib.loads(data.decode()), str(path))
    for uid in (0, 1, 65534, 2**31):
        found = settings.limits_for(uid)
        assert found in settings.entries or found == Limits()


def check_settings(settings: Settings, document: dict[str, Any], path: str) -> None:
    """Compare with the document, key by key and in the other direction; and with what can be meant at all."""
    said = {key: value for key, value in settings._asdict().items() if value != Settings._field_defaults[key]}
    entries = said.pop("entries", ())
    tables = document.pop("limits", [])
    assert said.items() <= {key: tuple(value) for key, value in document.items()}.items()
    assert document.keys() <= {"comm", "services"}
    # An entry for nobody would be one for everybody.
    assert all(value not in ([], "") for table in (document, *tables) for value in table.values())
    assert len(entries) == len(tables)
    for number, (entry, table) in enumerate(zip(entries, tables, strict=True), 1):
        assert entry.source == f"{path}, [[limits]] entry {number}"
        assert _restated(entry, table) == table
        assert [name for name, value in entry._asdict().items() if type(value) is bool] == ["deadline"]
        assert entry.deadline is False
        assert entry.users or entry.groups or entry is entries[-1]
        assert entry.cpus is None or (entry.cpus and 0 <= min(entry.cpus) <= max(entry.cpus) <= 9999)
        assert entry.max_cpus is None or 0 <= entry.max_cpus <= 9999
        assert 0 <= entry.max_vms <= 999
        assert entry.memlock is None or entry.memlock == contract.INFINITY or 2**10 <= entry.memlock < 2**60
        assert entry.policies
        assert entry.policies <= set(contract.POLICIES)
        assert 0 <= entry.max_priority <= 99
        assert entry.realtime in ("shielded", "anywhere")


def _restated(entry: Limits, table: dict[str, Any]) -> dict[str, Any]:
    """Return the table that an entry stands for, in the words of `table` where there are several for the same."""
    said = {key: value for key, value in entry._asdict().items() if key in table}
    for key in ("users", "groups"):
        if key in said:
            said[key] = list(said[key])
    if "policies" in said and set(table["policies"]) == said["policies"]:
        said["policies"] = table["policies"]
    if "cpus" in said and said["cpus"] == _cpus(table["cpus"]):
        said["cpus"] = table["cpus"]
    if "memlock" in said:
        size = table["memlock"]
        if said["memlock"] == (contract.INFINITY if size == "infinity" else int(size[:-1]) * _UNITS[size[-1]]):
            said["memlock"] = size
    return said


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _cpus(text: str) -> set[int]:
    cpus = set[int]()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


TARGETS: dict[str, Callable[[bytes], None]] = {
    "message": message,
    "arguments": arguments,
    "limits": helper_toml,
}
