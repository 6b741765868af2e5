"""libvirt's XML: the devices that virsh is not shown, QEMU's for them, and what is said about any."""

import time

import pytest

from qemu_launcher import cmdline
from qemu_launcher.errors import DefinitionError
from qemu_launcher.importing import command_line, domaindevices, domainremarks, domainshown, domainxml
from unit.domains import LINE, definition_of, domain
from unit.reading import read


def replaced(devices: str, machine: str = "pc-q35-7.2") -> list[str]:
    root = domain(f"<os><type machine='{machine}'>hvm</type></os><devices>{devices}</devices>")
    options = [option for option in domaindevices.replacements(root) if not option.left_out]
    shown = domainxml.parse(domainshown.prepared(root).decode(), "x")
    assert shown.find("devices/interface") is None
    return [w for o in options for w in cmdline.option_argv(command_line.as_read(o))]


@pytest.mark.parametrize(
    ("devices", "argv"),
    [
        ("<interface type='user'/>", "-netdev user,id=hostnet0 -device rtl8139,netdev=hostnet0,id=net0"),
        (
            "<interface type='bridge'><source bridge='br0'/><model type='virtio'/>"
            "<address type='pci' bus='0x02' slot='0x01' function='0x3' multifunction='on'/></interface>",
            "-netdev user,id=hostnet0 "
            "-device virtio-net-pci,netdev=hostnet0,id=net0,bus=pci.2,multifunction=on,addr=0x1.0x3",
        ),
        (
            "<interface type='hostdev'><source><address type='pci' domain='0' bus='0x06' slot='0x10' function='0x2'/>"
            "</source></interface>",
            "-device vfio-pci,host=0000:06:10.2,id=hostdev0",
        ),
        (
            "<hostdev type='usb'><source><vendor id='0x12'/><product id='0x34'/></source></hostdev>",
            "-device usb-host,vendorid=0x12,productid=0x34,id=hostdev0",
        ),
        (
            "<hostdev type='usb'><source guestReset='off'><vendor id='0x12'/><product id='0x34'/></source>"
            "<boot order='1'/><address type='usb' bus='1' port='2.3'/><alias name='ua-key'/></hostdev>",
            "-device usb-host,vendorid=0x12,productid=0x34,id=ua-key,guest-reset=off,bootindex=1,bus=usb1.0,port=2.3",
        ),
        (
            "<hostdev type='usb'><source guestReset='uninitialized'><vendor id='0x12'/></source>"
            "<address type='usb' bus='0' port='1'/></hostdev>",
            "-device usb-host,vendorid=0x12,id=hostdev0,guest-reset=on,guest-resets-all=off,bus=usb.0,port=1",
        ),
        ("<hostdev type='usb'><source><address bus='1' device='2'/></source></hostdev>", ""),
        (
            "<interface type='user'><model type='virtio'/><teaming type='persistent'/><alias name='ua-a'/></interface>"
            "<interface type='hostdev'><source><address type='pci' bus='7'/></source>"
            "<teaming type='transient' persistent='ua-a'/></interface>",
            "-netdev user,id=hostua-a -device virtio-net-pci,netdev=hostua-a,id=ua-a,failover=on "
            "-device vfio-pci,host=0000:07:00.0,id=hostdev0,failover_pair_id=ua-a",
        ),
        (
            "<interface type='user'><ip family='ipv4' address='172.17.2.0' prefix='24'/>"
            "<ip family='ipv6' address='2001:db8::' prefix='64'/><alias name='ua-a'/></interface>",
            "-netdev user,id=hostua-a,net=172.17.2.0/24,ipv6-prefix=2001:db8::,ipv6-prefixlen=64 "
            "-device rtl8139,netdev=hostua-a,id=ua-a",
        ),
        (
            "<interface type='mcast'><source address='230.0.0.1' port='5558'/></interface>"
            "<interface type='server'><source port='5'/></interface>"
            "<interface type='client'><source address='127.0.0.1' port='5'/></interface>"
            "<interface type='udp'><source address='127.0.0.1' port='5'><local address='127.0.0.2' port='6'/></source>"
            "</interface>",
            "-netdev socket,id=hostnet0,mcast=230.0.0.1:5558 -device rtl8139,netdev=hostnet0,id=net0 "
            "-netdev socket,id=hostnet1,listen=:5 -device rtl8139,netdev=hostnet1,id=net1 "
            "-netdev socket,id=hostnet2,connect=127.0.0.1:5 -device rtl8139,netdev=hostnet2,id=net2 "
            "-netdev socket,id=hostnet3,udp=127.0.0.1:5,localaddr=127.0.0.2:6 -device rtl8139,netdev=hostnet3,id=net3",
        ),
        (
            "<interface type='vhostuser'><source type='unix' path='/run/a,b' mode='server'/><model type='virtio'/>"
            "<driver queues='2' tx_queue_size='512'/><mtu size='9000'/></interface>"
            "<interface type='vhostuser'><source type='unix' path='/run/c' mode='client'>"
            "<reconnect enabled='yes' timeout='10'/></source></interface>",
            "-chardev socket,id=charnet0,path=/run/a,,b,server=on "
            "-netdev vhost-user,chardev=charnet0,queues=2,id=hostnet0 "
            "-device virtio-net-pci,netdev=hostnet0,id=net0,mq=on,vectors=6,tx_queue_size=512,host_mtu=9000 "
            "-chardev socket,id=charnet1,path=/run/c,reconnect=10 -netdev vhost-user,chardev=charnet1,id=hostnet1 "
            "-device virtio-net-pci,netdev=hostnet1,id=net1",
        ),
        (
            "<interface type='network'><model type='virtio'/><driver txmode='iothread' ioeventfd='on' event_idx='off' "
            "rx_queue_size='512' tx_queue_size='512' queues='4' packed='on' iommu='on' rss='on' rss_hash_report='on'>"
            "<host csum='off' gso='off' tso4='off' mrg_rxbuf='on'/><guest csum='off' ufo='off'/></driver>"
            "<acpi index='7'/></interface>",
            "-netdev user,id=hostnet0 -device virtio-net-pci,netdev=hostnet0,id=net0,tx=bh,ioeventfd=on,event_idx=off,"
            "rx_queue_size=512,packed=on,iommu_platform=on,rss=on,hash=on,csum=off,gso=off,host_tso4=off,mrg_rxbuf=on,"
            "guest_csum=off,guest_ufo=off,acpi-index=7",
        ),
        (
            "<interface type='user'><model type='virtio-transitional'/></interface>"
            "<interface type='user'><model type='virtio-non-transitional'/><rom file='/a,b'/></interface>",
            "-netdev user,id=hostnet0 -device virtio-net-pci-transitional,netdev=hostnet0,id=net0 "
            "-netdev user,id=hostnet1 -device virtio-net-pci-non-transitional,netdev=hostnet1,id=net1,romfile=/a,,b",
        ),
        (
            "<interface type='hostdev'><source><address type='pci' bus='7'/></source><boot order='1'/><rom bar='off'/>"
            "<address type='pci' bus='5' slot='0' function='0'/></interface>",
            "-device vfio-pci,host=0000:07:00.0,id=hostdev0,bootindex=1,bus=pci.5,addr=0x0,rombar=0",
        ),
        (
            "<interface type='hostdev'><source><address type='pci' bus='7'/></source><rom enabled='no'/></interface>",
            "-device vfio-pci,host=0000:07:00.0,id=hostdev0,romfile=",
        ),
        ("<tpm model='tpm-crb'><backend type='emulator'/></tpm><filesystem><driver type='virtiofs'/></filesystem>", ""),
        ("<tpm model='tpm-tis'><backend type='external'/></tpm><filesystem type='mount'/>", ""),
        (
            "<tpm model='tpm-crb'><backend type='passthrough'><device path='/dev/tpm1'/></backend></tpm>",
            "-tpmdev passthrough,id=tpm-tpm0,path=/dev/tpm1 -device tpm-crb,tpmdev=tpm-tpm0,id=tpm0",
        ),
        (
            "<tpm><backend type='passthrough'/></tpm>",
            "-tpmdev passthrough,id=tpm-tpm0,path=/dev/tpm0 -device tpm-tis,tpmdev=tpm-tpm0,id=tpm0",
        ),
        (
            "<interface type='x,y'><source a='b c'/><model type='a,b'/><mac address='x y'/>"
            "<address type='pci' bus='zz'/></interface>",
            "-netdev user,id=hostnet0 -device rtl8139,netdev=hostnet0,id=net0",
        ),
    ],
)
def test_replaced_devices(devices: str, argv: str) -> None:
    assert " ".join(replaced(devices)) == argv


