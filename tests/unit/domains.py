"""A VM of libvirt's for the tests of the import: XML for parts of it, and the line that virsh printed."""

from xml.etree.ElementTree import Element

from qemu_launcher import cmdline
from qemu_launcher.importing import command_line, domainxml, libvirt

# What virsh 9.0 of Debian 12 printed, in its order; of its devices only some.
LINE = r"""LC_ALL=C PATH=/usr/bin:/bin HOME=/tmp/l/domain--1-vm XDG_CACHE_HOME=/tmp/l/domain--1-vm/.cache FOO='a b' \
/usr/bin/qemu-system-x86_64 -name guest=vm,debug-threads=on -S \
-object '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/tmp/l/domain--1-vm/master-key.aes"}' \
-machine pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram -accel kvm -cpu host -m 512 \
-object '{"qom-type":"memory-backend-ram","id":"pc.ram","size":536870912}' -overcommit mem-lock=on \
-smp 4,sockets=1,cores=2,threads=2 -object '{"qom-type":"iothread","id":"iothread1"}' \
-uuid 11111111-2222-3333-4444-555555555555 \
-no-user-config -nodefaults -chardev socket,id=charmonitor,path=/tmp/l/domain--1-vm/monitor.sock,server=on,wait=off \
-mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc -no-shutdown -boot strict=on \
-device '{"driver":"pcie-root-port","port":16,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}' \
-blockdev '{"driver":"file","filename":"/var/lib/libvirt/images/a,b.img","node-name":"l","cache":{"direct":true}}' \
-chardev socket,id=charchannel0,path=/tmp/l/channel/target/domain--1-vm/org.qemu.guest_agent.0,server=on,wait=off \
-netdev tap,fds=30:31,id=hostnet9 -spice port=5901,addr=127.0.0.1 \
-object '{"qom-type":"secret","id":"s0","data":"x","keyid":"masterKey0","iv":"y","format":"base64"}' \
-device '{"driver":"vfio-pci","host":"0000:01:00.0","id":"hostdev0","bus":"pci.1","addr":"0x0"}' \
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg timestamp=on""".replace(
    "\\\n", ""
)


def domain(inside: str, kind: str = "kvm") -> Element:
    text = f"<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>vm</name>{inside}</domain>"
    return domainxml.parse(text, "vm.xml")


def definition_of(inside: str, line: str = LINE) -> str:
    root = domain(inside)
    draft = libvirt._draft(root, domainxml.tuning(root), line)
    return command_line.written(draft, [w for o in command_line.kept(draft) for w in cmdline.option_argv(o)])
