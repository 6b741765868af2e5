"""The members of the interface, each with arguments that a launcher could send, and how to make calls as somebody."""

from collections.abc import Callable
from typing import Any

from bus.client import INTERACTIVE, Client, Reply
from bus.world import ROOT_USER, User, World

CALLS: dict[str, tuple[str, list[Any]]] = {
    "SetMemlock": ("ust", [4242, "win11", 2**30]),
    "PinThreads": ("usa(uaub)au", [4242, "win11", [[4243, [4], True], [4244, [5], True]], []]),
    "SetScheduler": ("usausu", [4242, "win11", [4243, 4244], "fifo", 1]),
}
# What would be answered to these, before there is a VM.
CHECKS: dict[str, tuple[str, list[Any]]] = {
    "CheckMemlock": ("st", ["win11", 2**30]),
    "CheckPins": ("sa(uaub)au", ["win11", [[2, [4], True], [3, [5], True]], []]),
    "CheckScheduler": ("sa(uaub)su", ["win11", [[2, [4], True], [3, [5], True]], "fifo", 1]),
}
FREE: dict[str, tuple[str, list[Any]]] = {"ListVms": ("b", [False]), "GetLimits": ("", [])}
# What is root's and other users' business.
OTHERS: dict[str, tuple[str, list[Any]]] = {
    "Release": ("us", [ROOT_USER.uid, "win11"]),
    "ListVms": ("b", [True]),
    "GetLimitsOf": ("u", [ROOT_USER.uid]),
}


def using(host: World, user: User, calls: Callable[[Client], Any]) -> Any:
    """Run `calls` with a connection of `user`'s, in a process of his."""

    def run() -> Any:
        with Client(host.socket) as client:
            return calls(client)

    return host.run_as(user, run).result()


def call_all(client: Client) -> dict[str, Reply]:
    """Every method that acts or tells, each once, interactive or not as a launcher would."""
    return {
        member: client.call(member, *arguments, flags=INTERACTIVE)
        for member, arguments in (CALLS | CHECKS | FREE).items()
    }