def comments_on(devices: str, line: str = LINE) -> str:
    """All comments on QEMU's options, each on one line."""
    return definition_of(f"<devices>{devices}</devices>", line).replace("\n  # ", " ")


@pytest.mark.parametrize(
    ("tpm", "swtpm", "device", "state"),
    [
        ("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>", "socket --tpm2", "tpm-crb", "tpm2"),
        ("<tpm model='tpm-tis'><backend type='emulator' version='1.2'/></tpm>", "socket", "tpm-tis", "tpm1.2"),
        ("<tpm><backend type='emulator'/></tpm>", "socket --tpm2", "tpm-tis", "tpm2"),
    ],
)
def test_an_emulated_tpm(tpm: str, swtpm: str, device: str, state: str) -> None:
    text = definition_of(f"<uuid>11111111-2222</uuid><devices>{tpm}</devices>").replace("\n  # ", " ")
    assert f"Start swtpm {swtpm} --tpmstate dir=DIR" in text
    assert f"- device: [{device}, tpmdev: tpm0]" in text
    assert f"/var/lib/libvirt/swtpm/11111111-2222/{state}, or" in text


def test_an_encrypted_tpm() -> None:
    tpm = "<tpm><backend type='emulator'>{}</backend></tpm>"
    said = (
        "write what virsh secret-get-value --plain 6dd3e4a5-1d76 prints into a file, and give swtpm --key pwdfile=FILE"
    )
    assert said in comments_on(tpm.format("<encryption secret='6dd3e4a5-1d76'/>"))
    assert "It is encrypted" not in comments_on(tpm.format(""))


