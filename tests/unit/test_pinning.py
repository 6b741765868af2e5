"""Sets of host CPUs, the keys that place threads other than vCPUs, and what of it is refused where."""

import pytest

from qemu_launcher.definition import MOST_SHARED, Scheduling
from qemu_launcher.pinning import MAX_NAMED
from qemu_launcher.places import LEVELS, describe_place
from unit.reading import launcher, launcher_refusal, read, refusal

HINT = "    write a number such as 2, a range such as 2-5, or a list of these such as [2, 4-5]"
IOTHREAD = "[object: [iothread, id: io0]]"


def vcpu_sets(keys: str) -> list[set[int]]:
    vm = launcher(keys)
    return [set(cpus.cpus) for cpus in vm.pinning.sets] if vm.pinning else []


def test_each_form_of_a_set() -> None:
    assert vcpu_sets("vcpu_pinning: [2, 3-4, [5, 6], '7', [8, 10-11], 12-13,15]") == [
        {2}, {3, 4}, {5, 6}, {7}, {8, 10, 11}, {12, 13}, {15},
    ]  # fmt: skip
    assert vcpu_sets("vcpu_pinning: ['12-13,15', 0-0]") == [{12, 13, 15}, {0}]
    assert vcpu_sets("vcpu_pinning: {0: {0: {0: 2-3, 1: [6, 7]}}}") == [{2, 3}, {6, 7}]


def test_the_other_threads() -> None:
    vm = launcher("emulator_pinning: 0-1,8\niothread_pinning: {io0: [2, 4-5]}", IOTHREAD)
    assert vm.emulator_pinning is not None
    assert vm.emulator_pinning.cpus == {0, 1, 8}
    assert vm.iothread_pinning is not None
    assert {name: set(cpus.cpus) for name, cpus in vm.iothread_pinning.items()} == {"io0": {2, 4, 5}}
    assert launcher("iothread_pinning: {}").iothread_pinning is None


