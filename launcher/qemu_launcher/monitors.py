"""The two QMP monitors that the launcher gives to QEMU, next to whatever monitors the user has.

    private   one end of a socketpair: the launcher's own; gone with the launcher, and QEMU does not mind
    control   a listening socket with a name, for `status`, `stop` and other programs; one client at a time

Both are made here and inherited as descriptors, so there is no path to wait for. They are described in one
configuration file in memory and passed as `-readconfig`, because any `-mon` or `-qmp` on the command line would take
away QEMU's default monitor (Ctrl-A c under -nographic).
"""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

PRIVATE, CONTROL = "qemu-launcher-private", "qemu-launcher-control"

# docs/config in QEMU's sources; the descriptor numbers are the only thing that varies.
_CONFIGURATION = """\
[chardev "{private_name}"]
  backend = "socket"
  fd = "{private}"

[mon "{private_name}"]
  chardev = "{private_name}"
  mode = "control"

[chardev "{control_name}"]
  backend = "socket"
  fd = "{control}"
  server = "on"
  wait = "off"

[mon "{control_name}"]
  chardev = "{control_name}"
  mode = "control"
"""


@dataclass(frozen=True, slots=True)
class Monitors:
    """`ours` is the launcher's end of the private monitor; QEMU inherits `inherited` and is given `arguments`."""

    ours: socket.socket
    inherited: tuple[int, ...]
    arguments: tuple[str, ...]


@contextmanager
def made(control: socket.socket) -> Iterator[Monitors]:
    """Both monitors, until the child is forked: then QEMU's ends are its own, and only `ours` stays open here."""
    with ExitStack() as stack:
        stack.enter_context(control)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.enter_context(theirs)
        configuration = os.memfd_create("qemu-launcher-monitors")
        stack.callback(os.close, configuration)
        text = _CONFIGURATION.format(
            private_name=PRIVATE, private=theirs.fileno(), control_name=CONTROL, control=control.fileno()
        )
        os.write(configuration, text.encode("ascii"))
        try:
            yield Monitors(
                ours=ours,
                inherited=(theirs.fileno(), control.fileno(), configuration),
                arguments=("-readconfig", f"/dev/fd/{configuration}"),
            )
        except BaseException:
            ours.close()
            raise
