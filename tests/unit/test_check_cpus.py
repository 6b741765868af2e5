"""CPUs that are there and are not, cores that are split, and real time."""

from pathlib import Path

import pytest

from qemu_launcher.check import cpus
from qemu_launcher.check.finding import Finding
from qemu_launcher.definition import VmDefinition
from unit.other_host import OtherHost, the_only, told
from unit.reading import launcher


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    """8 cores of two threads: CPU n and n + 8 are one."""
    host = OtherHost(tmp_path)
    host.cpus("0-15", siblings=8)
    return host


def pinned(where: str, more: str = "", qemu: str = "[]") -> VmDefinition:
    return launcher(f"vcpu_pinning: {where}\n{more}", qemu)


def there(
    host: OtherHost, definition: VmDefinition, online: str = "0-15", possible: str | None = None
) -> list[Finding]:
    return list(cpus.there(definition, host.cpus(online, siblings=0, possible=possible)))


def cores(host: OtherHost, definition: VmDefinition) -> list[Finding]:
    return list(cpus.cores(definition, host.cpus("0-15", siblings=8)))


def test_there(host: OtherHost) -> None:
    assert told(there(host, pinned("[2, 10]"))) == ["ok: host CPUs 2,10: there and online"]
    assert told(there(host, pinned("[2]"))) == ["ok: host CPU 2: there and online"]


def test_all_that_are_missing_in_one_line(host: OtherHost) -> None:
    severity, text, fix = the_only(there(host, pinned("[2, 16, 17, 18]"), possible="0-15"))
    assert severity == "error"
    assert text == ("win11.yml:3:21: there are no host CPUs 16-18, or not online; this host has 0-15, online 0-15")
    assert "lscpu" in fix


def test_vcpus_that_no_smp_makes(host: OtherHost) -> None:
    """A PC is refused with the definition; what another machine has is its maker's to say."""
    assert told(list(cpus.count(pinned("[2, 3]")))) == [
        "warning: win11.yml:3:21: vcpu_pinning names vCPU 1, and without -smp most machines have only vCPU 0"
    ]
    [one] = cpus.count(pinned("{0: {1: {0: 2}}}"))
    assert one.fix == "add - smp: [2, sockets: 1, cores: 2, threads: 1] to the section qemu"
    for fine in (
        pinned("[2]"),
        pinned("[2, 3]", qemu="[smp: 2]"),
        pinned("[2, 3]", qemu="[readconfig: x]"),
        launcher("emulator_pinning: 2"),
    ):
        assert list(cpus.count(fine)) == []


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        (
            pinned("[2]", qemu="[smp: 2]"),
            "warning: win11.yml:3:17: vCPU 1 is not pinned, and smp makes 2; "
            "it runs on any CPU that nobody has shielded",
        ),
        (
            pinned("[2, 3]", "emulator_pinning: 0-1", "[smp: [8, maxcpus: 16]]"),
            "warning: win11.yml:3:17: vCPUs 2-7 are not pinned, and smp makes 8; "
            "they run on host CPUs 0-1 (emulator_pinning)",
        ),
        (
            pinned("{0: {0: {0: 2}}}", qemu="[smp: 2]"),
            "note: win11.yml:3:17: vcpu_pinning names 1 vCPU, and smp makes 2; "
            "the others run on any CPU that nobody has shielded",
        ),
        (pinned("[2, 3]", qemu="[smp: [2, maxcpus: 4]]"), None),
        (pinned("[2, 3]", qemu="[smp: [1, maxcpus: 2]]"), None),
        (pinned("[2]", qemu="[readconfig: x]"), None),
    ],
)
def test_vcpus_that_nothing_pins(definition: VmDefinition, said: str | None) -> None:
    assert told(list(cpus.count(definition))) == ([] if said is None else [said])


def test_offline(host: OtherHost) -> None:
    severity, text, fix = the_only(there(host, pinned("[2, 15]"), online="0-14", possible="0-15"))
    assert (severity, text) == (
        "error",
        "win11.yml:3:21: there is no host CPU 15, or not online; this host has 0-15, online 0-14",
    )
    assert "echo 1 | sudo tee /sys/devices/system/cpu/cpu15/online" in fix


def test_other_threads_in_the_shield_are_refused_as_a_start_does(host: OtherHost) -> None:
    definition = pinned("[2]", "emulator_pinning: 10")
    [one] = cpus.there(definition, host.cpus("0-15", siblings=8))
    assert one.severity == "error"
    assert "emulator_pinning may not run on host CPU 10, which is shielded" in one.text


def test_whole_cores(host: OtherHost) -> None:
    assert told(cores(host, pinned("[2, 10, 3, 11]", qemu="[smp: '4,threads=2']"))) == [
        "ok: CPUs 2-3,10-11: whole cores"
    ]


def test_split_siblings_of_a_shield(host: OtherHost) -> None:
    severity, text, fix = the_only(cores(host, pinned("[2, 3, 11]", qemu="[]"))[:1])
    assert severity == "warning"
    assert text == "a shield is made of whole cores: besides CPU 2 it takes CPU 10, which nothing then uses"
    assert "pin vCPUs to 10 too" in fix


