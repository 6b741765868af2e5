"""Attack A2: callers who hang up early. CVE-2021-3560: one who is gone must not become root's equal."""

import os
import signal
import time
from collections import Counter
from typing import Self

import pytest

from bus.agent import POLKIT, Agent
from bus.calls import CALLS, using
from bus.client import INTERACTIVE, Client
from bus.monitor import DAEMON, Monitor, asked
from bus.vitals import descriptors, served
from bus.world import CROWD, ROOT_USER, Child, User, World, as_user, wait_until

# 50 calls of each are within his quota, so that it is not the quota that refuses them.
USERS, EACH, AT_ONCE = CROWD[-40:], 50, 2
POLKITD = POLKIT["destination"]
GONE = "org.freedesktop.DBus.Error.NameHasNoOwner"


def hang_up(host: World, longest: float) -> None:
    for number in range(EACH):
        with Client(host.socket) as client:
            client.send("SetMemlock", *CALLS["SetMemlock"], flags=INTERACTIVE)
            time.sleep(longest * (number % 6) / 5)


def refusal(client: Client) -> float:
    """How long it takes to be refused by polkit; the shortest of some."""
    times = []
    for _ in range(10):
        start = time.monotonic()
        assert client.call("SetMemlock", *CALLS["SetMemlock"]).short == "NotAuthorized"
        times.append(time.monotonic() - start)
    return min(times)


class Watch:
    """Sees, in this process, when polkit is asked and when it answers."""

    def __init__(self, host: World) -> None:
        self._client = Client(host.socket)
        rules = ["type='method_call',member='CheckAuthorization'", f"type='method_return',sender='{POLKITD}'"]
        to = {"destination": DAEMON, "path": "/org/freedesktop/DBus", "interface": f"{DAEMON}.Monitoring"}
        assert self._client.call("BecomeMonitor", "asu", [rules, 0], **to).error is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.socket.close()

    def wait_for(self, member: str | None) -> None:
        while (message := self._client.receive()) is not None:
            if message.member == member and (member or message.signature == "(bba{ss})"):
                return
        raise EOFError


def test_a2_hanging_up_early_grants_nothing(strict_host: World, member: User) -> None:
    with Agent(strict_host, member, answers=True):
        # The positive control: who stays, and whose agent knows the password, is granted it.
        pid = served(strict_host, member)
        files = descriptors(pid)
        longest = max(0.005, using(strict_host, member, refusal))  # on a slow machine, all steps take longer
        stays = lambda bus: bus.call("SetMemlock", *CALLS["SetMemlock"], flags=INTERACTIVE).short  # noqa: E731
        assert using(strict_host, member, stays) == "ok"
    granted = strict_host.recorded()
    polkit = using(strict_host, ROOT_USER, lambda bus: bus.daemon("GetNameOwner", "s", [POLKITD]).body[0])
    with Monitor(strict_host, "type='method_call',member='CheckAuthorization'", "type='error'") as monitor:
        waiting, running = list(USERS), list[Child]()
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                user = waiting.pop()
                running.append(as_user(user, lambda: hang_up(strict_host, longest)))
            running.pop(0).result()
        assert served(strict_host, member) == pid
        messages = monitor.seen()
    errors = Counter((message.sender, message.error_name) for message in messages if message.error_name)
    subjects = {subject for subject, _, _ in asked(messages)}
    found_gone = sum(number for (sender, name), number in errors.items() if name == GONE)
    # Many got as far as polkit, and many were found to be gone, by the helper or by polkit: all steps were hit.
    assert len(subjects) > 200, errors
    assert found_gone > 200, errors
    assert errors[polkit, GONE] > 50, errors
    assert [act["member"] for act in strict_host.recorded()[len(granted) :]] == ["GetLimits"]
    wait_until(lambda: descriptors(pid) == files, "descriptors to be closed")


@pytest.mark.parametrize("leaves", [False, True])
def test_a2_a_yes_for_somebody_who_has_left_meanwhile(host: World, member: User, *, leaves: bool) -> None:
    """polkit says yes, and the caller hangs up before the helper has read that: each step is held until the next."""
    pid = served(host, member)
    assert host.polkitd is not None

    def call() -> str:
        with Client(host.socket) as client:
            return client.call("SetMemlock", *CALLS["SetMemlock"]).short

    with Watch(host) as watch:
        os.kill(host.polkitd.pid, signal.SIGSTOP)
        try:
            caller = as_user(member, call)
            watch.wait_for("CheckAuthorization")
            os.kill(pid, signal.SIGSTOP)
        finally:
            os.kill(host.polkitd.pid, signal.SIGCONT)
        try:
            watch.wait_for(None)
            if leaves:
                caller.kill()
        finally:
            os.kill(pid, signal.SIGCONT)
    assert leaves or caller.result() == "ok"
    using(host, ROOT_USER, lambda client: client.call("ListVms", "b", [True]))
    assert [act["member"] for act in host.recorded(member)] == ["GetLimits", *([] if leaves else ["SetMemlock"])]