def test_folders_of_virtiofs() -> None:
    one = "<filesystem><driver type='virtiofs'/><source {}/><target dir='{}'/></filesystem>"
    text = comments_on(
        "".join((one.format("dir='/srv/a'", "a"), one.format("dir='/a b'", "b]"), one.format("socket='/run/s'", "c")))
    )
    for said in (
        "Start virtiofsd --socket-path=DIR/fs0 --shared-dir=/srv/a yourself, and add - chardev: [socket, id: fs0, "
        "path: DIR/fs0] and - device: [vhost-user-fs-pci, chardev: fs0, tag: a]",
        "--socket-path=DIR/fs1 --shared-dir=FOLDER yourself",
        "- device: [vhost-user-fs-pci, chardev: fs1, tag: TAG]",
        "with virtiofs. Add - chardev: [socket, id: fs2, path: /run/s] and - device: [vhost-user-fs-pci, chardev: fs2, "
        "tag: c]",
    ):
        assert said in text


def test_what_virtiofsd_is_told() -> None:
    text = comments_on(
        "<filesystem><driver type='virtiofs' queue='1024'/><source dir='/srv'/><target dir='s'/><readonly/><idmap/>"
        "<binary xattr='on'><cache mode='none'/><sandbox mode='chroot'/><thread_pool size='4'/><lock/></binary>"
        "<address type='pci' bus='0x02' slot='0x00' function='0x0'/></filesystem>"
    )
    assert "--shared-dir=/srv --readonly --xattr --cache=never --sandbox=chroot --thread-pool-size=4 yourself" in text
    assert "chardev: fs0, tag: s, queue-size: 1024, bus: pci.2, addr: 0x0]" in text
    assert "Not carried over: binary/lock, idmap." in text


