"""What all tuning by the helper stands on: a session in which it takes a QEMU for ours, and the C library.

Pure, but that the C library is called.
"""

import errno
import os
import re
from collections.abc import Iterator

from .finding import Finding


def session_of(cgroup: str, uid: int, systemd: bool = True) -> Iterator[Finding]:
    """Whether the helper would find a QEMU of ours in a session of ours: it starts where we are, in `cgroup`.

    Without systemd that is one of elogind's, or the root group, or the one into which OpenRC 0.64 moves all of that.
    """
    own = f"/user.slice/user-{uid}.slice/"
    if not systemd:
        if not cgroup.startswith(own) and not re.fullmatch(r"(/(c?[0-9]+|rc\.init)(/.*)?)?", cgroup):
            text = f"you are in {cgroup}, which is no session of yours: the helper refuses what is started here"
            fix = "log in where PAM has elogind make a session (pam_elogind.so), or where no service of OpenRC's is"
            yield Finding("error", "session", text, fix)
    elif not cgroup:
        text = "you are in no cgroup of systemd's, or it is hidden (a container): the helper finds no session of yours"
        yield Finding(
            "error", "session", text, "run qemu-launcher on the host itself, in a login that systemd has made"
        )
    elif not cgroup.startswith(own):
        text = f"you are in {cgroup}, which is no session of yours: the helper refuses what is started here"
        fix = "log in as yourself (su and sudo keep the session), or name the service under services in helper.toml"
        yield Finding("warning" if cgroup.startswith("/system.slice/") else "error", "session", text, fix)


def c_library() -> Iterator[Finding]:
    """Whether it has the calls by which threads get their policies; musl's only say that they are not there."""
    try:
        os.sched_getscheduler(0)
    except OSError as err:
        if err.errno != errno.ENOSYS:
            return
        text = f"this host's C library cannot ask for a thread's policy ({err.strerror}), nor can the helper then"
        yield Finding("error", "libc", text, "use a host with glibc; musl has no scheduler calls")
