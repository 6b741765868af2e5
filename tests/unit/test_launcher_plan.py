"""From wishes to requests: what is asked for, of whom, and what is refused before anybody is asked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from qemu_launcher import definition as definitions, plan
from qemu_launcher.definition import Scheduling, VmDefinition
from qemu_launcher.errors import TuningFailed, Unfit
from qemu_launcher.plan import MEMLOCK_OVERHEAD
from qemu_launcher.sizes import INFINITY
from qemu_launcher.threads import Ids, Iothread, Threads, Vcpu

GIB = 1 << 30
HOST = 64 * GIB


def defined(launcher: str = "", qemu: str = "- m: 24G") -> VmDefinition:
    text = f"launcher:\n  binary: q\n{launcher}qemu:\n{qemu}\n"
    return definitions.parse(text.encode(), Path("/x/win11.yml"), "win11")


def vcpus(*tids: int, more: int = 0) -> Threads:
    """vCPUs of two threads a core, and places for `more`."""
    slots = tuple(Ids(core=i // 2, thread=i % 2) for i in range(len(tids) + more))
    there = tuple(Vcpu(i, tid, slots[i], i // 2) for i, tid in enumerate(tids))
    return Threads(there, (), slots, len(slots))


# Memory lock


def test_nothing_asked_nothing_needed() -> None:
    vm = defined()
    assert plan.memlock_need(vm, 0, 0, HOST) is None
    assert not vm.wants_tuning
    assert not plan.needs_helper(vm, None)


@pytest.mark.parametrize(
    ("key", "hard", "expected"),
    [
        ("auto", 8 << 20, (24 * GIB + MEMLOCK_OVERHEAD, 24 * GIB + MEMLOCK_OVERHEAD, False)),
        ("auto", 25 * GIB, (25 * GIB, 25 * GIB, True)),
        ("true", 8 << 20, (INFINITY, 24 * GIB, False)),
        ("true", 32 * GIB, (INFINITY, 24 * GIB, False)),
        ("true", HOST, (INFINITY, 24 * GIB, True)),
        ("true", INFINITY, (INFINITY, 24 * GIB, True)),
        ("30G", 30 * GIB - 1, (30 * GIB, 30 * GIB, False)),
        ("30G", 30 * GIB, (30 * GIB, 30 * GIB, True)),
    ],
)
def test_memlock(key: str, hard: int, expected: tuple[int, int, bool]) -> None:
    need = plan.memlock_need(defined(f"  rlimit_memlock: {key}\n"), 0, hard, HOST)
    assert need is not None
    assert (need.wanted, need.least, need.unaided) == expected


@pytest.mark.parametrize("soft", [26 * GIB, INFINITY])
def test_auto_takes_nothing_from_who_has_more(soft: int) -> None:
    """The limits.conf of many guides to VFIO: QEMU started by hand would have it, too."""
    need = plan.memlock_need(defined("  rlimit_memlock: auto\n"), soft, INFINITY, HOST)
    assert need == plan.MemlockNeed(soft, 25 * GIB, unaided=True)
    sized = plan.memlock_need(defined("  rlimit_memlock: 25G\n"), soft, INFINITY, HOST)
    assert sized is not None
    assert sized.wanted == 25 * GIB, "a size is just that"


def test_memlock_smaller_than_the_guest_is_refused_with_both_numbers() -> None:
    with pytest.raises(Unfit, match=r"/x/win11.yml:3:19: .* 16 GiB is less than the guest's RAM, 24 GiB"):
        plan.memlock_need(defined("  rlimit_memlock: 16G\n"), 0, INFINITY, HOST)


def test_auto_without_a_ram_to_be_seen() -> None:
    with pytest.raises(Unfit, match=r"^/x/win11.yml:3:19: .* cannot tell the guest's RAM"):
        plan.memlock_need(defined("  rlimit_memlock: auto\n", "- m: [nonsense]"), 0, 0, HOST)


@pytest.mark.parametrize("key", ["  rlimit_memlock: auto\n", ""])
def test_auto_with_a_configuration_file_asks_for_a_size(key: str) -> None:
    """`auto` is also the default of a VM with a VFIO device."""
    vm = defined(key, "- m: 24G\n- device: vfio-pci\n- readconfig: /x/more.cfg")
    with pytest.raises(Unfit, match="cannot tell the guest's RAM") as caught:
        plan.memlock_need(vm, 0, 0, HOST)
    assert caught.value.hint == "write rlimit_memlock: true, or a size such as 16G"


def test_memory_that_is_plugged_in_counts() -> None:
    plugged = "- m: 24G\n- object: memory-backend-ram,id=a,size=8G\n- device: pc-dimm,memdev=a"
    need = plan.memlock_need(defined("  rlimit_memlock: auto\n", plugged), 0, 0, HOST)
    assert need is not None
    assert need.wanted == need.least == 33 * GIB
    with pytest.raises(Unfit, match="25 GiB is less than the guest's RAM, 32 GiB"):
        plan.memlock_need(defined("  rlimit_memlock: 25G\n", plugged), 0, 0, HOST)


@pytest.mark.parametrize(("key", "granted"), [("true", 24 * GIB - 1), ("auto", 25 * GIB - 1), ("30G", 30 * GIB - 1)])
def test_granted_less(key: str, granted: int) -> None:
    need = plan.memlock_need(defined(f"  rlimit_memlock: {key}\n"), 0, 0, HOST)
    assert need is not None
    with pytest.raises(TuningFailed, match=r"QEMU must be able to lock .* GiB, but only .* GiB was granted"):
        plan.check_granted(need, granted)
    plan.check_granted(need, granted + 1)


def test_what_to_try_when_qemu_could_not_lock_its_memory() -> None:
    locking = defined(qemu="- m: 256M\n- overcommit: mem-lock=on")
    assert "write rlimit_memlock: 4G" in (plan.memlock_suspicion(locking, 5 * GIB // 4) or "")
    assert "may lock 25 GiB; write rlimit_memlock: 27G" in (plan.memlock_suspicion(locking, 25 * GIB) or "")
    assert plan.memlock_suspicion(locking, None) is None
    assert plan.memlock_suspicion(locking, INFINITY) is None
    assert plan.memlock_suspicion(defined(), 25 * GIB) is None


BOTH = "- m: 24G\n- overcommit: [mem-lock: on]\n- device: [vfio-pci, host: '01:00.0']"


def test_vfio_and_mem_lock_count_the_ram_twice() -> None:
    """The kernel adds what VFIO pins to what is locked already (vfio_pin_pages_remote of vfio_iommu_type1.c)."""
    need = plan.memlock_need(defined(qemu=BOTH), 0, 0, HOST)
    assert need is not None
    assert need.wanted == need.least == 48 * GIB + MEMLOCK_OVERHEAD
    with pytest.raises(TuningFailed, match=r"lock 49 GiB, but only 48 GiB was granted") as failed:
        plan.check_granted(need, 48 * GIB)
    assert "mem-lock" in (failed.value.hint or "")
    need = plan.memlock_need(defined("  rlimit_memlock: true\n", BOTH), 0, 0, HOST)
    assert need is not None
    assert need.least == 48 * GIB
    with pytest.raises(Unfit, match="25 GiB is less than all locks of the guest's RAM, 48 GiB") as refused:
        plan.memlock_need(defined("  rlimit_memlock: 25G\n", BOTH), 0, 0, HOST)
    assert (refused.value.hint or "").startswith("leave out mem-lock")
    assert plan.memlock_suspicion(defined(qemu=BOTH), 49 * GIB) == (
        "if it could not lock its memory: it may lock 49 GiB; write rlimit_memlock: 51G\n"
        "or leave out mem-lock: VFIO locks the guest's RAM anyway, and it counts twice so"
    )


def test_ram_that_is_pinned_several_times() -> None:
    vdpa = "- m: 24G\n- netdev: vhost-vdpa,id=a\n- netdev: vhost-vdpa,id=b"
    need = plan.memlock_need(defined(qemu=vdpa), 0, 0, HOST)
    assert need == plan.MemlockNeed(49 * GIB, 49 * GIB, unaided=False, several=True)
    with pytest.raises(Unfit, match="25 GiB is less than all locks of the guest's RAM, 48 GiB") as refused:
        plan.memlock_need(defined("  rlimit_memlock: 25G\n", vdpa), 0, 0, HOST)
    assert refused.value.hint == "write rlimit_memlock: auto, or a larger size"


def test_with_an_iommu_in_the_guest_auto_asks_for_more_and_is_content_with_less() -> None:
    """Each card may have a container of its own, or share its with others: QEMU's business, and the guest's."""
    cards = "- m: 8G\n- device: [vfio-pci, host: '01:00.0']\n- device: [vfio-pci, host: '0{}']\n- device: intel-iommu"
    need = plan.memlock_need(defined(qemu=cards.format("2:00.0")), 0, 0, HOST)
    assert need == plan.MemlockNeed(17 * GIB, 9 * GIB, unaided=False)
    need = plan.memlock_need(defined(qemu=cards.format("1:00.1")), 0, 0, HOST)
    assert need == plan.MemlockNeed(9 * GIB, 9 * GIB, unaided=False)
    assert plan.memlock_need(defined("  rlimit_memlock: 9G\n", cards.format("2:00.0")), 0, 0, HOST)
    arm = cards.format("2:00.0").replace("device: intel-iommu", "machine: [virt, iommu: {}]")
    needs = [plan.memlock_need(defined(qemu=arm.format(kind)), 0, 0, HOST) for kind in ("none", "smmuv3")]
    assert [need.wanted >> 30 for need in needs if need] == [9, 17]


def test_ram_that_no_limit_can_be_as_large_as() -> None:
    """The wire has 64 bits for it."""
    most = "- m: {}\n- device: virtio-iommu-pci\n- drive: 'nvme://0000:44:00.0/1'\n- drive: 'nvme://0000:45:00.0/1'"
    with pytest.raises(Unfit, match="auto cannot tell the guest's RAM"):
        plan.memlock_need(defined(qemu=most.format("6E")), 0, 0, HOST)
    cards = "".join(f"\n- device: [vfio-pci, host: '0{number}:00.0']" for number in range(1, 4))
    need = plan.memlock_need(defined(qemu=f"- m: 6E\n- device: virtio-iommu-pci{cards}"), 0, 0, HOST)
    assert need is not None
    assert need.wanted < INFINITY


# Who does it


@pytest.mark.parametrize(
    ("keys", "tuned", "helper"),
    [
        ("  vcpu_pinning: [1]\n", True, True),
        ("  vcpu_pinning: [1]\n  isolation: cpuset\n", True, True),
        ("  vcpu_pinning: [1]\n  isolation: affinity\n", True, False),
        ("  scheduler: batch\n", True, False),
        ("  scheduler: idle\n", True, False),
        ("  scheduler: other\n", True, False),
        ("  scheduler: fifo\n", True, True),
        ("  vcpu_pinning: [1]\n  isolation: affinity\n  scheduler: rr\n", True, True),
        ("  rlimit_memlock: false\n", False, False),
    ],
)
def test_who_is_needed(keys: str, tuned: bool, helper: bool) -> None:
    vm = defined(keys)
    assert vm.wants_tuning is tuned
    assert plan.needs_helper(vm, None) is helper


# Pins


def pins_of(launcher: str, threads: Threads) -> dict[int, set[int]]:
    return {pin.tid: set(pin.cpus) for pin in plan.thread_plan(defined(launcher), threads).pins}


def test_pins_by_index() -> None:
    assert pins_of("  vcpu_pinning: [1, 9, 2, 10]\n", vcpus(50, 51, 52, 53)) == {50: {1}, 51: {9}, 52: {2}, 53: {10}}


def test_pins_by_place_match_the_threads_whatever_their_order() -> None:
    threads = vcpus(50, 51, 52, 53)
    threads = replace(threads, vcpus=tuple(reversed(threads.vcpus)))
    launcher = "  vcpu_pinning: {0: {0: {0: 2, 1: 6}, 1: {0: 3, 1: 7}}}\n"
    assert pins_of(launcher, threads) == {50: {2}, 51: {6}, 52: {3}, 53: {7}}


def test_vcpus_that_are_left_out_stay_where_they_are() -> None:
    assert pins_of("  vcpu_pinning: {0: {1: {0: 3}}}\n", vcpus(50, 51, 52, 53)) == {52: {3}}
    assert pins_of("  vcpu_pinning: [5]\n", vcpus(50, 51)) == {50: {5}}


def test_unknown_vcpu_by_index_and_by_place() -> None:
    with pytest.raises(Unfit, match=r"/x/win11.yml:3:21: QEMU has no vCPU 1$") as caught:
        pins_of("  vcpu_pinning: [1, 2]\n", vcpus(50))
    assert caught.value.hint == "it has vCPU 0 (socket 0, core 0, thread 0)\n-smp gives it more"
    with pytest.raises(Unfit, match=r":3:29: QEMU has no vCPU socket 1, core 0, thread 0"):
        pins_of("  vcpu_pinning: {1: {0: {0: 2}}}\n", vcpus(50))


def test_vcpus_that_may_come_are_waited_for() -> None:
    """Named, and not there yet: what can be plugged in is no mistake, what cannot is one."""
    assert pins_of("  vcpu_pinning: [1, 2, 3]\n", vcpus(50, more=2)) == {50: {1}}
    assert pins_of("  vcpu_pinning: {0: {0: {0: 2, 1: 3}, 1: {0: 4}}}\n", vcpus(50, more=2)) == {50: {2}}
    with pytest.raises(Unfit, match=r"QEMU has no vCPU 3$"):
        pins_of("  vcpu_pinning: [1, 2, 3, 4]\n", vcpus(50, more=2))
    with pytest.raises(Unfit, match=r"QEMU has no vCPU socket 0, core 1, thread 1$"):
        pins_of("  vcpu_pinning: {0: {1: {1: 4}}}\n", vcpus(50, more=2))


def test_machine_without_vcpus() -> None:
    with pytest.raises(TuningFailed) as caught:
        pins_of("  vcpu_pinning: [1]\n", vcpus())
    assert caught.value.hint == "it has none at all"


def test_places_that_cannot_be_told_apart() -> None:
    threads = Threads((Vcpu(0, 50, Ids(), 0), Vcpu(1, 51, Ids(), 0)), (), (Ids(),), 2)
    with pytest.raises(Unfit, match=r"3:29: .* are both at socket 0, core 0, thread 0: this machine does not tell"):
        pins_of("  vcpu_pinning: {0: {0: {0: 2}}}\n", threads)


def test_one_thread_for_all_vcpus() -> None:
    with pytest.raises(
        Unfit, match=r"^/x/win11.yml:3:17: .* one thread of QEMU's \(TID 50\), which cannot be on CPU 1 and CPU 2"
    ):
        pins_of("  vcpu_pinning: [1, 2]\n", vcpus(50, 50))
    (pin,) = plan.thread_plan(defined("  vcpu_pinning: [1, 1]\n"), vcpus(50, 50)).pins
    assert (pin.tid, pin.vcpus) == (50, (0, 1))


def test_scheduling_names_each_thread_once() -> None:
    found = plan.thread_plan(defined("  scheduler: fifo\n  priority: 5\n"), vcpus(50, 50, 51))
    assert (found.scheduled, found.vcpu_policy) == ((50, 51), Scheduling("fifo", 5))
    assert plan.thread_plan(defined(), vcpus(50)).scheduled == ()


@given(cpus=st.lists(st.integers(0, 63), min_size=1, max_size=16, unique=True), more=st.integers(0, 3))
def test_every_pinned_vcpu_gets_exactly_its_cpu(cpus: list[int], more: int) -> None:
    threads = vcpus(*range(1000, 1000 + len(cpus) + more))
    found = plan.thread_plan(defined(f"  vcpu_pinning: {cpus}\n"), threads)
    assert [(pin.tid, set(pin.cpus)) for pin in found.pins] == [(1000 + i, {cpu}) for i, cpu in enumerate(cpus)]
    assert found.cpus == set(cpus)
    assert found.isolation == "shield"


def test_plan_without_pins_is_no_isolation() -> None:
    found: Any = plan.thread_plan(defined(), vcpus(1))
    assert (found.pins, found.isolation, found.vcpu_policy, found.cpus) == ((), None, None, frozenset())


# The other threads


def test_iothreads_and_emulator_threads() -> None:
    threads = replace(vcpus(50, 51), iothreads=(Iothread("io0", 60), Iothread("io1", 61)))
    keys = (
        "  vcpu_pinning: [4, 6-7]\n  iothread_pinning: {io1: 0-1}\n  emulator_pinning: 2\n"
        "  emulator_scheduler: {policy: rr, priority: 2}\n"
    )
    vm = defined(keys, "- object: iothread,id=io0\n- object: iothread,id=io1")
    found = plan.thread_plan(vm, threads)
    assert [(str(pin), set(pin.cpus), pin.shielded) for pin in found.pins] == [
        ("vCPU 0 (TID 50)", {4}, True),
        ("vCPU 1 (TID 51)", {6, 7}, True),
        ("iothread 'io1' (TID 61)", {0, 1}, False),
    ]
    assert (found.others, found.named) == (frozenset({2}), frozenset({50, 51, 60, 61}))
    assert found.emulator == Scheduling("rr", 2)
    assert found.cpus == {4, 6, 7}, "what is shielded, without the iothreads'"
    assert plan.needs_helper(vm, None)


@pytest.mark.parametrize(
    ("keys", "helper"),
    [
        ("  emulator_pinning: 0\n", False),
        ("  iothread_pinning: {io0: 0}\n", False),
        ("  iothread_pinning: {io0: 0}\n  isolation: cpuset\n", True),
        ("  emulator_scheduler: batch\n", False),
        ("  emulator_scheduler: fifo\n", True),
    ],
)
def test_who_is_needed_for_the_other_threads(keys: str, helper: bool) -> None:
    vm = defined(keys, "- object: iothread,id=io0")
    assert vm.wants_tuning
    assert plan.needs_helper(vm, None) is helper


@pytest.mark.parametrize(
    ("keys", "helper"),
    [
        ("  vcpu_pinning: [1]\n", True),
        ("  iothread_pinning: {io0: 0}\n  isolation: cpuset\n", True),
        ("  vcpu_pinning: [1]\n  isolation: affinity\n  scheduler: fifo\n", False),
        ("  emulator_pinning: 0\n", False),
        ("  scheduler: fifo\n", False),
    ],
)
def test_who_places_the_threads(keys: str, helper: bool) -> None:
    """Real time is asked of the helper in another call."""
    threads = replace(vcpus(50), iothreads=(Iothread("io0", 60),))
    assert plan.thread_plan(defined(keys, "- object: iothread,id=io0"), threads).by_helper is helper


@pytest.mark.parametrize(("there", "hint"), [((), "it has none at all: add"), (("io0", "io1"), "it has io0, io1")])
def test_unknown_iothread(there: tuple[str, ...], hint: str) -> None:
    """Where the options do not tell, QEMU does."""
    vm = defined("  iothread_pinning: {io7: 0-1}\n", "- readconfig: more.cfg")
    with pytest.raises(Unfit, match=r"/x/win11.yml:3:27: QEMU has no iothread 'io7'$") as caught:
        plan.thread_plan(vm, Threads((), tuple(Iothread(name, 60) for name in there)))
    assert (caught.value.hint or "").startswith(hint)
