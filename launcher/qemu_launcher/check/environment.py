"""Variables that QEMU's windows and audio find their servers by.

Why it exists: with `clear_env: true` QEMU starts without any, and says that PipeWire refused a connection. The same
happens to a definition that works on the desktop when it is started through ssh(1) or by root for another user.
Pure: takes the environment that QEMU would get, and ours to take values from.
"""

import shlex
from collections.abc import Iterator, Mapping

from ..definition import VmDefinition
from . import asked
from .finding import Finding

# Any one of the sets is enough.
_WINDOW = (("WAYLAND_DISPLAY", "XDG_RUNTIME_DIR"), ("DISPLAY",))
_NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gtk": _WINDOW,
    "sdl": _WINDOW,
    "pipewire": (("XDG_RUNTIME_DIR",), ("PIPEWIRE_RUNTIME_DIR",), ("PIPEWIRE_REMOTE",)),
    "pa": (("XDG_RUNTIME_DIR",), ("PULSE_SERVER",), ("PULSE_RUNTIME_PATH",)),
    "dbus": (("DBUS_SESSION_BUS_ADDRESS",), ("XDG_RUNTIME_DIR",)),
}
# Not needed to find the server, but to be let in.
_ALSO = {"DISPLAY": ("XAUTHORITY",)}


def variables(definition: VmDefinition, env: Mapping[str, str], ours: Mapping[str, str]) -> Iterator[Finding]:
    """`env`: what QEMU would get; `ours`: what we have."""
    wanted = [(kind, "display", "error") for kind in asked.displays(definition)]
    # A PulseAudio server that the option names needs no variable to be found.
    wanted += [(found["driver"], "audio", "warning") for found in asked.audio(definition) if "server" not in found]
    for kind, what, severity in dict.fromkeys(wanted):
        ways = _NEEDS.get(kind)
        if ways is None or (what == "display") != (ways is _WINDOW or kind == "dbus"):
            continue
        lacking = [[name for name in way if not env.get(name)] for way in ways]
        if not all(lacking):
            yield Finding("ok", what, f"{what} {kind} finds its server ({', '.join(ways[lacking.index([])])})")
            continue
        names = " or ".join(" and ".join(way) for way in ways)
        because = " (clear_env: true)" if definition.clear_env else " in this login"
        yield Finding(
            "error" if severity == "error" else "warning",
            what,
            f"{what} {kind} needs {names}, and QEMU would have none of them{because}",
            _fix(definition, lacking, ours),
        )


def _fix(definition: VmDefinition, lacking: list[list[str]], ours: Mapping[str, str]) -> str:
    """The first way that our own environment has."""
    for way in lacking:
        if all(ours.get(name) for name in way):
            names = [*way, *(also for name in way for also in _ALSO.get(name, ()) if ours.get(also))]
            pairs = ", ".join(f"{name}: {shlex.quote(ours[name])}" for name in names)
            return f"write env: {{{pairs}}}" + (", or clear_env: false" if definition.clear_env else "")
    if definition.clear_env:
        return f"write clear_env: false, or env: with {' and '.join(lacking[0])}"
    return "start it from the desktop, or write env: with the values it has there"
