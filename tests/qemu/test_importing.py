"""The tables by which `import` reads a command line are those of the QEMU that is installed."""

import re
import shutil
import subprocess

import pytest

from qemu_launcher.importing.qemuoptions import FLAGS, TAKE_VALUE

QEMU = "qemu-system-x86_64"


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    return subprocess.run([QEMU, *words], capture_output=True, text=True, timeout=120, check=False)


def options_of_this_qemu() -> set[str]:
    """What its -help names, the second of `-h or -help` and `-fda/-fdb` too."""
    names = set()
    for line in run("-help").stdout.splitlines():
        for head in re.findall(r"^--?[A-Za-z][\w-]*(?:(?:/| or )-[A-Za-z][\w-]*)*", line):
            names |= {name.lstrip("-") for name in re.split("/| or ", head)}
    return names


def test_every_option_is_known() -> None:
    names = options_of_this_qemu()
    assert len(names) > 100
    assert names <= FLAGS | TAKE_VALUE


def test_flags_take_nothing() -> None:
    """It has read them all to the end, or -version would not have been obeyed."""
    flags = [f"-{name}" for name in sorted(FLAGS & options_of_this_qemu() - {"h", "help", "version"})]
    done = run("-version", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("QEMU emulator version")


def test_the_others_take_a_value() -> None:
    """One at a time: the first that lacks its value ends QEMU."""
    names = sorted(TAKE_VALUE & options_of_this_qemu())
    without = [name for name in names if "requires an argument" not in run("-version", f"-{name}").stderr]
    assert without == []


@pytest.mark.parametrize("value", ["-S", "-", ""])
def test_a_value_may_look_like_an_option(value: str) -> None:
    assert run("-name", value, "-version").stdout.startswith("QEMU emulator version")
