"""What a lab is made of: a frozen recipe for the image, and a frozen description of the machine that boots it.

The two are apart because only the first decides the contents of the image: its hash, together with the files that are
put into it and the code that builds it, names the cached image, so that any change builds a new one. A machine is
chosen at boot and costs nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

LAB_FOLDER = Path(__file__).resolve().parent
PROJECT = LAB_FOLDER.parent.parent


def cache_folder() -> Path:
    """Where images, slots and running labs live: $QEMU_LAUNCHER_CACHE/lab, else the user's cache folder.

    Outside the tree, so that a fresh clone finds the image that an older one built, and that all checkouts of a user
    take the same slots.
    """
    named = os.environ.get("QEMU_LAUNCHER_CACHE")
    if named:
        return Path(named).absolute() / "lab"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qemu-launcher" / "lab"


CACHE = cache_folder()

# What decides the image besides the recipe itself: relative to this folder, folders are taken with all below them.
# `{}` is the init system.
INGREDIENTS = ("files", "files-{}", "customise", "customise-{}", "image.py")

BASE_PACKAGES = (
    # the host: bus, polkit, cgroups
    "dbus", "polkitd", "udev", "kmod", "procps", "util-linux", "iproute2", "linux-image-cloud-amd64",
    # what the product depends on, and what its tests use
    "python3", "python3-yaml", "python3-prctl", "python3-dbus-next", "python3-rich", "python3-pytest",
    "python3-hypothesis", "qemu-system-x86", "strace",
    # the way in
    "openssh-server",
)  # fmt: skip
# The host: init, and logind.
INIT_PACKAGES = {
    "systemd": ("systemd", "systemd-sysv", "dbus-user-session", "libpam-systemd", "dbus-broker"),
    "openrc": (
        "sysvinit-core", "openrc", "initscripts", "orphan-sysvinit-scripts", "elogind", "libpam-elogind",
        "systemd-standalone-sysusers", "systemd-standalone-tmpfiles",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """One image. Another suite, or another init, is another recipe."""

    name: str = "trixie"  # for people, and to tell the images of different recipes apart
    suite: str = "trixie"
    init: str = "systemd"  # or "openrc": one without any of systemd's daemons
    packages: tuple[str, ...] = BASE_PACKAGES  # besides those of INIT_PACKAGES
    users: tuple[str, ...] = ("alice", "bob", "carol")  # uid 1000, 1001, ...: each with a group of his own
    size_mib: int = 2048  # of the file system; the file is sparse

    @property
    def cpu_features(self) -> str:
        """What an emulated CPU needs so that this kernel sees its cores: Linux 6.1 takes the threads of one of AMD's
        without topoext, which QEMU's "max" is, for cores.
        """
        return ",vendor=GenuineIntel" if self.suite == "bookworm" else ""

    @property
    def ingredients(self) -> tuple[str, ...]:
        return tuple(name.format(self.init) for name in INGREDIENTS)

    @property
    def all_packages(self) -> tuple[str, ...]:
        return INIT_PACKAGES[self.init] + self.packages

    def digest(self, folder: Path = LAB_FOLDER) -> str:
        """The name of the image: 16 hex digits over the recipe and its ingredients below `folder`."""
        state = hashlib.sha256(json.dumps([dataclasses.asdict(self), self.all_packages], sort_keys=True).encode())
        for path in _files(folder, self.ingredients):
            content = path.read_bytes()
            mode = path.stat().st_mode & 0o111
            state.update(f"\0{path.relative_to(folder)}\0{mode}\0{len(content)}\0".encode())
            state.update(content)
        return state.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """The hardware of one boot. Four cores of two threads, so that whole cores can be told from halves."""

    smp: str = "8,sockets=1,cores=4,threads=2"
    memory_mib: int = 3072
    kernel_arguments: tuple[str, ...] = ()  # added to our own, last one wins
    fresh: bool = False  # boots even where a booted state is at hand

    @property
    def resumable(self) -> bool:
        """Whether to start from a booted state: not for a machine with kernel arguments, of which there are many."""
        return not (self.fresh or self.kernel_arguments)


TRIXIE = Recipe()
BOOKWORM = Recipe(name="bookworm", suite="bookworm")
OPENRC = Recipe(name="openrc", init="openrc")
OPENRC_V1 = Recipe(name="openrc12", suite="bookworm", init="openrc")
RECIPES = {recipe.name: recipe for recipe in (TRIXIE, BOOKWORM, OPENRC, OPENRC_V1)}


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    found: list[Path] = []
    for name in names:
        path = folder / name
        found += [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sorted(found)
