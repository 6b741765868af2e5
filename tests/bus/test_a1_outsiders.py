"""Attack A1: every member, by those who may not, and without polkit; the helper's real operations, under strace.

Each time the same is done by a member in the same world: strace, the recording systemd1 and the helper's records then
show the acts whose absence is asserted.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bus.calls import OTHERS, using
from bus.client import INTERACTIVE, Client
from bus.systemd1 import as_qemu, recording_systemd
from bus.world import BOB, EVERYBODY, NOBODY, User, World, slice_of, world

FREE = {"ListVms", "GetLimits", "GetLimitsOf", "Release"}  # about one's own VMs
Answers = dict[str, str]


class Attempt(NamedTuple):
    """What came of calling every member."""

    answers: Answers
    acts: set[str]
    changed: list[str]


def every_member(client: Client, pid: int, user: User) -> Answers:
    """All ten, and what reaches beyond one's own; about a child of the caller's, which passes all other checks."""
    vm = "win11"
    calls: dict[str, tuple[str, list[Any]]] = {
        "SetMemlock": ("ust", [pid, vm, 2**20]),
        "SetScheduler": ("usausu", [pid, vm, [pid], "batch", 0]),
        "PinThreads": ("usa(uaub)au", [pid, vm, [[pid, [0], False]], []]),
        "CheckMemlock": ("st", [vm, 2**20]),
        "CheckScheduler": ("sa(uaub)su", [vm, [[2, [0], False]], "batch", 0]),
        "CheckPins": ("sa(uaub)au", [vm, [[2, [0], False]], []]),
        "ListVms": ("b", [False]),
        "GetLimits": ("", []),
        "GetLimitsOf": ("u", [user.uid]),
        "Release": ("us", [user.uid, vm]),
    }
    answers = {name: client.call(name, *call, flags=INTERACTIVE).short for name, call in calls.items()}
    others = {f"{name} of another's": client.call(name, *call).short for name, call in OTHERS.items()}
    return answers | others


def attempt(host: World, user: User) -> Attempt:
    """Call every member as `user`, from a session of his, about a child of his; tell what that did."""
    host.log_in(user)
    (host.cgroups / slice_of(user).lstrip("/")).mkdir(parents=True, exist_ok=True)
    (host.cgroups / "cpuset.cpus.isolated").touch()
    (told, tell), (gate, opener), (done, finish) = os.pipe(), os.pipe(), os.pipe()

    def run() -> Answers:
        pid = as_qemu()
        os.write(tell, str(pid).encode())
        os.read(gate, 1)
        with Client(host.socket) as client:
            answers = every_member(client, pid, user)
        os.write(finish, b"x")
        os.read(gate, 1)
        return answers

    child = host.run_as(user, run)
    os.close(tell)
    os.close(finish)
    pid = int(os.read(told, 10))
    host.place(pid, host.folder / f"cgroup-{user.uid}")
    before, seen = state(host, pid), len(host.traced())
    os.write(opener, b"x")
    os.read(done, 1)
    after, traced = state(host, pid), host.traced()[seen:]
    os.write(opener, b"x")
    answers = child.result()
    for end in (told, gate, opener, done):
        os.close(end)
    return Attempt(answers, {kind(call, pid) for call in traced}, [key for key in after if after[key] != before[key]])


def kind(call: str, pid: int) -> str:
    """What a traced system call tried to act on."""
    name, _, rest = call.partition("(")
    return name if rest.startswith(f"{pid},") else "cgroup" if "/sys/fs/cgroup" in rest else f"other: {call}"


def state(host: World, pid: int) -> dict[str, Any]:
    """All that the acts would change."""
    grants: list[str] = []
    with suppress(FileNotFoundError):
        grants = os.listdir(host.grants)
    files = {path: path.read_text() for path in host.cgroups.rglob("*") if path.is_file()}
    units = (host.folder / "units.jsonl").read_text()
    kernel = [os.sched_getscheduler(pid), os.sched_getaffinity(pid), Path(f"/proc/{pid}/limits").read_text()]
    return {"policy": kernel, "grants": grants, "cgroups": files, "units": units}


def as_it_should(host: World, member: User) -> None:
    """The positive control: a member's calls act, and that shows everywhere the refused ones must not show."""
    done = attempt(host, member)
    assert [done.answers[name] for name in ("SetMemlock", "SetScheduler", "Release", "ListVms")] == ["ok"] * 4
    # The fake cgroup tree has no threaded cgroups; that it was tried is what counts here.
    assert done.answers["PinThreads"] == "Failed"
    assert {"prlimit64", "sched_setscheduler", "cgroup"} <= done.acts
    assert {"policy", "cgroups", "units"} <= set(done.changed)
    # Its VM has ended: let the helper clean up after it now.
    assert using(host, member, lambda client: client.call("GetLimits").short) == "ok"


@pytest.fixture(autouse=True)
def _needs_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")


@pytest.mark.parametrize("user", [BOB, NOBODY], ids=lambda user: user.name)
@pytest.mark.parametrize("polkit", [True, False], ids=["with-polkit", "without-polkit"])
def test_a1_outsiders_are_stopped_by_the_bus(user: User, member: User, *, polkit: bool) -> None:
    with world(real=True, trace=True) as host, recording_systemd(host):
        as_it_should(host, member)
        if not polkit:
            host.stop_polkit()
        answers, acts, changed = attempt(host, user)
        assert set(answers.values()) == {"AccessDenied"}
        assert (acts, changed) == (set(), [])


@pytest.mark.parametrize("polkit", [True, False], ids=["with-polkit", "without-polkit"])
def test_a1_where_the_bus_lets_everybody_in_polkit_does_not(member: User, *, polkit: bool) -> None:
    """An administrator may open the bus to all, to have them asked for a password; the first wall is gone then."""
    with world(real=True, trace=True, bus_policies=[EVERYBODY]) as host, recording_systemd(host):
        as_it_should(host, member)
        if not polkit:
            host.stop_polkit()
        answers, acts, changed = attempt(host, BOB)
        assert {name for name, answer in answers.items() if answer == "ok"} == FREE
        assert {answers[name] for name in answers.keys() - FREE} == {"NotAuthorized"}
        assert (acts, changed) == (set(), [])
        # The uid that stands for everybody whom the kernel cannot name is nobody's.
        answers, acts, changed = attempt(host, NOBODY)
        assert set(answers.values()) == {"NotAuthorized"}
        assert (acts, changed) == (set(), [])


def test_a1_without_polkit_members_are_outsiders(member: User) -> None:
    with world(real=True, trace=True) as host, recording_systemd(host):
        as_it_should(host, member)
        host.stop_polkit()
        answers, acts, changed = attempt(host, member)
        # What needs no authorisation, works: giving back above all.
        assert {name for name, answer in answers.items() if answer == "ok"} == FREE
        assert {answers[name] for name in answers.keys() - FREE} == {"NotAuthorized"}
        assert (acts, changed) == (set(), [])
