"""KVM or emulation: decided by booting a kernel under KVM, since a /dev/kvm that exists may still boot none.

The answer is kept until this machine is booted again.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path

from lab.image import Image, say

KVM = "kvm"
# Not thread=multi: about one boot in seven panicked, code being patched under another CPU's feet.
TCG = "tcg,thread=single"
CPU = {
    KVM: "host",
    # Without cx16: QEMU 7.2 sometimes leaves wrong flags behind after cmpxchg16b, and the kernel dies of it.
    # Without what makes emulation slower: erms has pages copied byte by byte, smap changes the TLB with each copy from
    # or to a program, la57 adds a level to each walk through the page tables; pku and mpx are more to save and restore.
    TCG: "max,-cx16,-erms,-smap,-la57,-pku,-mpx",
}
PROBE_SECONDS = 60.0
# Without a disk the kernel comes this far and no further; printed by init/do_mounts.c.
ALIVE = b"VFS: Unable to mount root fs"
BROKEN = b"KVM internal error"  # QEMU's words, after which the machine stands still for ever


def choose(picture: Image, cache: Path) -> str:
    """The accelerator to use on this machine, for QEMU's -accel."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    note = cache / f"kvm-{os.geteuid()}.json"
    try:
        known = json.loads(note.read_text())
    except (FileNotFoundError, ValueError):
        known = {}
    if known.get("boot_id") != boot_id:
        say("trying whether KVM boots a kernel here")
        known = {"boot_id": boot_id, "works": kvm_boots(picture)}
        note.write_text(json.dumps(known))
    return KVM if known["works"] else TCG


def kvm_boots(picture: Image) -> bool:
    """Whether the image's kernel reaches the end of its own start under KVM within a minute."""
    command = [
        "setpriv", "--pdeathsig", "KILL",
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "q35", "-accel", KVM, "-cpu", CPU[KVM], "-m", "512M",
        "-kernel", str(picture.kernel), "-append", "console=ttyS0 panic=-1", "-serial", "stdio",
    ]  # fmt: skip
    return says_alive(command, PROBE_SECONDS)


def says_alive(command: list[str], seconds: float) -> bool:
    """Whether `command` prints ALIVE within `seconds`, before it ends or prints BROKEN; it is ended then."""
    deadline = time.monotonic() + seconds
    seen = b""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        try:
            while ALIVE not in seen and BROKEN not in seen:
                if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    return False
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:
                    return False
                seen += chunk
        finally:
            process.kill()
    return ALIVE in seen
