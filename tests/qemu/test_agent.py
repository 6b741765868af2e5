"""polkit's agent on a text terminal: started for a question and for nothing else, and gone before the guest runs.

pkttyagent is a stand-in, polkit is played by the fake helper: NotAuthorized for a call that lets nobody be asked. The
launcher under test takes itself for an ordinary user's also where root runs the tests.
"""

import json
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import Home, wait_gone
from qemu.private_bus import PrivateBus
from qemu.test_administration import INTERACTIVE, OTHER, asked, row
from qemu.test_terminal import Terminal
from qemu.test_tuning import CPU, SHIELDED, needs_two_cpus

pytestmark = needs_two_cpus
USER = "from qemu_launcher import agent; agent._ROOT = -1"
ASKS = {"unless_asked": "act"}


class World:
    """A terminal with a stand-in agent within reach."""

    def __init__(self, home: Home, bus: PrivateBus, terminal: Terminal) -> None:
        self.home, self.bus, self.terminal = home, bus, terminal
        self.log = home.configuration / "agent.log"
        self.path = f"{home.configuration}:{os.environ['PATH']}"

    def install(self, how: str = "registers") -> None:
        program = self.home.configuration / "pkttyagent"
        script = Path(__file__).with_name("pkttyagent.py")
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} {self.log} {how} "$@"\n')
        program.chmod(0o755)

    def start(self, *words: str, change: str = USER) -> None:
        argv = self.home.changed_command(change, *(words or ("run", "vm-under-test")))
        self.terminal.start(argv=argv, env={**self.bus.environment, "PATH": self.path})

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def whats(self) -> list[str]:
        return [entry["what"] for entry in self.told()]

    def quit(self) -> int:
        assert self.home.ask("kill", "vm-under-test").returncode == 0
        return self.terminal.end()


@pytest.fixture
def world(home: Home, bus: PrivateBus) -> Iterator[World]:
    terminal = Terminal(home)
    made = World(home, bus, terminal)
    made.install()
    yield made
    terminal.close()


def test_no_agent_and_no_more_calls_where_polkit_says_yes(world: World) -> None:
    world.home.define(**SHIELDED)
    world.start()
    world.terminal.wait("vm-under-test: running")
    world.quit()
    assert world.told() == []
    assert [(member, flag) for member, _, flag in asked(world.bus)[:2]] == [("PinThreads", 0), ("PinThreads", 0)]
    assert world.bus.members() in (["PinThreads"] * 2, ["PinThreads"] * 2 + ["Release"])


def test_agent_is_there_for_the_question_and_gone_before_the_guest_runs(world: World) -> None:
    world.bus.plan(PinThreads=ASKS)
    world.home.define(**SHIELDED)
    world.start()
    world.terminal.wait("vm-under-test: running")
    world.terminal.wait("its threads are not sorted once more: that would need another password")
    world.quit()
    started, registered, ended = world.told()
    assert [started["what"], registered["what"], ended["what"]] == ["started", "registered", "ended"]
    option, number, fallback = started["arguments"]
    assert (option, fallback) == ("--notify-fd", "--fallback")
    assert int(number) > 2
    quiet, question, after_cont, *_ = world.bus.calls()
    assert [call["flags"] & INTERACTIVE for call in (quiet, question, after_cont)] == [0, INTERACTIVE, 0]
    assert quiet["time"] < started["time"] < registered["time"] < question["time"] < ended["time"] < after_cont["time"]


def test_one_question_is_enough_when_the_answer_is_kept(world: World) -> None:
    """As polkit's auth_admin_keep has it: after the first password the rest is a yes."""
    world.bus.plan(PinThreads=[ASKS, ASKS, "act"])
    world.home.define(**SHIELDED)
    world.start()
    world.terminal.wait("vm-under-test: running")
    world.quit()
    assert world.whats() == ["started", "registered", "ended"]
    assert world.bus.members()[:3] == ["PinThreads"] * 3


def test_keyboard_is_the_agents_while_it_asks(world: World) -> None:
    """With -nographic QEMU reads the terminal, raw, before its guest runs: it would take half of the password."""
    world.bus.plan(PinThreads=[ASKS, ASKS, "act"])
    path = world.home.define(**SHIELDED)
    path.write_text(path.read_text().replace("- nodefaults\n- display: none\n", "- nographic\n"))
    world.start()
    world.terminal.wait("vm-under-test: running")
    started = world.told()[0]
    assert started["line_by_line"]
    assert started["siblings"] == ["T"], "QEMU stands still"
    assert not termios.tcgetattr(world.terminal.slave)[3] & termios.ICANON, "QEMU has it again"
    world.terminal.type(b"\x01c")
    world.terminal.wait(r"\(qemu\)")
    world.terminal.type(b"quit\r")
    assert world.terminal.end() == 0
    assert termios.tcgetattr(world.terminal.slave) == world.terminal.before


def test_qemu_that_has_no_part_of_the_terminal_is_left_alone(world: World) -> None:
    world.bus.plan(PinThreads=[ASKS, ASKS, "act"])
    world.home.define(**SHIELDED)
    world.start()
    world.terminal.wait("vm-under-test: running")
    assert "T" not in world.told()[0]["siblings"]
    world.quit()


@pytest.mark.parametrize("nographic", [False, True])
def test_ctrl_c_while_it_asks(world: World, nographic: bool) -> None:
    world.bus.plan(PinThreads=[ASKS, "hang"])
    path = world.home.define(**SHIELDED)
    if nographic:
        path.write_text(path.read_text().replace("- nodefaults\n- display: none\n", "- nographic\n"))
    world.start()
    wait_until(world, lambda: world.bus.members() == ["PinThreads"] * 2)
    world.terminal.type(b"\x03")
    assert world.terminal.end() == 128 + signal.SIGINT
    assert world.whats() == ["started", "registered", "ended"]
    assert world.home.leftovers() == []
    assert termios.tcgetattr(world.terminal.slave) == world.terminal.before


