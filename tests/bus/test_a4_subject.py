"""Attack A4: polkit is asked about the caller's own connection, as often as it must be, as the bus sees it."""

from bus.agent import Agent
from bus.calls import CALLS, FREE, OTHERS, using
from bus.client import INTERACTIVE, Client
from bus.monitor import Monitor, asked
from bus.world import User, World

RULE = "type='method_call',member='CheckAuthorization'"
ACTIONS = {"SetMemlock": "set-memlock", "PinThreads": "pin-threads", "SetScheduler": "set-scheduler"}
MANAGE = "org.qemulauncher.manage-others"


def test_a4_polkit_is_asked_about_the_callers_own_connection(host: World, member: User, other: User) -> None:
    def calls(client: Client) -> str:
        assert {client.call(name, *arguments).short for name, arguments in CALLS.items()} == {"ok"}
        return client.unique_name

    with Monitor(host, RULE) as monitor:
        names = [using(host, user, calls) for user in (member, other)]
        messages = monitor.seen()
    expected = [(name, f"org.qemulauncher.{ACTIONS[call]}", 0) for name in names for call in CALLS]
    assert asked(messages) == expected
    for message, user in zip(messages, [member] * 3 + [other] * 3, strict=True):
        details = message.body[2]
        assert (details["user"], details["vm"]) == (user.name, "win11")


def test_a4_callers_at_the_same_time_are_not_mixed_up(host: World, member: User) -> None:
    """Three connections of one process, their calls interleaved; each question is about the connection that asked."""

    def calls() -> dict[str, str]:
        clients = {name: Client(host.socket) for name in CALLS}
        serials = {name: client.send(name, *CALLS[name]) for name, client in clients.items()}
        assert all(client.replies([serials[name]])[0].short == "ok" for name, client in clients.items())
        return {client.unique_name: name for name, client in clients.items()}

    with Monitor(host, RULE) as monitor:
        names = host.run_as(member, calls).result()
        questions = asked(monitor.seen())
    expected = sorted((subject, f"org.qemulauncher.{ACTIONS[name]}", 0) for subject, name in names.items())
    assert sorted(questions) == expected


def test_a4_others_vms(host: World, member: User) -> None:
    """Asked once for each, without a person as the caller consented to none; and about one's own, not at all."""

    def calls(client: Client) -> str:
        own = {**FREE, "GetLimitsOf": ("u", [member.uid]), "Release": ("us", [member.uid, "win11"])}
        assert {client.call(name, *arguments).short for name, arguments in own.items()} == {"ok"}
        assert {client.call(name, *arguments).short for name, arguments in OTHERS.items()} == {"NotAuthorized"}
        return client.unique_name

    with Monitor(host, RULE) as monitor:
        name = using(host, member, calls)
        assert asked(monitor.seen()) == [(name, MANAGE, 0)] * 3


def test_a4_dialogs(strict_host: World, member: User) -> None:
    """A person is asked about the same connection, with flag 1, after polkit said that it takes a person."""

    def calls(client: Client) -> str:
        assert client.call("PinThreads", *CALLS["PinThreads"], flags=INTERACTIVE).short == "ok"
        assert client.call("SetMemlock", *CALLS["SetMemlock"], flags=INTERACTIVE).short == "ok"
        assert client.call("ListVms", *OTHERS["ListVms"], flags=INTERACTIVE).short == "ok"
        assert client.call("ListVms", *OTHERS["ListVms"]).short == "NotAuthorized"
        return client.unique_name

    with Agent(strict_host, member, answers=True) as agent, Monitor(strict_host, RULE) as monitor:
        name = using(strict_host, member, calls)
        messages = monitor.seen()
        assert len(agent.seen("BeginAuthentication")) == 2
    pin = "org.qemulauncher.pin-threads"
    assert asked(messages) == [
        (name, pin, 0),
        (name, pin, 1),
        (name, "org.qemulauncher.set-memlock", 0),  # implied by the password that was given
        (name, MANAGE, 0),
        (name, MANAGE, 1),
        (name, MANAGE, 0),
    ]
    # The name by which a question can be withdrawn: only a dialog has one, and each its own.
    cancellation = [message.body[4] for message in messages]
    assert all(bool(text) == (flags == 1) for text, (_, _, flags) in zip(cancellation, asked(messages), strict=True))
    assert cancellation[1] != cancellation[4]
