"""Variables that QEMU's windows and audio find their servers by.

Why it exists: with `clear_env: true` QEMU starts without any, and says that PipeWire refused a connection. The same
happens to a definition that works on the desktop when it is started through ssh(1) or by root for another user.
Pure, over a Tree: takes the environment that QEMU would get, and ours to take values from.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ..definition import VmDefinition
from . import asked
from .finding import Finding, Severity
from .tree import WRITE, Tree

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
_NO_WINDOW = "or, for no window, add - display: none, - nographic or - vnc: localhost:0 to the section qemu"


def default_server(tree: Tree, env: Mapping[str, str]) -> str | None:
    """The Wayland server that is found without a variable that names it (libwayland's connect_to_socket)."""
    path = f"{env.get('XDG_RUNTIME_DIR')}/wayland-0"
    return path if path.startswith("/") and "WAYLAND_DISPLAY" not in env and tree.may(path, WRITE) else None


def variables(
    definition: VmDefinition, env: Mapping[str, str], ours: Mapping[str, str], server: str | None, *, certain: bool
) -> Iterator[Finding]:
    """`env`: what QEMU would get; `ours`: what we have; `server`: its default_server.

    Not `certain`: what is executed as QEMU might set more of them.
    """
    wanted: list[tuple[str, str, Severity]] = [(kind, "display", "error") for kind in asked.displays(definition)]
    # A PulseAudio server that the option names needs no variable to be found.
    wanted += [(found["driver"], "audio", "warning") for found in asked.audio(definition) if "server" not in found]
    for kind, what, severity in dict.fromkeys(wanted):
        ways = _NEEDS.get(kind)
        if ways is None or (what == "display") != (ways is _WINDOW or kind == "dbus"):
            continue
        lacking = _lacking(ways, env)
        if not all(lacking):
            yield Finding("ok", what, f"{what} {kind} finds its server ({', '.join(ways[lacking.index([])])})")
            continue
        if ways is _WINDOW and _finds(kind, server, env):
            yield Finding("ok", what, f"{what} {kind} finds its server ({server})")
            continue
        text = f"{what} {kind} needs {_none_of(definition, ways)}"
        doubtful = not certain or (kind == "gtk" and _gtk_is_told_elsewhere(env))
        yield Finding("warning" if doubtful else severity, what, text, _fix(definition, lacking, ours))


def window(
    definition: VmDefinition,
    env: Mapping[str, str],
    ours: Mapping[str, str],
    kind: Callable[[], str | None],
    server: str | None,
    *,
    certain: bool,
) -> Iterator[Finding]:
    """The window that QEMU opens by itself. `kind`: which that is, as QEMU says; not `certain`: it might do without.

    So might SDL, which can draw without a desktop. `server`: the default_server.
    """
    lacking = _lacking(_WINDOW, env)
    if not all(lacking) or not asked.leaves_display_open(definition):
        return
    if (name := kind()) is not None and not _finds(name, server, env):
        text = f"no option names a display, and QEMU's own choice, {name}, needs {_none_of(definition, _WINDOW)}"
        fix = f"{_fix(definition, lacking, ours)}\n{_NO_WINDOW}"
        certain = certain and name == "gtk" and not _gtk_is_told_elsewhere(env)
        yield Finding("error" if certain else "warning", "display", text, fix)


def _finds(kind: str, server: str | None, env: Mapping[str, str]) -> bool:
    """Whether GTK or SDL would come to the default server. SDL asks first what session it is in."""
    return server is not None and (kind == "gtk" or env.get("XDG_SESSION_TYPE", "wayland").lower() == "wayland")


def _gtk_is_told_elsewhere(env: Mapping[str, str]) -> bool:
    """Whether it may look for a server that is neither X's nor in XDG_RUNTIME_DIR."""
    return any(map(env.get, ("GDK_BACKEND", "WAYLAND_SOCKET"))) or env.get("WAYLAND_DISPLAY", "").startswith("/")


def _lacking(ways: Iterable[Sequence[str]], env: Mapping[str, str]) -> list[list[str]]:
    """What each way has no value for."""
    return [[name for name in way if not env.get(name)] for way in ways]


def _none_of(definition: VmDefinition, ways: Iterable[Sequence[str]]) -> str:
    names = " or ".join(" and ".join(way) for way in ways)
    because = "(clear_env: true)" if definition.clear_env else "in this login"
    return f"{names}, and QEMU would have none of them {because}"


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
