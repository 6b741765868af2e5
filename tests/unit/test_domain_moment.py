"""libvirt's XML: what virsh prints for one moment, in the form that lasts."""

import pytest

from qemu_launcher import cmdline
from unit.domains import LINE, definition_of
from unit.reading import read

NOW = "2026-11-27T10:06:52"


def lasting(inside: str, option: str) -> tuple[str, str]:
    """What becomes of an option that is printed last, and all comments."""
    text = definition_of(inside, f"{LINE.replace('-rtc base=utc', '')} {option}")
    return cmdline.qemu_argv(read(text))[-1], text.replace("\n  # ", " ")


@pytest.mark.parametrize(
    ("clock", "printed", "base"),
    [
        ("offset='variable'", NOW, "utc"),
        ("offset='variable' basis='localtime' adjustment='0'", NOW, "localtime"),
        ("offset='variable' basis='utc' adjustment='-3600'", NOW, "utc"),
        ("offset='utc' adjustment='60'", NOW, "utc"),
        ("offset='localtime' adjustment='5'", NOW, "localtime"),
        ("offset='timezone' timezone='Asia/Tokyo' adjustment='5'", NOW, "localtime"),
        ("offset='utc'", "utc", "utc"),
        ("offset='absolute' start='1000000000'", "2001-09-09T01:46:40", "2001-09-09T01:46:40"),
    ],
)
def test_the_clock_goes_on_between_two_starts(clock: str, printed: str, base: str) -> None:
    found, text = lasting(f"<clock {clock}/>", f"-rtc base={printed},clock=vm")
    assert found == f"base={base},clock=vm"
    ahead = "adjustment" in clock and "'0'" not in clock
    assert ("In libvirt this clock is another: adjustment=" in text) == ahead


@pytest.mark.parametrize(
    ("inside", "env"),
    [
        ("<clock offset='timezone' timezone='Europe/Berlin'/>", (("TZ", "Europe/Berlin"),)),
        (
            "<clock offset='timezone' timezone='Europe/Berlin'/>"
            "<qemu:commandline><qemu:env name='TZ' value='UTC'/></qemu:commandline>",
            (("TZ", "UTC"),),
        ),
        ("<clock offset='localtime'/>", ()),
        ("<devices><audio type='sdl' driver='pulseaudio'/></devices>", (("SDL_AUDIODRIVER", "pulseaudio"),)),
        ("<devices><audio type='alsa' driver='x'/></devices>", ()),
    ],
)
def test_what_libvirt_says_in_the_environment(inside: str, env: tuple[tuple[str, str], ...]) -> None:
    assert read(definition_of(inside)).env == env


def test_a_port_for_web_sockets_that_libvirt_would_choose() -> None:
    assert lasting("", "-vnc 0.0.0.0:0,websocket=-1")[0] == "0.0.0.0:0,websocket=on"
    assert lasting("", "-vnc 0.0.0.0:0,websocket=5800")[0] == "0.0.0.0:0,websocket=5800"


def test_vsock_is_opened_by_qemu() -> None:
    device = """-device '{{"driver":"vhost-vsock-pci","id":"v","guest-cid":{},"vhostfd":"-1","addr":"0x0"}}'"""
    found, text = lasting("", device.format(42))
    assert found == "vhost-vsock-pci,id=v,guest-cid=42,addr=0x0"
    assert "you must be allowed to write to it" in text
    assert "no other VM may have this guest-cid" not in text
    found, text = lasting("", device.format(0))
    assert found == "vhost-vsock-pci,id=v,guest-cid=3,addr=0x0"
    assert "no other VM may have this guest-cid" in text
