"""libvirt's XML: what becomes of the guest's memory, of huge pages, and of what other programs share."""

from itertools import pairwise
from mmap import PAGESIZE

import pytest

from qemu_launcher import cmdline
from qemu_launcher.importing import domainshown, domainxml
from unit.domains import LINE, definition_of, domain
from unit.reading import read

RAM = """-object '{"qom-type":"memory-backend-ram","id":"pc.ram","size":536870912}'"""
FILE = "/var/lib/libvirt/qemu/ram/-1-vm"


def memory_of(inside: str, *objects: str, more: str = "") -> list[str]:
    """What becomes of the memory objects that virsh has printed, each without its size."""
    printed = " ".join(f"-object '{text}'" for text in objects) if objects else RAM
    text = definition_of(f"<memoryBacking>{inside}</memoryBacking>", LINE.replace(RAM, f"{printed} {more}"))
    argv = cmdline.qemu_argv(read(text))
    return [
        word.replace(",size=536870912", "").removeprefix("memory-backend-")
        for name, word in pairwise(argv)
        if name == "-object" and word.startswith("memory-backend-")
    ]


HUGE_2M = "<hugepages><page size='2' unit='MiB'/></hugepages>"
SHARED_FILE = f'{{"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"{FILE}/pc.ram","share":true}}'


@pytest.mark.parametrize(
    ("inside", "printed", "memory"),
    [
        (HUGE_2M, [], ["memfd,id=pc.ram,hugetlb=on,hugetlbsize=2097152,prealloc=on"]),
        ("<hugepages/>", [], ["memfd,id=pc.ram,hugetlb=on,prealloc=on"]),
        # libvirt hides neither the access nor the source, and so chooses a file.
        (HUGE_2M, [SHARED_FILE], ["memfd,id=pc.ram,share=on,hugetlb=on,hugetlbsize=2097152,prealloc=on"]),
        ("<hugepages/>", [SHARED_FILE], ["memfd,id=pc.ram,share=on,hugetlb=on,prealloc=on"]),
        (
            "<hugepages/>",
            [SHARED_FILE.replace('"share":true', '"share":false,"discard-data":true,"prealloc":true')],
            ["memfd,id=pc.ram,share=off,prealloc=on,hugetlb=on"],
        ),
        (
            "<hugepages/><source type='memfd'/>",
            ['{"qom-type":"memory-backend-memfd","id":"pc.ram","share":true}'],
            ["memfd,id=pc.ram,share=on,hugetlb=on,prealloc=on"],
        ),
        ("", [SHARED_FILE], ["memfd,id=pc.ram,share=on"]),
        ("", [SHARED_FILE.replace('"share":true', '"share":false')], ["ram,id=pc.ram,share=off"]),
        ("", [SHARED_FILE.replace(',"share":true', "")], ["ram,id=pc.ram"]),
        (  # of a memory device, the file has the device's name
            "",
            [f'{{"qom-type":"memory-backend-file","id":"memdimm0","mem-path":"{FILE}/dimm0","share":true}}'],
            ["memfd,id=memdimm0,share=on"],
        ),
        # Pages as small as any are none, as in libvirt.
        (f"<hugepages><page size='{PAGESIZE}' unit='b'/></hugepages>", [], ["ram,id=pc.ram"]),
        # Files that somebody has named stay what they are.
        (
            "<hugepages/>",
            ['{"qom-type":"memory-backend-file","id":"looking-glass","mem-path":"/dev/shm/looking-glass"}'],
            ["file,id=looking-glass,mem-path=/dev/shm/looking-glass"],
        ),
        # And memory that is not the guest's RAM is none of this.
        ("<hugepages/>", ['{"qom-type":"memory-backend-memfd","id":"scream"}'], ["memfd,id=scream"]),
    ],
)
def test_memory_needs_no_folder_of_libvirt_s(inside: str, printed: list[str], memory: list[str]) -> None:
    assert memory_of(inside, *printed) == memory


NODES = [f'{{"qom-type":"memory-backend-ram","id":"ram-node{node}"}}' for node in range(3)]
NUMA = " ".join(f"-numa node,nodeid={node},memdev=ram-node{node}" for node in range(3))


