"""The guest's screen is there, as with bare QEMU: holding the guest until it is tuned takes no display anything away.

GTK, SDL, SPICE and D-Bus displays look for consoles once, when QEMU starts; a launch that held QEMU back earlier, when
it has no devices yet (-preconfig), would leave them without the VGA console. So GTK is looked at on an X server that
has no screen but memory, SPICE through a client of its own, and `-display dbus`, which a desktop would have to play, is
asked what it found. What they show is compared with what QEMU itself says is on the guest's screen, and that with bare
QEMU's.
"""

import json
import os
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
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


@pytest.fixture
def x_server(place: Path) -> Iterator[str]:
    """The name of an X display that holds its screen in memory."""
    needs("Xvfb", "xvfb")
    ready, number = os.pipe()
    with (place / "x.log").open("wb") as log:
        # Without -noreset it forgets its clients' windows whenever the last of them has left.
        argv = ["Xvfb", "-displayfd", str(number), "-screen", "0", "1024x768x24", "-nolisten", "tcp", "-noreset"]
        server = subprocess.Popen(argv, pass_fds=[number], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    os.close(number)
    try:
        assert select.select([ready], [], [], PATIENCE)[0], (place / "x.log").read_text()
        with os.fdopen(ready) as line:
            name = line.readline().strip()
        assert name, (place / "x.log").read_text()
        yield f":{name}"
    finally:
        server.terminate()
        server.wait(PATIENCE)


def needs(tool: str, package: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed: apt-get install {package}")


def machine(place: Path, *display: Any) -> list[Any]:
    """A PC with a screen; what its firmware writes there it also writes into the pipe `firmware`."""
    return [
        "nodefaults",
        {"machine": "q35"},
        {"accel": "tcg"},
        {"m": "64"},
        *(display or [{"vga": "std"}, {"vnc": f"unix:{place}/vnc"}]),
        {"debugcon": f"file:{place}/firmware"},
        {"global": "isa-debugcon.iobase=0x402"},
    ]


def pipe(place: Path) -> int:
    """Open before QEMU opens it, and for writing too: so neither end waits for the other."""
    os.mkfifo(place / "firmware")
    return os.open(place / "firmware", os.O_RDWR)


def wait_for_rest(place: Path, firmware: int) -> None:
    """Until the firmware has given up looking for a disk; from then on only the cursor blinks."""
    said = b""
    while b"No bootable device." not in said:
        assert select.select([firmware], [], [], PATIENCE)[0], said
        said += os.read(firmware, 4096)
    os.close(firmware)
    (place / "firmware").unlink()


def read_ppm(path: Path) -> Screen:
    magic, width, height, depth, pixels = path.read_bytes().split(maxsplit=4)
    assert (magic, depth) == (b"P6", b"255")
    return (int(width), int(height)), pixels


def screendump(place: Path, qmp: Qmp) -> Screen:
    """What QEMU says is on the primary console."""
    qmp("screendump", filename=f"{place}/screen.ppm")
    return read_ppm(place / "screen.ppm")


def screen_at_rest(place: Path, firmware: int, qmp: Qmp) -> Screen:
    """Size and pixels of the primary console; the VM is ended."""
    wait_for_rest(place, firmware)
    screen = screendump(place, qmp)
    qmp("quit")
    return screen


def is_same(one: Screen, other: Screen) -> bool:
    """But for the cursor, which blinks."""
    if one[0] != other[0] or len(one[1]) != len(other[1]):
        return False
    return sum(a != b for a, b in zip(one[1], other[1], strict=True)) <= ONE_CHARACTER


def is_written_on(screen: Screen) -> bool:
    """Text, light on black: many pixels are lit, and most are not."""
    size, pixels = screen
    return size == TEXT_MODE and 10 * ONE_CHARACTER < sum(map(bool, pixels)) < len(pixels) / 2


def assert_shown(place: Path, qmp: Qmp, look: Callable[[], Screen | str]) -> None:
    """Displays follow the guest a little later: look, which gives a picture or says why not, until they have."""
    deadline = time.monotonic() + PATIENCE
    while True:
        seen, real = look(), screendump(place, qmp)
        if not isinstance(seen, str) and is_same(seen, real):
            break
        why = seen if isinstance(seen, str) else f"{seen[0]} with {sum(map(bool, seen[1]))} bytes of light"
        assert time.monotonic() < deadline, f"seen: {why}; the guest's: {real[0]}"
    assert is_written_on(real)


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
    screen = screen_at_rest(place, firmware, run.qmp())
    assert run.end() == 0
    assert is_same(screen, bare_screen(place))
    assert is_written_on(screen)


@pytest.mark.parametrize("card", ["VGA", "qxl-vga"])
def test_spice_client_sees_the_screen(card: str, home: Home, place: Path) -> None:
    needs("spicy-screenshot", "spice-client-gtk")
    known = subprocess.run(["qemu-system-x86_64", "-spice", "help"], capture_output=True, text=True, check=False)
    if "disable-ticketing" not in known.stdout:
        pytest.skip("this QEMU has no SPICE: apt-get install qemu-system-modules-spice")
    client = ["spicy-screenshot", f"--uri=spice+unix://{place}/spice", f"--out-file={place}/seen.ppm"]

    def look() -> Screen | str:
        (place / "seen.ppm").unlink(missing_ok=True)
        done = subprocess.run(client, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return read_ppm(place / "seen.ppm") if (place / "seen.ppm").exists() else f"{done.returncode} {done.stderr}"

    firmware = pipe(place)
    spice = {"spice": [{"unix": "on"}, {"addr": f"{place}/spice"}, {"disable-ticketing": "on"}]}
    run = start(home, machine(place, {"device": card}, spice))
    qmp = run.qmp()
    wait_for_rest(place, firmware)
    assert_shown(place, qmp, look)
    qmp("quit")
    assert run.end() == 0


def test_gtk_window_shows_the_screen(home: Home, place: Path, x_server: str) -> None:
    needs("xwd", "x11-apps")
    if "gtk" not in display_backends():
        pytest.skip("this QEMU has no GTK window: apt-get install qemu-system-gui")
    # As long as the guest is held, the title goes on: "QEMU (vm-under-test) [Paused]".
    client = ["xwd", "-silent", "-display", x_server, "-name", "QEMU (vm-under-test)", "-out", f"{place}/seen.xwd"]

    def look() -> Screen | str:
        done = subprocess.run(client, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return below_menu(place / "seen.xwd") if done.returncode == 0 else done.stderr

    firmware = pipe(place)
    options = machine(place, {"vga": "std"}, {"display": "gtk"}, {"name": "vm-under-test"})
    run = start(home, options, DISPLAY=x_server, GDK_SCALE="1")
    qmp = run.qmp()
    wait_for_rest(place, firmware)
    assert_shown(place, qmp, look)
    qmp("quit")
    assert run.end() == 0


def below_menu(path: Path) -> Screen:
    """The lowest part of a window's picture, as large as VGA's text: above it is QEMU's menu. Format: XWDFile.h."""
    content = path.read_bytes()
    header = struct.unpack_from(">20I", content)
    start, width, height, little_endian, bits, line = (
        header[0] + 12 * header[19],  # after the colour map
        header[4],
        header[5],
        header[7] == 0,
        header[11],
        header[12],
    )
    assert little_endian
    assert bits == 32
    rows = min(height, TEXT_MODE[1])
    first = start + (height - rows) * line
    dots = b"".join(content[first + row * line :][: 4 * width] for row in range(rows))
    pixels = bytearray(3 * width * rows)
    for colour in range(3):
        pixels[colour::3] = dots[2 - colour :: 4]  # blue, green, red, nothing
    return (width, rows), bytes(pixels)


def display_backends() -> list[str]:
    ask = ["qemu-system-x86_64", "-display", "help"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()


def test_display_that_counts_consoles_when_it_starts_finds_the_screen(home: Home, bus: PrivateBus) -> None:
    if "dbus" not in display_backends():
        pytest.skip("this QEMU has no D-Bus display: apt-get install qemu-system-modules-opengl")
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
