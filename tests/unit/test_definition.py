"""Every key of the launcher section, every rule across keys, and how each refusal reads."""

import os
from pathlib import Path

import pytest

from qemu_launcher import definition
from qemu_launcher.definition import CpuSet, Memlock
from qemu_launcher.errors import MOST_PROBLEMS, DefinitionError, Mark
from qemu_launcher.optionlist import MAX_ARGUMENT_BYTES
from qemu_launcher.places import Place
from unit.reading import launcher, launcher_refusal, read, refusal, shown


def cpus(*places: tuple[int, int, int]) -> tuple[CpuSet, ...]:
    """Sets of one host CPU each, from (CPU, line, column)."""
    marks = ((cpu, Mark("win11.yml", line, column)) for cpu, line, column in places)
    return tuple(CpuSet(frozenset({cpu}), mark, ((range(cpu, cpu + 1), mark),)) for cpu, mark in marks)


def three(numbers: tuple[int, int, int]) -> Place:
    return tuple(zip(("socket", "core", "thread"), numbers, strict=True))


def test_defaults() -> None:
    vm = launcher("")
    assert vm == definition.VmDefinition(
        "win11", Path("win11.yml"), "q", (), marks={"binary": Mark("win11.yml", 2, 11)}
    )
    assert (vm.clear_env, vm.env, vm.working_directory, vm.pinning, vm.scheduler, vm.priority) == (
        (False, (), None, None, None, 0)
    )
    assert (vm.memlock, vm.isolation, vm.on_tuning_failure, vm.shutdown_timeout, vm.user, vm.group, vm.warnings) == (
        (Memlock("none"), None, "abort", 60.0, None, None, ())
    )


def test_plain_keys() -> None:
    vm = launcher(
        "clear_env: true\nenv: {A: 1.50, on: 'x y', B: ''}\nworking_directory: /srv/vm\n"
        "on_tuning_failure: continue\nshutdown_timeout: 90\nuser: alice\ngroup: 4294967294"
    )
    assert (vm.clear_env, vm.env, vm.working_directory) == (
        True,
        (("A", "1.50"), ("on", "x y"), ("B", "")),
        Path("/srv/vm"),
    )
    assert (vm.on_tuning_failure, vm.shutdown_timeout, vm.user, vm.group) == ("continue", 90.0, "alice", 4294967294)
    assert vm.marks["user"] == Mark("win11.yml", 8, 9)


def test_timeout_without_end() -> None:
    assert launcher("shutdown_timeout: infinity").shutdown_timeout is None
    assert launcher("shutdown_timeout: 0").shutdown_timeout == 0.0


def test_values_cannot_be_changed() -> None:
    vm = launcher("env: {A: b}")
    with pytest.raises(AttributeError):
        vm.binary = "other"  # type: ignore[misc]  # what is being tested
    with pytest.raises(TypeError):
        vm.marks["binary"] = Mark("", 1, 1)  # type: ignore[index]  # what is being tested


def test_pinning_by_index() -> None:
    vm = launcher("vcpu_pinning: [1, 9, 2]")
    assert vm.pinning is not None
    assert vm.pinning.topology is None
    assert vm.pinning.by_index == vm.pinning.sets == cpus((1, 3, 18), (9, 3, 21), (2, 3, 24))
    assert vm.isolation == "shield"


def test_pinning_by_topology() -> None:
    vm = launcher("vcpu_pinning:\n  0:\n    0: {0: 2, 1: 6}\n    1: {0: 3}\n  1: {0: {0: 4}}\nisolation: cpuset")
    assert vm.pinning is not None
    assert vm.pinning.by_index is None
    places = cpus((2, 5, 14), (6, 5, 20), (3, 6, 14), (4, 7, 16))
    assert vm.pinning.topology == dict(
        zip(map(three, [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]), places, strict=True)
    )
    assert vm.pinning.sets == places
    assert vm.isolation == "cpuset"