PASSWORD = "libvirt sets the password later"
NO_VIEWER = "libvirt itself lets viewers in here."
CHOSEN = "virsh has chosen this port"
PR_HELPER = "libvirt starts qemu-pr-helper"
BUS = "libvirt starts a dbus-daemon"
MDEV = "An mdev, which is gone"
BOUND = "libvirt binds it to vfio-pci"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("-vnc 0.0.0.0:5,password=on,audiodev=a", {PASSWORD, CHOSEN}),
        ("-vnc 0.0.0.0:5,password", {PASSWORD, CHOSEN}),
        ("-vnc 127.0.0.1:0", {CHOSEN}),
        ("-spice port=5900", {PASSWORD, CHOSEN}),
        ("-spice port=0,disable-ticketing=on,gl=on", {NO_VIEWER}),
        ("-spice port=0,tls-port=5901,disable-ticketing=on", {CHOSEN}),
        ("-spice unix=on,addr=/tmp/s,disable-ticketing=on", set()),
        ("-device vfio-pci,sysfsdev=/sys/bus/mdev/devices/c2177883", {MDEV}),
        ("-device vfio-pci,host=0000:02:00.0", {BOUND}),
        ("-blockdev nvme,device=0000:05:00.0,namespace=1", {BOUND}),
        ("-object pr-manager-helper,id=pr-helper0,path=/l/domain--1-vm/pr-helper0.sock", {PR_HELPER}),
        ("-display dbus,addr=unix:path=/l/dbus.sock,gl=on", {BUS}),
        ("-display dbus,p2p=on", set()),
    ],
)
def test_what_libvirt_would_do_later(option: str, said: set[str]) -> None:
    (read_option,) = command_line.options_of(option.split(" "))
    root = domain("<devices><graphics autoport='yes'/></devices>")
    (remarked,) = domainremarks.remarked([read_option], root)
    assert {
        text
        for text in (PASSWORD, NO_VIEWER, CHOSEN, MDEV, BOUND, PR_HELPER, BUS)
        if text in " ".join(remarked.comments)
    } == said


def test_a_function_of_a_card() -> None:
    function = (
        "<source><address type='pci' bus='7' slot='0x10' function='2'/></source><mac address='52:54:00:6d:90:02'/>"
    )
    text = comments_on(
        f"<interface type='hostdev'>{function}<vlan><tag id='42'/></vlan><bandwidth/></interface>",
        LINE.replace("0000:01:00.0", "0000:02:00.0").replace("vfio-pci", "e1000"),
    )
    assert "and you must now: ip link set PF vf N mac 52:54:00:6d:90:02 vlan 42. PF is the card" in text
    assert "its function 0000:07:10.2" in text
    assert "Not carried over from the interface: bandwidth." in text
    assert "libvirt binds it to vfio-pci" in text


DISK = "<disk><target dev='vda' bus='virtio'/>{}</disk>"


@pytest.mark.parametrize(
    ("devices", "first", "turns"),
    [
        # What virsh sees has no turn of its own, so it gives the first disk one; libvirt sees the interface too.
        (DISK.format("") + "<interface type='user'><boot order='1'/></interface>", "", ["rtl8139 1"]),
        (DISK.format("<boot order='2'/>") + "<interface type='user'><boot order='1'/></interface>", "",
         ["virtio-blk-pci 1", "rtl8139 1"]),
        ("<interface type='user'/>", "", ["virtio-blk-pci 1"]),
        ("<interface type='user'/><interface type='user'/>", "<boot dev='hd'/><boot dev='network'/>",
         ["virtio-blk-pci 1", "rtl8139 2"]),
    ],
)  # fmt: skip
def test_whose_turn_it_is_at_the_boot(devices: str, first: str, turns: list[str]) -> None:
    line = LINE + """ -device '{"driver":"virtio-blk-pci","drive":"x","id":"virtio-disk0","bootindex":1}'"""
    argv = cmdline.qemu_argv(read(definition_of(f"<os><type>hvm</type>{first}</os><devices>{devices}</devices>", line)))
    found = [word.split(",bootindex=") for word in argv if "bootindex=" in word]
    assert [f"{device.partition(',')[0]} {turn.partition(',')[0]}" for device, turn in found] == turns


def override(alias: str, name: str, kind: str, value: str = "") -> str:
    """It goes into the domain, behind the devices."""
    said = f"<qemu:frontend><qemu:property name='{name}' type='{kind}' value='{value}'/></qemu:frontend>"
    return f"<qemu:override><qemu:device alias='{alias}'>{said}</qemu:device></qemu:override>"


BOOTS_FIRST = "<interface type='user'><boot order='1'/></interface>"


