"""Which file a program's name means, and whether it is a name of QEMU's.

Why it exists: a start must find what a check of it has found, and the other way round.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path


def is_a_qemus(name: str) -> bool:
    """Whether those who package QEMU call it so: "comm" in qemu-launcher-helper.toml(5), as it is by default."""
    return name.startswith(("qemu-system-", ".qemu-system-")) or name in ("qemu-kvm", "kvm")


def is_executable(path: Path) -> bool:
    """Whether it is there, and ours to execute. A directory is not, though access(2) says so."""
    try:
        return os.access(path, os.X_OK) and not path.is_dir()
    except ValueError:  # a NUL in the name
        return False


def which(
    name: str, env: Mapping[str, str], folder: Path = Path(), is_program: Callable[[Path], bool] = is_executable
) -> Path | None:
    """The file that execvpe(3) would execute in `folder`; None if there is none. PATH is for names without a slash."""
    places = [""] if "/" in name else os.get_exec_path(dict(env))
    return next((path for place in places if is_program(path := folder / place / name)), None)