@pytest.mark.parametrize("keys", ["vcpu_pinning: {}", "vcpu_pinning: {0: {}}", "vcpu_pinning: {0: {0: {}}, 1: {}}"])
def test_a_map_without_vcpus_pins_nothing(keys: str) -> None:
    vm = launcher(keys)
    assert (vm.pinning, vm.isolation) == (None, None)


@pytest.mark.parametrize(
    ("value", "memlock"),
    [
        ("true", ("all", None)),
        ("false", ("none", None)),
        ("auto", ("auto", None)),
        ("16G", ("size", 16 << 30)),
        ("512M", ("size", 512 << 20)),
        ("2048k", ("size", 2 << 20)),
        ("1T", ("size", 1 << 40)),
        ("'16G'", ("size", 16 << 30)),
        ("25769803776", ("size", 24 << 30)),
        ("1048576", ("size", 1 << 20)),
    ],
)
def test_memlock(value: str, memlock: tuple[str, int | None]) -> None:
    assert launcher(f"rlimit_memlock: {value}").memlock == (*memlock, Mark("win11.yml", 3, 19))


@pytest.mark.parametrize(
    ("qemu", "kind"),
    [
        ("[device: [vfio-pci, host: 01:00.0]]", "auto"),
        ("[device: 'host=01:00.0,driver=vfio-pci']", "auto"),
        ("[overcommit: [mem-lock: on]]", "auto"),
        ("[overcommit: mem-lock=off]", "none"),
        ("[device: virtio-net-pci]", "none"),
        ("[netdev: [vhost-vdpa, id: n]]", "auto"),
        ("[drive: [file: nvme://0000:44:00.0/1]]", "auto"),
        ("[device: vfio-user-pci]", "none"),
    ],
)
def test_memlock_default(qemu: str, kind: str) -> None:
    assert launcher("", qemu).memlock == Memlock(kind)  # type: ignore[arg-type]  # one of its literals
    assert launcher("rlimit_memlock: false", qemu).memlock.kind == "none"


@pytest.mark.parametrize(
    ("keys", "scheduling"),
    [
        ("scheduler: other", ("other", 0)),
        ("scheduler: batch\npriority: 0", ("batch", 0)),
        ("scheduler: idle", ("idle", 0)),
        ("scheduler: fifo", ("fifo", 1)),
        ("scheduler: fifo\npriority: 99", ("fifo", 99)),
        ("priority: 5\nscheduler: rr", ("rr", 5)),
    ],
)
def test_scheduler(keys: str, scheduling: tuple[str, int]) -> None:
    vm = launcher(keys)
    assert (vm.scheduler, vm.priority) == scheduling
    assert vm.is_realtime == (scheduling[1] > 0)


