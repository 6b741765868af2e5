"""What runs here: the head of every bug report.

Why it exists: the first questions about a report are always the same. Nothing secret is among the answers: versions,
the user's name and groups, how CPUs are shielded. A program that is asked for its version gets half a minute.
"""

import grp
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import absence, users
from ..errors import printable
from .tree import Tree

_PATIENCE = 30.0  # seconds; --version takes a tenth of one, on a busy host under emulation more than five
_LONGEST = 4096  # bytes


def kernel() -> str:
    """`Linux 6.12.43+deb13-amd64 x86_64`."""
    about = os.uname()
    return f"{about.sysname} {about.release} {about.machine}"


def distribution(tree: Tree) -> str:
    """Its name, as os-release(5) has it."""
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        for line in (tree.text(path) or "").splitlines():
            name, _, value = line.partition("=")
            if name == "PRETTY_NAME":
                return value.strip("\"'")
    return "unknown"


def systemd(tree: Tree) -> str:
    """`systemd 257 (257.7-1)`."""
    if not absence.has_systemd(tree.root):
        return "no systemd"
    return first_line(["systemctl", "--version"], os.environ, Path("/")) or "systemd of unknown version"


def qemu(binary: str, env: Mapping[str, str], folder: Path) -> str | None:
    """`QEMU emulator version 10.0.2 (...)`, or whatever the program says instead; None if it says nothing."""
    return first_line([binary, "--version"], env, folder)


def default_window(binary: str, env: Mapping[str, str], folder: Path) -> str | None:
    """The window that this QEMU opens where no option names a display (qemu_display_find_default of its ui/console.c).

    None if it has no kind of window, or does not say.
    """
    kinds = _said([binary, "-display", "help"], env, folder, b"").split()
    return next((kind for kind in ("gtk", "sdl") if kind.encode() in kinds), None)


def user() -> str:
    """`alice (1000), groups alice kvm qemu-launcher`."""
    names = []
    for gid in sorted({os.getegid(), *os.getgroups()}):
        try:
            names.append(grp.getgrgid(gid).gr_name)
        except KeyError:
            names.append(str(gid))
    return f"{users.own_name()} ({os.geteuid()}), groups {' '.join(names)}"


def first_line(argv: Sequence[str], env: Mapping[str, str], folder: Path) -> str | None:
    """The first line that a program prints. None if it cannot be executed, or prints none in time; it is gone then."""
    line = _said(argv, env, folder, b"\n").decode("utf-8", "replace").partition("\n")[0].strip()
    return printable(line) or None


def _said(argv: Sequence[str], env: Mapping[str, str], folder: Path, until: bytes) -> bytes:
    """What a program prints, up to and with `until`, if that is not empty, and no more than we read."""
    try:
        process = subprocess.Popen(
            argv, env=dict(env), cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except (OSError, ValueError):
        return b""
    assert process.stdout is not None
    end, said = time.monotonic() + _PATIENCE, b""
    try:
        # Not communicate(): it would keep all that an endless program prints.
        while not (until and until in said) and len(said) < _LONGEST and (left := end - time.monotonic()) > 0:
            if select.select([process.stdout], [], [], left)[0]:
                data = os.read(process.stdout.fileno(), _LONGEST)
                if not data:
                    break
                said += data
    finally:
        process.stdout.close()
        process.kill()
        process.wait()
    return said
