"""What a VM may be called, and what its scope is called.

Why it exists: a VM's name becomes part of a unit's, so the helper has a rule for it. What is looked for by such a name,
in folders, among locks and in the cgroup tree, is told from everything else by the same rule.
"""

import re

VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")  # VM_NAME of the helper's contract
SCOPE = re.compile(rf"qemu-launcher-([0-9]+)-({VM_NAME.pattern})\.scope")  # uid, VM


def scope(uid: int, vm: str) -> str:
    """The unit in which the helper puts a VM of this user; without systemd, its cgroup."""
    return f"qemu-launcher-{uid}-{vm}.scope"