KNOWN_KEYS = (
    "binary, clear_env, env, working_directory, vcpu_pinning, emulator_pinning, iothread_pinning, scheduler, priority, "
    "emulator_scheduler, rlimit_memlock, isolation, on_tuning_failure, shutdown_timeout, before_start, "
    "after_stop, inhibit_sleep, debug, user, group"
)
MEMLOCK_HINT = "    write true (as much as I may), false, auto (guest RAM and 1 GiB more) or a size such as 16G"
MEMLOCK_RANGE = "is out of range (1M-8388607T); a number alone is in bytes"
RT_HINT = "    write a priority from 1 to 99; your administrator may allow less"
NO_SCHEDULER = "without scheduler\n    add scheduler: fifo or scheduler: rr, or remove priority"
NOT_RT = "which has none but 0\n    remove it, or use fifo or rr"
CPUS_HINT = "    write a number such as 2, a range such as 2-5, or a list of these such as [2, 4-5]"
NO_SECONDS = "shutdown_timeout must be a whole number of seconds or infinity, not"
NO_CPUS = "must be a number, a range or a list of these, not"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("priorty: 1", "3:3: unknown key in launcher: 'priorty'\n    did you mean priority?"),
        ("xyz: 1", f"3:3: unknown key in launcher: 'xyz'\n    known are {KNOWN_KEYS}"),
        ("qemu: []", "3:3: unknown key in launcher: 'qemu'\n    it is a section: put it at the beginning of its line"),
        ("5: 1", f"3:3: unknown key in launcher: '5'\n    known are {KNOWN_KEYS}"),
        ("clear_env: 1", "3:14: clear_env must be true or false, not the number 1\n"
         "    write true or false, in lower case, without quotes"),
        ("debug: yes", "3:10: debug must be true or false, not 'yes'\n"
         "    write true or false, in lower case, without quotes"),
        ("clear_env: True", "3:14: clear_env must be true or false, not 'True'\n"
         "    write true or false, in lower case, without quotes"),
        ("env: [A]", "3:8: env must be a map (key: value), not a list\n    write env: {NAME: value}"),
        ("env: A=b", "3:8: env must be a map (key: value), not 'A=b'\n    write env: {A: b}"),
        ("env: [A=b, C=/d, E=f g]", "3:8: env must be a map (key: value), not a list\n"
         "    write env: {A: b, C: /d, NAME: value}"),
        ("env: {A: ~}", "3:12: env: A must be a single value, not nothing (null)\n    for an empty value write ''"),
        ("env: {A: [b]}", "3:12: env: A must be a single value, not a list"),
        ("env: {5: b}", "3:9: a variable's name in env must be text, not the number 5\n    write it in quotes: \"5\""),
        ("env: {'A=': b}", "3:9: a variable's name in env cannot contain '=': 'A='\n    write NAME: value"),
        ("working_directory: ''", "3:22: working_directory is empty"),
        ("working_directory: ~", "3:22: working_directory must be text, and ~ alone is nothing (null) in YAML\n"
         "    ~ and $HOME are the shell's; write the whole path"),
        ("working_directory: 5", "3:22: working_directory must be text, not the number 5\n"
         "    write it in quotes: \"5\""),
        ("vcpu_pinning: []", "3:17: vcpu_pinning is an empty list\n"
         "    name a host CPU for each vCPU, or remove the key"),
        ("vcpu_pinning: 4", "3:17: vcpu_pinning must be a map or a list, not the number 4\n"
         "    write socket: {core: {thread: host CPU}}, or a list: [CPU of vCPU 0, CPU of vCPU 1, ...]"),
        ("vcpu_pinning: [1, a]", f"3:21: the host CPU of vCPU 1 {NO_CPUS} 'a'\n{CPUS_HINT}"),
        ("vcpu_pinning: [-1]", "3:18: the host CPU of vCPU 0 is -1, which is out of range (0-8191)"),
        ("emulator_pinning: 8192", "3:21: emulator_pinning is 8192, which is out of range (0-8191)"),
        ("vcpu_pinning: [08, 09]", f"3:18: the host CPU of vCPU 0 {NO_CPUS} '08'\n    without leading zero: 8"),
        ("vcpu_pinning: {x: {0: {0: 1}}}", "3:18: a socket number in vcpu_pinning must be a whole number, not 'x'\n"
         "    write a number, or a level and its number, such as socket 0"),
        ("vcpu_pinning: {0: 1}", "3:21: socket 0 must be a map (key: value), not the number 1\n"
         "    for a list by virtual CPU write [1]"),
        ("vcpu_pinning: {0: 4, 1: 6-7}", "3:21: socket 0 must be a map (key: value), not the number 4\n"
         "    for a list by virtual CPU write [4, 6-7]"),
        ("vcpu_pinning: {0: '4,12', 1: '5,13'}", "3:21: socket 0 must be a map (key: value), not '4,12'"),
        ("vcpu_pinning: {1: 4}", "3:21: socket 1 must be a map (key: value), not the number 4"),
        ("vcpu_pinning: {0: {1: 2}}", "3:25: socket 0, core 1 must be a map (key: value), not the number 2"),
        ("vcpu_pinning: {0: {1: {0: ~}}}", "3:29: the host CPU of vCPU (socket 0, core 1, thread 0) "
         f"{NO_CPUS} nothing (null)\n{CPUS_HINT}"),
        ("scheduler: RR", "3:14: scheduler must be one of other, batch, idle, fifo, rr; not 'RR'\n"
         "    did you mean rr?"),
        ("scheduler: ~", "3:14: scheduler must be one of other, batch, idle, fifo, rr; not nothing (null)"),
        ("scheduler: deadline", "3:14: scheduler deadline cannot be had: it needs a runtime, a deadline and a period, "
         "the kernel refuses it for threads confined to a partition (EPERM), and its admission control is shared by "
         "all users\n    use fifo or rr, with vcpu_pinning"),
        ("priority: 5", f"3:13: priority 5 {NO_SCHEDULER}"),
        ("priority: 0", f"3:13: priority 0 {NO_SCHEDULER}"),
        ("priority: 05", "3:13: priority must be a whole number, not '05'\n    without leading zero: 5"),
        ("priority: '5'", "3:13: priority must be a whole number, not '5'\n"
         "    write a decimal number, without quotes"),
        ("scheduler: fifo\npriority: 0", f"4:13: priority 0 is out of range for fifo (1-99)\n{RT_HINT}"),
        ("scheduler: fifo\npriority: 120", f"4:13: priority 120 is out of range for fifo (1-99)\n{RT_HINT}"),
        ("scheduler: rr\npriority: -1", f"4:13: priority -1 is out of range for rr (1-99)\n{RT_HINT}"),
        ("scheduler: batch\npriority: 1", f"4:13: priority 1 is out of range for batch, {NOT_RT}"),
        ("scheduler: other\npriority: -5", f"4:13: priority -5 is out of range for other, {NOT_RT}"),
        ("rlimit_memlock: 16", f"3:19: rlimit_memlock: 16 {MEMLOCK_RANGE}\n    did you mean 16G?"),
        ("rlimit_memlock: 1023", f"3:19: rlimit_memlock: 1023 {MEMLOCK_RANGE}\n    did you mean 1023G?"),
        ("rlimit_memlock: 16384", f"3:19: rlimit_memlock: 16384 {MEMLOCK_RANGE}\n"
         "    did you mean 16384M (16 GiB)?"),
        ("rlimit_memlock: 524288", f"3:19: rlimit_memlock: 524288 {MEMLOCK_RANGE}\n"
         "    did you mean 524288K (512 MiB)?"),
        ("rlimit_memlock: 0", f"3:19: rlimit_memlock: 0 {MEMLOCK_RANGE}\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: 1K", f"3:19: rlimit_memlock: 1K {MEMLOCK_RANGE}\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: 9999999T", f"3:19: rlimit_memlock: 9999999T {MEMLOCK_RANGE}\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: -1", f"3:19: rlimit_memlock cannot be the number -1\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: 16GB", f"3:19: rlimit_memlock cannot be '16GB'\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: 1.5G", f"3:19: rlimit_memlock cannot be '1.5G'\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: G", f"3:19: rlimit_memlock cannot be 'G'\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: \u0661G", f"3:19: rlimit_memlock cannot be '\u0661G'\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: ''", f"3:19: rlimit_memlock cannot be ''\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: 'true'", f"3:19: rlimit_memlock cannot be 'true'\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: ~", f"3:19: rlimit_memlock cannot be nothing (null)\n{MEMLOCK_HINT}"),
        ("rlimit_memlock: [1]", f"3:19: rlimit_memlock cannot be a list\n{MEMLOCK_HINT}"),
        ("isolation: sheild\nvcpu_pinning: [1]",
         "3:14: isolation must be one of shield, cpuset, affinity; not 'sheild'\n"
         "    did you mean shield?"),
        ("isolation: shield", "3:14: isolation: shield has nothing to isolate: no vCPU is pinned\n"
         "    add vcpu_pinning, or remove isolation"),
        ("on_tuning_failure: ignore", "3:22: on_tuning_failure must be one of abort, continue; not 'ignore'"),
        ("shutdown_timeout: 1.5", "3:21: shutdown_timeout must be a whole number of seconds or infinity, "
         "not the number 1.5\n    write a number such as 60"),
        ("shutdown_timeout: 1:30", f"3:21: {NO_SECONDS} '1:30'\n    write 90"),
        ("shutdown_timeout: 999999999:00", f"3:21: {NO_SECONDS} '999999999:00'\n    write a number such as 60"),
        ("shutdown_timeout: 60s", f"3:21: {NO_SECONDS} '60s'\n    write 60"),
        ("shutdown_timeout: 08", f"3:21: {NO_SECONDS} '08'\n    write 8"),
        ("shutdown_timeout: 5min", f"3:21: {NO_SECONDS} '5min'\n    write a number such as 60"),
        ("shutdown_timeout: -1", "3:21: shutdown_timeout is -1, which is out of range (0-2592000)"),
        ("user: true", "3:9: user must be a name or a number, not true"),
        ("user: ''", "3:9: user is empty"),
        ("group: 4294967295", "3:10: group is 4294967295, which is out of range (0-4294967294)"),
        ("group: -1", "3:10: group is -1, which is out of range (0-4294967294)"),
    ],
)  # fmt: skip
def test_refused_key(keys: str, message: str) -> None:
    assert launcher_refusal(keys) == message


