"""Disk images and boot files: there, and this user's to read or write. And the QEMU binary.

Relative paths are QEMU's: they begin in working_directory, or where the user stands. Image formats are not looked into,
and neither are backing files.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .. import restrictions, unexpanded
from ..definition import HookCommand, QemuOption, VmDefinition
from ..programs import which
from .asked import Image
from .finding import Finding, Severity
from .tree import ENTER, READ, WRITE, Tree

_ELF = b"\x7fELF"
_WITH_RIGHTS = "before_start may make it only with more rights than yours"


def images(
    tree: Tree, wanted: Iterable[Image], folder: Path, user: str, *, made_before: bool = False
) -> Iterator[Finding]:
    """`folder`: where relative paths begin. `made_before`: before_start may make what is not there yet."""
    good = 0
    for image in wanted:
        path = str(folder / image.path)
        about = f"file {image.path}"
        state = tree.stat(path)
        mode = READ | WRITE if image.writable else READ
        kind = "read and write" if image.writable else "read"
        if (closed := _closed_folder(tree, path)) is not None:
            fix = f"sudo setfacl -m u:{user}:x {closed}"
            yield Finding("error", about, f"{path} (-{image.option}) cannot be reached: {closed} is closed to you", fix)
        elif state is None:
            text, fix = f"there is no {path} (-{image.option})", _near(tree, path, image)
            may_come = made_before and not unexpanded.hint(image.path)
            if may_come and not tree.may(_nearest(tree, path), WRITE):
                yield Finding("warning", about, text, f"{fix}\n{_WITH_RIGHTS}")
            else:
                yield absent(about, text, fix, may_come=may_come)
        elif stat.S_ISDIR(state.st_mode):
            yield Finding("error", about, f"{path} (-{image.option}) is a directory", "name the image in it")
        elif not tree.may(path, mode):
            letters = "rw" if image.writable else "r"
            fix = f"sudo setfacl -m u:{user}:{letters} {path}"
            if stat.S_ISBLK(state.st_mode):  # an ACL on a node of /dev is gone after the next boot
                name = os.path.basename(tree.target(path))  # noqa: PTH119
                fix = f'a udev rule that outlives the next boot: SUBSYSTEM=="block", KERNEL=="{name}", OWNER="{user}"'
            if image.writable and tree.may(path, READ):
                fix += "\nor, if the guest only reads it: readonly: on"
            yield Finding("error", about, f"{path} (-{image.option}) is not yours to {kind}", fix)
        else:
            good += 1
    if good:
        many = f"{good} images and boot files" if good > 1 else "1 image or boot file"
        yield Finding("ok", "files", f"{many} can be opened as wanted")


def commands(tree: Tree, definition: VmDefinition, env: Mapping[str, str], folder: Path) -> Iterator[Finding]:
    """Whether the programs of before_start and after_stop are there. They are not executed."""
    hooks: tuple[tuple[str, Sequence[HookCommand], Severity], ...] = (
        ("before_start", definition.before_start, "error"),
        ("after_stop", definition.after_stop, "warning"),
    )
    for key, wanted, severity in hooks:
        for program in dict.fromkeys(command.argv[0] for command in wanted):
            if binary(tree, program, env, folder) is None:
                mark = next(command.mark for command in wanted if command.argv[0] == program)
                text = f"{mark}: {key} cannot start {program!r}: it is in no folder of PATH, or not yours to execute"
                fix = unexpanded.hint(program, "install it, or correct its path")
                yield Finding(severity, key, text, fix)
    if definition.before_start:
        yield Finding(
            "note", "before_start", "what before_start makes is not there yet: it is not executed for a check"
        )


def sockets(tree: Tree, wanted: Iterable[str], folder: Path, *, made_before: bool = False) -> Iterator[Finding]:
    """Whether a socket is there to connect to; whether anybody listens on it only a connection would tell."""
    for name in wanted:
        path = str(folder / name)
        if not tree.exists(path):
            text = f"there is no socket {path} (-chardev)"
            fix = unexpanded.hint(name, "start the program that listens there (swtpm, virtiofsd) before the VM")
            may_come = made_before and not unexpanded.hint(name)
            yield absent(f"socket {name}", text, fix, may_come=may_come)
        elif not tree.may(path, WRITE):
            fix = "have that program started by the same user"
            yield Finding("error", f"socket {name}", f"the socket {path} (-chardev) is not yours to connect to", fix)


def absent(about: str, text: str, fix: str | None, *, may_come: bool) -> Finding:
    """Not there. Whether before_start makes it is only known when it has run; it makes no folder called ~ or $HOME."""
    if may_come:
        return Finding("note", about, text, "before_start may make it", may_come=True)
    return Finding("error", about, text, fix)


def _nearest(tree: Tree, path: str) -> str:
    """The folder, of those on the way to `path`, that is there and the nearest to it."""
    return next((folder for folder in map(str, Path(path).parents) if tree.exists(folder)), "/")


def _closed_folder(tree: Tree, path: str) -> str | None:
    """The first folder on the way that may not be entered."""
    for parent in reversed(Path(path).parents):
        if tree.is_directory(str(parent)) and not tree.may(str(parent), ENTER):
            return str(parent)
    return None


def _near(tree: Tree, path: str, image: Image) -> str:
    if hint := unexpanded.hint(image.path):
        return hint
    folder = _nearest(tree, path)
    if "OVMF" in image.path:
        return "on Debian: sudo apt install ovmf (its files are in /usr/share/OVMF)"
    if str(Path(path).parent) != folder:
        first, *_ = Path(path).relative_to(folder).parts
        return f"{folder} exists, {Path(folder, first)} does not: make it, or correct the path"
    disks = [name for name in tree.names(folder) if name.endswith((".qcow2", ".img", ".raw", ".iso", ".fd"))]
    if disks:
        return f"{folder} has: {', '.join(disks[:5])}{', ...' if len(disks) > 5 else ''}"
    return "correct the path" + (f", or make it: qemu-img create -f qcow2 {path} SIZE" if image.writable else "")


def binary(tree: Tree, name: str, env: Mapping[str, str], folder: Path) -> str | None:
    """Where the program is that a start would execute; None if nowhere."""
    found = which(name, env, folder, lambda path: may_start(tree, str(path)))
    return None if found is None else str(found)


def may_start(tree: Tree, path: str) -> bool:
    """Whether it is there, and this user's to execute."""
    return tree.may(path, ENTER) and not tree.is_directory(path)


def is_program(tree: Tree, binary: str) -> bool:
    """Whether it is no script: what that executes, and with which options, is not known."""
    return tree.begins_with(binary, _ELF)


def process_name(tree: Tree, binary: str | None, options: Sequence[QemuOption]) -> Iterator[Finding]:
    """Whether the helper would know this QEMU by the name of its process: proc(5), comm, at most 15 bytes.

    Of a script nothing is known: it becomes what it executes. And an administrator may allow other names.
    """
    renamed = [
        value
        for option in options
        if option.bare_name == "name"
        for name, value in option.properties()
        if name == "process" and value
    ]
    if not renamed and (binary is None or not is_program(tree, binary)):
        return
    name = (renamed[-1] if renamed else os.path.basename(binary or ""))[:15]  # noqa: PTH119
    mark, hint = restrictions.helper_refused(options, name, is_own=True)
    if hint is not None:
        place = f"{mark}: " if mark is not None else ""
        yield Finding("warning", "name", f"{place}this QEMU's process will be called {name!r}", hint)
