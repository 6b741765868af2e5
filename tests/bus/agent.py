"""A polkit authentication agent for the tests: records what a person would see, and answers as told, or never."""

import json
import os
from typing import Any, Self

from dbus_next.message import Message
from dbus_next.signature import Variant

from bus.client import Client, Reply
from bus.world import User, World, wait_until

POLKIT = {
    "destination": "org.freedesktop.PolicyKit1",
    "path": "/org/freedesktop/PolicyKit1/Authority",
    "interface": "org.freedesktop.PolicyKit1.Authority",
}


class Agent:
    """Runs as `user` in the background. `answers`: give the administrator's password; else leave the dialog open."""

    def __init__(self, host: World, user: User, *, answers: bool) -> None:
        self._file = host.folder / f"agent-{user.uid}.jsonl"
        self._file.touch()
        self._file.chmod(0o666)
        session = host.log_in(user)
        root = Client(host.socket)  # what polkit's setuid helper would do
        self._child = host.run_as(user, lambda: self._run(host.socket, root, user, session, answers))
        root.socket.close()
        wait_until(lambda: self.seen("registered"), f"the agent of {user.name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()

    def seen(self, what: str) -> list[dict[str, Any]]:
        """What happened to the agent so far: "registered", "BeginAuthentication", "CancelAuthentication"."""
        events = [json.loads(line) for line in self._file.read_text().splitlines()]
        return [event for event in events if event["what"] == what]

    def _run(self, path: str, root: Client, user: User, session: str, answers: bool) -> None:
        log = os.open(self._file, os.O_WRONLY | os.O_APPEND)
        with Client(path) as client:
            subject = ["unix-session", {"session-id": Variant("s", session)}]
            reply = client.call("RegisterAuthenticationAgent", "(sa{sv})ss", [subject, "C", "/agent"], **POLKIT)
            assert reply.error is None, reply
            os.write(log, b'{"what": "registered"}\n')
            while True:
                call = client.receive(200)
                if call is None:
                    return
                if call.member not in ("BeginAuthentication", "CancelAuthentication"):
                    continue
                begins = call.member == "BeginAuthentication"
                event = {"what": call.member, "action": call.body[0], "message": call.body[1] if begins else ""}
                os.write(log, json.dumps(event).encode() + b"\n")
                if begins and answers:
                    body = [user.uid, call.body[4], call.body[5][0]]
                    answer: Reply = root.call("AuthenticationAgentResponse2", "us(sa{sv})", body, **POLKIT)
                    assert answer.error is None, answer
                if answers or not begins:
                    client.answer(Message.new_method_return(call))