@pytest.mark.parametrize("policy", ["fifo", "rr"])
def test_realtime_vcpus_share_no_cpu(policy: str) -> None:
    assert launcher_refusal(f"scheduler: {policy}\nvcpu_pinning: [1, 2, 1]") == (
        "4:24: host CPU 1 has a vCPU already, from 4:18\n"
        f"    two {policy} vCPUs on one CPU can hang the guest; give each a CPU of its own"
    )


def test_shared_cpu_is_a_warning_otherwise() -> None:
    vm = launcher("vcpu_pinning: {0: {0: {0: 3, 1: 3}}}")
    assert vm.warnings == ("win11.yml:3:35: host CPU 3 has a vCPU already, from 3:29; they will take turns",)


def test_shared_cpu_through_an_alias() -> None:
    assert len(launcher("vcpu_pinning: [&a 3, *a]").warnings) == 1


def test_more_pins_than_vcpus() -> None:
    assert launcher("vcpu_pinning: [1, 2]", "[smp: 2]").pinning is not None
    assert launcher("vcpu_pinning: [1, 2]", "[smp: [1, maxcpus: 2]]").pinning is not None
    message = launcher_refusal("vcpu_pinning: [1, 2, 3]", "[smp: 2]")
    assert message == (
        "3:24: vcpu_pinning names 3 vCPUs, but -smp gives the guest 2\n    give it more there, or pin fewer"
    )


