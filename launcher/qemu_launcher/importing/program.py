"""Whether a command line is QEMU's at all, as far as that can be told: what is to be said of those that are not.

Pure, save for a look at the first bytes of the program.
"""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

from .. import noqemu
from ..errors import UsageError, shortened
from ..locate import MOST_OF_A_PATH
from .prefixes import is_known, peel
from .qemuoptions import TAKE_VALUE


def check_program(argv: Sequence[str]) -> None:
    """Raises UsageError for a command line of another program's than QEMU, as far as that can be told."""
    program = argv[0]
    if " -" in program:
        raise UsageError(f"{shortened(program)!r} is one word here", "leave out the quotes around the whole line")
    line = None if noqemu.may_be_qemu(program) else _qemu_in_one_word(argv)
    if line is not None:
        hint = f"give that command line without the quotes, and without what stands before it: {shortened(program)}"
        raise noqemu.by_name(argv) or UsageError(f"{shortened(line)!r} is one word here", hint)
    at = None if noqemu.may_be_qemu(program) else _place_of_qemu(argv)
    if at is not None:
        stranger = argv[: _first_known(argv, at)]
        what = f"{shortened(shlex.join(stranger), MOST_OF_A_PATH)!r} stands before {shortened(argv[at])!r}"
        shield = ": vcpu_pinning makes a shield, see qemu-launcher-migration(7)"
        is_cset = program.rpartition("/")[2] == "cset"
        raise UsageError(f"{what}, and is not known here", "leave it out" + shield * is_cset)
    if (refused := noqemu.by_name(argv) or noqemu.by_content(argv)) is not None:
        raise refused


def _qemu_in_one_word(argv: Sequence[str]) -> str | None:
    """A command line of QEMU's that is to be read by a shell, or elsewhere: nix-shell --run 'QEMU ...'."""
    for before, line in pairwise(argv):
        words = [] if _takes_value(before) else line.split()
        if any(map(noqemu.may_be_qemu, words[:-1])) and any(word.startswith("-") for word in words):
            return line
    return None


def _place_of_qemu(argv: Sequence[str]) -> int | None:
    """Where behind the first word a QEMU is named. kvm is a user too, and none as an option's value: -accel kvm."""
    named = (at for at, word in enumerate(argv) if at and noqemu.is_qemu(word))
    other = (
        at
        for at, (before, word) in enumerate(pairwise(argv), 1)
        if word.rpartition("/")[2] == "kvm" and not _takes_value(before)
    )
    return next(named, next(other, None))


def _takes_value(word: str) -> bool:
    """Whether it is an option of QEMU's that the next word belongs to, for a wrapper as well."""
    return word.startswith("-") and word.lstrip("-") in TAKE_VALUE


def _first_known(argv: Sequence[str], end: int) -> int:
    """From where on all that stands before the QEMU at `end` is known."""
    for start in range(1, end):
        with suppress(UsageError):
            if is_known(argv[start]) and len(peel(argv[start : end + 1]).argv) == 1:
                return start
    return end
