"""Password dialogs, with real polkitd and agents of the test's: attack A14, and one prompt per start."""

import time
from contextlib import ExitStack

from bus.agent import Agent
from bus.calls import CALLS, using
from bus.client import INTERACTIVE, Client, Reply
from bus.vitals import unhurt
from bus.world import User, World, wait_until


def whole_start(client: Client) -> list[str]:
    """The four calls of a start."""
    names = ["SetMemlock", "PinThreads", "SetScheduler", "PinThreads"]
    return [client.call(name, *CALLS[name], flags=INTERACTIVE).short for name in names]


def test_one_prompt_per_start(strict_host: World, member: User) -> None:
    with Agent(strict_host, member, answers=True) as agent:
        assert using(strict_host, member, whole_start) == ["ok"] * 4
        [prompt] = agent.seen("BeginAuthentication")
    assert prompt["action"] == "org.qemulauncher.set-memlock"
    assert prompt["message"] == (
        f"Authentication is required to let virtual machine win11 of {member.name} lock its memory"
    )
    assert [act["member"] for act in strict_host.recorded()] == [
        "SetMemlock",
        "PinThreads",
        "SetScheduler",
        "PinThreads",
    ]


def test_prompts_say_what_for(strict_host: World, member: User, other: User) -> None:
    with Agent(strict_host, member, answers=True) as agent, Agent(strict_host, other, answers=True) as second:
        assert (
            using(
                strict_host, member, lambda bus: bus.call("PinThreads", *CALLS["PinThreads"], flags=INTERACTIVE).short
            )
            == "ok"
        )
        assert (
            using(
                strict_host,
                other,
                lambda bus: bus.call("SetScheduler", *CALLS["SetScheduler"], flags=INTERACTIVE).short,
            )
            == "ok"
        )
        [pin], [schedule] = agent.seen("BeginAuthentication"), second.seen("BeginAuthentication")
    assert pin["message"] == f"Authentication is required to pin virtual machine win11 of {member.name} to CPUs 4-5"
    assert schedule["message"] == (
        f"Authentication is required to run virtual machine win11 of {other.name} with policy fifo, priority 1"
    )


def test_nobody_is_asked_without_the_callers_consent(strict_host: World, member: User) -> None:
    with Agent(strict_host, member, answers=True) as agent:
        assert (
            using(strict_host, member, lambda bus: bus.call("SetMemlock", *CALLS["SetMemlock"]).short)
            == "NotAuthorized"
        )
        assert agent.seen("BeginAuthentication") == []
        # Positive control: the same call, with consent.
        assert using(strict_host, member, whole_start) == ["ok"] * 4


def test_others_vms_always_need_a_password(strict_host: World, member: User) -> None:
    def calls(client: Client) -> list[str]:
        return [client.call("ListVms", "b", [True], flags=INTERACTIVE).short for _ in range(2)]

    with Agent(strict_host, member, answers=True) as agent:
        assert using(strict_host, member, calls) == ["ok"] * 2
        assert len(agent.seen("BeginAuthentication")) == 2


def test_a14_an_agent_that_never_answers(strict_host: World, member: User, other: User) -> None:
    """200 checks: one dialog, eight that wait, the others refused; free calls and other users are served."""

    def attack() -> list[str]:
        clients = [Client(strict_host.socket) for _ in range(20)]
        for client in clients:
            _, data = client.message("SetMemlock", *CALLS["SetMemlock"], flags=INTERACTIVE)
            client.socket.sendall(client.copies(data, 10))
        refused: list[str] = []
        # Until nothing comes any more: what waits for the person who never comes is not answered.
        while (some := [reply.short for client in clients for reply in client.waiting(0.1)]) or len(refused) < 191:
            refused += some
        return refused

    with Agent(strict_host, member, answers=False) as hostile, Agent(strict_host, other, answers=True) as agent:
        with unhurt(strict_host, other, member="GetLimits"):
            flood = strict_host.run_as(member, attack)
            wait_until(lambda: hostile.seen("BeginAuthentication"), "the one dialog")
            assert using(strict_host, other, whole_start) == ["ok"] * 4
            refused = flood.result()
        # At least one waits and at most nine; how many of the others come when four are in flight is luck.
        assert 200 - 9 <= len(refused) < 200
        assert set(refused) == {"LimitExceeded"}
        assert len(hostile.seen("BeginAuthentication")) == 1
        assert len(agent.seen("BeginAuthentication")) >= 1
        # The attacker's connections are gone: his dialog is taken down, and his queue with it.
        wait_until(lambda: hostile.seen("CancelAuthentication"), "the end of the dialog")
        assert len(hostile.seen("BeginAuthentication")) == 1
    assert list(strict_host.recorded(member)) == []


def test_waiting_for_a_person_takes_none_of_the_users_slots(strict_host: World, member: User) -> None:
    """One dialog and eight calls that wait for it; the tenth is refused, and calls that need no person are not.

    That a call waits is seen from those behind it: they have been refused, and it has not.
    """

    def calls(client: Client) -> tuple[int, list[bool], str]:
        def send() -> int:
            return client.send("SetMemlock", *CALLS["SetMemlock"], flags=INTERACTIVE)

        def refusal() -> Reply:
            reply = client.reply()
            assert reply is not None, "all of them wait"
            return reply

        waiting = {send() for _ in range(10)}
        patience = iter(range(600))
        while (reply := refusal()).body != ["Too many calls wait for a password already"]:
            assert reply.short == "LimitExceeded"
            next(patience)
            waiting.remove(reply.serial)  # one too many at a time: they were sent faster than they came to wait
            time.sleep(0.05)
            waiting.add(send())
        waiting.remove(reply.serial)
        later = [send() == refusal().serial for _ in range(10)]
        return len(waiting), later, client.call("Release", "us", [member.uid, "win11"]).short

    with Agent(strict_host, member, answers=False) as agent:
        assert using(strict_host, member, calls) == (9, [True] * 10, "ok")
        wait_until(lambda: agent.seen("BeginAuthentication"), "the one dialog")
        assert len(agent.seen("BeginAuthentication")) == 1


def test_dialogs_of_the_whole_host(strict_host: World, crowd: list[User], member: User) -> None:
    with ExitStack() as stack:
        agents = []
        for user in crowd:
            agents.append(stack.enter_context(Agent(strict_host, user, answers=False)))

            def hang() -> None:
                with Client(strict_host.socket) as client:
                    client.call("SetMemlock", *CALLS["SetMemlock"], flags=INTERACTIVE)

            stack.callback(strict_host.run_as(user, hang).kill)
        for agent in agents:
            wait_until(lambda: agent.seen("BeginAuthentication"), "a dialog")  # noqa: B023
        with Agent(strict_host, member, answers=True):
            assert using(strict_host, member, whole_start) == ["LimitExceeded"] * 4
            stack.pop_all().close()
            wait_until(lambda: using(strict_host, member, whole_start) == ["ok"] * 4, "a free dialog")


def test_a_caller_who_leaves_takes_his_dialog_along(strict_host: World, member: User) -> None:
    def hang() -> None:
        with Client(strict_host.socket) as client:
            client.call("SetMemlock", *CALLS["SetMemlock"], flags=INTERACTIVE)

    with Agent(strict_host, member, answers=False) as agent:
        caller = strict_host.run_as(member, hang)
        wait_until(lambda: agent.seen("BeginAuthentication"), "the dialog")
        assert agent.seen("CancelAuthentication") == []
        caller.kill()
        wait_until(lambda: agent.seen("CancelAuthentication"), "its end")
    assert strict_host.recorded() == []