def test_huge_pages_by_node() -> None:
    pages = "<page size='1' unit='GiB' nodeset='0'/>{}<page size='2' unit='MiB' nodeset='1'/>"
    gib, mib = "hugetlb=on,hugetlbsize=1073741824,prealloc=on", "hugetlb=on,hugetlbsize=2097152,prealloc=on"
    found = memory_of(f"<hugepages>{pages.format('')}</hugepages>", *NODES, more=NUMA)
    assert found == [f"memfd,id=ram-node0,{gib}", f"memfd,id=ram-node1,{mib}", "ram,id=ram-node2"]
    default = "<page size='4' unit='MiB'/>"
    found = memory_of(f"<hugepages>{pages.format(default)}</hugepages>", *NODES, more=NUMA)
    assert found[2] == "memfd,id=ram-node2,hugetlb=on,hugetlbsize=4194304,prealloc=on"


def test_huge_pages_of_memory_devices() -> None:
    printed = [f'{{"qom-type":"memory-backend-ram","id":"mem{name}"}}' for name in ("dimm0", "virtiomem0")]
    devices = (
        """-device '{"driver":"pc-dimm","node":1,"memdev":"memdimm0","id":"dimm0"}' """
        """-device '{"driver":"virtio-mem-pci","node":1,"memdev":"memvirtiomem0","id":"virtiomem0"}'"""
    )
    assert memory_of("<hugepages><page size='2' unit='MiB' nodeset='1'/></hugepages>", *printed, more=devices) == [
        "memfd,id=memdimm0,hugetlb=on,hugetlbsize=2097152,prealloc=on",
        "memfd,id=memvirtiomem0,hugetlb=on,hugetlbsize=2097152",  # which takes its memory as it grows
    ]


DIMMS = [
    f'{{"qom-type":"memory-backend-ram","id":"mem{name}"}}' for name in ("dimm1", "nvdimm0", "dimm2", "virtiomem0")
]
DIMM_DEVICES = " ".join(
    f"""-device '{{"driver":"{driver}","node":0,"memdev":"mem{name}","id":"{name}"}}'"""
    for driver, name in (
        ("pc-dimm", "dimm1"), ("nvdimm", "nvdimm0"), ("pc-dimm", "dimm2"), ("virtio-mem-pci", "virtiomem0")
    )
)  # fmt: skip


def test_pages_of_a_memory_device_s_own() -> None:
    """They come before those of its node; small ones too."""
    source = "<memory model='{}'><source><pagesize{}>{}</pagesize></source></memory>"
    devices = (
        source.format("dimm", " unit='GiB'", 1)
        + "<memory model='nvdimm'/><memory model='sgx-epc'/>"
        + source.format("dimm", "", PAGESIZE >> 10)
        + source.format("virtio-mem", "", 2048)
    )
    inside = "<hugepages><page size='2' unit='MiB'/></hugepages></memoryBacking><devices>{}</devices><memoryBacking>"
    assert memory_of(inside.format(devices), *DIMMS, more=DIMM_DEVICES) == [
        "memfd,id=memdimm1,hugetlb=on,hugetlbsize=1073741824,prealloc=on",
        "ram,id=memnvdimm0",
        "ram,id=memdimm2",
        "memfd,id=memvirtiomem0,hugetlb=on,hugetlbsize=2097152",
    ]


@pytest.mark.parametrize(("inside", "count"), [("<hugepages/>", 1), ("", 0)])
def test_memory_that_grows_asks_for_huge_pages_first(inside: str, count: int) -> None:
    line = LINE.replace(RAM, " ".join(f"-object '{text}'" for text in DIMMS) + " " + DIMM_DEVICES)
    argv = cmdline.qemu_argv(read(definition_of(f"<memoryBacking>{inside}</memoryBacking>", line)))
    found = [word for word in argv if word.startswith(("pc-dimm", "virtio-mem"))]
    assert [word.count(",prealloc=on") for word in found] == [0, 0, count]


def test_virsh_is_not_shown_pages_of_a_memory_device_s_own() -> None:
    """It has no command line otherwise: "hugetlbfs filesystem is not mounted"."""
    device = "<memory><source><pagesize>4</pagesize><nodemask>0</nodemask></source></memory><memory/>"
    shown = domainxml.parse(domainshown.prepared(domain(f"<devices>{device}</devices>")).decode(), "x")
    assert [part.tag for part in shown.iter()][-4:] == ["memory", "source", "nodemask", "memory"]


def test_shared_memory_is_not_said_to_need_access() -> None:
    text = definition_of("", LINE.replace(RAM, f"-object '{SHARED_FILE}'").replace("/var/lib/libvirt/images", "/v"))
    assert "you must have it yourself" not in text
