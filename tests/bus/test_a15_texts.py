"""Attack A15: line ends, terminal escapes, markup, writing direction and %-formats in every text that travels.

Dialogs and log lines stay plain text, nothing in them is the attacker's, and there is one line for each refusal.
"""

import os
import pwd
from collections.abc import Callable

import pytest
from dbus_next.message import Message

from bus.agent import POLKIT, Agent
from bus.calls import CALLS, using
from bus.client import INTERACTIVE, Client, Reply
from bus.systemd1 import as_qemu
from bus.world import User, World, as_user, world

EVIL = [
    "win11\nrefused Release uid=0",
    "\x1b[2J\x1b[31mwin11",
    "<b>win11</b>&amp;",
    "\N{RIGHT-TO-LEFT OVERRIDE}11niw",
    "%s%n%(vm)s%d{0}$(user)",
    "win11\r\tMESSAGE=forged",
    "../../win11",
]
# A colon or a line end, passwd(5) itself forbids.
ODD = [
    User("<b>root</b>", 62001, member=True),
    User("\x1b[31mroot", 62002, member=True),
    User("%s$(vm)%n", 62003, member=True),
    User("\N{RIGHT-TO-LEFT OVERRIDE}toor", 62004, member=True),
]


def clean(lines: list[str]) -> bool:
    """Tell whether all of it is plain text: no control, no markup, nothing but ASCII."""
    return all(line.isascii() and line.isprintable() and not set("<>&%$") & set(line) for line in lines)


def test_a15_arguments(host: World, member: User) -> None:
    def calls(client: Client) -> list[Reply]:
        calls: list[tuple[str, Callable[[str], list[object]]]] = [
            ("SetMemlock", lambda evil: [4242, evil, 1]),
            ("PinThreads", lambda evil: [4242, evil, [[4243, [1], True]], []]),
            ("SetScheduler", lambda evil: [4242, evil, [4243], "fifo", 1]),
            ("SetScheduler", lambda evil: [4242, "win11", [4243], evil, 1]),
            ("Release", lambda evil: [member.uid, evil]),
        ]
        forms = {name: call[0] for name, call in CALLS.items()} | {"Release": "us"}
        return [client.call(name, forms[name], body(evil), flags=INTERACTIVE) for evil in EVIL for name, body in calls]

    replies = using(host, member, calls)
    assert {reply.short for reply in replies} == {"InvalidArgs"}
    assert len({reply.body[0] for reply in replies}) == 2, "the text depends on what was sent"
    lines = host.logged()
    assert len(lines) == len(host.logged(member)) == len(replies)
    assert all(line.startswith("refused ") and f" uid={member.uid} " in line for line in lines)
    assert clean(lines)
    assert host.recorded(member) == []
    # The positive control: a plain name is written out.
    assert using(host, member, lambda client: client.call("SetMemlock", *CALLS["SetMemlock"]).short) == "ok"
    assert " vm=win11 " in host.logged()[-1]


def test_a15_names_of_members_and_interfaces_leave_no_line(host: World, member: User) -> None:
    """What the bus lets pass of these is letters; who calls what does not exist, does not fill the journal with it."""
    before = host.logged()

    def calls(client: Client) -> set[str]:
        names = ["A" * 255, "refused", "MESSAGE", "_"]
        return {client.call(name).short for name in names} | {
            client.call("Nope", path="/" + name).short for name in names
        }

    assert using(host, member, calls) == {"UnknownMethod"}
    assert host.logged() == before


@pytest.mark.parametrize("user", ODD, ids=lambda user: str(user.uid))
def test_a15_names_of_accounts(user: User) -> None:
    """polkit is told a number in such a name's place; so are the person and the journal."""
    with world(member_rule=False, users=ODD) as host, Agent(host, user, answers=True) as agent:
        refused, granted, unknown = using(
            host,
            user,
            lambda client: [
                client.call("SetMemlock", *CALLS["SetMemlock"]),
                client.call("SetMemlock", *CALLS["SetMemlock"], flags=INTERACTIVE),
                client.call("ListVms", "b", [True]),
            ],
        )
        assert [refused.short, granted.short, unknown.short] == ["NotAuthorized", "ok", "NotAuthorized"]
        said = f"polkit does not allow org.qemulauncher.set-memlock to uid {user.uid} in this session"
        assert refused.body == [f"{said} without a password"]
        [dialog] = agent.seen("BeginAuthentication")
        assert dialog["message"] == (
            f"Authentication is required to let virtual machine win11 of uid {user.uid} lock its memory"
        )
        lines = host.logged()
        assert [line.split()[0] for line in lines] == ["refused", "granted", "refused"]
        assert all(f"user=uid {user.uid}" in line for line in lines)
        assert clean(lines)


@pytest.mark.parametrize(
    "comm", [b"qemu\nrefused x", b"\x1b[31mroot", b"<b>%s%n</b>", b"\xe2\x80\xae\xff\xfe", b") R 1 (x"]
)
def test_a15_names_of_processes(member: User, comm: bytes) -> None:
    """The helper's own operations read the name of a process and say it in the refusal: as ASCII, and on one line."""

    def calls(client: Client) -> list[Reply]:
        answers = []
        for name in (comm, b"qemu-system-x86"):
            pid = as_qemu(name)
            answers.append(client.call("SetScheduler", "usausu", [pid, "win11", [pid], "batch", 0]))
        return answers

    with world(real=True) as host:
        odd, control = using(host, member, calls)
        assert (odd.short, control.short) == ("TargetRefused", "TargetRefused")
        assert "is not a QEMU by its name" in odd.body[0]
        # This one passes that check, and is in no session.
        assert "is in no session" in control.body[0]
        assert odd.body[0].isascii()
        assert odd.body[0].isprintable()
        lines = host.logged()
        assert len(lines) == 2
        assert all(line.startswith("refused SetScheduler ") for line in lines)
        assert all(line.isascii() and line.isprintable() for line in lines)


@pytest.mark.parametrize("evil", EVIL[:5])
def test_a15_errors_of_polkit(member: User, evil: str) -> None:
    """An error's text may quote an attacker; the caller gets a fixed one, the journal ASCII on one line."""
    account = pwd.getpwnam("polkitd")  # who alone may own polkit's name
    (told, tell) = os.pipe()

    def serve(path: str) -> None:
        with Client(path) as polkit:
            assert polkit.daemon("RequestName", "su", [POLKIT["destination"], 4]).body == [1]
            os.write(tell, b"x")
            while (call := polkit.receive(60)) is not None:
                if call.member == "CheckAuthorization":
                    polkit.answer(Message.new_error(call, "org.freedesktop.PolicyKit1.Error.Failed", evil))

    with world() as host:
        assert using(host, member, lambda client: client.call("SetMemlock", *CALLS["SetMemlock"]).short) == "ok"
        host.stop_polkit()
        child = as_user(User("polkitd", account.pw_uid, member=False), lambda: serve(host.socket))
        os.close(tell)
        assert os.read(told, 1) == b"x"
        os.close(told)
        try:
            reply = using(host, member, lambda client: client.call("SetMemlock", *CALLS["SetMemlock"]))
        finally:
            child.kill()
        assert reply.short == "NotAuthorized"
        assert clean(reply.body)
        lines = host.logged()[1:]
        assert len(lines) == 2
        assert lines[0].startswith("polkit gave no answer: ")
        assert lines[1].startswith("refused SetMemlock ")
        assert all(line.isascii() and line.isprintable() for line in lines)
