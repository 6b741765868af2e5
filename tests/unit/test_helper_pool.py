"""The pool's arithmetic over the host's groups, in a tree of plain files; the kernel's part is in tests/system."""

import errno
import itertools
import json
import os
from pathlib import Path
from typing import NoReturn

import pytest

from qemu_launcher_helper.contract import Conflict
from qemu_launcher_helper.cpuset import pool
from qemu_launcher_helper.cpuset.pool import Pool

SCOPES = [f"/qemu.slice/qemu-{uid}.slice/qemu-launcher-{uid}-vm.scope" for uid in (1000, 1001)]
BEFORE = {"init.scope": "", "system.slice": "0-5", "user.slice": "", "docker": "2-3,6"}


class Host:
    """Eight CPUs, four groups of the host's, two scopes of VMs."""

    def __init__(self, folder: Path) -> None:
        self.root, self.memory = folder / "cgroup", folder / "run/pool"
        (folder / "possible").write_text("0-7\n")
        self.pool = Pool(self.root, self.memory, folder / "possible")
        for name, cpus in BEFORE.items():
            self.write(name, cpus)
        for scope in ("qemu.slice", *(scope[1:] for scope in SCOPES), *(f"{scope[1:]}/pool" for scope in SCOPES)):
            self.write(scope, "")
        (self.root / "cpuset.cpus.effective").write_text("0-7\n")

    def write(self, group: str, cpus: str) -> None:
        (self.root / group).mkdir(parents=True, exist_ok=True)
        (self.root / group / "cpuset.cpus").write_text(f"{cpus}\n")

    def cpus(self, group: str) -> str:
        return (self.root / group.lstrip("/") / "cpuset.cpus").read_text().strip()

    def groups(self) -> dict[str, str]:
        return {name: self.cpus(name) for name in BEFORE}

    def settle(self, *shielded: int) -> None:
        self.pool.settle({SCOPES[0]: frozenset(shielded)} if shielded else {})


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


AS_BEFORE = BEFORE | {"init.scope": "0-7", "user.slice": "0-7"}  # a group with tasks in it cannot be told nothing


def test_without_a_shield_nothing_is_touched(host: Host) -> None:
    host.pool.settle({SCOPES[0]: frozenset()})
    assert host.groups() == BEFORE
    assert not host.memory.exists()


def test_every_group_leaves_the_cpus_and_gets_back_what_it_had(host: Host) -> None:
    host.settle(4, 5)
    assert host.groups() == {"init.scope": "0-3,6-7", "system.slice": "0-3", "user.slice": "0-3,6-7", "docker": "2-3,6"}
    assert [host.cpus(scope) for scope in SCOPES] == ["0-7", "0-3,6-7"]
    assert [host.cpus(f"{scope}/pool") for scope in SCOPES] == ["0-3,6-7", "0-3,6-7"]
    assert host.cpus("qemu.slice") == "", "its own scopes are what is shielded"
    host.settle()
    assert host.groups() == AS_BEFORE
    assert not host.memory.exists()


def test_two_vms_in_any_order(host: Host) -> None:
    both = {SCOPES[0]: frozenset({4, 5}), SCOPES[1]: frozenset({2, 3})}
    for first in SCOPES:
        host.pool.settle({first: both[first]})
        host.pool.settle(both)
        assert host.groups() == {"init.scope": "0-1,6-7", "system.slice": "0-1", "user.slice": "0-1,6-7", "docker": "6"}
        assert [host.cpus(scope) for scope in SCOPES] == ["0-1,4-7", "0-3,6-7"]
        host.pool.settle({first: both[first]})
        host.settle()
        assert host.groups() == AS_BEFORE


def test_what_an_administrator_writes_meanwhile_is_what_he_gets_back(host: Host) -> None:
    host.settle(4, 5)
    host.write("system.slice", "0-4")
    host.write("user.slice", "0-7")
    host.settle(4, 5)
    assert (host.cpus("system.slice"), host.cpus("user.slice")) == ("0-3", "0-3,6-7")
    host.write("system.slice", "1-5")
    host.settle()
    assert host.cpus("system.slice") == "1-5"
    assert host.cpus("user.slice") == "0-7"


def test_a_group_that_comes_later(host: Host) -> None:
    host.settle(4, 5)
    host.write("machine.slice", "")
    host.settle(4, 5)
    assert host.cpus("machine.slice") == "0-3,6-7"
    host.write("late.slice", "")
    host.settle()
    assert (host.cpus("machine.slice"), host.cpus("late.slice")) == ("0-7", "")


