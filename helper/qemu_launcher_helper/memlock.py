"""How much memory a user's VMs may lock: pure arithmetic, and the one act.

rlimits are per process and inherited, so this bounds each QEMU, and by the records the sum of what was granted;
children that QEMU forks are bounded only by MemoryMax= on the user's slice (qemu-launcher-helper(8) says so).
"""

import os
import resource
from collections.abc import Collection

from . import scheduling
from .contract import INFINITY
from .errors import LimitExceeded
from .limits import Limits
from .records import Record
from .target import Target

# What always stays unlockable for the host, all users together.
HOST_BYTES = 2 << 30
HOST_SHARE = 10  # percent of MemTotal


def host_bytes() -> int:
    """Return MemTotal less what the host keeps, in bytes (sysconf(3))."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, total - max(HOST_BYTES, total * HOST_SHARE // 100))


def grant(asked: int, own: Record, limits: Limits, records: Collection[Record], lockable: int) -> int:
    """Return how many of the `asked` bytes the VM `own` may lock; INFINITY only where the administrator wrote it.

    LimitExceeded when nothing is left. `lockable`: host_bytes().
    """
    if limits.memlock == INFINITY:
        return asked
    others = [record for record in records if record.key != own.key]
    held = sum(record.memlock for record in others if record.uid == own.uid)
    left_on_host = lockable - sum(min(record.memlock, lockable) for record in others)
    left = left_on_host if limits.memlock is None else min(left_on_host, limits.memlock - held)
    if left <= 0:
        rule = f"{limits.memlock} bytes ({limits.source})" if limits.memlock is not None else f"{lockable} on this host"
        raise LimitExceeded(f"no memory is left to lock: your VMs hold {held} bytes of {rule}")
    return min(asked, left)


def raise_limit(target: Target, granted: int) -> None:
    """Raise the target's RLIMIT_MEMLOCK to `granted` bytes; a hard limit that is higher already stays."""
    wanted = resource.RLIM_INFINITY if granted == INFINITY else granted
    _, hard = scheduling.read_rlimit(target, resource.RLIMIT_MEMLOCK)
    hard = resource.RLIM_INFINITY if resource.RLIM_INFINITY in (wanted, hard) else max(wanted, hard)
    scheduling.set_rlimit(target, resource.RLIMIT_MEMLOCK, (wanted, hard))
