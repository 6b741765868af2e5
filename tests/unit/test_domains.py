"""libvirt's XML: what becomes of its tuning, the command line and hostile text. The real virsh is in tests/qemu."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given, settings, strategies as st

from qemu_launcher import cmdline
from qemu_launcher.definition import VmDefinition
from qemu_launcher.errors import DefinitionError, LauncherError
from qemu_launcher.importing import (
    command_line,
    domainkeys,
    domainshown,
    domainxml,
    drafting,
    libvirt,
    virsh,
)
from unit.domains import LINE, definition_of, domain
from unit.reading import ROOT, read


def launcher_keys(inside: str, vcpus: int = 4) -> list[str]:
    """The lines of the launcher section that come from the XML's tuning, suggestions included; other comments not."""
    given = "<vcpu>" in inside or "<vcpu " in inside
    found = domainxml.tuning(domain(inside if given else f"<vcpu>{vcpus}</vcpu>{inside}"))
    text = drafting.render(drafting.Draft("q", (), tuple(domainkeys.thread_keys(found))))
    lines = text.partition("binary: q\n")[2].partition("qemu:")[0].splitlines()
    keys = ("vcpu_", "emulator_", "iothread", "scheduler", "priority", "isolation")
    return [line.strip() for line in lines if not line.startswith("  # ") or line.removeprefix("  # ").startswith(keys)]


def pins(*cpus: str) -> str:
    return "".join(f"<vcpupin vcpu='{index}' cpuset='{text}'/>" for index, text in enumerate(cpus))


def vcpus(enabled: str) -> str:
    """A vCPU for each letter; the first is always there, the others can be plugged in."""
    each = "".join(
        f"<vcpu id='{index}' enabled='{'yes' if letter == 'y' else 'no'}' hotpluggable='{'yes' if index else 'no'}'/>"
        for index, letter in enumerate(enabled)
    )
    return f"<vcpu current='{enabled.count('y')}'>{len(enabled)}</vcpu><vcpus>{each}</vcpus>"


