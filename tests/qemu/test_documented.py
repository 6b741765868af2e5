"""The commands in README and the manual pages, run as they stand: each in a home of its own, with the real QEMU."""

import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qemu.launched import PATIENCE, ROOT, Home
from unit.manual import README, blocks

BLOCKS = list(blocks())
NAMED = sorted(
    {
        line.partition(" #")[0].strip()
        for block in BLOCKS
        for line in block.text.splitlines()
        if line.startswith("qemu-launcher ") and block.language != "text"
    }
)
# What is not run here: it is for a guest that runs, or for the helper, or asks a libvirt. Each has tests of its own.
ELSEWHERE = ("monitor", "qmp", "release", "start", "stop", "kill", "pause", "resume", "__complete")
LINES = [line for line in NAMED if line.split()[1] not in ELSEWHERE and "--libvirt" not in line]
STATUS = {"list": {0}, "status": {0, 1, 3}, "check": {0, 2}, "command": {0}, "import": {0}, "limits": {0, 1}}


@pytest.fixture
def newcomer(home: Home, tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who has just installed it."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    program = tmp_path / "bin/qemu-launcher"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qemu_launcher "$@"\n')
    program.chmod(0o755)
    own = tmp_path / "home"
    own.mkdir()
    environment = {**home.environment, "HOME": str(own), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    for name in ("QEMU_LAUNCHER_CONFIG_DIR", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    return environment


def folder(environment: dict[str, str]) -> Path:
    return Path(environment["HOME"]) / ".config/qemu-launcher"


def test_the_first_vm_by_hand(newcomer: dict[str, str]) -> None:
    """README's lines, in one shell; the firmware says hello, and Ctrl-A x ends QEMU."""
    [block] = [block for block in BLOCKS if block.path == README and block.text.startswith("mkdir -p ~/.config")]
    process = subprocess.Popen(
        ["bash", "-euc", block.text],
        cwd=ROOT,
        env=newcomer,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    said = b""
    deadline = time.monotonic() + PATIENCE
    while b"SeaBIOS" not in said:
        assert select.select([process.stdout], [], [], deadline - time.monotonic())[0], said
        data = os.read(process.stdout.fileno(), 65536)
        assert data, said
        said += data
    process.stdin.write(b"\x01x")
    process.stdin.flush()
    rest, _ = process.communicate(timeout=PATIENCE)
    said += rest
    assert process.returncode == 0, said
    assert said.startswith(b"qemu-system-x86_64 -machine q35 -m 256M -nographic\n")
    assert b"first: running" in said


@pytest.mark.parametrize("line", LINES)
def test_line(line: str, newcomer: dict[str, str], tmp_path: Path) -> None:
    """It ends as it should, without a traceback. VMs that it names are there, and do not run."""
    words = [word for word in shlex.split(line) if word != "..."]
    command = words[1]
    for name in {"win11", "first", *(word for word in words[2:] if re.fullmatch(r"[a-z]+[0-9]*", word))}:
        folder(newcomer).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "launcher/examples/first.yml", folder(newcomer) / f"{name}.yml")
    if command not in STATUS:  # a start: QEMU waits for its keyboard, which says no more than that
        assert words[1:] in (["win11"], ["first"])
        command = "run"
    done = subprocess.run(
        ["bash", "-c", line.replace(" ...", "")],
        cwd=tmp_path,
        env=newcomer,
        input=b"\x01x" if command == "run" else b"",
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr
    assert done.returncode in STATUS.get(command, {0}), done.stderr
    if command in ("list", "command", "check") or (command == "import" and "-o" not in words):
        assert done.stdout


def test_lines_are_found() -> None:
    assert len(NAMED) > 15
    assert len(LINES) > 8


def test_what_import_prints_is_what_the_page_shows(newcomer: dict[str, str]) -> None:
    """The example and the one that follows it, "prints"."""
    at = next(
        number
        for number, block in enumerate(BLOCKS)
        if block.path.name == "qemu-launcher.1.md" and block.text.startswith("qemu-launcher import -- ")
    )
    given, printed = BLOCKS[at], BLOCKS[at + 1]
    done = subprocess.run(["bash", "-c", given.text], env=newcomer, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip("\n") == printed.text.rstrip("\n")
