"""A question for a password on the user's terminal: polkit's text agent, for the time of one call.

Why it exists: polkit asks a person through an agent. A desktop session has one; a text console or an ssh login has
none, and there polkit says no without a question. So a command that may need a password starts pkttyagent(1) as
systemctl(1) does (polkit_agent_open in systemd's src/shared/polkit-agent.c): it serves this process alone, and with
--fallback only if the session has no agent of its own.

Never started for root, whom polkit never asks; nor without a terminal in which we are in the foreground, where it could
only be stopped by SIGTTIN. Without pkttyagent everything goes on as if it had been there and nobody had answered. It is
gone when the context ends, however it ends, and with us when we are killed.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator

from . import patience, procfs, terminal

PROGRAM = "pkttyagent"

_ROOT = 0
# It connects to the bus and calls polkitd once. One that hangs must not keep us from asking without it.
_REGISTRATION = 25.0  # seconds
_GRACE = 2.0  # seconds; SIGTERM ends it at once, after it has restored the terminal


def somebody_is_there() -> bool:
    """Whether a person could answer, by whatever agent."""
    return os.isatty(0) or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def is_possible() -> bool:
    """Whether the text agent could ask the person in front of our terminal."""
    return os.geteuid() != _ROOT and terminal.is_in_foreground()


@contextlib.asynccontextmanager
async def registered() -> AsyncIterator[None]:
    """The agent, registered with polkit for this process; or nothing, if it cannot be started."""
    with contextlib.ExitStack() as stack:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, reading)
        try:
            process = _started(writing)
        except OSError:
            process = None
        finally:
            os.close(writing)  # ours: the agent has its own, and closes it when it is registered, or ends
        if process is not None:
            stack.callback(_end, process)
            await patience.readable(reading, _REGISTRATION)  # it has closed it then, or hangs
        yield


def _started(notify: int) -> "subprocess.Popen[bytes]":
    import prctl  # noqa: PLC0415  only who is asked pays for it

    def with_us() -> None:
        prctl.set_pdeathsig(signal.SIGTERM)

    # It talks to /dev/tty, not to the standard streams, which may be a pipe of the user's.
    return subprocess.Popen(
        [PROGRAM, "--notify-fd", str(notify), "--fallback"],
        pass_fds=(notify,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=with_us,  # noqa: PLW1509  there are no threads (process.forked sees to it)
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    # Not awaited: it takes no time, and must be done even while we are being cancelled.
    fd = os.pidfd_open(process.pid)
    try:
        for number in (signal.SIGTERM, signal.SIGCONT):  # the second for one that Ctrl-Z has stopped
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
        if not procfs.wait_readable(fd, _GRACE):
            process.kill()
        process.wait()
    finally:
        os.close(fd)
