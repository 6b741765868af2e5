"""Which of QEMU's options take a value, and of which the value is a list: what reading a command line needs.

QEMU decides by its table alone: after an option that takes a value, the next word is the value, even if it begins with
a hyphen; after one that takes none, a word without hyphen is a disk image. The two tables hold the options of QEMU 4 to
10 on all targets (`HAS_ARG` in qemu-options.hx), and tests hold them to the QEMU that is installed.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FLAGS = _words(
    """
    S alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-hax enable-kvm
    enable-sync-profile full-screen h help jitdump mem-prealloc no-acpi no-fd-bootchk no-frame no-hpet no-kvm no-quit
    no-reboot no-shutdown no-user-config nodefaults nodefconfig nographic old-param only-migratable perfmap portrait
    preconfig s sdl semihosting singlestep snapshot usb version win2k-hack xen-attach xen-create xen-domid-restrict
    """
)
TAKE_VALUE = _words(
    """
    D L M accel acpitable action add-fd append audio audiodev balloon bios blockdev boot bt cdrom chardev chroot compat
    cpu d debugcon device dfilter display drive dtb dump-vmstate echr fda fdb fsdev fw_cfg g gdb global hda hdb hdc hdd
    icount incoming initrd iscsi k kernel loadvm m machine mem-path mon monitor msg mtdblock name net netdev nic numa
    object option-rom overcommit parallel pflash pidfile plugin prom-env qmp qmp-pretty readconfig realtime rotate rtc
    run-with runas sandbox sd seed semihosting-config serial set shim show-cursor smbios smp soundhw spice tb-size
    tpmdev trace usbdevice uuid vga virtfs vnc watchdog watchdog-action writeconfig xen-domid
    """
)

# Their value is a list of `name=value` and words, joined with commas. In all others a comma is only a comma.
LISTS = _words(
    """
    M accel acpitable action add-fd audio audiodev blockdev boot chardev compat cpu device display drive fsdev fw_cfg
    global icount iscsi m machine mon msg name net netdev nic numa object overcommit plugin rtc run-with sandbox
    semihosting-config smbios smp spice tpmdev trace virtfs vnc
    """
)
