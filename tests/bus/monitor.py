"""A monitor of the whole bus, as root may have one: everything that was sent, in the order in which the bus took it."""

from typing import Self

from dbus_next.message import Message

from bus.client import Client
from bus.world import ROOT_USER, Child, World, as_user

DAEMON = "org.freedesktop.DBus"
END = "TheTestIsDone"


class Monitor:
    """Collects in a process of its own what `rules` match, from the beginning of the block on."""

    def __init__(self, host: World, *rules: str) -> None:
        self._socket = host.socket
        self._client = Client(host.socket)
        to = {"destination": DAEMON, "path": "/org/freedesktop/DBus", "interface": f"{DAEMON}.Monitoring"}
        everything = [*rules, f"type='method_call',member='{END}'"]
        assert self._client.call("BecomeMonitor", "asu", [everything, 0], **to).error is None
        self._child: Child | None = as_user(ROOT_USER, self._collect)
        self._client.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.kill()

    def seen(self) -> list[Message]:
        """End; return all that the bus took before this moment."""
        with Client(self._socket) as client:
            client.send(END, destination=DAEMON, path="/", interface="a.b")
        assert self._child is not None
        child, self._child = self._child, None
        messages: list[Message] = child.result()
        return messages

    def _collect(self) -> list[Message]:
        messages: list[Message] = []
        while (message := self._client.receive(200)) is not None:
            if message.member == END:
                return messages
            if message.destination != self._client.unique_name:  # what the bus tells the monitor itself
                messages.append(message)
        raise EOFError


def asked(messages: list[Message]) -> list[tuple[str, str, int]]:
    """Of every CheckAuthorization: the subject, which must be a bus name and nothing else, the action, the flags."""
    questions = []
    for message in messages:
        if message.member == "CheckAuthorization":
            (kind, subject), action, details, flags, _ = message.body
            assert (kind, list(subject)) == ("system-bus-name", ["name"])
            assert not any(key.startswith("polkit.") for key in details)
            questions.append((subject["name"].value, action, flags))
    return questions
