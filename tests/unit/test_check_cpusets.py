"""Containers, libvirt's guests and units that have CPUs of their own, as `check` finds them in the cgroup tree."""

from pathlib import Path

import pytest

from qemu_launcher.check import cpusets
from qemu_launcher.check.finding import Finding
from unit.other_host import OtherHost, the_only, told
from unit.reading import launcher

ID = "3f2a90c1b7d4" + "0" * 52
ONLINE = frozenset(range(8))


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    host = OtherHost(tmp_path)
    for path in ("/init.scope", "/system.slice", "/user.slice/user-1000.slice"):
        cgroup(host, path, "0-7")
    return host


def cgroup(host: OtherHost, path: str, cpus: str = "", *, partition: str = "member", used: bool = True) -> None:
    """One of the tree, as the kernel shows it."""
    folder = f"/sys/fs/cgroup{path}"
    host.write(f"{folder}/cpuset.cpus", f"{cpus}\n")
    host.write(f"{folder}/cpuset.cpus.effective", f"{cpus or '0-7'}\n")
    host.write(f"{folder}/cpuset.cpus.partition", f"{partition}\n")
    host.write(f"{folder}/cgroup.events", f"populated {used:d}\nfrozen 0\n")


def others(host: OtherHost, more: str = "") -> list[Finding]:
    definition = launcher(f"vcpu_pinning: [4, 5]\n{more}", "[]")
    return list(cpusets.others(definition, frozenset({4, 5}), ONLINE, 1000, host.tree))


@pytest.mark.parametrize(
    ("path", "name", "fix"),
    [
        (f"/docker/{ID}", "the docker container 3f2a90c1b7d4", "docker update --cpuset-cpus 0-3,6-7 3f2a90c1b7d4"),
        (f"/system.slice/docker-{ID}.scope", "the docker container 3f2a90c1b7d4", "docker update --cpuset-cpus 0-3"),
        (f"/machine.slice/libpod-{ID}.scope/container", "the podman container 3f2a90c1b7d4", "podman update --cpuset"),
        (
            f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope",
            "the CRI container 3f2a90c1b7d4",
            "give the container other CPUs",
        ),
        ("/machine.slice/lxc.payload.web", "the LXC container web", "lxc.cgroup2.cpuset.cpus = 0-3,6-7"),
        (
            "/machine.slice/machine-qemu\\x2d1\\x2dwin{10}.scope/libvirt/vcpu0",
            "libvirt's VM win{10}",
            "virsh vcpupin win{10} shows and changes",
        ),
        (
            "/system.slice/backup.service",
            "the unit backup.service",
            "sudo systemctl set-property backup.service AllowedCPUs=0-3,6-7",
        ),
        ("/mine/deep", "the cgroup /mine/deep", "echo 0-3,6-7 | sudo tee /sys/fs/cgroup/mine/deep/cpuset.cpus"),
    ],
)
def test_who_is_kept_there(host: OtherHost, path: str, name: str, fix: str) -> None:
    cgroup(host, path, "5-6")
    severity, text, found = the_only(others(host))
    assert (severity, text) == (
        "warning",
        f"{name} is kept on CPUs 5-6 (cpuset.cpus): while this VM runs, it runs on 6 only",
    )
    assert fix in found


def test_a_guest_of_libvirts_is_told_of_once(host: OtherHost) -> None:
    for index in (0, 1):
        cgroup(host, f"/machine.slice/machine-qemu\\x2d1\\x2dwin10.scope/libvirt/vcpu{index}", f"{4 + index}")
    assert told(others(host)) == [
        "warning: libvirt's VM win10 is kept on CPUs 4-5 (cpuset.cpus): while this VM runs, it runs wherever there is "
        "room"
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/lxc.payload.web", "the LXC container web"),
        ("/system.slice", "the unit system.slice"),
        ("/user.slice/user-1001.slice", "the unit user-1001.slice"),
        ("/user.slice/user-1000.slice/session-3.scope", "the unit session-3.scope"),
    ],
)
def test_a_sibling_that_would_be_left_nothing(host: OtherHost, path: str, name: str) -> None:
    """Whether anybody is in it or not."""
    cgroup(host, path, "4", used=False)
    assert the_only(others(host))[:2] == (
        "error",
        f"{name} may use nothing but CPU 4 (cpuset.cpus): the kernel refuses a shield that leaves it none",
    )
    assert others(host, "isolation: cpuset") == []


