"""The guest's screen is there, as with bare QEMU: holding the guest until it is tuned takes no display anything away.

GTK, SDL, SPICE and D-Bus displays look for consoles once, when QEMU starts; a launch that held QEMU back earlier, when
it has no devices yet (-preconfig), would leave them without the VGA console. Of these, `-display dbus` needs no screen
of our own, and can be asked what it found.
"""

import json
import os
import select
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import PATIENCE, Home, Qmp, Run
from qemu.private_bus import PrivateBus

# VGA's text mode, 80 x 25 characters of 9 x 16 pixels. QEMU's own "Guest has not initialized the display" is 640 x 480.
TEXT_MODE = (720, 400)
ONE_CHARACTER = 9 * 16 * 3  # bytes: the cursor blinks

CONSOLE = "/org/qemu/Display1/Console_0"

Screen = tuple[tuple[int, int], bytes]


@pytest.fixture
def place() -> Iterator[Path]:
    """Short enough for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="ql-screen-") as name:
        yield Path(name)


def machine(place: Path) -> list[Any]:
    """A PC with a screen; what its firmware writes there it also writes into the pipe `firmware`."""
    return [
        "nodefaults",
        {"machine": "q35"},
        {"accel": "tcg"},
        {"m": "64"},
        {"vga": "std"},
        {"vnc": f"unix:{place}/vnc"},
        {"debugcon": f"file:{place}/firmware"},
        {"global": "isa-debugcon.iobase=0x402"},
    ]


def pipe(place: Path) -> int:
    """Open before QEMU opens it, and for writing too: so neither end waits for the other."""
    os.mkfifo(place / "firmware")
    return os.open(place / "firmware", os.O_RDWR)


def screen_at_rest(place: Path, firmware: int, qmp: Qmp) -> Screen:
    """Size and pixels of the primary console when the firmware has given up looking for a disk."""
    said = b""
    while b"No bootable device." not in said:
        assert select.select([firmware], [], [], PATIENCE)[0], said
        said += os.read(firmware, 4096)
    os.close(firmware)
    (place / "firmware").unlink()
    qmp("screendump", filename=f"{place}/screen.ppm")
    qmp("quit")
    magic, width, height, depth, pixels = (place / "screen.ppm").read_bytes().split(maxsplit=4)
    assert (magic, depth) == (b"P6", b"255")
    return (int(width), int(height)), pixels


def start(home: Home, options: list[Any], **environment: str) -> Run:
    """A VM with these options alone, held back until its threads are scheduled."""
    sections = {"launcher": {"binary": "qemu-system-x86_64", "scheduler": "batch"}, "qemu": options}
    (home.configuration / "vm-under-test.yml").write_text(json.dumps(sections))
    run = home.start(env=environment)
    run.wait_running()
    return run


def bare_screen(place: Path) -> Screen:
    firmware = pipe(place)
    options = [word for o in machine(place) for word in ([f"-{o}"] if isinstance(o, str) else _words(o))]
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(f"{place}/qmp")
        control.listen()
        options += ["-chardev", f"socket,id=qmp,fd={control.fileno()},server=on,wait=off"]
        qemu = subprocess.Popen(
            ["qemu-system-x86_64", *options, "-mon", "chardev=qmp,mode=control"], pass_fds=[control.fileno()]
        )
    try:
        return screen_at_rest(place, firmware, Qmp(place / "qmp"))
    finally:
        qemu.wait(PATIENCE)


def _words(option: dict[str, str]) -> list[str]:
    return [word for name, value in option.items() for word in (f"-{name}", value)]


def test_what_the_guest_shows_is_what_it_shows_under_bare_qemu(home: Home, place: Path) -> None:
    firmware = pipe(place)
    run = start(home, machine(place))
    size, pixels = screen_at_rest(place, firmware, run.qmp())
    assert run.end() == 0
    bare_size, bare_pixels = bare_screen(place)
    assert size == bare_size == TEXT_MODE
    assert len(pixels) == len(bare_pixels)
    different = sum(ours != theirs for ours, theirs in zip(pixels, bare_pixels, strict=True))
    assert different <= ONE_CHARACTER
    assert sum(map(bool, pixels)) > 10 * ONE_CHARACTER, "hardly anything is on it"


def test_display_that_counts_consoles_when_it_starts_finds_the_screen(home: Home, bus: PrivateBus) -> None:
    backends = subprocess.run(["qemu-system-x86_64", "-display", "help"], capture_output=True, text=True, check=True)
    if "dbus" not in backends.stdout.split():
        # Debian 13 has it in a package of its own, which brings half of Mesa.
        pytest.skip("optional: this QEMU has no D-Bus display (qemu-system-modules-opengl)")
    options = ["nodefaults", {"machine": "q35"}, {"accel": "tcg"}, {"m": "64"}, {"vga": "std"}]
    run = start(home, [*options, {"display": f"dbus,addr={bus.address.partition(',')[0]}"}])
    question = ["org.freedesktop.DBus.Properties.GetAll", "string:org.qemu.Display1.Console"]
    answer = subprocess.run(
        ["dbus-send", f"--bus={bus.address}", "--print-reply", "--dest=org.qemu", CONSOLE, *question],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "VGA" in answer.stdout
    assert "Graphic" in answer.stdout
    run.qmp()("quit")
    assert run.end() == 0