def disk(target: str, kind: str = "disk") -> str:
    return f"<disk device='{kind}'><target dev='{target}' bus='virtio'/></disk>"


@pytest.mark.parametrize(
    ("inside", "printed", "turns"),
    [
        # Only a disk's turn is virsh's own idea; that of a <qemu:arg> is the user's.
        (disk("vda"), {"d,id=virtio-disk0": 1, "nvme,id=mine": 2}, {"nvme,id=mine": "2"}),
        (disk("vda"), {"d,id=virtio-disk0": 1, "nvme,id=mine": 1}, {"nvme,id=mine": "1"}),
        (disk("vda"), {"d,id=virtio-disk0": 2}, {"d,id=virtio-disk0": "2"}),
        (disk("vda", "cdrom"), {"d,id=virtio-disk0": 1}, {"d,id=virtio-disk0": "1"}),
        (disk("vda", "lun"), {"d,id=virtio-disk0": 1}, {}),
        ("<disk><target dev='vda'/></disk>", {"d,id=virtio-disk0": 1}, {}),
        # libvirt sorts them by their targets.
        (disk("vdb") + disk("vda"), {"d,id=virtio-disk0": 1, "d,id=virtio-disk1": 3}, {"d,id=virtio-disk1": "3"}),
    ],
)
def test_only_the_turn_is_taken_back_that_virsh_gives_a_disk(
    inside: str, printed: dict[str, int], turns: dict[str, str]
) -> None:
    line = LINE + "".join(f" -device {device},bootindex={turn}" for device, turn in printed.items())
    argv = cmdline.qemu_argv(read(definition_of(f"<devices>{inside}{BOOTS_FIRST}</devices>", line)))
    found = dict(word.split(",bootindex=") for word in argv if ",bootindex=" in word)
    assert found == turns | {"rtl8139,netdev=hostnet0,id=net0": "1"}


@pytest.mark.parametrize(("said", "count"), [("", 0), (override("virtio-disk0", "bootindex", "unsigned", "1"), 1)])
@pytest.mark.parametrize("more", ["", ',"iothread-vq-mapping":[{"iothread":"a"}]'])  # which stays JSON
def test_a_turn_that_the_user_gives_a_disk(said: str, count: int, more: str) -> None:
    device = f'{{"driver":"virtio-blk-pci","id":"virtio-disk0","bootindex":1{more}}}'
    line = f"{LINE} -device '{device}'"
    text = definition_of(f"<devices>{disk('vda')}{BOOTS_FIRST}</devices>{said}", line)
    (found,) = [word for word in cmdline.qemu_argv(read(text)) if "virtio-blk-pci" in word]
    assert found.count("bootindex") == count


@pytest.mark.parametrize(
    ("kind", "source", "bridge"),
    [
        ("bridge", "bridge='br0'", "br0"),
        ("bridge", "network='default' portid='x' bridge='virbr3'", "virbr3"),  # of a VM that runs
        ("network", "network='default'", "virbr0"),
        ("network", "network='lan'", "BRIDGE"),
        ("direct", "dev='eth0'", "BRIDGE"),
    ],
)
def test_the_bridge_for_an_interface(kind: str, source: str, bridge: str) -> None:
    text = comments_on(f"<interface type='{kind}'><source {source}/></interface>")
    assert f"- netdev: [bridge, id: hostnet0, br: {bridge}]" in text


def test_variables_of_the_efi() -> None:
    """A VM that libvirt has never started has none yet."""
    options = command_line.options_of(["-blockdev", "file,filename=/n/a,,b_VARS.fd", "-blockdev", "file,filename=/c"])
    nvram = "<os><nvram{}>/n/a,b_VARS.fd</nvram></os>"
    remarked = domainremarks.remarked(options, domain(nvram.format(" template='/usr/VARS.fd'")))
    said = "The EFI's variables: libvirt makes this file at the first start, as a copy of /usr/VARS.fd."
    assert [option.comments for option in remarked] == [(said,), ()]
    assert not any(option.comments for option in domainremarks.remarked(options, domain(nvram.format(""))))


FOLDER = "libvirt makes this folder"


