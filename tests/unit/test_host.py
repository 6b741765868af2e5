"""The host's CPUs as /sys tells them, and definitions that do not fit them."""

from pathlib import Path

import pytest

from qemu_launcher import fitting, host
from qemu_launcher.errors import DefinitionError, LauncherError
from unit.reading import launcher, shown


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with CPUs 0-3, of which 3 is offline, two to a core (0 and 2, 1 and 3)."""
    folder = tmp_path / host.CPU_FOLDER
    folder.mkdir(parents=True)
    (folder / "possible").write_text("0-3\n")
    (folder / "online").write_text("0-2\n")
    for cpu, siblings in ((0, "0,2"), (1, "1"), (2, "0,2")):
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    return tmp_path


def test_read_host(root: Path) -> None:
    assert host.read_host(root) == host.Host(
        possible=frozenset({0, 1, 2, 3}),
        online=frozenset({0, 1, 2}),
        siblings={0: frozenset({0, 2}), 1: frozenset({1}), 2: frozenset({0, 2})},
    )


def test_without_topology_each_cpu_is_a_core(root: Path) -> None:
    (root / host.CPU_FOLDER / "cpu2" / "topology" / "thread_siblings_list").unlink()
    assert host.read_host(root).siblings[2] == frozenset({2})


def test_this_host() -> None:
    here = host.read_host()
    assert here.online <= here.possible
    assert here.siblings.keys() == here.online


def test_no_sys(tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match=r"^cannot read the host's CPUs from .*/online: "):
        host.read_host(tmp_path)


def test_cpus_that_are_online(root: Path) -> None:
    """Asked for alone, they may stay unknown."""
    assert host.online_cpus(root) == frozenset({0, 1, 2})
    (root / host.CPU_FOLDER / "online").write_text("all\n")
    assert host.online_cpus(root) is None
    (root / host.CPU_FOLDER / "online").unlink()
    assert host.online_cpus(root) is None


def test_nonsense_in_sys(root: Path) -> None:
    (root / host.CPU_FOLDER / "possible").write_text("all\n")
    with pytest.raises(LauncherError, match=r"^cannot read the host's CPUs from .*/possible: 'all' is no CPU number$"):
        host.read_host(root)


@pytest.mark.parametrize("keys", ["", "vcpu_pinning: [0, 1, 2]", "vcpu_pinning: {0: {0: {0: 2}}}"])
def test_definitions_that_fit(root: Path, keys: str) -> None:
    fitting.validate_against_host(launcher(keys), host.read_host(root))


@pytest.mark.parametrize("keys", ["vcpu_pinning: [9, 0, 3]", "vcpu_pinning: {0: {0: {0: 9, 1: 0, 2: 3}}}"])
def test_definitions_that_do_not_fit(root: Path, keys: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        fitting.validate_against_host(launcher(keys), host.read_host(root))
    first, second, hint = shown(caught.value).splitlines()
    assert first.split(": ", 1)[1] == "host CPU 9 does not exist; this host has 0-3"
    assert second.split(": ", 1)[1] == "host CPU 3 is offline"
    assert hint == "    use another, or bring it online: echo 1 | sudo tee /sys/devices/system/cpu/cpu3/online"
    assert first.startswith("3:")


def refusal_of(root: Path, keys: str) -> str:
    with pytest.raises(DefinitionError) as caught:
        fitting.validate_against_host(launcher(keys, "[object: [iothread, id: io0]]"), host.read_host(root))
    return shown(caught.value)


def test_every_key_that_names_cpus_is_checked(root: Path) -> None:
    message = refusal_of(root, "vcpu_pinning: [0-9]\nemulator_pinning: [1, 3]\niothread_pinning: {io0: 12}")
    assert [line.split("; ")[0] for line in message.splitlines() if not line.startswith("    ")] == [
        "3:18: host CPU 4-9 does not exist",
        "4:25: host CPU 3 is offline",
        "5:27: host CPU 12 does not exist",
    ]


def test_other_threads_keep_off_the_whole_cores_of_a_shield(root: Path) -> None:
    """0 and 2 are siblings: who shields 0 reserves 2 as well."""
    assert refusal_of(root, "vcpu_pinning: [0]\nemulator_pinning: [1, 0]") == (
        "4:25: emulator_pinning may not run on host CPU 0, which is shielded: vCPUs are pinned there\n"
        "    use CPUs outside of 0,2, or write isolation: cpuset"
    )
    assert refusal_of(root, "vcpu_pinning: [0]\niothread_pinning: {io0: [1, 2]}") == (
        "4:31: iothread 'io0' may not run on host CPU 2, which is shielded: a sibling of it, in the same core, "
        "has a vCPU\n    use CPUs outside of 0,2, or write isolation: cpuset"
    )


@pytest.mark.parametrize("isolation", ["cpuset", "affinity"])
def test_other_threads_may_share_where_nothing_is_shielded(root: Path, isolation: str) -> None:
    keys = f"vcpu_pinning: [0]\nemulator_pinning: [0, 1]\niothread_pinning: {{io0: 2}}\nisolation: {isolation}"
    fitting.validate_against_host(launcher(keys, "[object: [iothread, id: io0]]"), host.read_host(root))
