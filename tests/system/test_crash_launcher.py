"""The launcher, or its QEMU, is killed at some steps of a start with the real helper.

Whatever the helper has done by then is taken back, no guest runs half tuned, and the next start works.

The steps are counted by the launcher itself (stepping_launcher.py). All of them are tried with a fake helper, in less
than a second each: tests/qemu/test_crash_points.py. Here are a few, chosen by the seed, since each takes many seconds.
"""

from __future__ import annotations

import os
import shlex
import signal

from system import host
from system.claims import copied
from system.faults import ROUNDS, SHARES, NotComeBy, Point, try_all
from system.fixtures import call_helper
from system.people import User, folder_of
from system.vms import Launch, define, expect_tuned

NAME = "stepped"
TUNING = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1, "rlimit_memlock": "400M"}


class Stepped:
    """Starts that are ended at a step."""

    def __init__(self, user: User) -> None:
        self.user = user
        self.log = folder_of(user.name) / "steps"
        self._script = copied("qemu/stepping_launcher.py") / "stepping_launcher.py"
        define(user, NAME, TUNING, cpus=2)

    def start(self, step: str = "", who: str = "") -> Launch:
        """Start the VM."""
        self.user.file(self.log, "")
        words = ["python3", str(self._script), str(self.log), step, who]
        return Launch(self.user, NAME, program=shlex.join(words))

    def steps(self) -> list[str]:
        """What a start comes by from QEMU's birth until all is done."""
        launch = self.start()
        try:
            launch.until_running().until_settled()
            found = self.log.read_text().splitlines()
            assert launch.quit() == 0
        finally:
            launch.close()
        return found[next(at for at, name in enumerate(found) if name.startswith("fork ")) + 1 :]

    @property
    def reached(self) -> bool:
        """Whether it has come to the step."""
        return "reached" in self.log.read_text().splitlines()


def expect_held_or_tuned(launch: Launch, qemu: int) -> None:
    """The launcher is dead; its guest stands still for ever, or has everything."""
    host.wait_for("QEMU offers a monitor, or ends", lambda: launch.offers_monitor or not host.is_alive(qemu))
    if not host.is_alive(qemu):
        assert not launch.guest_ran
        return
    if launch.witness.state() == "prelaunch":
        assert launch.witness.heard("RESUME") == []
        assert not launch.guest_ran
        return
    expect_tuned(launch, qemu)
    host.wait_for("its guest runs", lambda: launch.guest_ran)


def expect_next_start(stepped: Stepped, launch: Launch, qemu: int | None) -> None:
    """It works, and ends a QEMU that is left; unless that one has everything, and its user may let its guest go on."""
    again = Launch(stepped.user, NAME)
    try:
        host.wait_for("the next start runs, or ends", lambda: "running" in again.said or not again.is_alive)
        if qemu is None or f"is already running (PID {qemu}), and waits to be started" not in again.said:
            again.until_running()
            assert host.isolated() == {4, 5}
            assert again.quit() == 0
            return
    finally:
        again.close()
    expect_tuned(launch, qemu)
    assert stepped.user.command("resume", NAME).status == 0
    assert launch.witness.state() == "running"
    expect_tuned(launch, qemu)
    assert stepped.user.command("kill", NAME).status == 0
    host.wait_for("its QEMU is gone", lambda: not host.is_alive(qemu))
    expect_next_start(stepped, launch, None)


def try_step(stepped: Stepped, step: str, who: str) -> bool:
    """End a start there, look at what is left, and start again; whether the step was reached."""
    launch = stepped.start(step, who)
    qemu: int | None = None
    try:
        host.wait_for("a step, or the end", lambda: stepped.reached or not launch.is_alive or launch.guest_ran)
        if not stepped.reached:
            return False
        if who == "launcher":
            host.wait_for("the launcher is gone", lambda: not launch.is_alive)
            qemu = next(iter(host.processes("qemu-system-x86_64")), None)
            if qemu is not None:
                expect_held_or_tuned(launch, qemu)
        elif who == "QEMU":
            assert launch.until_ended() in (1, 128 + signal.SIGKILL), launch.said
        if not launch.guest_ran:
            expect_next_start(stepped, launch, qemu)
    finally:
        launch.close()
        for pid in host.processes("qemu-system-x86_64"):
            os.kill(pid, signal.SIGKILL)
        host.wait_until_as_before(call_helper)
    return True


def test_a17_killed_at_some_steps_of_a_start(alice: User) -> None:
    stepped = Stepped(alice)
    names = stepped.steps()
    assert len(names) >= 75, names
    points = [Point(at, name, who) for at, name in enumerate(names) for who in ("launcher", "QEMU")]

    def one(point: Point) -> None:
        if not try_step(stepped, point.name, point.do):
            raise NotComeBy

    try_all(points, "SIGKILL of launcher or QEMU at a step of a start", one, max(2 * SHARES, ROUNDS // 2))