def test_nobody_talks_over_the_question(world: World) -> None:
    world.bus.plan(PinThreads=[ASKS, "hang"])
    world.home.define(**SHIELDED)
    world.start(change=f"{USER}; from qemu_launcher import patience; patience.FIRST_WORD = patience.NEXT_WORD = 0.1")
    wait_until(world, lambda: world.bus.members() == ["PinThreads"] * 2)
    begin = len(world.terminal.screen)
    wait_until(world, lambda: False, seconds=1.0)
    assert b"waiting for" not in world.terminal.screen[begin:]
    world.terminal.type(b"\x03")
    assert world.terminal.end() == 128 + signal.SIGINT


def test_agent_does_not_survive_a_killed_launcher(world: World) -> None:
    world.bus.plan(PinThreads=[ASKS, "hang"])
    world.home.define(**SHIELDED)
    world.start()
    wait_until(world, lambda: world.bus.members() == ["PinThreads"] * 2)
    assert world.terminal.process is not None
    world.terminal.process.kill()
    wait_gone(world.told()[0]["pid"])


@pytest.mark.parametrize("how", ["fails", "hangs", "missing"])
def test_agent_that_is_of_no_use_does_no_harm(world: World, how: str) -> None:
    """The question is put all the same: there may be another agent."""
    world.install(how)
    world.bus.plan(PinThreads=ASKS)
    world.home.define(**SHIELDED)
    change = {"fails": "", "hangs": "; agent._REGISTRATION = 5.0", "missing": "; agent.PROGRAM = 'no-such-program'"}
    world.start(change=f"{USER}{change[how]}")
    world.terminal.wait("vm-under-test: running")
    world.quit()
    assert world.whats() == {"fails": ["started"], "hangs": ["started", "ended"], "missing": []}[how]
    assert [flag for _, _, flag in asked(world.bus)[:2]] == [0, INTERACTIVE]


def test_refusal_that_no_password_helps_against_asks_nobody(world: World) -> None:
    world.bus.plan(PinThreads={"error": ["org.qemulauncher.Error.Conflict", "CPU 4 is taken"]})
    world.home.define(**SHIELDED)
    world.start()
    world.terminal.wait("CPU 4 is taken")
    assert world.terminal.end() == 1
    assert world.told() == []
    assert world.bus.members() == ["PinThreads"]


@pytest.mark.skipif(os.geteuid() != 0, reason="optional: what root is spared")
def test_root_is_never_asked(world: World) -> None:
    world.bus.plan(PinThreads=ASKS)
    world.home.define(**SHIELDED)
    world.start(change="pass")
    world.terminal.wait("vm-under-test: running")
    world.quit()
    assert world.told() == []


def test_untuned_vm_asks_nobody(world: World) -> None:
    world.home.define(vcpu_pinning=[CPU])
    world.start("run", "--untuned", "vm-under-test")
    world.terminal.wait("vm-under-test: running")
    world.quit()
    assert (world.told(), world.bus.calls()) == ([], [])


@pytest.mark.parametrize(
    ("words", "member"),
    [
        (("status", "--all-users"), "ListVms"),
        (("limits", "--owner", str(OTHER)), "GetLimitsOf"),
        (("release", "win11", "--owner", str(OTHER)), "Release"),
    ],
)
def test_commands_about_others_ask_once(world: World, words: tuple[str, ...], member: str) -> None:
    listed = {"return": [row("win11", OTHER, "4")]}
    plan: dict[str, Any] = {"ListVms": listed, "GetLimitsOf": "act", "Release": "act"}
    world.bus.plan(**plan | {member: {"unless_asked": plan[member]}})
    world.start(*words)
    assert world.terminal.end() == 0, world.terminal.screen
    assert world.whats() == ["started", "registered", "ended"]
    assert [flag for name, _, flag in asked(world.bus) if name == member] == [0, INTERACTIVE]


@pytest.mark.parametrize("words", [("limits",), ("status",), ("release", "win11")])
def test_commands_about_ones_own_ask_nobody(world: World, words: tuple[str, ...]) -> None:
    world.bus.plan(GetLimits=ASKS, ListVms={"return": [row("win11", os.geteuid(), "4")]}, Release=ASKS)
    world.start(*words)
    world.terminal.end()
    assert world.told() == []
    assert {flag for _, _, flag in asked(world.bus)} <= {0}


def test_ctrl_c_while_a_command_asks(world: World) -> None:
    world.bus.plan(ListVms=[ASKS, "hang"])
    world.start("status", "--all-users")
    wait_until(world, lambda: world.bus.members() == ["ListVms"] * 2)
    world.terminal.type(b"\x03")
    assert world.terminal.end() == 128 + signal.SIGINT
    assert world.whats() == ["started", "registered", "ended"]
    assert world.home.leftovers() == []


def wait_until(world: World, true: Callable[[], bool], seconds: float | None = None) -> None:
    """Wait for something that happens elsewhere, and read the terminal meanwhile; or just read it for some time."""
    import select
    import time

    from qemu.launched import PATIENCE

    deadline = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while not true():
        if time.monotonic() > deadline:
            assert seconds is not None, world.terminal.screen.decode()
            return
        if select.select([world.terminal.master], [], [], 0.05)[0]:
            world.terminal.screen += os.read(world.terminal.master, 65536)