@pytest.mark.parametrize(
    ("inside", "lines"),
    [
        ("", ["# vcpu_pinning: [4, 5, 6, 7]"]),
        (f"<cputune>{pins('4', '5', '6', '7')}</cputune>", ["vcpu_pinning: [4, 5, 6, 7]"]),
        (f"<cputune>{pins('0-3,^1-2', '4-6,^5', '8,9', '10')}</cputune>", ["vcpu_pinning: ['0,3', '4,6', 8-9, 10]"]),
        # Those that can be plugged in later are named too.
        ("<vcpu current='1'>4</vcpu><cputune>" + pins("4", "5") + "</cputune>", ["vcpu_pinning: [4, 5]"]),
        (
            "<vcpu current='1' cpuset='4-5'>2</vcpu>",
            ["vcpu_pinning: [4-5, 4-5]", "isolation: cpuset", "emulator_pinning: 4-5"],
        ),
        (
            "<vcpu current='2'>3</vcpu><cputune>"
            + pins("4", "5", "6")
            + "<vcpusched vcpus='0-2' scheduler='fifo' priority='1'/><emulatorpin cpuset='6'/></cputune>",
            ["vcpu_pinning: [4, 5, 6]", "# emulator_pinning: 6", "scheduler: fifo", "priority: 1"],
        ),
        # Which there are is said one by one.
        (
            vcpus("yyn") + "<cputune><vcpusched vcpus='0-1' scheduler='batch'/></cputune>",
            ["# vcpu_pinning: [2, 3]", "scheduler: batch"],
        ),
        (
            vcpus("yny") + "<cputune><vcpupin vcpu='0' cpuset='8'/><vcpupin vcpu='2' cpuset='10'/>"
            "<vcpusched vcpus='0,2' scheduler='fifo' priority='1'/></cputune>",
            ["vcpu_pinning:", "0:", "0: {0: 8}", "2:", "0: {0: 10}", "scheduler: fifo", "priority: 1"],
        ),
        (f"<cputune>{pins('4', '5')}</cputune>", ["vcpu_pinning: [4, 5]"]),
        ("<cputune><vcpupin vcpu='3' cpuset='4'/></cputune>", ["vcpu_pinning:", "3:", "0: {0: 4}"]),
        (
            "<cpu><topology sockets='1' dies='1' cores='2' threads='2'/></cpu><cputune>"
            "<vcpupin vcpu='1' cpuset='4'/><vcpupin vcpu='2' cpuset='5-6'/><vcpupin vcpu='3' cpuset='8,10'/></cputune>",
            ["vcpu_pinning:", "0:", "0: {1: 4}", "1: {0: 5-6, 1: '8,10'}"],
        ),
        (
            f"<cputune>{pins('2-5', '2-5')}</cputune>",
            ["vcpu_pinning: [2-5, 2-5]", "isolation: cpuset"],
        ),
        ("<vcpu cpuset='2'>1</vcpu>", ["vcpu_pinning: [2]", "# emulator_pinning: 2"]),
        (
            f"<vcpu cpuset='8-9'>2</vcpu><cputune>{pins('2', '3')}</cputune>",
            ["vcpu_pinning: [2, 3]", "emulator_pinning: 8-9"],
        ),
        (
            f"<cputune>{pins('4', '5', '6', '7')}<emulatorpin cpuset='0-1,3'/>"
            "<iothreadpin iothread='1' cpuset='2'/><iothreadpin iothread='12' cpuset='0,3'/></cputune>",
            [
                *("vcpu_pinning: [4, 5, 6, 7]", "emulator_pinning: '0-1,3'"),
                *("iothread_pinning:", "iothread1: 2", "iothread12: '0,3'"),
            ],
        ),
        (
            f"<cputune>{pins('4', '5', '6', '7')}<emulatorpin cpuset='4'/>"
            "<iothreadpin iothread='1' cpuset='5'/></cputune>",
            ["vcpu_pinning: [4, 5, 6, 7]", "# emulator_pinning: 4", "# iothread_pinning:"],
        ),
        (
            f"<cputune>{pins('4', '5', '6', '7')}<iothreadpin iothread='1' cpuset='5'/>"
            "<iothreadpin iothread='2' cpuset='0-1'/></cputune>",
            ["vcpu_pinning: [4, 5, 6, 7]", "iothread_pinning:", "iothread2: 0-1", "# iothread1: 5"],
        ),
        (
            f"<cputune>{pins('4', '5', '6', '7')}<vcpusched vcpus='0-3' scheduler='fifo' priority='7'/></cputune>",
            ["vcpu_pinning: [4, 5, 6, 7]", "scheduler: fifo", "priority: 7"],
        ),
        (
            f"<cputune>{pins('4', '5', '6', '7')}<vcpusched vcpus='0-3,^1' scheduler='batch'/>"
            "<vcpusched vcpus='1' scheduler='batch'/></cputune>",
            ["vcpu_pinning: [4, 5, 6, 7]", "scheduler: batch"],
        ),
        (
            f"<cputune>{pins('4', '5', '6', '7')}<vcpusched vcpus='0' scheduler='rr' priority='1'/></cputune>",
            ["vcpu_pinning: [4, 5, 6, 7]", "# scheduler: rr"],
        ),
        (
            f"<cputune>{pins('4', '4', '6', '7')}<vcpusched vcpus='0-3' scheduler='rr' priority='1'/></cputune>",
            ["vcpu_pinning: [4, 4, 6, 7]", "isolation: cpuset", "# scheduler: rr", "# priority: 1"],
        ),
        (
            "<cputune><vcpusched vcpus='0-3' scheduler='fifo' priority='1'/></cputune>",
            ["# vcpu_pinning: [4, 5, 6, 7]", "# scheduler: fifo", "# priority: 1"],
        ),
        (
            "<cputune><emulatorsched scheduler='idle'/></cputune>",
            ["# vcpu_pinning: [4, 5, 6, 7]", "emulator_scheduler: idle"],
        ),
        (
            "<cputune><emulatorsched scheduler='fifo' priority='2'/></cputune>",
            ["# vcpu_pinning: [4, 5, 6, 7]", "# emulator_scheduler: {policy: fifo, priority: 2}"],
        ),
    ],
)
def test_tuning_becomes_keys(inside: str, lines: list[str]) -> None:
    assert launcher_keys(inside) == lines