@pytest.mark.parametrize("folder", ["/tmp/l/channel/target/domain--1-vm", "/run/libvirt/qemu/channel/5-vm"])
def test_a_folder_of_the_moment(folder: str) -> None:
    option = command_line.options_of(["-chardev", f"socket,id=a,path={folder}/org.qemu.guest_agent.0"])
    (remarked,) = domainremarks.remarked(option, domain(""))
    assert [text.startswith(FOLDER) for text in remarked.comments] == [True]


@pytest.mark.parametrize(
    ("policy", "said"), [("", 1), ("startupPolicy='requisite'", 1), ("startupPolicy='optional'", 0)]
)
def test_a_usb_device_may_be_missing(policy: str, said: int) -> None:
    usb = f"<hostdev type='usb'><source {policy}><vendor id='0x12'/></source></hostdev>"
    assert comments_on(usb).count("libvirt does not start the VM without it.") == said


def test_a_port_that_is_not_there_or_given_away() -> None:
    usb = (
        "<hostdev type='usb'><source><vendor id='1'/></source><address type='usb' bus='0' port='1'/></hostdev>"
        "<hostdev type='usb'><source><vendor id='2'/></source><address type='usb' bus='0' port='2'/></hostdev>"
        "<hostdev type='usb'><source><vendor id='3'/></source><address type='usb' bus='1' port='2'/></hostdev>"
    )
    more = " -device qemu-xhci,id=usb -device usb-tablet,bus=usb.0,port=1"
    words = cmdline.qemu_argv(read(definition_of(f"<devices>{usb}</devices>", LINE + more)))
    assert [word for word in words if word.startswith("usb-host")] == [
        "usb-host,vendorid=1,id=hostdev0",
        "usb-host,vendorid=2,id=hostdev1,bus=usb.0,port=2",
        "usb-host,vendorid=3,id=hostdev2",
    ]


USB_FIRST = (
    "<hostdev type='usb'><source><vendor id='1'/></source></hostdev><hostdev type='pci'/>"
    "<interface type='hostdev'><source><address type='pci' bus='7'/></source></interface><interface type='user'/>"
)


def test_ids_are_those_of_libvirt() -> None:
    """-set goes by them. libvirt counts the function of the card first, then USB, and PCI is hostdev2."""
    line = LINE + " -set device.hostdev2.x-vga=on -set device.net0.mac=52:54:00:12:34:99"
    argv = cmdline.qemu_argv(read(definition_of(f"<devices>{USB_FIRST}</devices>", line)))
    ids = {word.partition(",")[0]: word.partition(",id=")[2].partition(",")[0] for word in argv if ",id=" in word}
    assert (ids["usb-host"], ids["rtl8139"]) == ("hostdev1", "net0")
    assert [word.partition(",id=")[2].partition(",")[0] for word in argv if word.startswith("vfio-pci")] == [
        "hostdev2",
        "hostdev0",
    ]
    assert argv[-4:] == ["-set", "device.hostdev2.x-vga=on", "-set", "device.net0.mac=52:54:00:12:34:99"]


def test_virsh_is_shown_overrides_by_its_own_ids() -> None:
    root = domain(f"<devices>{USB_FIRST}</devices>{override('hostdev2', 'x-vga', 'bool', 'true')}")
    shown = domainxml.parse(domainshown.prepared(root).decode(), "x")
    assert shown.find(f"{domainxml.QEMU_NAMESPACE}override/*").get("alias") == "hostdev0"  # type: ignore[union-attr]


def test_virsh_is_not_shown_overrides_of_what_is_kept_from_it() -> None:
    """By its own count hostdev0 is the PCI device, which is hostdev2 to libvirt."""
    overrides = "".join(override(alias, "x", "bool", "true") for alias in ("hostdev0", "hostdev1", "net0", "ua-own"))
    root = domain(f"<devices>{USB_FIRST}<hostdev type='pci'><alias name='ua-own'/></hostdev></devices>{overrides}")
    shown = domainxml.parse(domainshown.prepared(root).decode(), "x")
    found = shown.iterfind(f"{domainxml.QEMU_NAMESPACE}override/{domainxml.QEMU_NAMESPACE}device")
    assert [device.get("alias") for device in found] == ["ua-own"]


