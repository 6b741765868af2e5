"""Threads leave a group that is to go: how long that may take, whatever they do."""

import time
from pathlib import Path

import pytest

from qemu_launcher_helper.contract import Failed
from qemu_launcher_helper.cpuset.partition import STUCK_LOOKS, SWEEP_THREADS, _drain

TID, OVER = "4711", 0.0  # a deadline that has passed


class Tree:
    """A thread's group and the one that it is to go to. Who is `stuck` stays: he is past being moved, not yet gone."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.emulator, self.stuck, self.tries = folder / TID, folder / "emulator", set[str](), list[str]()
        for group in (self.place, self.emulator):
            group.mkdir()
        real = Path.write_text

        def write_text(path: Path, tid: str) -> int:
            self.tries.append(tid)
            assert len(self.tries) < 100, "it would try for ever"
            left = [thread for thread in self.threads() if thread != tid or thread in self.stuck]
            return real(self.place / "cgroup.threads", "\n".join(left))

        self.fill(TID)
        monkeypatch.setattr(Path, "write_text", write_text)

    def fill(self, *tids: str) -> None:
        with (self.place / "cgroup.threads").open("w") as file:
            file.write("\n".join(tids))

    def threads(self) -> list[str]:
        return (self.place / "cgroup.threads").read_text().split()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return Tree(tmp_path, monkeypatch)


def test_who_is_there_at_the_first_look_goes_however_late_it_is(tree: Tree) -> None:
    tree.fill(TID, "4712")
    _drain(tree.place, tree.emulator, OVER)
    assert (tree.tries, tree.threads()) == ([TID, "4712"], [])


def test_but_not_any_number(tree: Tree) -> None:
    """A user may have tens of thousands of threads; while they are moved one by one, nobody else is served."""
    tree.fill(*map(str, range(4711, 4711 + SWEEP_THREADS + 12)))
    with pytest.raises(Failed, match=r"^Threads are born faster than they can be moved"):
        _drain(tree.place, tree.emulator, OVER)
    assert len(tree.threads()) == 12


def test_any_number_while_there_is_time(tree: Tree) -> None:
    tree.fill(*map(str, range(4711, 4711 + 3 * SWEEP_THREADS)))
    _drain(tree.place, tree.emulator, time.monotonic() + 600)
    assert tree.threads() == []


def test_a_thread_that_is_ending_and_does_not_end(tree: Tree) -> None:
    """As when a file system of its user's own does not answer to the closing of a file: for ever, if he likes."""
    tree.stuck = {TID}
    with pytest.raises(Failed):
        _drain(tree.place, tree.emulator, OVER)
    assert tree.tries == [TID]


def test_and_it_does_not_take_all_the_time_that_there_is(tree: Tree) -> None:
    tree.stuck = {TID}
    with pytest.raises(Failed):
        _drain(tree.place, tree.emulator, time.monotonic() + 600)
    assert len(tree.tries) == STUCK_LOOKS + 1