@pytest.mark.parametrize(
    "inside",
    [
        f"<vcpu>4</vcpu><cputune>{pins('4', '5', '6', '7')}<emulatorpin cpuset='0-1,3'/>"
        "<iothreadpin iothread='1' cpuset='0,3'/><vcpusched vcpus='0-3' scheduler='fifo' priority='7'/>"
        "<emulatorsched scheduler='idle'/></cputune>",
        f"<vcpu>4</vcpu><cputune>{pins('4-5', '4-5')}</cputune>",
        "<vcpu>4</vcpu><cputune><vcpupin vcpu='3' cpuset='4,6'/></cputune>",
        "<vcpu cpuset='2,4'>4</vcpu>",
        "<vcpu>40</vcpu><cputune>" + pins(*map(str, range(40))) + "</cputune>",
    ],
)
def test_what_is_written_can_be_read(inside: str) -> None:
    """With the suggestions' comment signs, and without a single one of them lost."""
    root = domain(inside)
    found = domainxml.tuning(root)
    text = definition_of(inside, LINE.replace("-smp 4,sockets=1,cores=2,threads=2", f"-smp {len(found.started)}"))
    vm = read(text)
    sets = {} if vm.pinning is None else dict(enumerate(cpus.cpus for cpus in vm.pinning.sets))
    assert list(sets.values()) == list(found.vcpu_pins.values())
    assert vm.pinning is None or vm.pinning.by_index is None or list(sets) == list(found.vcpu_pins)


@pytest.mark.parametrize(
    ("enabled", "smp", "said"),
    [("yyyn", "3,maxcpus=4", None), ("yyyy", "4,maxcpus=4", None), ("ynny", "1,maxcpus=4", "virtual CPU 3")],
)
def test_virtual_cpus_that_libvirt_plugs_in_are_there_at_the_start(enabled: str, smp: str, said: str | None) -> None:
    text = definition_of(vcpus(enabled), LINE.replace("-smp 4", "-smp 1,maxcpus=4"))
    assert f"{smp},sockets=1,cores=2,threads=2" in cmdline.qemu_argv(read(text))
    comment = "In libvirt these too are there when the guest starts: {}. Here they must be plugged in, by device_add."
    assert (comment.format(said) in text.replace("\n  # ", " ")) == (said is not None)
    assert said is not None or "these too" not in text


def test_unpinned_and_different_ones_are_named() -> None:
    text = definition_of(
        f"<vcpu>4</vcpu><cputune>{pins('4', '5')}<vcpusched vcpus='0-1' scheduler='fifo' priority='1'/>"
        "<vcpusched vcpus='3' scheduler='batch'/><shares>2048</shares><quota>1</quota></cputune>"
        "<memtune><soft_limit>1</soft_limit></memtune><blkiotune><weight>1</weight></blkiotune>"
    ).replace("\n  # ", " ")
    assert "Not pinned in libvirt: virtual CPU 2-3." in text
    assert (
        "In libvirt: batch for virtual CPU 3; fifo 1 for virtual CPU 0-1. Here all virtual CPUs have one policy."
        in text
    )
    assert "# Not carried over from libvirt: shares, quota, soft_limit, blkiotune.\n" in text


