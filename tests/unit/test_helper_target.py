"""Every fact about a target (qemu-launcher-helper(8), THREAT MODEL, 11) by itself.

A real process and a real pidfd, with /proc's words changed one at a time.
"""

import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from qemu_launcher_helper import privileges, target
from qemu_launcher_helper.contract import Caller, TargetRefused
from qemu_launcher_helper.target import Target
from unit.alone import alone, descriptors
from unit.proc_facts import Facts

VM = "win11"
SCOPE = "qemu-launcher-1000-win11.scope"
CALLER = Caller(":1.7", 1000, 4242, "alice", 1000)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.fixture
def facts(tmp_path: Path, child: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch) -> Facts:
    monkeypatch.setattr(target, "PROC", tmp_path)
    monkeypatch.setattr(target, "SYSTEMD", True)
    monkeypatch.setattr(target, "UNLIMITED", False)
    return Facts(tmp_path, child.pid)


def verify(facts: Facts, **more: tuple[str, ...]) -> str:
    with Target(facts.pid) as opened:
        return opened.verify(CALLER, VM, **more)


def test_the_callers_own_child_in_his_session_passes(facts: Facts) -> None:
    assert verify(facts) == "/user.slice/user-1000.slice/session-3.scope"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Tgid": "77"}, "is a thread, not a process"),
        ({"PPid": "4243"}, "is not a child of yours"),
        ({"PPid": "42421"}, "is not a child of yours"),
        ({"Uid": "1001\t1001\t1001\t1001"}, "does not run as you"),
        ({"Uid": "1000\t0\t1000\t1000"}, "does not run as you"),
        ({"Uid": "1000\t1000\t0\t1000"}, "does not run as you"),
        ({"Uid": "1000"}, "does not run as you"),
        ({"Gid": "1000\t42\t42\t42"}, "runs with mixed group ids"),
        ({"Gid": ""}, "runs with mixed group ids"),
        ({"NSpid": "77\t1"}, "is in another PID namespace"),
        ({"NSpid": ""}, "is in another PID namespace"),
        ({"State": "Z (zombie)"}, "is dead"),
        ({"State": "X (dead)"}, "is dead"),
        ({"Kthread": "1"}, "is not yours to name"),
    ],
)
def test_one_wrong_fact_refuses(facts: Facts, change: dict[str, str], words: str) -> None:
    facts.say(**change)
    with pytest.raises(TargetRefused, match=f"Process {facts.pid} {words}"):
        verify(facts)


@pytest.mark.parametrize("key", ["Tgid", "PPid", "Uid", "Gid", "NSpid", "State"])
def test_a_missing_fact_refuses(facts: Facts, key: str) -> None:
    del facts.status[key]
    facts.say()
    with pytest.raises(TargetRefused):
        verify(facts)


def test_another_user_namespace(facts: Facts) -> None:
    facts.write("uid_map", "         0       1000          1\n")
    with pytest.raises(TargetRefused, match="is in another user namespace"):
        verify(facts)


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/user.slice/user-1000.slice/session-c1.scope", "session-c1.scope"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.scope", "user@1000.service"),
        (f"/user.slice/user-1000.slice/{SCOPE}", SCOPE),
        (f"/user.slice/user-1000.slice/{SCOPE}/emulator", SCOPE),
    ],
)
def test_places_a_target_may_live_in(facts: Facts, cgroup: str, unit: str) -> None:
    facts.write("cgroup", f"0::{cgroup}\n")
    assert verify(facts) == f"/user.slice/user-1000.slice/{unit}"


