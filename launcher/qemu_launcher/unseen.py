"""An error that nobody would read, since there is no terminal, is shown on the desktop, if there is one.

Why it exists: a VM can be started from a menu, or by its user's systemd when he logs in. What went wrong is then in a
journal that he does not know of. dbus_next is imported here, by way of `desktop`, and only in this case.
"""

import os
from collections.abc import Mapping
from pathlib import Path

_STDIO = (0, 1, 2)


def show(vm: str, text: str, environ: Mapping[str, str]) -> None:
    """Show the whole message `text` about a VM, as for the terminal. Never fails, and takes two seconds at most."""
    address = _session_bus(environ)
    if address is None or any(os.isatty(fd) for fd in _STDIO):
        return
    try:
        from . import desktop  # noqa: PLC0415

        desktop.show_error(address, f"Virtual machine {vm}", text.strip())
    except Exception:  # noqa: BLE001  it is about an error already, and nobody is left to hear of a second one
        return


def _session_bus(environ: Mapping[str, str]) -> str | None:
    """Address of the session bus; None without one."""
    if given := environ.get("DBUS_SESSION_BUS_ADDRESS"):
        return None if given.startswith("disabled:") else given
    bus = Path(environ.get("XDG_RUNTIME_DIR") or "/nowhere") / "bus"
    # After `su` without a dash it is another user's, and not to be looked into.
    return f"unix:path={bus}" if os.access(bus, os.W_OK) else None