@pytest.mark.parametrize(
    ("inside", "names"),
    [
        ("<blkiotune><weight>500</weight></blkiotune><devices><lease/><lease/></devices>", "blkiotune, lease"),
        # QEMU does not start without it.
        (
            "<devices><disk><target dev='sda'/><source startupPolicy='optional'/></disk>"
            "<disk><target dev='sdb'/><source startupPolicy='mandatory'/></disk></devices>",
            "startupPolicy of sda",
        ),
        ("<memory unit='GiB'>4</memory><currentMemory unit='MiB'>2048</currentMemory>", "currentMemory"),
        ("<memory unit='GiB'>4</memory><currentMemory unit='MiB'>4096</currentMemory>", None),
        ("<on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>", None),
        ("<on_poweroff>restart</on_poweroff><on_crash>preserve</on_crash>", "on_poweroff=restart, on_crash=preserve"),
        ("<on_crash>a b</on_crash>", "on_crash"),
        (
            "<numatune><memory mode='restrictive' nodeset='0'/><memnode cellid='0' mode='restrictive'/></numatune>",
            "numatune memory restrictive, numatune memnode restrictive",
        ),
        ("<numatune><memory mode='strict' nodeset='0'/></numatune>", None),
        ("<vcpu placement='auto'>4</vcpu><numatune><memory placement='auto'/></numatune>", "placement=auto"),
    ],
)
def test_what_has_no_counterpart_is_named(inside: str, names: str | None) -> None:
    lines = definition_of(inside).splitlines()
    found = [line for line in lines if line.startswith("# Not carried over from libvirt: ")]
    assert found == ([] if names is None else [f"# Not carried over from libvirt: {names}."])


def test_a_limit_of_memory_is_named_unless_it_is_kept() -> None:
    """It is rlimit_memlock's where memory is locked; else it was the cgroup's alone."""
    limit = "<memtune><hard_limit unit='GiB'>4</hard_limit></memtune>"
    unlocked = LINE.replace("mem-lock=on", "mem-lock=off").replace("vfio-pci", "e1000")
    said = "# Not carried over from libvirt: hard_limit.\n"
    assert said in definition_of(limit, unlocked)
    assert said not in definition_of(limit)
    assert said not in definition_of("", unlocked)


@pytest.mark.parametrize(
    ("inside", "line", "count"),
    [
        ("", LINE, 0),
        ("<on_reboot>restart</on_reboot>", LINE, 0),
        ("<on_reboot>destroy</on_reboot>", LINE, 1),
        ("<on_reboot>destroy</on_reboot>", LINE + " -no-reboot", 1),
    ],
)
def test_a_guest_that_ends_instead_of_rebooting(inside: str, line: str, count: int) -> None:
    assert cmdline.qemu_argv(read(definition_of(inside, line))).count("-no-reboot") == count


def test_what_numad_would_have_to_say_is_not_asked_for() -> None:
    """virsh has no command line otherwise: "Advice from numad is needed"."""
    auto = "<vcpu placement='auto'>4</vcpu><numatune><memory mode='strict' placement='auto'/><memnode/></numatune>"
    shown = domainxml.parse(domainshown.prepared(domain(auto)).decode(), "x")
    assert [(part.tag, part.attrib) for part in shown.iter() if part.tag in ("vcpu", "memory", "memnode")] == [
        ("vcpu", {}),
        ("memnode", {}),
    ]


@pytest.mark.parametrize(
    ("inside", "line", "key"),
    [
        ("", LINE, "rlimit_memlock: auto"),
        ("<memtune><hard_limit unit='GiB'>20</hard_limit></memtune>", LINE, "rlimit_memlock: 20G"),
        ("<memtune><hard_limit>1536</hard_limit></memtune>", LINE, "rlimit_memlock: 1536K"),
        ("<memtune><hard_limit unit='MB'>1025</hard_limit></memtune>", LINE, "rlimit_memlock: 1025000000"),
        ("<memtune><hard_limit>9007199254740991</hard_limit></memtune>", LINE, "rlimit_memlock: auto"),
        ("", LINE.replace("-accel kvm", "-accel tcg"), "rlimit_memlock: true"),
        ("", LINE.replace("mem-lock=on", "mem-lock=off").replace("vfio-pci", "e1000"), None),
    ],
)
def test_locked_memory(inside: str, line: str, key: str | None) -> None:
    found = [text.strip() for text in definition_of(inside, line).splitlines() if "rlimit_memlock" in text]
    assert found == ([] if key is None else [key])