@pytest.mark.parametrize("item", ["daemonize", "-daemonize"])
def test_daemonize(item: str) -> None:
    assert launcher_refusal("", f"[{item}]") == (
        "3:8: -daemonize takes QEMU out of the launcher's hands, which waits for it and ends it in order\n"
        "    remove it; to have it in the background: qemu-launcher start NAME"
    )


@pytest.mark.parametrize(
    ("item", "text", "size"),
    [
        ("m: 4GB", "4GB", "4G"),
        ("-m: 4 G", "4 G", "4G"),
        ("m: 1.5GiB", "1.5GiB", "1.5G"),
        ("m: 4096 mb", "4096 mb", "4096m"),
        ("m: 4Gi", "4Gi", "4G"),
        ("m: 'size=4GB,slots=2'", "4GB", "4G"),
        ("m: [4G, slots: 2, maxmem: 8GB]", "8GB", "8G"),
    ],
)
@pytest.mark.parametrize("keys", ["", "rlimit_memlock: auto"])
def test_size_that_is_none_for_qemu(keys: str, item: str, text: str, size: str) -> None:
    message = launcher_refusal(keys, f"[{item}]")
    assert message == f"{3 + bool(keys)}:8: -m {text} is no size for QEMU\n    write {size}"


@pytest.mark.parametrize(
    "item",
    ["4G", "4g", "1.5G", "4096", "0x1000", "4E", "1024B", "lots", "0x4B", "' 4G'", "+4G", "[4G, maxmem: 8g]", "99P"],
)
def test_size_that_is_qemu_s_business(item: str) -> None:
    assert launcher("", f"[m: {item}]").options[0].name == "m"