@pytest.mark.parametrize(
    ("keys", "isolation"),
    [
        ("vcpu_pinning: [2]\nemulator_pinning: 0", "shield"),
        ("emulator_pinning: 0", "affinity"),
        ("iothread_pinning: {io0: 0}", "affinity"),
        ("iothread_pinning: {io0: 0}\nisolation: cpuset", "cpuset"),
        ("emulator_pinning: 0\niothread_pinning: {io0: 0}\nisolation: cpuset", "cpuset"),
        ("emulator_scheduler: batch", None),
    ],
)
def test_isolation_without_vcpus(keys: str, isolation: str | None) -> None:
    vm = launcher(keys, IOTHREAD)
    assert vm.isolation == isolation
    assert vm.wants_tuning


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("batch", ("batch", 0)),
        ("fifo", ("fifo", 1)),
        ("{policy: idle}", ("idle", 0)),
        ("{policy: other, priority: 0}", ("other", 0)),
        ("{priority: 7, policy: rr}", ("rr", 7)),
    ],
)
def test_emulator_scheduler(value: str, expected: tuple[str, int]) -> None:
    assert launcher(f"emulator_scheduler: {value}").emulator_scheduler == Scheduling(*expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("vcpu_pinning: [3-2]", "3:18: the host CPU of vCPU 0: the range 3-2 counts backwards\n    did you mean 2-3?"),
        ("vcpu_pinning: [1, 2-9000]", "3:21: the host CPU of vCPU 1 is 2-9000, which is out of range (0-8191)"),
        ("vcpu_pinning: [0-99999999999999]", "3:18: the host CPU of vCPU 0 is 0-99999999999999, which is out of range "
         "(0-8191)"),
        ("vcpu_pinning: [[]]", f"3:18: the host CPU of vCPU 0 is an empty list\n{HINT}"),
        ("vcpu_pinning: [[1, [2]]]", "3:22: the host CPU of vCPU 0 must be a number, a range or a list of these, "
         f"not a list\n{HINT}"),
        ("vcpu_pinning: [[1-3, 5, 2-4]]", "3:27: the host CPU of vCPU 0: CPU 2-3 is named twice\n"
         "    name each CPU once"),
        ("vcpu_pinning: [010]", "3:18: the host CPU of vCPU 0 must be a number, a range or a list of these, "
         "not '010'\n    without leading zero: 10"),
        ("vcpu_pinning: [^2]", "3:18: the host CPU of vCPU 0 must be a number, a range or a list of these, "
         f"not '^2'\n{HINT}"),
        ("emulator_pinning: {0: 1}", "3:21: emulator_pinning must be a number, a range or a list of these, "
         f"not a map\n{HINT}"),
        ("emulator_pinning: 0 - 3", "3:21: emulator_pinning must be a number, a range or a list of these, "
         f"not '0 - 3'\n{HINT}"),
        ("emulator_pinning: ~", "3:21: emulator_pinning must be a number, a range or a list of these, "
         f"not nothing (null)\n{HINT}"),
        ("iothread_pinning: 0-1", "3:21: iothread_pinning must be a map, not '0-1'\n"
         "    write id of the iothread: host CPU"),
        ("iothread_pinning: {1: 0}", "3:22: an iothread's id in iothread_pinning must be text, not the number 1\n"
         '    write it in quotes: "1"'),
        ("iothread_pinning: {io0: a}", "3:27: the host CPU of iothread 'io0' must be a number, a range or a list of "
         f"these, not 'a'\n{HINT}"),
        ("iothread_pinning: {io0: 0, io1: 1}", "3:35: iothread_pinning names 'io1', and the qemu section has no such "
         "iothread\n    it has io0"),
        ("isolation: shield\nemulator_pinning: 0", "3:14: isolation: shield has nothing to shield: no vCPU is pinned\n"
         "    add vcpu_pinning, or write isolation: affinity"),
        ("isolation: cpuset\nemulator_pinning: 0", "3:14: isolation: cpuset is made for pinned vCPUs and iothreads, "
         "and emulator_pinning alone pins none of them\n    add vcpu_pinning, or write isolation: affinity"),
        ("emulator_scheduler: bacth", "3:23: emulator_scheduler must be one of other, batch, idle, fifo, rr; "
         "not 'bacth'\n    did you mean batch?"),
        ("emulator_scheduler: {prio: 1}", "3:24: unknown key in emulator_scheduler: 'prio'\n"
         "    did you mean priority?"),
        ("emulator_scheduler: {priority: 1}", "3:23: the key policy is missing in emulator_scheduler:\n"
         "    write emulator_scheduler: {policy: fifo, priority: 1}"),
        ("emulator_scheduler: {policy: fifo, priority: 0}", "3:48: priority 0 is out of range for fifo (1-99)\n"
         "    write a priority from 1 to 99; your administrator may allow less"),
        ("emulator_scheduler: {policy: batch, priority: 3}", "3:49: priority 3 is out of range for batch, which has "
         "none but 0\n    remove it, or use fifo or rr"),
    ],
)  # fmt: skip
def test_refused(keys: str, message: str) -> None:
    assert launcher_refusal(keys, IOTHREAD) == message


def test_iothread_without_any() -> None:
    assert launcher_refusal("iothread_pinning: {io0: 0}") == (
        "3:27: iothread_pinning names 'io0', and the qemu section has no such iothread\n"
        "    add - object: [iothread, id: io0] to it"
    )


@pytest.mark.parametrize(
    "qemu",
    [
        "[object: 'iothread,id=io0']",
        "[object: 'qom-type=iothread,id=io0']",
        '[object: \'{"qom-type": "iothread", "id": "io0"}\']',
        "[readconfig: /x/more.cfg]",
    ],
)
def test_iothread_in_every_form_of_the_option(qemu: str) -> None:
    assert launcher("iothread_pinning: {io0: 0}", qemu).iothread_pinning is not None


# CPUs that several vCPUs have


def test_vcpus_that_float_over_the_same_cpus_are_one_warning() -> None:
    vm = launcher("vcpu_pinning: [2-3, 2-3, 2-3]")
    assert vm.warnings == ("win11.yml:3:23: host CPUs 2-3 have a vCPU already, from 3:18; they will take turns",)


def test_overlap_is_a_warning() -> None:
    vm = launcher("vcpu_pinning: [2-3, 3-4]")
    assert vm.warnings == ("win11.yml:3:23: host CPU 3 has a vCPU already, from 3:18; they will take turns",)
    assert launcher("vcpu_pinning: [2-3, 4-5]").warnings == ()