def test_command_line_without_libvirt_s_own() -> None:
    text = definition_of(
        "<qemu:commandline><qemu:env name='FOO' value='a b'/></qemu:commandline>"
        "<devices><graphics type='spice' autoport='yes'/></devices>"
    )
    vm = read(text)
    assert vm.env == (("FOO", "a b"),)
    argv = cmdline.qemu_argv(vm)
    assert argv[:6] == [
        *("/usr/bin/qemu-system-x86_64", "-name", "guest=vm,debug-threads=on"),
        *("-machine", "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram", "-accel"),
    ]
    assert not {"-S", "-no-shutdown", "-mon"} & set(argv)
    assert "pcie-root-port,port=16,id=pci.1,bus=pcie.0,multifunction=on,addr=0x2" in argv
    assert argv[argv.index("-blockdev") + 1] == (
        "file,filename=/var/lib/libvirt/images/a,,b.img,node-name=l,cache.direct=on"
    )
    comments = text.replace("\n  # ", " ")
    for said in (
        "you must have it yourself",
        "choose a path of yours",
        "A descriptor of libvirtd's",
        "libvirt sets the password later",
        "Encrypted with libvirt's key",
        "bind" and "give yourself /dev/vfio/GROUP",
    ):
        assert comments.count(said) == 1, said