@pytest.mark.parametrize("item", ["preconfig", "-preconfig"])
@pytest.mark.parametrize("keys", ["vcpu_pinning: [0]", "scheduler: batch", "rlimit_memlock: 1G"])
def test_preconfig_and_tuning(item: str, keys: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        definition.validate_tunable(launcher(keys, f"[{item}]"))
    assert shown(caught.value) == (
        "4:8: -preconfig stops QEMU before it has made its vCPUs, so they cannot be tuned before the guest runs\n"
        "    remove it; -S holds the guest too, once its vCPUs are there"
    )


@pytest.mark.parametrize(
    ("keys", "item"),
    [
        ("", "preconfig"),
        ("rlimit_memlock: false", "preconfig"),
        ("scheduler: batch", "S"),
        ("scheduler: batch", "name: preconfig"),
    ],
)
def test_preconfig_without_tuning(keys: str, item: str) -> None:
    definition.validate_tunable(launcher(keys, f"[{item}]"))


EXAMPLE = "    qemu-launcher.yml(5) has an example"
NO_KEYS = "    write launcher: and below it, two spaces further in, binary: qemu-system-x86_64"
NO_OPTIONS = "    write qemu: and below it an option in each line, such as - nographic; or qemu: [] for none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", f"1:1: a definition has the sections launcher: and qemu:, but this is a list\n{EXAMPLE}"),
        ("a", f"1:1: a definition has the sections launcher: and qemu:, but this is 'a'\n{EXAMPLE}"),
        ("launcher: {binary: q}", f"1:1: the section qemu: is missing\n{NO_OPTIONS}"),
        ("qemu: []", f"1:1: the section launcher: is missing\n{NO_KEYS}"),
        ("launcher: {}\nqemu: []", "1:11: the key binary is missing in launcher:\n"
         "    name the QEMU to run, for example binary: qemu-system-x86_64"),
        ("launcher: ~\nqemu: []", "1:11: the section launcher must be a map (key: value), not nothing (null)\n"
         f"{NO_KEYS}"),
        ("launcher: {binary: q}\nqemu:", "2:6: the section qemu must be a list, not nothing (null)\n"
         f"{NO_OPTIONS}"),
        ("launcher: {binary: 5}\nqemu: []", '1:20: binary must be text, not the number 5\n    write it in quotes: "5"'),
        ("launcher: {binary: q}\nqemu: {a: b}", "2:7: the section qemu must be a list, not a map\n"
         '    begin each option with "- "'),
        ("launcher: {binary: q}\nqemu: -m 256M\n  -nographic",
         "2:7: the section qemu must be a list, not '-m 256M -nographic'\n"
         "    a list is what this makes of a command line: qemu-launcher import -- qemu-system-x86_64 ..."),
        ("launcher: {binary: q}\nqemu: []\nquemu: []", "3:1: unknown section 'quemu'\n    did you mean qemu?"),
        ("launcher: {binary: q}\nqemu: []\nbase: &b [x]", "3:1: unknown section 'base'\n    known are launcher, qemu"),
        ("b: &b {binary: q}\nlauncher: {<<: *b, binary: r}\nqemu: []", "2:12: unknown key in launcher: '<<'\n"
         "    merge keys (<<) are no part of YAML 1.2; write the keys out, or use an alias for the whole"),
    ],
)  # fmt: skip
def test_refused_sections(text: str, message: str) -> None:
    assert refusal(text) == message


def test_other_sections_may_hold_what_aliases_use() -> None:
    vm = read("base: {deep: [&b {binary: q}], list: &o [x, y: 1]}\nlauncher: *b\nqemu: [a: *o]\n")
    assert vm.binary == "q"


def test_all_mistakes_in_one_go_in_the_order_of_the_file() -> None:
    message = refusal("qemu:\n- a: ~\n- 5\nlauncher:\n  binary: q\n  priority: x\n  clear_env: 1\nfoo: 1\n")
    places = [line.split(" ")[0] for line in message.splitlines() if not line.startswith("    ")]
    assert places == ["2:6:", "3:3:", "6:13:", "7:14:", "8:1:"]


