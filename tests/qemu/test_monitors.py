"""Our two monitors change nothing else: what QEMU has by itself, it has under the launcher too."""

import json
import socket
import subprocess
from typing import Any

import pytest

from qemu.launched import PATIENCE, Home

OURS = {"qemu-launcher-private", "qemu-launcher-control"}


def bare_chardevs(options: list[str]) -> list[dict[str, Any]]:
    """query-chardev of a QEMU without any launcher, asked over a monitor that is described in a file, too."""
    ours, theirs = socket.socketpair()
    configuration = (
        f'[chardev "probe"]\n  backend = "socket"\n  fd = "{theirs.fileno()}"\n'
        '[mon "probe"]\n  chardev = "probe"\n  mode = "control"\n'
    )
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", "-readconfig", "/dev/stdin", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    assert qemu.stdin is not None
    qemu.stdin.write(configuration.encode())
    qemu.stdin.close()
    ours.settimeout(PATIENCE)
    with ours, ours.makefile("rw") as file:

        def ask(command: str) -> Any:
            file.write(json.dumps({"execute": command}) + "\n")
            file.flush()
            while "return" not in (answer := json.loads(file.readline())):
                assert "event" in answer
            return answer["return"]

        assert "QMP" in file.readline()
        ask("qmp_capabilities")
        found: list[dict[str, Any]] = ask("query-chardev")
        ask("quit")
    qemu.wait(PATIENCE)
    return [entry for entry in found if entry["label"] != "probe"]


def by_label(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: str(entry["label"]))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["nographic"], id="nographic"),
        pytest.param([{"display": "none"}], id="display-none"),
        pytest.param(["nodefaults", {"display": "none"}], id="nodefaults"),
        pytest.param([{"display": "none"}, {"serial": "mon:stdio"}], id="mon-stdio"),
    ],
)
def test_chardevs_less_our_two_are_those_of_bare_qemu(home: Home, options: list[Any]) -> None:
    machine: list[Any] = [{"machine": "q35"}, {"accel": "tcg"}, {"m": "64"}, *options]
    words = [
        word for o in machine for word in ([f"-{o}"] if isinstance(o, str) else [f"-{k}" for k in o] + [*o.values()])
    ]
    path = home.configuration / "vm-under-test.yml"
    path.write_text(json.dumps({"launcher": {"binary": "qemu-system-x86_64"}, "qemu": machine}))
    run = home.start()
    run.wait_running()
    qmp = run.qmp()
    found = qmp("query-chardev")
    qmp("quit")
    assert run.end() == 0
    assert {entry["label"] for entry in found} >= OURS
    assert by_label([entry for entry in found if entry["label"] not in OURS]) == by_label(bare_chardevs(words))


def test_one_client_of_the_control_socket_at_a_time_and_the_next_after_it(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    for _ in range(3):
        qmp = run.qmp()
        assert qmp("query-status")["running"]
        qmp.close()
