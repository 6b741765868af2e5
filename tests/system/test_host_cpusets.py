"""Others who keep CPUs for themselves by cpusets: containers and libvirt's guests, and those of an administrator.

The cgroups are the ones that docker's cgroupfs driver and libvirt make, with a process in each.
"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from system import host
from system.claims import Claimant
from system.people import User
from system.vms import define

pytestmark = pytest.mark.hosts("trixie", why="it is about what the kernel says to partitions")

DOCKER = host.CGROUP / "docker"
# systemd.unit(5): \x2d is a hyphen, in a name where those mean something else.
GUEST = "machine-qemu\\x2d1\\x2dwin10.scope"


@pytest.fixture
def docker() -> Iterator[Callable[[str, str], int]]:
    """Starts a container: docker(its ID, CPUs) -> the PID of what runs in it; all end with the test."""
    started: dict[Path, subprocess.Popen[bytes]] = {}
    (host.CGROUP / "cgroup.subtree_control").write_text("+cpuset")
    DOCKER.mkdir()
    (DOCKER / "cgroup.subtree_control").write_text("+cpuset")

    def start(name: str, cpus: str) -> int:
        (DOCKER / name).mkdir()
        (DOCKER / name / "cpuset.cpus").write_text(cpus)
        process = started[DOCKER / name] = subprocess.Popen(["sleep", "infinity"])
        (DOCKER / name / "cgroup.procs").write_text(str(process.pid))
        return process.pid

    yield start
    for folder, process in started.items():
        process.kill()
        process.wait()
        host.wait_for("the container is empty", partial(_is_empty, folder))
        folder.rmdir()
    DOCKER.rmdir()


def _is_empty(cgroup: Path) -> bool:
    return not (cgroup / "cgroup.procs").read_text()


@contextmanager
def guest_of_libvirt(cpus: str) -> Iterator[int]:
    """A scope as machined makes it, and in it libvirt's groups of threads, one vCPU with its CPUs; the PID."""
    command = ["systemd-run", "--scope", "--quiet", "--slice=machine.slice", f"--unit={GUEST}"]
    process = subprocess.Popen([*command, "--property=Delegate=yes", "sleep", "infinity"])
    scope = host.CGROUP / "machine.slice" / GUEST
    try:
        host.wait_for(
            "libvirt's guest runs", lambda: (scope / "cgroup.procs").exists() and host.cgroup(process.pid) == scope
        )
        libvirt = scope / "libvirt"
        libvirt.mkdir()
        (libvirt / "cgroup.procs").write_text(str(process.pid))
        (scope / "cgroup.subtree_control").write_text("+cpuset")
        vcpu = libvirt / "vcpu0"
        vcpu.mkdir()
        (vcpu / "cgroup.type").write_text("threaded")
        (libvirt / "cgroup.subtree_control").write_text("+cpuset")
        (vcpu / "cpuset.cpus").write_text(cpus)
        (vcpu / "cgroup.threads").write_text(str(process.pid))
        yield process.pid
    finally:
        process.kill()
        process.wait()
        subprocess.run(["systemctl", "stop", GUEST], check=False, stderr=subprocess.DEVNULL)


def test_others_make_room_and_get_their_cpus_back(
    program: Claimant, alice: User, docker: Callable[[str, str], int]
) -> None:
    """Whether they were there before the shield or came while it was; who has other CPUs notices nothing.

    `check` names them beforehand.
    """
    child = program.spawn(2)
    before, beside = docker("a" * 64, "4-5"), docker("beside", "6")
    with guest_of_libvirt("5") as guest:
        assert [host.cpus_of(pid) for pid in (before, beside, guest)] == [{4, 5}, {6}, {5}]
        define(alice, "vm", {"vcpu_pinning": [4, 5]}, cpus=2)
        told = alice.command("check", "vm").stdout
        meanwhile = "while this VM runs, it runs wherever there is room"
        for holder, cpus in (("the docker container aaaaaaaaaaaa", "CPUs 4-5"), ("libvirt's VM win10", "CPU 5")):
            assert f"warning  {holder} is kept on {cpus} (cpuset.cpus): {meanwhile}\n" in told, told
        assert "docker update --cpuset-cpus 0-3,6-7 aaaaaaaaaaaa\n" in told
        assert "beside" not in told
        assert told.endswith("vm would start: 2 warnings\n")
        assert program.pin(child, "vm", 4, 5).error == "ok"
        later = docker("later", "3-4")
        assert host.isolated() == {4, 5}
        assert host.trespassers({4, 5}, child.tids, since=host.born(child.pid)) == []
        room = host.online() - {4, 5}
        assert [host.cpus_of(pid) for pid in (before, beside, guest, later)] == [room, {6}, room, {3}]
        program.end(child.pid)
        assert program.call("GetLimits", "").error == "ok"
        assert host.isolated() == frozenset()
        assert [host.cpus_of(pid) for pid in (before, beside, guest, later)] == [{4, 5}, {6}, {5}, {3, 4}]


def test_a_partition_of_somebody_elses_is_not_touched(
    program: Claimant, alice: User, docker: Callable[[str, str], int]
) -> None:
    """Who has made docker's cgroup a partition keeps it. `check` says whose the CPUs are before the kernel says no."""
    child = program.spawn(2)
    alone, shared = docker("a" * 64, "4"), docker("b" * 64, "3")
    (DOCKER / "cpuset.cpus").write_text("2-4")
    (DOCKER / "cpuset.cpus.partition").write_text("root")
    try:
        assert (DOCKER / "cpuset.cpus.partition").read_text() == "root\n"
        answer = program.pin(child, "vm", 4, 5)
        assert (answer.error, "another cpuset holds some" in answer.text) == ("Conflict", True), answer
        assert (host.isolated(), host.exclusive()) == (frozenset(), {})
        assert [host.cpus_of(pid) for pid in (alone, shared)] == [{4}, {3}]

        define(alice, "vm", {"vcpu_pinning": [4, 5]}, cpus=2)
        checked = alice.command("check", "vm")
        assert checked.status == 2
        assert "error    the cgroup /docker has CPUs 2-4 for itself (cpuset.cpus.partition)\n" in checked.stdout
        assert "vm would not start: " in checked.stdout
    finally:
        (DOCKER / "cpuset.cpus.partition").write_text("member")
        (DOCKER / "cpuset.cpus").write_text("0-7")  # none would be ENOSPC, with processes in it
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert host.isolated() == {4, 5}
    assert host.cpus_of(shared) == {3}