@pytest.mark.parametrize(
    ("option", "words"),
    [
        # -object is read by another of QEMU's readers, which has lists of numbers, and nothing inner.
        ('-object {"qom-type":"a","host-nodes":[0,2],"x":true}', "-object a,host-nodes=0,host-nodes=2,x=on"),
        ('-object {"qom-type":"a","host-nodes":[3,0,1,2]}', "-object a,host-nodes=0-3"),
        ('-blockdev {"driver":"a","b":{"c":{"d":"e,f"}}}', "-blockdev a,b.c.d=e,,f"),
        ('-audiodev {"driver":"a","in":{"x":1}}', "-audiodev a,in.x=1"),
        # Left as they are: what QEMU reads otherwise, or not at all, in the other form.
        ('-device {"driver":"a","b":[1]}', None),
        ('-device {"driver":"a","b":1.5}', None),
        ('-netdev {"type":"a","b":{"c":1}}', None),
        ('-object {"qom-type":"a","limits":{"bps-total":1}}', None),
        ('-object {"qom-type":"a","b":["x"]}', None),
        ('-object {"qom-type":"a","b":[true]}', None),
        ('-object {"qom-type":"a","b":[]}', None),
        ('-blockdev {"driver":"a","b":{}}', None),
        ('-blockdev {"driver":"a","b":null}', None),
        ('-blockdev {"driver":"a","b.c":1}', None),
        ('-device {"driver":"a,b","c":1}', None),
        ('-device {"a":"b"}', None),
        ('-device {"driver":', None),
        ('-device {"driver":"a","b=c":1}', None),
        ('-chardev {"driver":"a"}', None),
    ],
)
def test_json_in_the_readable_form(option: str, words: str | None) -> None:
    (read_option,) = command_line.options_of(option.split(" ", 1))
    assert " ".join(cmdline.option_argv(command_line.as_read(libvirt._readable(read_option)))) == (words or option)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "vm.xml is no XML: no element found: line 1, column 0"),
        ("<domain>", "vm.xml is no XML: no element found: line 1, column 8"),
        ("<network/>", "vm.xml is no domain of libvirt's, but <network>"),
        ("<!DOCTYPE domain><domain/>", "vm.xml has a document type, which no domain of libvirt's has"),
        (
            "<!DOCTYPE x [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><domain>&b;</domain>",
            "vm.xml has a document type, which no domain of libvirt's has",
        ),
        ("<domain>&a;</domain>", None),
        ("<domain>" + "<a>" * 100, "vm.xml is nested more than 64 levels deep"),
        ("<?xml version='1.0' encoding='nonsense'?><network/>", "vm.xml is no domain of libvirt's, but <network>"),
        ("<domain>\ud800</domain>", None),
        ("<domain>\0</domain>", None),
    ],
)
def test_hostile_xml(text: str, message: str | None) -> None:
    with pytest.raises(DefinitionError) as caught:
        domainxml.parse(text, "vm.xml")
    assert message is None or caught.value.message == message


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("<vcpu>x</vcpu>", "vcpu in the XML is 'x', and must be a number (1-8192)"),
        ("<vcpu>99999999999999999999</vcpu>", "must be a number (1-8192)"),
        ("<vcpu current='5'>4</vcpu>", "vcpu current in the XML is '5', and must be a number (1-4)"),
        (
            "<vcpu>2</vcpu><vcpus><vcpu id='2' enabled='yes'/></vcpus>",
            "vcpus id in the XML is '2', and must be a number (0-1)",
        ),
        ("<cputune><vcpupin vcpu='0' cpuset='0-99999999'/></cputune>", "must be a number (0-8191)"),
        ("<cputune><vcpupin vcpu='0' cpuset='3-1'/></cputune>", "is '1', and must be a number (3-8191)"),
        (
            "<cputune><vcpupin vcpu='0' cpuset='1,^1'/></cputune>",
            "vcpupin in the XML is '1,^1', which leaves no CPU",
        ),
        ("<cputune><vcpupin vcpu='0'/></cputune>", "is '', and must be a number"),
        ("<cputune><vcpupin cpuset='0'/></cputune>", "vcpupin vcpu in the XML is ''"),
        ("<cputune><vcpusched vcpus='0' scheduler='deadline'/></cputune>", "has the scheduler 'deadline'"),
        ("<cputune><vcpusched vcpus='0' scheduler='fifo' priority='100'/></cputune>", "must be a number (0-99)"),
        ("<memoryBacking><hugepages><page size='x'/></hugepages></memoryBacking>", "page in the XML is 'x'"),
        (
            "<memoryBacking><hugepages><page size='2' nodeset='x'/></hugepages></memoryBacking>",
            "a node of page nodeset in the XML is 'x'",
        ),
        ("<memtune><hard_limit unit='parsec'>1</hard_limit></memtune>", "has the unit 'parsec'"),
        ("<cpu><topology cores='-1'/></cpu>", "topology cores in the XML is '-1'"),
    ],
)
def test_numbers_that_cannot_be(inside: str, message: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        domainxml.tuning(domain(inside))
    assert message in caught.value.message
    assert caught.value.exit_status == 2


TAGS = """
    domain vcpu cputune vcpupin emulatorpin iothreadpin vcpusched devices interface mac source model address hostdev tpm
    backend memtune hard_limit cpu topology memoryBacking hugepages page os type name controller boot
    rom vlan tag vcpus disk target iotune group_name total_bytes_sec size_iops_sec
    numatune memory currentMemory on_reboot on_crash
    clock audio teaming acpi ip reconnect local filesystem driver binary cache readonly encryption mtu alias nvram
    pagesize
"""
NAMES = """
    enabled guestReset bar file mode placement unit nodeset type vcpu cpuset
    current scheduler vcpus id bus slot iothread cores address order size
    offset basis adjustment timezone port prefix path queues index template model dev socket secret persistent device
"""
TAG = st.sampled_from(TAGS.split())
VALUE = st.sampled_from(
    [
        "",
        "0",
        "1",
        "0-1",
        "^0",
        "pci",
        "usb",
        "user",
        "fifo",
        "emulator",
        "vhostuser",
        "virtiofs",
        "virtio",
        "vda",
        "-1",
        "0x1",
        "x" * 99,
        "é,\n",
    ]
)
Tree = tuple[str, dict[str, str], str, list[Any]]
LEAF: st.SearchStrategy[Tree] = st.tuples(
    TAG, st.dictionaries(st.sampled_from(NAMES.split()), VALUE, max_size=4), VALUE, st.just([])
)
TREE: st.SearchStrategy[Tree] = st.recursive(
    LEAF,
    lambda inner: st.tuples(TAG, st.just({}), st.just(""), st.lists(inner, max_size=6)),
    max_leaves=12,
)


def built(tree: Tree) -> Element:
    tag, attributes, text, parts = tree
    element = Element(tag, attributes)
    element.text = text
    element.extend(built(part) for part in parts)
    return element


@settings(max_examples=60, deadline=None)
@given(st.lists(TREE, max_size=8))
def test_odd_domains_give_a_definition_or_a_message(trees: list[Tree]) -> None:
    root = Element("domain")
    root.extend(built(tree) for tree in trees)
    try:
        draft = libvirt._draft(root, domainxml.tuning(root), LINE)
        read(command_line.written(draft, [w for o in command_line.kept(draft) for w in cmdline.option_argv(o)]))
        domainshown.prepared(root)
    except LauncherError:
        pass


@pytest.mark.parametrize("line", ["", "A=b", "q 'x", "q disk.img", "LC_ALL=C sudo"])
def test_odd_answers_of_virsh(line: str) -> None:
    with pytest.raises(LauncherError) as caught:
        definition_of("", line)
    assert caught.value.message.startswith("the command line that virsh printed cannot be read: ")


# As a program


def launch(*words: str, path: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "qemu_launcher", "import", "--libvirt", *words],
        env={"PYTHONPATH": str(ROOT / "launcher"), "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_virsh(tmp_path: Path) -> None:
    (tmp_path / "vm.xml").write_text("<domain/>")
    for word in ("win11", f"{tmp_path}/vm.xml"):
        done = launch(word, path=str(tmp_path))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "qemu-launcher: virsh is not installed, and only libvirt knows the command line of its VMs\n"
            "    on Debian: libvirt-clients, and to ask it without a running libvirt, libvirt-daemon-driver-qemu too\n"
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not UTF-8"),
        (b"<domain>", "is no XML: no element found"),
        (b" " * ((1 << 20) + 1), "is larger than 1 MiB"),
        (None, "cannot read"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "vm.xml"
    if content is not None:
        path.write_bytes(content)
    done = launch(str(path), path=os.environ["PATH"])
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("qemu-launcher: ")


def virsh_that(script: str, folder: Path) -> None:
    path = folder / "virsh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_system_s_vm_is_found_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("LIBVIRT_DEFAULT_URI", "VIRSH_DEFAULT_CONNECT_URI"):
        monkeypatch.delenv(name, raising=False)
    virsh_that('[ "$1" = --readonly ] && echo "$@" || { echo "error: failed to get domain" >&2; exit 1; }', tmp_path)
    assert virsh.domain_xml("-x") == "--readonly --connect qemu:///system dumpxml --inactive --domain -x\n"
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "test:///default")  # whoever names one means that one
    with pytest.raises(LauncherError, match="virsh: failed to get domain") as caught:
        virsh.domain_xml("-x")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("virsh list --all")


@pytest.mark.parametrize(("uid", "more"), [(0, "\nor run it as the user who will own the VM"), (1000, "")])
def test_who_cannot_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, more: str) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    virsh_that('echo "error: failed to connect to the hypervisor" >&2; exit 1', tmp_path)
    with pytest.raises(LauncherError) as caught:
        virsh.command_line(b"<domain/>")
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("virsh then starts what it needs for you" + more)


def test_xml_reaches_virsh_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    virsh_that('cat "$4"', tmp_path)
    xml = b"<domain>" + b"x" * (1 << 18) + b"</domain>"
    assert virsh.command_line(xml).encode() == xml


def test_virsh_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    virsh_that("exit 7", tmp_path)
    with pytest.raises(LauncherError, match="virsh: it ended with status 7"):
        virsh.command_line(b"x")


def test_nothing_is_lost_of_what_is_kept() -> None:
    """The words of the definition are those of virsh, in its order, less the ones that are named above."""
    vm: VmDefinition = read(definition_of(""))
    assert [option.name for option in vm.options] == [
        *("name", "machine", "accel", "cpu", "m", "object", "overcommit", "smp", "object", "uuid", "no-user-config"),
        *("nodefaults", "rtc", "boot", "device", "blockdev", "chardev", "netdev", "spice", "object", "device"),
        *("sandbox", "msg"),
    ]