@pytest.mark.parametrize(
    ("said", "device"),
    [
        (override("net0", "x", "bool", "true"), "rtl8139,netdev=hostnet0,id=net0,mac=52:54:00:00:00:01,x=on"),
        (override("net0", "mac", "string", "a"), "rtl8139,netdev=hostnet0,id=net0,mac=a"),
        (override("net0", "mac", "remove"), "rtl8139,netdev=hostnet0,id=net0"),
        (override("net1", "mac", "remove"), "rtl8139,netdev=hostnet0,id=net0,mac=52:54:00:00:00:01"),
    ],
)
def test_overrides_of_what_virsh_has_not_seen(said: str, device: str) -> None:
    card = "<interface type='user'><mac address='52:54:00:00:00:01'/></interface>"
    argv = cmdline.qemu_argv(read(definition_of(f"<devices>{card}</devices>{said}")))
    assert [word for word in argv if word.startswith("rtl8139")] == [device]


@pytest.mark.parametrize(
    ("name", "ident"),
    [
        ("ua-My_card-1", "ua-My_card-1"),
        ("ua-a b,c", "net0"),
        ("ua-", "net0"),
        ("ua-\N{ARABIC-INDIC DIGIT FOUR}", "net0"),
    ],
)
def test_only_ids_that_libvirt_takes_are_the_user_s(name: str, ident: str) -> None:
    argv = replaced(f"<interface type='user'><alias name='{name}'/></interface><interface type='user'/>")
    assert argv[3] == f"rtl8139,netdev=host{ident},id={ident}"
    assert argv[7].endswith(",id=net1" if ident == "net0" else ",id=net0")


@pytest.mark.parametrize(
    ("arch", "model", "driver"),
    [("x86_64", "tpm-tis", "tpm-tis"), ("aarch64", "tpm-tis", "tpm-tis-device"), ("aarch64", "tpm-crb", "tpm-crb")],
)
@pytest.mark.parametrize("ident", ["tpm0", "ua-t"])
def test_the_host_s_tpm(arch: str, model: str, driver: str, ident: str) -> None:
    tpm = f"<tpm model='{model}'><backend type='passthrough'/><alias name='{ident}'/></tpm>"
    root = domain(f"<os><type arch='{arch}'>hvm</type></os><devices>{tpm}</devices>")
    argv = [w for o in domaindevices.replacements(root) for w in cmdline.option_argv(command_line.as_read(o))]
    assert argv[1] == f"passthrough,id=tpm-{ident},path=/dev/tpm0"
    assert argv[3] == f"{driver},tpmdev=tpm-{ident},id={ident}"


@pytest.mark.parametrize(
    ("queues", "netdev", "card"),
    [
        ("1", "", ""),
        ("2", ",queues=2", ",mq=on,vectors=6"),
        ("0", "", ""),
        ("9" * 5000, "", ""),
        ("\N{ARABIC-INDIC DIGIT FOUR}", "", ""),
        ("x", "", ""),
    ],
)
def test_queues_of_vhost_user(queues: str, netdev: str, card: str) -> None:
    driver = f"<driver queues='{queues}'/>"
    argv = replaced(f"<interface type='vhostuser'><source type='unix' path='/s'/>{driver}</interface>")
    assert argv[3] == f"vhost-user,chardev=charnet0{netdev},id=hostnet0"
    assert argv[5] == f"virtio-net-pci,netdev=hostnet0,id=net0{card}"


@pytest.mark.parametrize(
    ("ip", "netdev"),
    [
        ("<ip address='fec0::' prefix='64'/>", ",ipv6-prefix=fec0::,ipv6-prefixlen=64"),
        ("<ip address='fec0::'/>", ",ipv6-prefix=fec0::"),
        ("<ip address='10.0.0.0'/>", ",net=10.0.0.0"),
        ("<ip/>", ""),
        ("<ip family='ipv6' prefix='64'/>", ""),
    ],
)
def test_addresses_of_the_guest(ip: str, netdev: str) -> None:
    """Which family it is, can be seen where the XML does not say it."""
    assert replaced(f"<interface type='user'>{ip}</interface>")[1] == f"user,id=hostnet0{netdev}"


