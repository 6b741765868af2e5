"""The launcher, or its QEMU, is killed at every step of a start: no guest runs half tuned, and the next start works.

The steps are counted as the launcher comes to them (stepping_launcher.py); no list of them is kept anywhere. QEMU is a
real one, the helper a fake one that really pins. At each step dies the launcher, QEMU, or both; then:

- a guest that runs has all its tuning; one that never ran stands in "prelaunch", which no guest returns to (its QMP
  says so, not our record), and nobody but a QEMU is left over;
- the next start ends such a QEMU and runs; a guest that runs is refused a second one, can be ended, and then started.

`QEMU_LAUNCHER_ROUNDS=N` tries N points of each kind instead of a few, `make test-exhaustive` all; QEMU_LAUNCHER_SEED=N
chooses others, QEMU_LAUNCHER_SHARE=2/3 the second third of them.
"""

import os
import random
import signal
import sys
from pathlib import Path

import pytest

from qemu.launched import PATIENCE, Home, Run, is_alive, wait_gone, wait_until
from qemu.private_bus import PrivateBus
from system.faults import SEED, SHARE, SHARES

VM = "vm-under-test"
CPU = max(os.sched_getaffinity(0))
ROUNDS = int(os.environ.get("QEMU_LAUNCHER_ROUNDS", "8"))
# What was counted when this was written is some more; much less would be a count that has lost sight of the launcher.
LEAST_STEPS = 105

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="optional: a shield needs a CPU for the others"
)


class World:
    """A VM, and starts of it that are ended at a step."""

    def __init__(self, home: Home, bus: PrivateBus, log: Path) -> None:
        self.home, self.bus, self.log = home, bus, log
        home.define(vcpu_pinning=[CPU])

    def start(self, wanted: str = "", do: str = "") -> Run:
        """Start it, counting."""
        self.log.write_text("")
        folder = str(Path(__file__).parent)
        begin = f"import sys; sys.path.insert(0, {folder!r}); import stepping_launcher\n"
        begin += f"stepping_launcher.begin({str(self.log)!r}, {wanted!r}, {do!r})"
        return self.home.start(env=self.bus.environment, argv=self.home.with_changed(begin))

    def steps(self) -> list[str]:
        """All that one start comes by, until nothing is left to do but to wait."""
        calls = len(self.bus.calls())
        run = self.start()
        run.wait_running()
        wait_until(lambda: len(self.bus.calls()) == calls + 2)  # the map is sent once more
        found = self.log.read_text().splitlines()
        self.quit(run)
        assert len(found) >= LEAST_STEPS, found
        return found

    def reached(self, run: Run) -> bool:
        """Wait until the step was reached, or the start is over without it: that happens, in a loop over /proc say."""
        calls = len(self.bus.calls())
        wait_until(
            lambda: (
                "reached" in self.log.read_text().splitlines()
                or run.process.poll() is not None
                or len(self.bus.calls()) >= calls + 2
            )
        )
        return "reached" in self.log.read_text().splitlines()

    def quit(self, run: Run) -> None:
        """End a guest that runs."""
        qmp = run.qmp()
        qmp("quit")
        qmp.close()
        assert run.end() == 0, run.output

    def left_over(self) -> int | None:
        """The QEMU that is left, when whatever else was left has gone by itself: a child at its gate, say."""
        wait_until(lambda: all(_is_qemu(pid) for pid in self.home.leftovers()))
        assert len(self.home.leftovers()) <= 1
        return next(iter(self.home.leftovers()), None)

    def expect_next_start(self) -> str:
        """Start it once more, and end it; what was said."""
        run = self.home.start(env=self.bus.environment)
        run.wait_running()
        self.quit(run)
        assert self.home.leftovers() == []
        return run.output


def _is_qemu(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system-")
    except OSError:
        return False


@pytest.fixture
def world(home: Home, bus: PrivateBus, tmp_path: Path) -> World:
    """One for all points of a test."""
    return World(home, bus, tmp_path / "steps")


def expect_launcher_gone(world: World, run: Run) -> None:
    """What holds when only the launcher has died."""
    assert run.process.wait(PATIENCE) == -signal.SIGKILL  # not end(): QEMU keeps what the launcher wrote to open
    pid = world.left_over()
    if pid is None:
        assert "ended a QEMU" not in world.expect_next_start()
        return
    qmp = run.qmp()
    state = qmp("query-status")["status"]
    told = world.home.record()["state"]
    if state == "prelaunch" and told == "starting":
        qmp.close()
        said = world.expect_next_start()
        assert f"ended a QEMU (PID {pid}) whose guest had never been started" in said, said
        return
    # It runs; or `cont` was just to be sent: all is done then, and its user may let it go on.
    assert told == "running"
    (vcpu,) = qmp("query-cpus-fast")
    assert os.sched_getaffinity(vcpu["thread-id"]) == {CPU}
    qmp.close()
    again = world.home.start(env=world.bus.environment)
    assert again.end() == 1
    waits = ", and waits to be started\n    start its guest with: qemu-launcher resume" * (state == "prelaunch")
    assert f"{VM} is already running (PID {pid}){waits}" in again.output
    assert is_alive(pid)
    if waits:
        assert world.home.ask("resume", VM).returncode == 0
    assert world.home.ask("kill", VM).returncode == 0
    wait_gone(pid)
    world.expect_next_start()


def expect_qemu_gone(world: World, run: Run) -> None:
    """What holds when only QEMU has died: the launcher says so, and leaves nothing."""
    assert run.end() in (1, 128 + signal.SIGKILL), run.output
    assert run.output.strip(), "not a word"
    assert world.left_over() is None
    world.expect_next_start()


def expect_both_gone(world: World, run: Run) -> None:
    """What holds when nobody has lived to tell."""
    assert run.end() == 128 + signal.SIGKILL
    assert world.left_over() is None
    world.expect_next_start()


EXPECTED = {"launcher": expect_launcher_gone, "QEMU": expect_qemu_gone, "QEMU and launcher": expect_both_gone}


@pytest.mark.parametrize("who", EXPECTED)
def test_a17_killed_at_each_step_of_a_start(world: World, who: str) -> None:
    names = world.steps()
    if who != "launcher":  # whatever else dies must have been born
        names = names[next(at for at, name in enumerate(names) if name.startswith("fork ")) + 1 :]
    sample = random.Random(f"{SEED} {who}").sample(names, min(ROUNDS, len(names)))
    chosen = sorted(sample[SHARE - 1 :: SHARES], key=names.index)
    wrong, passed_by = [], 0
    for name in chosen:
        run = world.start(name, who)
        try:
            if world.reached(run):
                EXPECTED[who](world, run)
            else:
                passed_by += 1
                world.home.clean_up()
        except (AssertionError, EOFError, OSError) as err:
            wrong.append(f"SIGKILL of {who} at {name}: {err!r}\n{run.output}")
            world.home.clean_up()
    tried = len(chosen) - passed_by
    sys.stdout.write(
        f"SIGKILL of {who}: {tried} of {len(names)} steps of a start tried, {tried - len(wrong)} passed, "
        f"{passed_by} not come by; QEMU_LAUNCHER_SEED={SEED} QEMU_LAUNCHER_SHARE={SHARE}/{SHARES}\n"
    )
    assert not wrong, "\n".join(wrong)
    assert passed_by <= len(chosen) // 4