@pytest.mark.parametrize("path", ["/user.slice", "/user.slice/user-1000.slice", "/system.slice/old.service"])
def test_above_it_and_elsewhere_that_does_not_count(host: OtherHost, path: str) -> None:
    cgroup(host, path, "4", used=False)
    assert others(host) == []


def test_without_a_shield_it_is_shared(host: OtherHost) -> None:
    cgroup(host, f"/docker/{ID}", "4-5")
    assert told(others(host, "isolation: cpuset")) == [
        "note: the docker container 3f2a90c1b7d4 is kept on CPUs 4-5 (cpuset.cpus), and shares them with this VM"
    ]


@pytest.mark.parametrize("kind", ["root", "isolated"])
def test_a_partition_of_somebody_elses(host: OtherHost, kind: str) -> None:
    cgroup(host, "/docker", "4-6", partition=kind)
    cgroup(host, f"/docker/{ID}", "4-5", partition="root")
    severity, text, fix = the_only(others(host))
    assert (severity, text) == (
        "error",
        "the cgroup /docker has CPUs 4-6 for itself (cpuset.cpus.partition)",
    )
    assert fix.startswith("use other CPUs for the VM; or echo 0-3,6-7 | sudo tee")


def test_what_does_not_matter(host: OtherHost) -> None:
    """Other CPUs; nobody there; a partition that does not hold; our own VMs, whose owner the helper knows."""
    cgroup(host, f"/docker/{ID}", "0-3")
    cgroup(host, f"/docker/{'1' * 64}", "4-5", used=False)
    cgroup(host, "/system.slice/old.service", "", partition="isolated invalid (why)")
    scope = "/user.slice/user-1000.slice/qemu-launcher-1000-win11.scope"
    cgroup(host, scope)
    cgroup(host, f"{scope}/vcpus", "4-5", partition="isolated")
    assert others(host) == []
    assert others(OtherHost(host.root / "without cgroups")) == []


def test_many(host: OtherHost) -> None:
    for number in range(12):
        cgroup(host, f"/docker/{number:064x}", "4")
    # Their shortened names are all the same, as those of docker never are.
    assert len(others(host)) == 1
    for number in range(12):
        cgroup(host, f"/mine/{number}", "4")
    found = others(host)
    assert len(found) == 9
    assert found[-1].text == "and 5 more cpusets name CPUs of this VM"


def own(host: OtherHost, more: str, *unshielded: int) -> list[Finding]:
    definition = launcher(f"vcpu_pinning: [4, 5]\n{more}", "[]")
    return list(cpusets.own(definition, frozenset(unshielded), 1000, host.tree))


@pytest.mark.parametrize("path", ["/user.slice", "/user.slice/user-1000.slice"])
def test_a_slice_that_lacks_what_is_pinned(host: OtherHost, path: str) -> None:
    cgroup(host, path, "0-3")
    severity, text, fix = the_only(own(host, "emulator_pinning: [3, 6]", 3, 6))
    unit = path.rpartition("/")[2]
    assert (severity, text) == (
        "error",
        f"{unit} may only use CPUs 0-3 (AllowedCPUs=), and its threads besides the vCPUs are pinned to 6",
    )
    assert fix.endswith(f"sudo systemctl set-property {unit} AllowedCPUs=0-3,6")
    assert "and its threads are pinned to 4-5" in the_only(own(host, "isolation: cpuset", 4, 5))[1]


def test_a_shield_is_above_a_slices_cpus(host: OtherHost) -> None:
    cgroup(host, "/user.slice", "0-3")
    assert own(host, "", 2) == []
    assert own(host, "") == []