def test_many_mistakes_are_cut_short() -> None:
    message = refusal("launcher: {binary: q}\nqemu:\n" + "- 5\n" * 50)
    assert message.count("an option must be text") == MOST_PROBLEMS


@pytest.mark.parametrize(
    "text",
    [
        "x: &x [" + "abcdefg," * 30000 + "]\nlauncher: {binary: q}\nqemu:\n" + "- a: *x\n" * 20000,
        "x: &x [" + "abcdefg," * 10000 + "]\nlauncher: {binary: q}\nqemu:\n" + "- a: *x\n" * 20000,
        "x: &x [" + "a," * 30000 + "~]\nlauncher: {binary: q}\nqemu:\n" + "- a: *x\n" * 20000,
        "a: &a {" + "".join(f"{i}: {{}}," for i in range(20000)) + "}\n"
        "launcher: {binary: q, vcpu_pinning: {" + "".join(f"{i}: *a," for i in range(20000)) + "}}\nqemu: []",
        "a: &a [x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 20)).replace("*a0", "*a")
        + "launcher: {binary: q}\nqemu: *a19\n",
    ],
    ids=["long value", "many values", "repeated mistake", "pinning", "billion laughs"],
)  # fmt: skip
def test_aliases_do_not_make_much_out_of_little(text: str) -> None:
    """Each would come to gigabytes if it were followed; that the test ends is what it shows."""
    assert len(refusal(text)) < 1000


def test_one_argument_has_a_longest_value() -> None:
    longest = MAX_ARGUMENT_BYTES
    head = "launcher: {binary: q}\nqemu:\n- a: "
    assert read(head + "x" * longest).options[0].value == "x" * longest
    assert refusal(head + "x" * (longest + 1)) == "3:3: -a has a value longer than 131071 bytes, the kernel's limit"


# Files


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "v.yml"
    path.write_text("launcher: {binary: q}\nqemu: []\n")
    assert definition.load(path, "v").path == path


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "folder.yml").mkdir()
    (tmp_path / "dangling.yml").symlink_to("nowhere")
    (tmp_path / "loop.yml").symlink_to("loop.yml")
    os.mkfifo(tmp_path / "fifo.yml")
    (tmp_path / "big.yml").write_bytes(b"#" * (definition.MAX_FILE_BYTES + 1))
    messages = {}
    for name in ("folder", "dangling", "loop", "fifo", "big", "nul\0"):
        with pytest.raises(DefinitionError) as caught:
            definition.read(tmp_path / f"{name}.yml")
        messages[name] = caught.value.message.replace(f"{tmp_path}/", "")
    assert messages == {
        "folder": "cannot read folder.yml: Is a directory",
        "dangling": "cannot read dangling.yml: No such file or directory",
        "loop": "cannot read loop.yml: Too many levels of symbolic links",
        "fifo": "fifo.yml is no regular file",
        "big": "big.yml is larger than 1 MiB",
        "nul\0": f"cannot read '{tmp_path}/nul\\x00.yml': embedded null byte".replace(f"{tmp_path}/", ""),
    }


def test_the_largest_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "v.yml"
    path.write_bytes(b"#" * definition.MAX_FILE_BYTES)
    assert len(definition.read(path)) == definition.MAX_FILE_BYTES