@pytest.mark.parametrize(
    "cgroup",
    [
        "/",
        "/init.scope",
        "/system.slice/ssh.service",
        "/user.slice/user-1000.slice",
        "/user.slice/user-1001.slice/session-3.scope",
        "/user.slice/user-1000.slice/user@1001.service/app.slice",
        "/user.slice/user-1000.slice/qemu-launcher-1000-other.scope",
        "/user.slice/user-1000.slice/qemu-launcher-1000-win11xscope",
        "/x/user.slice/user-1000.slice/session-3.scope",
        "/machine.slice/libpod-1.scope/user.slice/user-1000.slice/session-3.scope",
        "/user.slice/user-1000.slice/session-3.scope (deleted)",
        "/../user.slice/user-1000.slice/session-3.scope",
        f"/system.slice/{SCOPE}",
    ],
)
def test_places_it_may_not(facts: Facts, cgroup: str) -> None:
    facts.write("cgroup", f"0::{cgroup}\n")
    with pytest.raises(TargetRefused, match="in no session or service of yours"):
        verify(facts)


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/", ""),
        ("/3", "/3"),
        ("/c12", "/c12"),
        ("/c12/x", "/c12"),
        ("/rc.init", "/rc.init"),
        (f"/{SCOPE}", f"/{SCOPE}"),
        (f"/{SCOPE}/emulator", f"/{SCOPE}"),
        ("/user.slice/user-1000.slice/session-3.scope", "/user.slice/user-1000.slice/session-3.scope"),
        (f"/user.slice/user-1000.slice/{SCOPE}/vcpus/7", f"/user.slice/user-1000.slice/{SCOPE}"),
    ],
)
def test_places_it_may_be_in_without_systemd(
    facts: Facts, monkeypatch: pytest.MonkeyPatch, cgroup: str, unit: str
) -> None:
    monkeypatch.setattr(target, "SYSTEMD", False)
    facts.write("cgroup", f"0::{cgroup}\n")
    assert verify(facts) == unit


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/", ""),
        ("/ssh", "/ssh"),
        ("/openrc.xdm/x", "/openrc.xdm/x"),
        (f"/{SCOPE}/x", f"/{SCOPE}"),
        ("/qemu-launcher-1000-other.scope", None),
        ("/x/qemu-launcher-1000-other.scope/y", None),
    ],
)
def test_where_groups_limit_nothing_any_will_do(
    facts: Facts, monkeypatch: pytest.MonkeyPatch, cgroup: str, unit: str | None
) -> None:
    """But for those of other VMs."""
    monkeypatch.setattr(target, "SYSTEMD", False)
    monkeypatch.setattr(target, "UNLIMITED", True)
    facts.write("cgroup", f"2:memory:/x\n0::{cgroup}\n")
    if unit is not None:
        assert verify(facts) == unit
        return
    with pytest.raises(TargetRefused, match="in no session or service of yours"):
        verify(facts)


@pytest.mark.parametrize(
    "cgroup",
    [
        "/openrc.ssh",
        "/openrc.ssh/3",
        "/rc.initial",
        "/rcxinit",
        "/x/rc.init",
        "/3x",
        "/cc3",
        "/x/3",
        "/docker/4711",
        "/qemu-launcher-1000-other.scope",
        "/qemu-launcher-1001-win11.scope",
        "/user.slice/user-1000.slice",
        "/user.slice/user-1001.slice/session-3.scope",
        "//",
    ],
)
def test_places_it_may_not_be_in_without_systemd(facts: Facts, monkeypatch: pytest.MonkeyPatch, cgroup: str) -> None:
    monkeypatch.setattr(target, "SYSTEMD", False)
    facts.write("cgroup", f"0::{cgroup}\n")
    with pytest.raises(TargetRefused, match="in no session or service of yours"):
        verify(facts)


def test_a_service_that_the_administrator_named(facts: Facts) -> None:
    for unit in ("my-vm.service", SCOPE):
        facts.write("cgroup", f"0::/system.slice/{unit}\n")
        assert verify(facts, services=("my-vm.service",)) == f"/system.slice/{unit}"
    facts.write("cgroup", "0::/system.slice/my-vmxservice\n")
    with pytest.raises(TargetRefused):
        verify(facts, services=("my-vm.service",))


def test_a_process_that_ended_is_refused_although_its_descriptors_are_held(
    facts: Facts, child: "subprocess.Popen[bytes]"
) -> None:
    with Target(facts.pid) as opened:
        opened.verify(CALLER, VM)
        child.kill()
        child.wait()
        assert not opened.is_alive()
        with pytest.raises(TargetRefused, match="is dead"):
            opened.verify(CALLER, VM)


def test_no_process_no_target() -> None:
    with subprocess.Popen(["/bin/true"]) as ended:
        ended.wait()
    with pytest.raises(TargetRefused, match="does not exist"):
        Target(ended.pid)