@pytest.mark.parametrize("kind", ["mcast", "udp", "client", "server"])
@pytest.mark.parametrize("source", ["", "<source address='1.2.3.4'/>", "<source port='a b'/>"])
def test_sockets_without_an_address(kind: str, source: str) -> None:
    xml = f"<interface type='{kind}'>{source}</interface>"
    assert replaced(xml)[1] == "user,id=hostnet0"
    assert f"In libvirt: {kind}" in comments_on(xml)


def test_a_socket_with_half_an_address() -> None:
    assert replaced("<interface type='mcast'><source port='5'/></interface>")[1] == "user,id=hostnet0"
    source = "<source address='127.0.0.1' port='5'><local port='6'/></source>"
    assert replaced(f"<interface type='udp'>{source}</interface>")[1] == "socket,id=hostnet0,udp=127.0.0.1:5"


@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "-1", "256", "zz", ""])
@pytest.mark.parametrize("name", ["bus", "slot", "function"])
def test_places_that_pci_does_not_have(name: str, number: str) -> None:
    address = f"<address type='pci' {name}='{number}'/>"
    argv = replaced(f"<interface type='hostdev'><source>{address}</source>{address}</interface>")
    assert argv == ["-device", "vfio-pci,host=0000:00:00.0,id=hostdev0"]


def test_all_overrides_of_a_device_count() -> None:
    card = "<interface type='user'/><interface type='user'><alias name='ua-b'/></interface>"
    said = (
        override("net0", "x", "string", "1")
        + override("ua-b", "y", "string", "2")
        + override("net0", "z", "bool", "true")
    )
    argv = cmdline.qemu_argv(read(definition_of(f"<devices>{card}</devices>{said}")))
    assert [word.partition(",id=")[2] for word in argv if word.startswith("rtl8139")] == ["net0,x=1,z=on", "ua-b,y=2"]


def test_thousands_of_devices_and_overrides() -> None:
    """Each is looked at once, and not all overrides for each device."""
    count = 5000
    usb = "<hostdev type='usb'><source><vendor id='1'/></source></hostdev><hostdev type='pci'/>" * count
    said = "".join(f"<qemu:device alias='hostdev{index}'/>" for index in range(2 * count))
    root = domain(f"<devices>{usb}</devices><qemu:override>{said}</qemu:override>")
    before = time.process_time()
    domainshown.prepared(root)
    assert sum(1 for _option in domaindevices.replacements(root)) == count
    assert time.process_time() - before < 3


@pytest.mark.parametrize(
    ("inside", "names"),
    [
        ("<driver name='vhost' queues='4'/>", "driver queues"),
        ("<mtu size='9000'/><link state='down'/><driver tx_queue_size='512'/>", "mtu, link, driver tx_queue_size"),
        ("<link state='up'/><driver name='vhost'/>", None),
    ],
)
def test_what_is_lost_of_a_card(inside: str, names: str | None) -> None:
    text = comments_on(f"<interface type='bridge'><source bridge='br0'/><model type='virtio'/>{inside}</interface>")
    said = f"Not carried over from the interface: {names}."
    assert (said in text) if names else ("Not carried over" not in text)


def test_passed_through_pci_gets_the_driver_that_libvirt_chooses_late() -> None:
    root = domain("<devices><hostdev type='pci'/><hostdev type='pci'><driver name='xen'/></hostdev></devices>")
    shown = domainxml.parse(domainshown.prepared(root).decode(), "x")
    assert [driver.get("name") for driver in shown.iter("driver")] == ["vfio", "xen"]
    assert root.find("devices/hostdev[1]/driver") is None  # ours is a copy


def test_a_disk_that_forgets_is_refused() -> None:
    """As another disk it would keep what the guest writes, and nobody would notice until it is too late."""
    disk = "<disk type='file'><source file='/a.img'/><target dev='vda' bus='virtio'/>{}</disk>"
    with pytest.raises(DefinitionError, match="the disk vda is transient in libvirt") as caught:
        domainshown.prepared(domain(f"<devices>{disk.format('<transient/>')}</devices>"))
    assert caught.value.hint is not None
    assert "snapshot: on" in caught.value.hint
    domainshown.prepared(domain(f"<devices>{disk.format('')}</devices>"))
