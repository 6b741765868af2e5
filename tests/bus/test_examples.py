"""The files an administrator may copy from the examples, as they stand, with the real bus and the real polkitd.

Each lies where its text says, beside the package's own: so these tests also show that a file in /etc has the last word.
"""

import re
import time
from collections.abc import Iterator

import pytest
from dbus_next.constants import MessageType
from dbus_next.signature import Variant

from bus.agent import POLKIT, Agent
from bus.calls import CALLS, CHECKS, FREE, call_all, using
from bus.client import INTERACTIVE, NAME, Client
from bus.test_dialogs import whole_start
from bus.test_rules import Call, answers, memlock, pin, schedule
from bus.world import ALICE, BOB, CAROL, EVERYBODY, NOBODY, ROOT, STOCK_BUS, User, World, world

ASK = ROOT / "polkit/examples/40-qemu-launcher-ask.rules"
STUDENTS = ROOT / "polkit/examples/30-qemu-launcher-students.rules"
GIB = 2**30


@pytest.fixture
def asking() -> Iterator[World]:
    """A world with the rule that asks members for a password."""
    with world(rules={ASK.name: ASK.read_text()}) as running:
        yield running


@pytest.fixture
def school(member: User) -> Iterator[World]:
    """A world in which `member` and carol are students; alice is not."""
    rules = {STUDENTS.name: STUDENTS.read_text()}
    with world(rules=rules, groups={"students": [member, CAROL]}) as running:
        yield running


@pytest.fixture
def open_host() -> Iterator[World]:
    """A world whose bus is open to everybody."""
    with world(bus_policies=[EVERYBODY]) as running:
        yield running


# --- a password in place of yes ---------------------------------------------------------------------------------------


def test_ask_without_an_agent_refuses_members(asking: World, member: User) -> None:
    replies = using(asking, member, call_all)
    assert {name: reply.short for name, reply in replies.items()} == (
        dict.fromkeys(CALLS | CHECKS, "NotAuthorized") | dict.fromkeys(FREE, "ok")
    )
    assert [act["member"] for act in asking.recorded(member)] == list(FREE)


def test_ask_takes_one_password_per_start(asking: World, member: User) -> None:
    with Agent(asking, member, answers=True) as agent:
        assert using(asking, member, whole_start) == ["ok"] * 4
        assert len(agent.seen("BeginAuthentication")) == 1


def test_ask_leaves_the_management_of_others_as_it_is(asking: World, member: User) -> None:
    """A password for that is never kept."""

    def calls(client: Client) -> list[str]:
        return [client.call("ListVms", "b", [True], flags=INTERACTIVE).short for _ in range(2)]

    with Agent(asking, member, answers=True) as agent:
        assert using(asking, member, calls) == ["ok"] * 2
        assert len(agent.seen("BeginAuthentication")) == 2


# --- a decision by details --------------------------------------------------------------------------------------------


MANAGE: list[Call] = [("ListVms", "b", [True]), ("GetLimitsOf", "u", [BOB.uid]), ("Release", "us", [BOB.uid, "lab"])]


@pytest.mark.parametrize(
    ("granted", "refused"),
    [
        pytest.param([memlock(1), memlock(16 * GIB)], [memlock(16 * GIB + 1), memlock(2**64 - 1)], id="bytes"),
        pytest.param(
            [pin([8]), pin([15]), pin([8, 9], [15]), pin(list(range(8, 16)))],
            # The last: a list too long for a detail.
            [pin([7]), pin([16]), pin([8], [16]), pin([0]), pin([7, 8]), pin([80]), pin(list(range(0, 100, 2)))],
            id="cpus",
        ),
        pytest.param(
            [schedule("other", 0), schedule("batch", 0), schedule("idle", 0)],
            [schedule("fifo", 1), schedule("rr", 1), schedule("fifo", 1, "rt-lab")],
            id="policy",
        ),
        pytest.param([("ListVms", "b", [False])], MANAGE, id="others"),
    ],
)
def test_students(school: World, member: User, granted: list[Call], refused: list[Call]) -> None:
    """And nobody is asked for a password, though an agent is there and would give one."""
    with Agent(school, member, answers=True) as agent:
        assert answers(school, member, granted) == ["ok"] * len(granted)
        assert answers(school, member, refused) == ["NotAuthorized"] * len(refused)
        assert agent.seen("BeginAuthentication") == []
    assert len(school.recorded(member)) == len(granted)


def test_students_real_time_is_for_one_user_vm_and_priority(school: World) -> None:
    granted = [schedule("fifo", 1, "rt-lab"), schedule("idle", 0, "lab")]
    refused = [schedule("fifo", 2, "rt-lab"), schedule("rr", 1, "rt-lab"), schedule("fifo", 1), pin([7], vm="rt-lab")]
    assert answers(school, CAROL, granted + refused) == ["ok"] * 2 + ["NotAuthorized"] * 4
    assert len(school.recorded(CAROL)) == 2