def test_many_overlaps_are_one_warning() -> None:
    """255 vCPUs on 8 CPUs would be 247 lines."""
    few = launcher(f"vcpu_pinning: {[*range(MOST_SHARED), *range(MOST_SHARED)]}")
    assert len(few.warnings) == MOST_SHARED
    many = launcher(f"vcpu_pinning: {[index % 8 for index in range(255)]}")
    assert many.warnings == ("win11.yml:3:17: host CPUs 0-7 have several vCPUs each; they will take turns",)
    one = launcher(f"vcpu_pinning: {[5] * 255}")
    assert one.warnings == ("win11.yml:3:17: host CPU 5 has several vCPUs; they will take turns",)


def test_overlap_is_an_error_in_real_time() -> None:
    assert launcher_refusal("scheduler: rr\nvcpu_pinning: [2-3, 3-4]").startswith(
        "4:23: host CPU 3 has a vCPU already, from 4:18\n    two rr vCPUs on one CPU can hang the guest"
    )


def test_ranges_do_not_make_much_out_of_little() -> None:
    text = "launcher: {binary: q, vcpu_pinning: [" + "0-8191," * 8000 + "]}\nqemu: []\n"
    assert f"names more than {MAX_NAMED} host CPUs" in refusal(text)
    text = "launcher: {binary: q, vcpu_pinning: [" + "0," * 9000 + "]}\nqemu: []\n"
    assert refusal(text) == "1:37: vcpu_pinning names more than 8192 vCPUs"


# Places


def places_of(value: str) -> dict[str, set[int]]:
    vm = launcher(f"vcpu_pinning: {value}")
    assert vm.pinning is not None
    assert vm.pinning.topology is not None
    return {describe_place(place): set(cpus.cpus) for place, cpus in vm.pinning.topology.items()}


def test_levels_by_name_and_by_order() -> None:
    plain = {"socket 0, core 1, thread 0": {4}}
    assert places_of("{0: {1: {0: 4}}}") == plain
    assert places_of("{socket 0: {core 1: {thread 0: 4}}}") == plain
    assert places_of("{0: {die 1: {cluster 0: {module 2: {3: {0: 4-5}}}}}}") == {
        "socket 0, die 1, cluster 0, module 2, core 3, thread 0": {4, 5}
    }
    assert places_of("{drawer 1: {book 0: {2: {3: {0: 4}}}}}") == {"drawer 1, book 0, socket 2, core 3, thread 0": {4}}
    assert places_of("{0: {die 0: {0: {0: 1}}}, 1: {0: {0: 2}}}") == {
        "socket 0, die 0, core 0, thread 0": {1},
        "socket 1, core 0, thread 0": {2},
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{0: {dye 1: {0: {0: 4}}}}", "3:22: unknown level 'dye' in socket 0\n    did you mean die?"),
        ("{0: {xyz 1: {0: {0: 4}}}}", f"3:22: unknown level 'xyz' in socket 0\n    known are {', '.join(LEVELS)}"),
        ("{0: {die1: {0: {0: 4}}}}", "3:22: a core number in socket 0 must be a whole number, not 'die1'\n"
         "    write a number, or a level and its number, such as core 0"),
        ("{die 0: {0: {0: 4}}}", "3:18: die 0 in vcpu_pinning without a socket around it\n"
         f"    from the outside in: {', '.join(LEVELS)}"),
        ("{0: {thread 0: 4}}", "3:22: thread 0 in socket 0 without a core around it\n"
         f"    from the outside in: {', '.join(LEVELS)}"),
        ("{0: {cluster 0: {die 1: {0: {0: 4}}}}}", "3:34: die 1 stands inside of cluster 0\n"
         f"    from the outside in: {', '.join(LEVELS)}"),
        ("{0: {die 0: {0: {0: 1}}, 5: {0: 2}}}", "3:42: socket 0 has a core beside a die\n"
         "    name the same level in all of its keys"),
        ("{0: {0: {0: 1}}, socket 0: {1: {0: 2}}}", "3:34: socket 0 is given twice in vcpu_pinning\n"
         "    remove one of them"),
        ("{0: {die 9999999999: {0: {0: 4}}}}", "3:22: die 9999999999 is out of range (0-4294967295)"),
        ("{0: {die 0: {0: 4}}}", "3:33: socket 0, die 0, core 0 must be a map (key: value), not the number 4"),
    ],
)  # fmt: skip
def test_refused_places(value: str, message: str) -> None:
    assert launcher_refusal(f"vcpu_pinning: {value}") == message


