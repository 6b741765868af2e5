"""The host's files as `check` looks at them: /sys, /proc, /dev, /etc below a root, and what this user may do there.

Why it exists: every fact about a host is one of a few questions to its files, and a file that is not there is an answer
(a container without /sys, a kernel without IOMMU), not an error. Tests lay out another host in a folder.

Reads only, and opens nothing that could wait or act: devices and pipes are never opened, only asked about with
access(2), which knows ACLs, capabilities and read-only mounts. No method raises OSError.
"""

import grp
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from ..cpulist import parse_cpulist

READ, WRITE, ENTER = os.R_OK, os.W_OK, os.X_OK
_LONGEST = 1 << 20  # bytes; what is read here has a few lines


class Tree:
    """The files below `root`. `may`: access(2)."""

    def __init__(self, root: Path = Path("/"), may: Callable[[Path, int], bool] = os.access) -> None:
        self.root = root
        self._may = may

    def path(self, path: str) -> Path:
        """Where the file is that the host calls `path`."""
        return self.root / path.lstrip("/")

    def text(self, path: str) -> str | None:
        """The content of a regular file, without blanks around it; None if it cannot be had."""
        place = self.path(path)
        try:
            if not stat.S_ISREG(place.stat().st_mode):
                return None
            with place.open("rb") as file:
                return file.read(_LONGEST).decode("utf-8", "replace").strip()
        except (OSError, ValueError):  # the second for a NUL in the path
            return None

    def begins_with(self, path: str, beginning: bytes) -> bool:
        """Whether a regular file begins so."""
        try:
            if not stat.S_ISREG(self.path(path).stat().st_mode):
                return False
            with self.path(path).open("rb") as file:
                return file.read(len(beginning)) == beginning
        except (OSError, ValueError):
            return False

    def number(self, path: str) -> int | None:
        """A file that holds one decimal number."""
        try:
            return int(self.text(path) or "")
        except ValueError:
            return None

    def names(self, path: str) -> list[str]:
        """What is in a directory, sorted; nothing if it cannot be had."""
        try:
            return sorted(os.listdir(self.path(path)))
        except (OSError, ValueError):
            return []

    def exists(self, path: str) -> bool:
        """Whether it is there, as far as this user can see."""
        return self.stat(path) is not None

    def is_directory(self, path: str) -> bool:
        """Whether it is a directory."""
        about = self.stat(path)
        return about is not None and stat.S_ISDIR(about.st_mode)

    def stat(self, path: str) -> os.stat_result | None:
        """stat(2), links followed."""
        try:
            return self.path(path).stat()
        except (OSError, ValueError):
            return None

    def link(self, path: str) -> str | None:
        """The last part of what a symbolic link points to, which is how /sys names a driver or a group."""
        try:
            return self.path(path).readlink().name
        except (OSError, ValueError):
            return None

    def target(self, path: str) -> str:
        """`path` with all symbolic links followed, as the host calls it; unchanged where that fails."""
        try:
            real = self.path(path).resolve(strict=True)
            return f"/{real.relative_to(self.root.resolve())}"
        except (OSError, ValueError, RuntimeError):
            return path

    def may(self, path: str, mode: int) -> bool:
        """Whether this user may do `mode` with it."""
        try:
            return self._may(self.path(path), mode)
        except (OSError, ValueError):
            return False

    def group_of(self, path: str) -> str | None:
        """Name of the group that owns it, if its members may read and write there; None for the group root."""
        about = self.stat(path)
        wanted = stat.S_IRGRP | stat.S_IWGRP
        if about is None or about.st_gid == 0 or about.st_mode & wanted != wanted:
            return None
        try:
            return grp.getgrgid(about.st_gid).gr_name
        except KeyError:
            return None

    def free_bytes(self, path: str) -> int | None:
        """What is left for ordinary users in the file system of `path`."""
        try:
            about = os.statvfs(self.path(path))
        except (OSError, ValueError):
            return None
        return about.f_bavail * about.f_frsize


def cpus_in(text: str | None) -> frozenset[int]:
    """What a file says that holds a list of CPUs; none where it is not there, empty or something else."""
    try:
        return parse_cpulist(text or "")
    except ValueError:
        return frozenset()


def linux(release: str) -> tuple[int, int]:
    """The first two numbers of uname(2)'s `release`; 0 and 0 where they are not numbers."""
    found = re.match(r"([0-9]+)\.([0-9]+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
