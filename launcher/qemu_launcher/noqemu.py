"""What is given for QEMU's command line and is none: shells, scripts, libvirt's XML, definitions.

Why it exists: `import` would make a definition of any program, and one that starts a script by the name of QEMU helps
nobody. Wrappers that have QEMU's name are left alone, since they get QEMU's options.
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from . import programs
from .errors import PROGRAM, UsageError, shortened

_MOST_OF_A_PATH = 200  # characters that a message repeats
_QEMU = re.compile(r"qemu-(?:system-[a-z0-9_]+|kvm)")
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "busybox", "su")
_WITH_COMMAND = re.compile("-[a-z]*c|--command")  # -c, -lc
_COPY = (
    f"in a copy of it put '{PROGRAM} import -- ' before the line with QEMU, and run that: it does all else as before"
)
_WRAPPER = "; for one that QEMU's options are given to, write QEMU's name here, and the script's at binary: afterwards"


def is_qemu(word: str) -> bool:
    """Whether it has the name of one: qemu-system-x86_64, /usr/libexec/qemu-kvm."""
    return _QEMU.fullmatch(word.rpartition("/")[2]) is not None


def may_be_qemu(program: str) -> bool:
    """The same of what is a program for certain: kvm is an accelerator too, and other names begin like QEMU's."""
    return programs.is_a_qemus(program.rpartition("/")[2])


def by_name(words: Sequence[str]) -> UsageError | None:
    """What to say of a command line that by the name of its program is not QEMU's; None if it may be."""
    program = words[0]
    path = shortened(program, _MOST_OF_A_PATH)
    quoted, name = repr(path), program.rpartition("/")[2]
    if name in _SHELLS:
        has_command = any(map(_WITH_COMMAND.fullmatch, words[1:]))
        hint = "give the command line that the shell is to run, without the shell and its quotes"
        return UsageError(f"{quoted} is a shell, and not QEMU", hint if has_command else _COPY)
    if name.endswith(".sh"):
        return UsageError(f"{quoted} is a script, and not QEMU", _COPY)
    file = shlex.quote(path)
    if name.endswith(".xml"):
        hint = f"of a VM of libvirt's: {PROGRAM} import --libvirt {file}"
        return UsageError(f"{quoted} is XML by its name, and not QEMU", hint)
    if name.endswith((".yml", ".yaml")):
        output = shlex.quote(re.sub(r"\.yaml\Z", ".yml", path))  # the one ending that import writes
        hint = f"to start it: {PROGRAM} {file}; to write it: {PROGRAM} import -o {output} -- QEMU..."
        return UsageError(f"{quoted} is a definition by its name, and not QEMU", hint)
    return None


def by_content(words: Sequence[str]) -> UsageError | None:
    """The same by the first bytes of the program's file, if it can be read."""
    if may_be_qemu(words[0]) or not _is_script(words[0]):
        return None
    hint = _COPY + (_WRAPPER if len(words) > 1 else "")
    return UsageError(f"{shortened(words[0], _MOST_OF_A_PATH)!r} is a script, and not QEMU", hint)


def _is_script(program: str) -> bool:
    try:
        # Opening a FIFO would wait.
        if (path := programs.which(program, os.environ, is_program=Path.is_file)) is not None:
            with path.open("rb") as file:
                return file.read(2) == b"#!"
    except (OSError, ValueError):  # not ours to read, or no path: a NUL, or text that the locale has no bytes for
        pass
    return False
