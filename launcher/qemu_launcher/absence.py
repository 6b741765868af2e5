"""How to get what is not there: the helper, or one that the bus knows of; QEMU. In a container, or not on Debian, too.

Why it exists: "not installed" is the first thing that many will read, and what helps is different in each of these.
Looks at a few files; starts nothing, changes nothing.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from . import unexpanded

HOW_TO_INSTALL = (
    "on Debian: make deb in its sources, then sudo apt install ./build/qemu-launcher_*.deb\n"
    "on other distributions: sudo make install in its sources\n"
    "it needs a host with a system bus (dbus) and polkit"
)
# Debian's package by QEMU's name for the architecture; `qemu-system` brings all there are.
_PACKAGES = {"x86_64": "x86", "i386": "x86", "aarch64": "arm", "arm": "arm", "ppc": "ppc", "ppc64": "ppc"}
WITHOUT_HELPER = "to pin without the helper, with your own rights: isolation: affinity; nothing is shielded then"

# systemd's name for it, else what docker, podman (with toolbox, distrobox) and flatpak leave: systemd-detect-virt(1).
_CONTAINER_NAME = "run/systemd/container"
_CONTAINER_MARKS = {".dockerenv": "docker", "run/.containerenv": "podman", ".flatpak-info": "flatpak"}
_ACTIVATION = "dbus-1/system-services/org.qemulauncher.Helper1.service"
_BUS = "org.freedesktop.DBus"
_SHARED = ("usr/share", "usr/local/share", "run", "etc")  # dbus-daemon(1), <standard_system_servicedirs/>


def has_systemd(root: Path = Path("/")) -> bool:
    """Whether systemd is this host's init: sd_booted(3)."""
    return (root / "run/systemd/system").exists()


def reload_bus(root: Path = Path("/")) -> str:
    """The command after which the bus has read its files again."""
    if has_systemd(root):
        return "sudo systemctl reload dbus"
    return f"sudo dbus-send --system --type=method_call --dest={_BUS} / {_BUS}.ReloadConfig"


def remedy(root: Path = Path("/")) -> str:
    """What to do where the bus knows no helper, or where there is no bus; the lines of a hint."""
    return "\n".join(_remedies(root))


def _remedies(root: Path) -> Iterator[str]:
    if (container := container_of(root)) is not None:
        yield f"this is a container ({container}): install it on the host, and start the VM there, in no container"
    elif any((root / folder / _ACTIVATION).exists() for folder in _SHARED):
        yield "it is installed, but not to the running system's knowledge: " + reload_bus(root)
        yield "if that does not help, install it again: on Debian, sudo apt install --reinstall ./qemu-launcher_*.deb"
        return
    yield HOW_TO_INSTALL


def qemu(binary: str, env: Mapping[str, str]) -> tuple[str, str | None]:
    """What to say where there is no program `binary`, a name or a path, that was to be QEMU; and a hint."""
    where = "it is not there, or not yours to execute"
    if "/" not in binary:
        where = f"it is in no folder of PATH ({':'.join(os.get_exec_path(dict(env)))})"
    return f"cannot start {binary!r}: {where}", unexpanded.hint(binary, _get_qemu(binary))


def _get_qemu(binary: str) -> str:
    _, called, architecture = binary.rpartition("/")[2].partition("qemu-system-")
    if called:
        package = "-".join(["qemu-system", *filter(None, [_PACKAGES.get(architecture)])])
        other = "correct its path" if "/" in binary else "give its whole path"
        return f"install it (on Debian: sudo apt install {package}), or {other}"
    if "/" in binary:
        return "correct the path, or name QEMU as PATH has it: qemu-system-x86_64"
    return "correct the name, or give its whole path; QEMU for PCs is qemu-system-x86_64"


def in_container() -> str | None:
    """A hint where the host's helper answers in a container, and cannot know our processes by our numbers for them."""
    if (kind := container_of()) is None:
        return None
    return f"this is a container ({kind}): the helper tunes processes of the host, start it there"


def container_of(root: Path = Path("/")) -> str | None:
    """What kind of container we are in, None if in none that is known."""
    try:
        if name := (root / _CONTAINER_NAME).read_text("utf-8", "replace").strip():
            return name
    except OSError:
        pass
    marked = (kind for mark, kind in _CONTAINER_MARKS.items() if (root / mark).exists())
    return next(marked, os.environ.get("container") or None)  # noqa: SIM112 (so is it called)