@pytest.mark.parametrize("isolation", ["cpuset", "affinity"])
def test_split_siblings_without_a_shield(host: OtherHost, isolation: str) -> None:
    severity, text, fix = the_only(cores(host, pinned("[2, 3]", f"isolation: {isolation}")))
    assert severity == "warning"
    assert text == "anybody may run on CPUs 10-11, on the same cores as CPUs 2-3"
    assert "isolation: shield" in fix


def test_without_smt_there_is_nothing_to_split(host: OtherHost) -> None:
    assert list(cpus.cores(pinned("[2, 3]"), OtherHost(host.root / "plain").cpus("0-3"))) == []


@pytest.mark.parametrize("where", ["[0, 8]", "[8]"])
def test_cpu_0(host: OtherHost, where: str) -> None:
    """Also where only its sibling is named: shields are whole cores."""
    [one] = [one for one in cores(host, pinned(where, qemu="[smp: '2,threads=2']")) if one.about == "cpu 0"]
    assert one.severity == "warning"
    assert one.text.startswith("the shield takes CPU 0, ")
    assert "real time" not in one.text
    assert one.fix == "use other CPUs; not pinned are: 1-7,9-15"


def test_cpu_0_without_a_shield_is_nothing(host: OtherHost) -> None:
    assert all(one.about != "cpu 0" for one in cores(host, pinned("[0, 8]", "isolation: cpuset")))


def test_real_time_on_cpu_0(host: OtherHost) -> None:
    found = cores(host, pinned("[0, 8]", "scheduler: fifo"))
    assert any('realtime = "anywhere"' in one.text for one in found)


@pytest.mark.parametrize(
    ("definition", "text"),
    [
        (pinned("{0: {0: {0: 2, 1: 3}}}"), "socket 0, core 0 of the guest is on CPUs 2-3, which are not one core of"),
        (pinned("[2, 3, 10, 11]", qemu="[smp: '4,threads=2']"), "core 0 of the guest is on CPUs 2-3, which are not"),
        (pinned("[2, 10]", qemu="[smp: 2]"), "core 0 and core 1 of the guest share one core of the host, CPUs 2,10"),
    ],
)
def test_guest_with_other_siblings(host: OtherHost, definition: VmDefinition, text: str) -> None:
    [one] = [one for one in cores(host, definition) if one.about == "topology"]
    assert one.severity == "note"
    assert one.text.startswith(text)


@pytest.mark.parametrize(
    "definition",
    [
        pinned("{0: {0: {0: 2, 1: 10}, 1: {0: 3, 1: 11}}}"),
        pinned("[2, 10, 3, 11]", qemu="[smp: '4,threads=2']"),
        pinned("[2, 3]", qemu="[smp: 2]"),
        pinned("['2-3', '2-3']", "isolation: cpuset"),
    ],
)
def test_guest_with_the_hosts_siblings(host: OtherHost, definition: VmDefinition) -> None:
    assert all(one.about != "topology" for one in cores(host, definition))


def test_held_by_another_vm(host: OtherHost) -> None:
    definition = pinned("[2, 3]", "isolation: affinity")
    assert list(cpus.held(definition, host.tree)) == []
    host.write("/sys/fs/cgroup/cpuset.cpus.isolated", "3-4\n")
    assert the_only(list(cpus.held(definition, host.tree)))[:2] == ("error", "CPU 3: shielded for another VM now")
    host.write("/sys/fs/cgroup/cpuset.cpus.isolated", "\n")
    assert list(cpus.held(definition, host.tree)) == []


def test_isolated_since_the_boot_is_no_shield(host: OtherHost) -> None:
    """The kernel counts the CPUs of isolcpus= in."""
    definition = pinned("[2, 3]", "isolation: affinity")
    host.write("/proc/cmdline", "quiet isolcpus=2-3")
    host.write("/sys/fs/cgroup/cpuset.cpus.isolated", "2-3\n")
    assert list(cpus.held(definition, host.tree)) == []


# Real time


def realtime(host: OtherHost, release: str, more: str = "scheduler: fifo") -> list[Finding]:
    return list(cpus.realtime(pinned("[2]", more), host.tree, release))


def test_fair_server(host: OtherHost) -> None:
    host.write("/proc/sys/kernel/sched_rt_runtime_us", "950000\n")
    host.write("/proc/sys/kernel/sched_rt_period_us", "1000000\n")
    assert the_only(realtime(host, "6.12.43+deb13-amd64"))[0] == "ok"
    assert the_only(realtime(host, "7.0.0"))[0] == "ok"
    severity, text, _ = the_only(realtime(host, "6.1.0-44-amd64"))
    assert severity == "warning"
    assert text.startswith("Linux 6.1.0-44-amd64 has no fair server (6.12 has)")
    assert "5 % of its CPU" in text
    assert realtime(host, "6.1.0", "") == []
    assert realtime(host, "6.1.0", "scheduler: batch") == []
    assert len(realtime(host, "6.1.0", "emulator_scheduler: fifo")) == 1


def test_nothing_would_stop_a_real_time_thread(host: OtherHost) -> None:
    host.write("/proc/sys/kernel/sched_rt_runtime_us", "-1\n")
    severity, text, fix = the_only(realtime(host, "6.12.0"))
    assert (severity, text) == ("error", "kernel.sched_rt_runtime_us is -1: nothing would stop a real-time thread")
    assert "sudo sysctl kernel.sched_rt_runtime_us=950000" in fix
