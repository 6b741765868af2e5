"""Attack A16: taking the helper's name, and starting it over and over."""

import time

from bus.calls import CALLS, using
from bus.client import NAME, Client
from bus.test_lifetime import exits
from bus.world import BOB, NOBODY, ROOT_USER, Child, User, World, as_user, wait_until, world

NAMES = [NAME, f"{NAME}.sub", f"{NAME}1", "org.qemulauncher"]


def take(client: Client) -> list[str]:
    """Ask for the name, and for some near it; with replacement, and with a place in the queue."""
    return [client.daemon("RequestName", "su", [name, flags]).short for name in NAMES for flags in (0, 2, 3, 4)]


def test_a16_nobody_takes_the_name(member: User) -> None:
    with world() as host:
        for running in (False, True):  # also not before the helper has ever owned it
            for user in (member, BOB, NOBODY):
                assert set(using(host, user, take)) == {"AccessDenied"}
            if not running:
                assert using(host, member, lambda client: client.call("GetLimits").short) == "ok"
        # What only the owner may do, is not for others: 2 is DBUS_RELEASE_NAME_REPLY_NON_EXISTENT, 3 is NOT_OWNER.
        pid = host.helper_pid()
        assert using(host, member, lambda client: client.daemon("ReleaseName", "s", [NAME]).body) == [3]
        assert host.helper_pid() == pid
    with world() as host:
        # The positive control: root, in a world where no helper runs, gets this name; and nothing like it either.
        assert using(host, ROOT_USER, take) == ["ok"] * 4 + ["AccessDenied"] * 12


def test_a16_starting_it_over_and_over_is_harmless(member: User, other: User) -> None:
    """Each start is one that happens: the helper leaves after 0.2 s, and the next begins."""

    def starts(host: World, user: User) -> Child:
        def run() -> set[str]:
            answers = set()
            with Client(host.socket) as client:
                end = time.monotonic() + 60
                while len(exits(host)) < 8 and time.monotonic() < end:
                    answers.add(client.daemon("StartServiceByName", "su", [NAME, 0]).short)
            return answers

        return as_user(user, run)

    with world(idle=0.2) as host:
        attackers = [starts(host, user) for user in (NOBODY, BOB)]
        honest: list[str] = []
        while len(exits(host)) < 8 and len(honest) < 50:
            honest.append(using(host, member, lambda client: client.call("SetMemlock", *CALLS["SetMemlock"]).short))
            time.sleep(0.25)
        for child in attackers:
            assert child.result() == {"ok"}
        assert honest
        assert set(honest) == {"ok"}
        assert using(host, other, lambda client: client.call("GetLimits").short) == "ok"
        wait_until(lambda: len(exits(host)) >= 8, "helpers that have left")
        assert set(exits(host).values()) == {0}
        # One record for each honest call, whichever helper served it, and nothing else in any log.
        assert len(host.recorded()) == len(honest) + 1
        assert all(line.startswith("granted ") for line in host.logged())
        assert len(host.logged()) == len(host.recorded())