@pytest.mark.parametrize(
    ("place", "smp", "wrong"),
    [
        ("{1: {0: {0: 4}}}", "2,sockets=1,cores=2,threads=1", "socket 1, but -smp gives the guest only socket 0"),
        ("{0: {2: {0: 4}}}", "2,sockets=1,cores=2,threads=1", "core 2, but -smp gives socket 0 only core 0-1"),
        ("{0: {0: {1: 4}}}", "2,sockets=1,cores=2,threads=1",
         "thread 1, but -smp gives socket 0, core 0 only thread 0"),
        ("{0: {3: {0: 4}}}", "4,sockets=1,dies=2,cores=2,threads=1", None),
        ("{0: {4: {0: 4}}}", "4,sockets=1,dies=2,cores=2,threads=1", "core 4, but -smp gives socket 0 only core 0-3"),
        ("{0: {die 1: {2: {0: 4}}}}", "4,sockets=1,dies=2,cores=2,threads=1",
         "core 2, but -smp gives socket 0, die 1 only core 0-1"),
        ("{0: {die 2: {0: {0: 4}}}}", "4,sockets=1,dies=2,cores=2", "die 2, but -smp gives socket 0 only die 0-1"),
        ("{0: {die 1: {0: {0: 4}}}}", "4,sockets=1,cores=4", "die 1, but -smp gives socket 0 only die 0"),
        ("{drawer 1: {0: {0: {0: 4}}}}", "4", "drawer 1, but -smp gives the guest only drawer 0"),
        ("{1: {7: {1: 4}}}", "4,maxcpus=64", None),
        ("{1: {0: {0: 4}}}", "2,sockets=0x1", None),
    ],
)  # fmt: skip
def test_place_that_a_pc_cannot_have_is_known_before_it_is_started(place: str, smp: str, wrong: str | None) -> None:
    text = "launcher:\n  binary: {}\n  vcpu_pinning: {}\nqemu: [smp: '{}']\n"
    assert read(text.format("qemu-system-ppc64", place, smp)).pinning is not None, "QEMU is asked"
    pc = text.format("/usr/bin/qemu-system-x86_64", place, smp)
    if wrong is None:
        assert read(pc).pinning is not None
    else:
        assert refusal(pc) == f"3:{place.index('4}') + 17}: vcpu_pinning names {wrong}"


@pytest.mark.parametrize(
    ("pinning", "column", "names", "smp"),
    [
        ("[4, 5]", 21, "vCPU 1", "smp: 2"),
        ("[4, 5, 6-7]", 21, "vCPU 1", "smp: 3"),
        ("{0: {0: {0: 4, 1: 5}}}", 35, "socket 0, core 0, thread 1", "smp: [2, sockets: 1, cores: 1, threads: 2]"),
        ("{0: {0: {0: 4}, 2: {0: 5}}}", 40, "socket 0, core 2, thread 0", "smp: [3, sockets: 1, cores: 3, threads: 1]"),
        ("{1: {0: {0: 4}}}", 29, "socket 1, core 0, thread 0", "smp: [2, sockets: 2, cores: 1, threads: 1]"),
        ("{0: {die 1: {0: {0: 4}}}}", 37, "socket 0, die 1, core 0, thread 0",
         "smp: [2, sockets: 1, dies: 2, cores: 1, threads: 1]"),
        ("[4]", 0, None, None),
        ("{drawer 0: {0: {die 0: {0: {0: 4}}}}}", 0, None, None),
    ],
)  # fmt: skip
def test_pc_without_smp_has_only_the_first(pinning: str, column: int, names: str | None, smp: str | None) -> None:
    def text(binary: str, qemu: str) -> str:
        return f"launcher:\n  binary: {binary}\n  vcpu_pinning: {pinning}\nqemu: {qemu}\n"

    pc = "/usr/bin/qemu-system-x86_64"
    for other in ("qemu-system-aarch64", "./windows"):
        assert read(text(other, "[]")).pinning is not None, "its maker knows"
    for given in (
        "[readconfig: x]",
        "[machine: 'q35,smp.cpus=0x8']",
        "[smp: '64,dies=2']",
        "[M: [q35, smp.cpus: 64, smp.dies: 2]]",
    ):
        assert read(text(pc, given)).pinning is not None, "something else says it"
    if names is None:
        assert read(text(pc, "[m: 1G]")).pinning is not None
    else:
        assert refusal(text(pc, "[m: 1G]")) == (
            f"3:{column}: vcpu_pinning names {names}, but without -smp the guest has only vCPU 0\n"
            f"    add - {smp} to the section qemu"
        )