def test_a_group_that_would_have_nothing_left(host: Host) -> None:
    with pytest.raises(Conflict, match=r"^CPUs 2-3,6 are all that AllowedCPUs= leaves to 'docker'$"):
        host.settle(2, 3, 6, 7)
    assert host.cpus("docker") == "2-3,6"
    assert host.cpus("user.slice") == "0-1,4-5", "the others are as they should be all the same"
    host.settle()
    assert host.groups() == AS_BEFORE


@pytest.mark.parametrize("first", [(4, 5), (2, 3, 4, 5)])
def test_killed_between_any_two_writes(host: Host, monkeypatch: pytest.MonkeyPatch, first: tuple[int, ...]) -> None:
    """Each time it comes a step further. Whatever was left, the next settle knows what was there at first."""

    class Killed(BaseException):
        pass

    real, steps = Path.write_text, [0]

    def write_text(path: Path, text: str) -> int:
        steps[0] -= 1
        if steps[0] < 0:
            raise Killed
        return real(path, text)

    for most in range(40):
        host.settle(*first)
        steps[0] = most
        monkeypatch.setattr(Path, "write_text", write_text)
        ended = True
        try:
            host.settle(*(() if most % 2 else (6, 7)))
        except Killed:
            ended = False
        monkeypatch.undo()
        host.settle()
        assert host.groups() == AS_BEFORE
        assert not host.memory.exists()
        if ended and most % 2:
            break
    else:
        pytest.fail("it never came to its end")


def test_its_memory_is_whole_or_not_there(host: Host) -> None:
    host.settle(4, 5)
    assert json.loads(host.memory.read_text())["system.slice"] == ["0-5", "0-5", "0-3"]
    assert os.listdir(host.memory.parent) == ["pool"]


def test_a_group_whose_last_cpus_are_offline(host: Host) -> None:
    """The kernel would let it run on all others, the shielded ones included."""
    (host.root / "cpuset.cpus.effective").write_text("0-5\n")
    with pytest.raises(Conflict, match="'docker'"):
        host.settle(2, 3)


def test_a_group_that_anothers_vm_leaves_nothing_is_no_reason_to_refuse(host: Host) -> None:
    """An administrator gives it the CPUs of a VM that runs; it is this VM's next claim that is refused."""
    host.settle(4, 5)
    host.write("docker", "4-5")
    theirs, claim = {SCOPES[0]: frozenset({4, 5})}, {SCOPES[1]: frozenset({6, 7})}
    host.pool.settle(claim | theirs)
    assert host.cpus("user.slice") == "0-3"
    with pytest.raises(Conflict, match=r"^CPUs 4-5 are all that AllowedCPUs= leaves to 'docker'$"):
        host.pool.settle(theirs | claim)


@pytest.mark.parametrize("state", ["root", "isolated", "isolated invalid (no CPUs)"])
def test_a_partition_of_somebody_elses_stays_one(host: Host, state: str) -> None:
    """Since Linux 6.1 the kernel ends it, without an error, as soon as a list beside it has one of its CPUs."""
    host.write("rt", "2-3")
    (host.root / "rt/cpuset.cpus.partition").write_text(f"{state}\n")
    host.write("docker", "")
    host.write("system.slice", "0-1,4-5")
    valid = state in ("root", "isolated")
    host.settle()
    assert not host.memory.exists()
    host.settle(4, 5)
    assert host.cpus("user.slice") == ("0-1,6-7" if valid else "0-3,6-7")
    assert (host.cpus("system.slice"), host.cpus("rt")) == ("0-1", "2-3")
    if valid:
        with pytest.raises(Conflict, match=r"^CPUs 2 are those of a partition that others have made$"):
            host.settle(1, 2)
    for _ in range(2):
        host.settle()
        assert host.cpus("user.slice") == ("0-1,4-7" if valid else "0-7")
        assert (host.cpus("system.slice"), host.cpus("rt")) == ("0-1,4-5", "2-3")
    # When it is none any more, its CPUs are everybody's again, as soon as the helper runs.
    (host.root / "rt/cpuset.cpus.partition").write_text("member\n")
    host.settle()
    assert host.cpus("user.slice") == "0-7"
    assert not host.memory.exists()


def test_a_partition_that_is_made_of_shielded_cpus_stays_one(host: Host) -> None:
    """Whatever groups had before: each has left these CPUs, so the kernel lets an administrator make it."""
    for name in BEFORE:
        host.write(name, "0-7")
    host.settle(4, 5)
    host.write("rt", "4-5")
    (host.root / "rt/cpuset.cpus.partition").write_text("isolated\n")
    for _ in range(2):
        host.settle()
        assert host.cpus("user.slice") == "0-3,6-7"
    (host.root / "rt/cpuset.cpus.partition").write_text("member\n")
    host.settle()
    assert host.groups() == dict.fromkeys(BEFORE, "0-7")


