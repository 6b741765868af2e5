"""arguments.parse: what passes is in range, and nothing but the two refusals ever comes out (attack A18)."""

import contextlib
import inspect
import io
from typing import Any

import pytest
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.message import Message
from hypothesis import given, strategies as st

from qemu_launcher_helper import contract
from qemu_launcher_helper.bus import Call
from qemu_launcher_helper.contract import InvalidArguments, Pin, TargetRefused, parse
from qemu_launcher_helper.operations import Operation

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
TASK = st.integers(2, 2**22)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60)
NAME = st.from_regex(contract.VM_NAME, fullmatch=True)
PINS = st.lists(
    st.tuples(U32 | TASK, st.lists(U32 | st.integers(0, 9), max_size=4), st.booleans()).map(list), max_size=5
)
BODIES: dict[str, st.SearchStrategy[list[Any]]] = {
    "SetMemlock": st.tuples(U32 | TASK, TEXT | NAME, U64).map(list),
    "PinThreads": st.tuples(U32 | TASK, TEXT | NAME, PINS, st.lists(U32, max_size=4)).map(list),
    "SetScheduler": st.tuples(
        U32 | TASK, TEXT | NAME, st.lists(U32 | TASK, max_size=5), TEXT | st.sampled_from(contract.POLICIES), U32
    ).map(list),
    "CheckMemlock": st.tuples(TEXT | NAME, U64).map(list),
    "CheckPins": st.tuples(TEXT | NAME, PINS, st.lists(U32, max_size=4)).map(list),
    "CheckScheduler": st.tuples(TEXT | NAME, PINS, TEXT | st.sampled_from(contract.POLICIES), U32).map(list),
    "Release": st.tuples(U32, TEXT | NAME).map(list),
    "ListVms": st.tuples(st.booleans()).map(list),
    "GetLimits": st.just([]),
    "GetLimitsOf": st.tuples(U32).map(list),
}


def through_the_wire(member: str, body: list[Any]) -> list[Any]:
    """The body as it comes out of the codec."""
    signature = contract.METHODS[member][0]
    path, name = contract.OBJECT_PATH, contract.BUS_NAME
    data = bytes(Message(name, path, name, member, signature=signature, body=body, serial=1)._marshall())
    return Call(Unmarshaller(io.BytesIO(data)).unmarshall(), data).body()


@pytest.mark.parametrize("member", BODIES)
@given(data=st.data())
def test_a18_fuzzed_values(member: str, data: st.DataObject) -> None:
    body = data.draw(BODIES[member])
    refusal, named = "", dict[str, Any]()
    try:
        named = parse(member, through_the_wire(member, body))
    except (InvalidArguments, TargetRefused) as err:
        refusal = str(err) or "an empty one\n"
    assert refusal.isascii()
    assert refusal.isprintable()
    if refusal:
        return
    inspect.signature(getattr(Operation, contract.METHODS[member][3])).bind(None, **named)
    assert 2 <= named.get("pid", 2) <= 2**22
    assert 0 <= named.get("uid", 0) < 2**32 - 1
    assert contract.VM_NAME.fullmatch(named.get("vm", "x"))
    if member in ("SetMemlock", "CheckMemlock"):
        assert 1 <= named["bytes"] < 2**64
    if member in ("PinThreads", "CheckPins"):
        pins = named["pins"]
        assert 1 <= len(pins) <= 1024
        assert len({pin.tid for pin in pins}) == len(pins)
        assert all(2 <= pin.tid <= 2**22 and pin.cpus for pin in pins)
        assert all(0 <= cpu < 8192 for pin in pins for cpu in pin.cpus | named["others"])
    if member in ("SetScheduler", "CheckScheduler"):
        assert named["priority"] == 0 or (named["policy"] in ("fifo", "rr") and 1 <= named["priority"] <= 99)
        tids = named["tids"] if "tids" in named else [pin.tid for pin in named["pins"]]
        assert tids
        assert all(2 <= tid <= 2**22 for tid in tids)
        assert len(set(tids)) == len(tids)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT | st.floats() | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("member", BODIES)
@given(body=st.lists(anything, max_size=6))
def test_a18_values_that_no_codec_would_give(member: str, body: list[Any]) -> None:
    """The second wall: even if the types were wrong, nothing but a refusal comes out."""
    with contextlib.suppress(InvalidArguments, TargetRefused):
        parse(member, body)


def test_what_passes() -> None:
    everything = {"pid": 2, "vm": "win11", "bytes": contract.INFINITY}
    assert parse("SetMemlock", [2, "win11", 2**64 - 1]) == everything
    pins = [[7, [1, 2], True], [8, [3], False]]
    parsed = (Pin(7, frozenset({1, 2}), shielded=True), Pin(8, frozenset({3}), shielded=False))
    assert parse("PinThreads", [4, "a-b_C", pins, [0]]) == {
        "pid": 4,
        "vm": "a-b_C",
        "pins": parsed,
        "others": frozenset({0}),
    }
    scheduler = {"pid": 4, "vm": "x", "tids": (5, 6), "policy": "rr", "priority": 99}
    assert parse("SetScheduler", [4, "x", [5, 6], "rr", 99]) == scheduler
    # A check is the same without the process.
    assert parse("CheckMemlock", ["win11", 2**64 - 1]) == {"vm": "win11", "bytes": contract.INFINITY}
    assert parse("CheckPins", ["a-b_C", pins, [0]]) == {"vm": "a-b_C", "pins": parsed, "others": frozenset({0})}
    planned = {"vm": "x", "pins": parsed, "policy": "rr", "priority": 99}
    assert parse("CheckScheduler", ["x", pins, "rr", 99]) == planned
    idle = scheduler | {"tids": (5,), "policy": "idle", "priority": 0}
    assert parse("SetScheduler", [4, "x", [5], "idle", 0]) == idle
    assert parse("Release", [0, "x" * 48]) == {"uid": 0, "vm": "x" * 48}
    assert parse("ListVms", [True]) == {"everybody": True}
    assert parse("GetLimits", []) == {}


def test_a_thread_is_named_once() -> None:
    with pytest.raises(InvalidArguments, match="each named once"):
        parse("SetScheduler", [4, "x", [5, 6, 5], "fifo", 1])
    with pytest.raises(InvalidArguments, match="each named once"):
        parse("PinThreads", [4, "x", [[5, [1], True], [5, [2], True]], []])


@pytest.mark.parametrize(
    "name", ["", "-x", "_x", "x" * 49, "a b", "a/b", "..", "a.b", "a\n", "\u00e4", "a\x00", "a$(b)", "%i"]
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidArguments):
        parse("Release", [1000, name])
    with pytest.raises(InvalidArguments):
        parse("SetMemlock", [7, name, 1])


def test_a_body_without_values() -> None:
    """A bus that does not look into bodies lets an empty one pass under any signature."""
    for member in contract.METHODS:
        if member != "GetLimits":
            with pytest.raises(InvalidArguments):
                parse(member, [])
    with pytest.raises(InvalidArguments):
        parse("Nope", [])


def test_more_pins_than_a_host_has_cpus() -> None:
    pins = [[number, [1], False] for number in range(2, 1027)]
    with pytest.raises(InvalidArguments, match="1 to 1024"):
        parse("PinThreads", [4, "x", pins, []])
    assert len(parse("PinThreads", [4, "x", pins[1:], []])["pins"]) == 1024
