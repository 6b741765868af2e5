"""What the service manager is told about the VM, where there is one that wants to know: sd_notify(3).

Why it exists: in a service of Type=notify "started" means that the guest runs, or stands still because its user wants
that, and not that a process exists. The manager's address is taken out of the environment, so that neither QEMU nor
what it starts can speak for us.

Nothing here fails: a manager that cannot be reached is one that is told nothing. Telling waits for a busy one, but not
long. How long the guest may take to power down is the definition's to say, so the manager is asked for that much time;
TimeoutStopSec= of the unit then only bounds a launcher that hangs.
"""

import contextlib
import socket
from collections.abc import MutableMapping

from .errors import printable

VARIABLE = "NOTIFY_SOCKET"
# systemd reads its socket in its main loop, which a large `daemon-reload` keeps busy for this long at worst.
_LONGEST_WAIT = 2.0  # seconds
_NO_LIMIT = 365 * 24 * 3600.0  # seconds; systemd ignores an extension by "infinity"


class Manager:
    """Who started us as a service; nobody, if that was no service manager."""

    def __init__(self, address: str | None = None) -> None:
        self._socket: socket.socket | None = None
        if address is None or address[:1] not in ("/", "@"):  # there is also vsock:, which is for whole machines
            return
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            manager.settimeout(_LONGEST_WAIT)
            # Now, since what we may reach can change with the user that we become.
            manager.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        except OSError:
            manager.close()
        else:
            self._socket = manager

    @classmethod
    def taken(cls, environ: MutableMapping[str, str]) -> "Manager":
        """The manager that `environ` names. Removes the variable from `environ`."""
        return cls(environ.pop(VARIABLE, None))

    def status(self, text: str) -> None:
        """What we are about; a person reads it in `systemctl status`."""
        self._tell(_status(text))

    def ready(self, text: str) -> None:
        """The guest is where its user wants it."""
        self._tell("READY=1", _status(text))

    def stopping(self, text: str, seconds: float | None) -> None:
        """The end is under way, and may take `seconds`; None: as long as it takes."""
        extension = round((_NO_LIMIT if seconds is None else seconds) * 1_000_000)
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={extension}", _status(text))

    def _tell(self, *assignments: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send("\n".join(assignments).encode(errors="backslashreplace"))


def _status(text: str) -> str:
    return f"STATUS={printable(' '.join(text.split()))}"