def test_students_others_are_served_as_before(school: World) -> None:
    assert answers(school, ALICE, [memlock(17 * GIB), pin([0]), schedule("rr", 5)]) == ["ok"] * 3


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("cpus", ["8", "8-15", "8,9,15", "8-9,11-15", "0008"], [
            "many", "50 CPUs", "", " ", "8 ", " 8", "8,", ",8", "8-", "-8", "8-9-10", "8--9", "15-8", "7-8", "15-16",
            "8,16", "8;9", "0x8", "8.5", "1e1", "8\n", "8\n7", "8,\n9", "99999", "８", "undefined", "null", "NaN", None,
        ]),
        ("bytes", ["0", "1", "17179869184"], [
            "17179869185", "18446744073709551615", "9" * 21, "-1", "1e3", "0x10", "1 ", "1\n", "", "many", "NaN", None,
        ]),
        ("policy", ["other", "batch", "idle"], [
            "fifo", "rr", "deadline", "Other", "other ", "", "0", "__proto__", "constructor", None,
        ]),
    ],
)  # fmt: skip
def test_students_what_is_not_understood_is_refused(
    school: World, member: User, key: str, good: list[str | None], bad: list[str | None]
) -> None:
    """polkitd, asked as the helper asks, but with details that the helper does not make, or leaves out."""
    action = {"cpus": "pin-threads", "bytes": "set-memlock", "policy": "set-scheduler"}[key]

    child = school.run_as(member, lambda: time.sleep(200))
    process = {"pid": Variant("u", child.pid), "start-time": Variant("t", 0), "uid": Variant("i", member.uid)}

    def ask(value: str | None) -> tuple[bool, bool]:
        details = {"user": member.name, "vm": "lab"} | ({} if value is None else {key: value})
        body = [["unix-process", process], f"org.qemulauncher.{action}", details, 0, ""]
        reply = root.call("CheckAuthorization", "(sa{sv})sa{ss}us", body, **POLKIT)
        assert reply.error is None, reply
        granted, challenge, _ = reply.body[0]
        return granted, challenge

    try:
        with Client(school.socket) as root:
            assert {value: ask(value) for value in good} == dict.fromkeys(good, (True, False))
            assert {value: ask(value) for value in bad} == dict.fromkeys(bad, (False, False))
    finally:
        child.kill()


# --- the bus, open to everybody ---------------------------------------------------------------------------------------


def test_the_stock_bus_reads_etc_after_the_packages_files() -> None:
    """As a world does it; the last rule that fits wins."""
    folders = re.findall(r"<includedir>(.*)</includedir>", STOCK_BUS.read_text())
    assert folders.index("system.d") < folders.index("/etc/dbus-1/system.d")


def test_everybody_gets_to_polkit(open_host: World) -> None:
    """Who is no member, and has nobody to ask, is refused by polkit, no longer by the bus; and the trail says so."""
    replies = using(open_host, BOB, call_all)
    assert {name: reply.short for name, reply in replies.items()} == (
        dict.fromkeys(CALLS | CHECKS, "NotAuthorized") | dict.fromkeys(FREE, "ok")
    )
    assert [act["member"] for act in open_host.recorded(BOB)] == list(FREE)
    assert [line.split()[0] for line in open_host.logged(BOB)] == ["refused"] * 6 + ["granted"] * 2


def test_everybody_but_the_overflow_uid(open_host: World) -> None:
    """nobody has the number that the kernel shows for whom it cannot name: it could be anybody."""
    assert {reply.short for reply in using(open_host, NOBODY, call_all).values()} == {"NotAuthorized"}
    assert open_host.recorded() == []


def test_everybody_may_give_a_password(open_host: World) -> None:
    with Agent(open_host, BOB, answers=True) as agent:
        assert using(open_host, BOB, whole_start) == ["ok"] * 4
        [prompt] = agent.seen("BeginAuthentication")
    assert "virtual machine win11 of bob" in prompt["message"]
    assert len(open_host.recorded(BOB)) == 4


def test_everybody_includes_members_who_give_none(open_host: World, member: User) -> None:
    with Agent(open_host, member, answers=True) as agent:
        assert using(open_host, member, whole_start) == ["ok"] * 4
        assert agent.seen("BeginAuthentication") == []


@pytest.mark.parametrize("interface", ["org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Peer"])
def test_everybody_gets_this_interface_alone(open_host: World, interface: str) -> None:
    assert using(open_host, BOB, lambda bus: bus.call("Ping", interface=interface).short) == "AccessDenied"


def test_everybody_sends_no_signals_and_takes_no_name(open_host: World) -> None:
    def calls(client: Client) -> str:
        client.send("Boo", "s", ["x"], kind=MessageType.SIGNAL)
        job = [7, "/org/freedesktop/systemd1/job/7", "x.scope", "done"]
        manager = {"path": "/org/freedesktop/systemd1", "interface": "org.freedesktop.systemd1.Manager"}
        client.send("JobRemoved", "uoss", job, kind=MessageType.SIGNAL, **manager)
        return client.daemon("RequestName", "su", [NAME, 0]).short

    assert using(open_host, BOB, lambda bus: bus.call("GetLimits").short) == "ok"
    rejected = open_host.daemons_log().count('type="signal"')
    assert using(open_host, BOB, calls) == "AccessDenied"
    assert open_host.daemons_log().count('type="signal"') == rejected + 2
