"""How the helper comes and goes: attack A22, a lost bus, SIGTERM, privileges at rest."""

import os
import random
import signal
import time
from pathlib import Path

from bus.calls import CALLS, FREE, using
from bus.client import Client
from bus.world import User, World, as_user, wait_until, world


def exits(host: World) -> dict[int, int]:
    """Status by PID of the helpers that have ended."""
    file = host.folder / "exits"
    lines = file.read_text().splitlines() if file.exists() else []
    return {int(pid): int(status) for pid, status in (line.split() for line in lines)}


def test_a22_calls_around_the_moment_of_leaving_are_not_lost(crowd: list[User]) -> None:
    """Six users call at about the moment when the helper leaves, again and again; it leaves once in each round."""
    users, rounds = crowd[:6], 8

    def calls(host: World, user: User, gate: int) -> list[str]:
        chance = random.Random(user.uid)
        answers = []
        with Client(host.socket) as client:
            while os.read(gate, 1):
                time.sleep(chance.uniform(0.15, 0.27))
                answers.append(client.call("SetMemlock", *CALLS["SetMemlock"]).short)
                time.sleep(chance.uniform(0.18, 0.24))
                answers.append(client.call("ListVms", *FREE["ListVms"]).short)
        return answers

    with world(idle=0.2) as host:
        gates = [os.pipe() for _ in users]
        children = []
        for user, (gate, _) in zip(users, gates, strict=True):

            def run(user: User = user, gate: int = gate) -> list[str]:
                for _, opener in gates:
                    os.close(opener)
                return calls(host, user, gate)

            children.append(as_user(user, run))
        for number in range(rounds):
            # A helper that begins to wait, just when all the others do.
            assert using(host, crowd[6 + number % 2], lambda client: client.call("GetLimits").short) == "ok"
            for _, opener in gates:
                os.write(opener, b"x")
            wait_until(lambda: len(host.recorded()) == (number + 1) * (2 * len(users) + 1), "all calls of a round")  # noqa: B023
            wait_until(lambda: len(exits(host)) > number, "the helper to leave")  # noqa: B023
        for gate, opener in gates:
            os.close(opener)
            os.close(gate)
        for child in children:
            assert child.result() == ["ok"] * 2 * rounds
        assert len(host.recorded()) == rounds * (2 * len(users) + 1)
        assert len(exits(host)) >= rounds
        assert set(exits(host).values()) == {0}


def test_a_call_in_flight_keeps_it_here(member: User) -> None:
    with world(idle=1.0) as host:  # in which a helper that is started by the call has to come to it, on a busy host too

        def calls() -> int:
            with Client(host.socket) as client:
                client.send("SetMemlock", "ust", [4242, "slow", 1])
                wait_until(lambda: host.recorded(member), "the call")
                time.sleep(2.5)
                return host.helper_pid()

        pid = as_user(member, calls).result()
        assert Path(f"/proc/{pid}").exists()


def test_calls_that_are_refused_keep_it_here_but_not_from_looking_after_vms(member: User) -> None:
    """A VM that ends cannot start it while it is there. With a pool nobody else gives its CPUs back."""
    with world(idle=1.0) as host:

        def calls() -> int:
            with Client(host.socket) as client:

                def looked_three_times() -> bool:
                    assert client.call("NoSuchMethod").short == "UnknownMethod"
                    looks = (host.folder / "looks").read_text().split()
                    return looks.count(looks[-1]) >= 3

                wait_until(looked_three_times, "it to look again, and again")
                return host.helper_pid()

        pid = as_user(member, calls).result()
        wait_until(lambda: pid in exits(host), "it to leave when nobody calls any more")


def test_sigterm_is_an_orderly_end(member: User) -> None:
    with world() as host:
        assert using(host, member, lambda client: client.call("GetLimits").short) == "ok"
        pid = host.helper_pid()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: exits(host), "the end")
        assert exits(host) == {pid: 0}


def test_a_lost_bus_is_a_failure(member: User) -> None:
    with world() as host:
        assert using(host, member, lambda client: client.call("GetLimits").short) == "ok"
        pid = host.helper_pid()
        host.bus.kill()
        wait_until(lambda: exits(host), "the end")
        assert exits(host) == {pid: 1}
        assert any("lost the bus" in line for line in host.logged())


def test_a_second_helper_leaves_the_first_alone(host: World, member: User) -> None:
    assert using(host, member, lambda client: client.call("GetLimits").short) == "ok"
    pid = host.helper_pid()
    second = os.spawnv(os.P_WAIT, host.helper_command()[0], host.helper_command())
    assert second == 1
    assert host.helper_pid() == pid


def test_privileges_at_rest(host: World, member: User) -> None:
    assert using(host, member, lambda client: client.call("GetLimits").short) == "ok"
    lines = Path(f"/proc/{host.helper_pid()}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    three = 1 << 23 | 1 << 24 | 1 << 21
    assert int(status["CapEff"], 16) == int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    assert int(status["CapPrm"], 16) & ~three == int(status["CapBnd"], 16) & ~three == 0
    assert int(status["CapPrm"], 16) != 0
    assert status["NoNewPrivs"] == "1"