def test_a_thread_is_no_process(child: "subprocess.Popen[bytes]") -> None:
    code = "import threading as t; x = t.Thread(target=t.Event().wait); x.start(); print(x.native_id, flush=True)"
    with subprocess.Popen(["/usr/bin/python3", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        tid = int(process.stdout.readline())
        with pytest.raises(TargetRefused):
            Target(tid)
        with Target(process.pid) as opened:
            assert opened.tids() == {process.pid, tid}
            assert set(opened.verify_threads([tid])) == {tid}
            with pytest.raises(TargetRefused, match=f"{child.pid} is not a thread of process {process.pid}"):
                opened.verify_threads([tid, child.pid])
        process.kill()


def test_comm_catches_mistakes(facts: Facts) -> None:
    with Target(facts.pid) as opened:
        opened.verify(CALLER, VM, comm=["qemu-kvm", "qemu-system-*"])
        facts.say(Name="evil\x1b[2J")
        opened.verify(CALLER, VM)
        with pytest.raises(TargetRefused, match="is not a QEMU by its name") as caught:
            opened.verify(CALLER, VM, comm=["qemu-kvm", "qemu-system-*"])
    assert str(caught.value).isprintable()


def test_a_recorded_process_is_found_by_number_and_start_time(child: "subprocess.Popen[bytes]") -> None:
    with Target(child.pid) as opened:
        start_time = opened.start_time
    with Target(child.pid, start_time) as again:
        assert again.pid == child.pid
    with pytest.raises(TargetRefused, match="does not exist"):
        Target(child.pid, start_time + 1)


def test_descriptors_are_closed(child: "subprocess.Popen[bytes]") -> None:
    def act() -> None:
        before = descriptors()
        for _ in range(10):
            with Target(child.pid):
                pass
            with pytest.raises(TargetRefused):
                Target(child.pid, 1)
        assert descriptors() == before

    alone(act)


def test_facts_cannot_be_swapped_under_an_open_target(facts: Facts, tmp_path: Path) -> None:
    with Target(facts.pid) as opened:
        shutil.rmtree(tmp_path / str(facts.pid))
        with pytest.raises(TargetRefused, match="is gone"):
            opened.verify(CALLER, VM)


@pytest.mark.parametrize(
    ("before", "limit", "keep", "kept_after"),
    [
        ((200_000, 200_000), (-1, -1), {1, 2}, set()),  # lifted: what was granted earlier may be rtkit's by now
        ((200_000, -1), (-1, -1), {1, 2}, {1, 2}),  # it looks at the hard limit
        ((-1, -1), (-1, -1), {1, 2}, {1, 2}),  # lifted already: it has given none
        ((-1, -1), (200_000, 200_000), set(), set()),  # put back
        ((200_000, 200_000), (-1, -1), set(), set()),  # put back, where the process has lowered it meanwhile
    ],
)
def test_nobody_gets_real_time_while_its_limit_changes(
    facts: Facts,
    monkeypatch: pytest.MonkeyPatch,
    before: tuple[int, int],
    limit: tuple[int, int],
    keep: set[int],
    kept_after: set[int],
) -> None:
    """Before: a lower limit kills who has it. After: rtkit may have given it until then, and does not any more."""
    done: list[object] = []

    def rlimit(_: Target, which: int, wanted: tuple[int, int]) -> tuple[int, int]:
        done.append((which, wanted))
        return before

    monkeypatch.setattr(Target, "take_realtime", lambda _, kept: done.append(set(kept)))
    monkeypatch.setattr(Target, "rlimit", rlimit)
    with Target(facts.pid) as opened:
        opened.set_rttime(limit, keep)
    assert done == [keep, (resource.RLIMIT_RTTIME, limit), kept_after]


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ((1_000_000, 200_000), (200_000, 200_000)),  # as after SIGXCPU, which each time raises the soft one by a second
        ((-1, 200_000), (200_000, 200_000)),
        ((50_000, 200_000), (50_000, 200_000)),
        ((50_000, -1), (50_000, -1)),
        ((-1, -1), (-1, -1)),
    ],
)
def test_a_limit_is_told_so_that_it_can_be_put_back(
    facts: Facts, monkeypatch: pytest.MonkeyPatch, found: tuple[int, int], told: tuple[int, int]
) -> None:
    monkeypatch.setattr(privileges, "raised", lambda _: nullcontext())
    monkeypatch.setattr(resource, "prlimit", lambda *_: found)
    with Target(facts.pid) as opened:
        assert opened.rlimit(resource.RLIMIT_RTTIME) == told