# Several mistakes in one go


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("launcher: {binary: q, binary: r, priority: 5}\nqemu: [a: ~]\nqemu: []",
         ["1:23: the key 'binary' is given twice, first in line 1", "1:44: priority 5 without scheduler",
          "2:11: the value of a must be a single value, not nothing (null)",
          "3:1: the key 'qemu' is given twice, first in line 2"]),
        ("launcher: {scheduler: fifo, priority: 200, vcpu_pinning: [1, 1], env: 5}\nqemu: [daemonize]",
         ["1:11: the key binary is missing in launcher:", "1:39: priority 200 is out of range for fifo (1-99)",
          "1:62: host CPU 1 has a vCPU already, from 1:59", "1:71: env must be a map (key: value), not the number 5",
          "2:8: -daemonize takes QEMU out of the launcher's hands, which waits for it and ends it in order"]),
        ("launcher: {binary: q, vcpu_pinning: [1, 2, 3]}\nqemu: [smp: 2]\nbinary: q",
         ["1:44: vcpu_pinning names 3 vCPUs, but -smp gives the guest 2", "3:1: unknown section 'binary'"]),
    ],
)  # fmt: skip
def test_all_that_is_wrong_is_told_together(text: str, messages: list[str]) -> None:
    told = [line for line in refusal(text).splitlines() if not line.startswith("    ")]
    assert told == messages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("launcher: {binary: q, sheduler: fifo, priority: 5}\nqemu: []", "1:23: unknown key in launcher: 'sheduler'"),
        ("launcher: {binary: q, scheduler: [fifo], priority: 5}\nqemu: []", "1:34: scheduler must be one of"),
        ("launcher: {binary: q, vcpu_pining: [1], isolation: shield}\nqemu: []", "1:23: unknown key in launcher"),
        ("launcher: {binary: q, vcpu_pinning: [x], isolation: shield}\nqemu: []", "1:38: the host CPU of vCPU 0"),
        ("launcher: {binary: q, vcpu_pinning: [1, 2]}\nqemu: [smp: 1, smp: ~]", "2:21: the value of smp"),
        ("launcher: {binary: q, iothread_pinning: {io: 1}}\nqemu: [object: {iothread: id=io}]", "2:16: the value of"),
        ("launcher: {binary: q, iothread_pinning: {io: 1}}", "1:1: the section qemu: is missing"),
        ("qemu: [daemonise]", "1:1: the section launcher: is missing"),
    ],
)
def test_what_cannot_be_read_makes_nothing_else_wrong(text: str, message: str) -> None:
    """A rule across keys says nothing where one of them is unsure: it would be told of a mistake that is none."""
    (told,) = [line for line in refusal(text).splitlines() if not line.startswith("    ")]
    assert told.startswith(message)


def test_key_that_stands_a_level_too_high() -> None:
    message = refusal("launcher:\n  binary: q\nvcpu_pinning: [1]\nqemu: []\n")
    assert message == (
        "3:1: unknown section 'vcpu_pinning'\n"
        "    vcpu_pinning is a key of the section launcher: put it there, two spaces further in"
    )


@pytest.mark.parametrize(
    ("keys", "qemu", "wanted"),
    [
        ("", "[]", False),
        ("", "[{device: [vfio-pci, host: 01:00.0]}]", True),
        ("inhibit_sleep: false", "[{device: [vfio-pci, host: 01:00.0]}]", False),
        ("", "[{drive: [file: 'nvme://0000:44:00.0/1']}]", True),  # QEMU drives the controller itself
        ("inhibit_sleep: true", "[]", True),
        ("", "[netdev: vhost-vdpa]", False),
        ("", "[device: vfio-user-pci]", False),
    ],
)
def test_host_stays_awake_for_a_device_of_its_own(keys: str, qemu: str, wanted: bool) -> None:
    assert launcher(keys, qemu).inhibit_sleep is wanted


@pytest.mark.parametrize("word", ["on", "on-fault"])
def test_memory_that_is_locked_twice_is_a_warning(word: str) -> None:
    """VFIO locks it anyway, and the kernel adds up the two."""
    vm = launcher("", f"[device: [vfio-pci, host: '01:00.0'], overcommit: cpu-pm=on, overcommit: mem-lock={word}]")
    assert vm.warnings == (
        f"win11.yml:3:68: mem-lock={word} locks the guest's RAM, which VFIO locks anyway, and then it counts twice "
        "against rlimit_memlock; leave it out",
    )


@pytest.mark.parametrize(
    "items",
    [
        "overcommit: mem-lock=on",
        "device: vfio-pci",
        "device: vfio-pci, overcommit: mem-lock=off",
        "device: [vfio-pci, iommufd: io], overcommit: mem-lock=on",
        "device: vfio-pci, overcommit: mem-lock=on, mem-path: /dev/hugepages",
    ],
)
def test_memory_that_is_locked_once_is_none(items: str) -> None:
    assert launcher("", f"[{items}]").warnings == ()
