"""Definitions from strings, for the tests of the parts that read them."""

from pathlib import Path

import pytest

from qemu_launcher import cmdline, definition
from qemu_launcher.definition import VmDefinition
from qemu_launcher.errors import DefinitionError, render

PATH = Path("win11.yml")
ROOT = Path(__file__).resolve().parents[2]


def read(text: str | bytes) -> VmDefinition:
    """The definition in `text`, as if it stood in win11.yml."""
    return definition.parse(text if isinstance(text, bytes) else text.encode(), PATH, "win11")


def launcher(keys: str, qemu: str = "[]") -> VmDefinition:
    """A definition whose launcher section has, besides binary in line 2, `keys` from line 3 on, two columns in."""
    lines = "".join(f"  {line}\n" for line in keys.splitlines())
    return read(f"launcher:\n  binary: q\n{lines}qemu: {qemu}\n")


def argv(items: str) -> list[str]:
    """QEMU's arguments for the qemu section `items`, a flow sequence or block items that begin in line 3."""
    start = " " if items.startswith("[") else "\n"
    return cmdline.qemu_argv(read(f"launcher: {{binary: q}}\nqemu:{start}{items}\n"))[1:]


def refusal(text: str | bytes) -> str:
    """What the user is told about the wrong definition `text`, without the program's name and file."""
    with pytest.raises(DefinitionError) as caught:
        read(text)
    return shown(caught.value)


def launcher_refusal(keys: str, qemu: str = "[]") -> str:
    """What the user is told about wrong `keys`, which begin in line 3, column 3."""
    with pytest.raises(DefinitionError) as caught:
        launcher(keys, qemu)
    return shown(caught.value)


def shown(error: DefinitionError) -> str:
    """The message for the terminal, shortened to line:column: message, and the hints."""
    return render(error).replace("qemu-launcher: win11.yml:", "").rstrip("\n")
