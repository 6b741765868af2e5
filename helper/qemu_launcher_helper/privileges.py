"""The three capabilities the helper holds, and the one way to use them: each by name, around one act.

python-prctl's only importer. Guarantees, after `drop()`: permitted and bounding sets hold at most the three; the
effective, inheritable and ambient sets are empty; no_new_privs is set; the process is not dumpable; descriptors and
memory are limited. So the helper is confined the same way on hosts where no systemd does it. capabilities(7).

What this does not do: a process with uid 0 can still ask systemd for anything over the bus. The real defence is that
little code parses little input.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RLIMIT_DATA, RLIMIT_NOFILE, setrlimit

import prctl

from .contract import Failed

# Names and numbers of linux/capability.h. sys_nice: scheduling of the caller's threads; with cgroup v1, moving the
# host's tasks between cpusets (security_task_setscheduler). sys_resource: prlimit(2) on the caller's
# process. sys_admin: one write, enabling a cpuset partition below a delegated scope.
KEPT = {"sys_nice": 23, "sys_resource": 24, "sys_admin": 21}


@contextmanager
def raised(name: str) -> Iterator[None]:
    """Hold capability `name`, one of KEPT, for the block, which must not await: the whole process has it meanwhile.

    Raises OSError where the process was started without that capability. It is dropped again whatever happens.
    """
    setattr(prctl.cap_effective, name, True)
    try:
        yield
    finally:
        setattr(prctl.cap_effective, name, False)


def drop() -> None:
    """Give up everything but the three, for good. Raises Failed or OSError where that is not possible."""
    # As LimitNOFILE= and MemoryMax= (bytes) of the helper's unit: select(2) takes descriptors below 1024 only.
    for which, most in (RLIMIT_NOFILE, 256), (RLIMIT_DATA, 128 << 20):
        setrlimit(which, (most, most))
    # The kernel's own number, not the library's: a newer kernel may have capabilities that python-prctl cannot name.
    for number in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        if number not in KEPT.values() and prctl.capbset_read(number):
            prctl.capbset_drop(number)
    others = [name for name in prctl.ALL_CAP_NAMES if name not in KEPT]
    everywhere_but_permitted = [prctl.CAP_EFFECTIVE, prctl.CAP_INHERITABLE]  # no inheritable one: no ambient one
    prctl.set_caps((others, prctl.CAP_PERMITTED, False), (prctl.ALL_CAP_NAMES, everywhere_but_permitted, False))
    prctl.set_no_new_privs(1)
    prctl.set_dumpable(0)
    # See what the kernel says: a capability that python-prctl cannot name has stayed.
    kept = sum(1 << number for number in KEPT.values())
    found = dict(re.findall(r"^(Cap\w+):\t(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE))
    if any(int(value, 16) & ~(kept if name in ("CapPrm", "CapBnd") else 0) for name, value in found.items()):
        raise Failed(f"More capabilities are left than should be, {found}: start the helper through its systemd unit")
