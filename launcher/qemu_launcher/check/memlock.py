"""How much memory this user may lock without the helper, and what his other VMs leave of it. Pure, over a Tree."""

import re
from collections.abc import Iterable, Iterator

from .. import locking, ram
from ..definition import VmDefinition
from ..hostdevices import pinned_by
from ..plan import MEMLOCK_OVERHEAD, MemlockNeed
from ..sizes import INFINITY, format_limit, format_size
from .finding import Finding
from .tree import Tree


def limit_for(need: MemlockNeed | None, soft: int, hard: int) -> int | None:
    """RLIMIT_MEMLOCK that a start would give QEMU, in bytes; None for what the helper has left.

    `soft` and `hard` are this login's.
    """
    if need is None:
        return soft
    if need.unaided:
        return min(need.wanted, hard)
    return None if need.wanted == INFINITY else need.wanted


def own(definition: VmDefinition, need: MemlockNeed | None, soft: int, hard: int) -> Iterator[Finding]:
    """What this user may lock without the helper: RLIMIT_MEMLOCK of this login, in bytes."""
    options = definition.options
    locked = locking.lockable(options)
    if need is not None and need.unaided:
        text = f"{format_limit(hard, 'all memory')} may be locked in this login, without the helper"
        yield Finding("ok", "memlock", text)
    elif need is None and locked is not None and soft < locked:
        if locking.is_locked_twice(options):
            locks = "VFIO and mem-lock=on each lock the guest's RAM, together"
        elif (who := pinned_by(options)) or locking.has_mem_lock(options):
            several = " more than once, together" if locked > (ram.guest_ram(options) or 0) else ","
            locks = f"{who or 'mem-lock=on'} locks the guest's RAM{several}"
        else:
            return
        text = f"{locks} {format_size(locked)}, and QEMU may lock {format_limit(soft, 'all memory')}"
        yield Finding("error", "memlock", text, "leave out rlimit_memlock, or write rlimit_memlock: auto")


def pinned_together(
    tree: Tree, size: int | None, limit: int | None, others: Iterable[tuple[str, int]]
) -> Iterator[Finding]:
    """Whether a VM with iommufd= has room beside the user's `others`, which are (name, PID of QEMU).

    The limit is each process's own, and what is compared with it is the user's (incr_user_locked_vm in
    drivers/iommu/iommufd/pages.c of Linux). Bytes: `size` of the guest's RAM, None if it cannot be told; `limit`, None
    for what the helper has left.
    """
    held = {name: pinned for name, pid in others if (pinned := _pinned_by_iommufd(tree, pid))}
    total = sum(held.values()) + (size or 0)
    if not held or limit == INFINITY or (size is not None and limit is not None and total <= limit):
        return
    names = " and ".join(held)
    has = "has" if len(held) == 1 else "have"
    text = (
        f"with iommufd= the kernel counts all VMs of yours together: {names} {has} pinned "
        f"{format_size(sum(held.values()))}, this guest's RAM "
        f"{'comes to that' if size is None else f'is {format_size(size)}'}, and QEMU may lock "
        f"{'what the helper has left' if limit is None else format_size(limit)}"
    )
    enough = "true" if size is None else f"{-(-(total + MEMLOCK_OVERHEAD) >> 30)}G"
    fix = (
        "leave out iommufd=: then each counts for itself\n"
        f"or write rlimit_memlock: {enough}, and have the administrator's memlock allow it beside theirs"
    )
    yield Finding("warning", "memlock", text, fix)


def _pinned_by_iommufd(tree: Tree, pid: int) -> int:
    if "iommufd" not in (tree.text(f"/proc/{pid}/cmdline") or ""):
        return 0
    found = re.search(r"^VmPin:\s+([0-9]+) kB", tree.text(f"/proc/{pid}/status") or "", re.MULTILINE)
    return int(found[1]) << 10 if found else 0
