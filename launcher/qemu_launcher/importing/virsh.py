"""virsh, asked for the two things that only libvirt knows: the XML of a VM, and the command line it would start.

Nothing is started or changed by either. LauncherError, with what virsh said, when it does not answer.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence

from ..errors import LauncherError

SYSTEM = "qemu:///system"
_URIS = ("LIBVIRT_DEFAULT_URI", "VIRSH_DEFAULT_CONNECT_URI")
_NO_CONNECTION = "failed to connect to the hypervisor"
_HINTS = (
    (
        _NO_CONNECTION,
        "on Debian, install libvirt-daemon and libvirt-daemon-driver-qemu: virsh then starts what it needs for you",
    ),
    ("failed to get domain", "virsh list --all names yours, virsh -c qemu:///system list --all those of the system"),
    ("does not support virt type 'kvm'", "QEMU must be able to use /dev/kvm as you: are you in the group kvm?"),
)
OTHER_HINT = "it is about what stands in the XML: take that out of a copy of it, and import the copy"


def domain_xml(name: str) -> str:
    """The XML of the VM `name`: the caller's own one, else the system's."""
    dump = ("dumpxml", "--inactive", "--domain", name)
    try:
        return _virsh(dump)
    except LauncherError:
        if any(os.environ.get(uri) for uri in _URIS):
            raise
        try:
            # Read-only, as this may be done without a password.
            return _virsh(("--readonly", "--connect", SYSTEM, *dump))
        except LauncherError:
            pass
        raise


def command_line(xml: bytes) -> str:
    """What libvirt would start for this XML, as a line for the shell."""
    memory = os.memfd_create("domain.xml")
    try:
        view = memoryview(xml)
        while view:
            view = view[os.write(memory, view) :]
        return _virsh(("domxml-to-native", "qemu-argv", "--xml", f"/dev/fd/{memory}"), pass_fds=(memory,))
    finally:
        os.close(memory)


def _virsh(words: Sequence[str], pass_fds: Sequence[int] = ()) -> str:
    environ: Mapping[str, str] = os.environ | {"LC_ALL": "C.UTF-8"}  # for the hints
    try:
        done = subprocess.run(
            ["virsh", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=pass_fds,
            env=environ,
            check=False,
        )
    except FileNotFoundError as err:
        raise LauncherError(
            "virsh is not installed, and only libvirt knows the command line of its VMs",
            "on Debian: libvirt-clients, and to ask it without a running libvirt, libvirt-daemon-driver-qemu too",
        ) from err
    except OSError as err:
        raise LauncherError(f"cannot run virsh: {err.strerror}") from err
    if done.returncode == 0:
        return done.stdout.decode(errors="surrogateescape")
    said = done.stderr.decode(errors="surrogateescape")
    lines = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    message = ": ".join(lines) or said.strip() or f"it ended with status {done.returncode}"
    hint = next((hint for part, hint in _HINTS if part in said), OTHER_HINT)
    if _NO_CONNECTION in said and os.geteuid() == 0:  # for root virsh starts nothing
        hint += "\nor run it as the user who will own the VM"
    raise LauncherError(f"virsh: {message}", hint)