def test_a_group_that_keeps_its_cpus_does_not_keep_the_others_from_theirs(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def write_text(path: Path, text: str) -> int:
        if path.parent.name == "docker":
            raise OSError(22, os.strerror(22), str(path))
        return real(path, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(Conflict, match=r"^The kernel does not let 'docker' leave CPUs 2-3"):
        host.settle(2, 3)
    assert host.groups() == {
        "init.scope": "0-1,4-7",
        "system.slice": "0-1,4-5",
        "user.slice": "0-1,4-7",
        "docker": "2-3,6",
    }
    host.settle()
    assert host.groups() == AS_BEFORE
    assert not host.memory.exists()


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"user.slice": 7}', "null"])
def test_a_memory_that_cannot_be_read(host: Host, broken: str) -> None:
    host.settle(4, 5)
    host.memory.write_text(broken)
    host.settle(4, 5)
    assert host.cpus("user.slice") == "0-3,6-7"
    host.settle()
    assert host.groups() == dict.fromkeys(BEFORE, "0-7")
    assert not host.memory.exists()


def test_a_group_that_ends_while_it_is_settled(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text

    def read_text(path: Path) -> str:
        if path.parent.name == "docker":
            raise FileNotFoundError(2, os.strerror(2), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    host.settle(4, 5)
    monkeypatch.undo()
    assert host.cpus("user.slice") == "0-3,6-7"


def test_what_is_shielded_and_when_it_is_not(host: Host) -> None:
    vcpus = f"{SCOPES[0][1:]}/vcpus"
    host.write(vcpus, "4-5")
    host.write(f"{vcpus}/4711", "4")
    for group, cpus in ((vcpus, "4-5"), (f"{vcpus}/4711", "4")):
        (host.root / group / "cpuset.cpus.effective").write_text(f"{cpus}\n")
    (host.root / vcpus / "4711/cgroup.threads").write_text("4711\n")
    assert host.pool.shielded_threads(SCOPES[0]) == {4711: frozenset({4})}
    assert host.pool.orphans(frozenset()) == SCOPES[:1]
    assert host.pool.orphans(frozenset(SCOPES)) == []
    (host.root / vcpus / "cpuset.cpus.effective").write_text("4\n")  # CPU 5 went offline
    assert host.pool.shielded_threads(SCOPES[0]) is None
    host.write(vcpus, "0-7")  # given back; what is still in there may never end
    assert host.pool.orphans(frozenset()) == []


def test_what_it_needs(host: Host) -> None:
    assert host.pool.lacks() == "Shielding needs the cgroup v2 hierarchy with its cpuset controller"
    (host.root / "cgroup.controllers").write_text("cpu memory\n")
    assert host.pool.lacks() != ""
    (host.root / "cgroup.controllers").write_text("cpuset cpu memory\n")
    assert host.pool.lacks() == ""


def test_a_file_that_cannot_be_opened_just_now_says_nothing_of_what_there_is(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the helper's start it chose another mechanism then: whoever had a shield lost it, and real time with it."""
    (host.root / "cgroup.controllers").write_text("cpuset cpu memory\n")
    monkeypatch.setattr(Path, "read_text", full)
    with pytest.raises(OSError, match="Too many open files"):
        host.pool.lacks()


@pytest.mark.parametrize("spare", range(7))
@pytest.mark.parametrize("later", [(), (4, 5), (6,)])
def test_folders_that_cannot_be_opened_just_now_are_not_empty(
    host: Host, monkeypatch: pytest.MonkeyPatch, spare: int, later: tuple[int, ...]
) -> None:
    """Python 3.13's Path.glob takes them for that: what groups had before was forgotten, and never came back."""
    host.settle(4, 5)
    left, scandir = itertools.count(spare, -1), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scandir(path) if next(left) > 0 else full())
    with pytest.raises(OSError, match="Too many open files"):
        host.settle(*later)
    monkeypatch.undo()
    host.settle()
    assert host.groups() == AS_BEFORE
    assert [host.cpus(scope) for scope in SCOPES] == ["0-7", "0-7"]


def full(*_: object) -> NoReturn:
    """No file can be opened: any user can fill the host's table of open files, where its limit is low."""
    raise OSError(errno.ENFILE, "Too many open files in system")


def test_the_place_of_its_memory_is_the_helpers_own() -> None:
    assert Path("/run/qemu-launcher/pool") == pool.MEMORY
