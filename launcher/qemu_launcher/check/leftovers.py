"""What an earlier attempt with isolcpus=, AllowedCPUs= or libvirt's hooks has left on the host.

Why it exists: it keeps CPUs from the host whether a VM runs or not, or fights with a shield, and no error says so.
Pure judgement over a Tree. Nothing here keeps a VM from starting.
"""

import re
from collections.abc import Iterator

from ..cpulist import format_cpulist, named
from .finding import Finding
from .tree import Tree, cpus_in

Cpus = frozenset[int]

_LIBVIRT_HOOKS = "/etc/libvirt/hooks"
# systemd.unit(5), "Unit File Load Path", as far as an administrator, or systemctl set-property, writes there.
_UNIT_FOLDERS = (
    "/etc/systemd/system",
    "/etc/systemd/system.control",
    "/run/systemd/system",
    "/run/systemd/system.control",
)
_WHOLE_HOST = ("init.scope.d", "system.slice.d", "user.slice.d")


def settings(tree: Tree, pinned: Cpus, mechanism: str | None) -> Iterator[Finding]:
    """Settings of the host that were made for the same purpose by other means.

    `pinned`: CPUs of this VM; empty for the host as such. `mechanism`: how the helper shields; the masks that it sets
    itself, to shield without partitions, are none of these.
    """
    yield from _kernel_arguments(tree, pinned)
    online, said = cpus_in(tree.text("/sys/devices/system/cpu/online")), set[str]()
    for folder in _UNIT_FOLDERS:
        for unit in _WHOLE_HOST:
            for file in tree.names(f"{folder}/{unit}"):
                path = f"{folder}/{unit}/{file}"
                value = _allowed_cpus(tree.text(path) or "") if file.endswith(".conf") else ""
                if value:
                    said.add(unit)
                if value and not (online and online <= cpus_in(re.sub(r"[\s,]+", ",", value))):
                    yield _drop_in(tree, path, unit.removesuffix(".d"), value)
    if mechanism != "pool" and online:
        yield from _masks(tree, online, said)
    for path in _hooks(tree):
        words = sorted(set(re.findall(r"AllowedCPUs|\bcset\b|cpuset", tree.text(path) or "")))
        if words:
            yield Finding(
                "warning",
                "libvirt",
                f"the libvirt hook {path} moves the host's tasks between CPUs too ({', '.join(words)})",
                "take that out of it, or do not run libvirt's VMs beside these",
            )


def _kernel_arguments(tree: Tree, pinned: Cpus) -> Iterator[Finding]:
    words = (tree.text("/proc/cmdline") or "").split()
    for word, cpus in isolcpus(tree):
        idle = cpus - pinned
        what = f"the kernel was started with {word}: "
        if pinned and not idle:
            yield Finding("note", "isolcpus", f"{what}{named(cpus)} stay empty also while the VM is off")
        elif idle:
            text = f"{what}nothing of the host runs on {named(idle)} by itself, VM or not"
            fix = "take it off the kernel command line: a shield does the same, and only while a VM has it"
            yield Finding("warning", "isolcpus", text, fix)
    for word in words:
        name, _, value = word.partition("=")
        if name == "nohz_full" and pinned and (rest := pinned - cpus_in(value)):
            text = f"{word} leaves out {named(rest)}, where the timer ticks on"
            yield Finding("note", "nohz_full", text, "add them, or leave nohz_full away: a shield works without it")


def isolcpus(tree: Tree) -> Iterator[tuple[str, Cpus]]:
    """isolcpus=[flags,]list with what it names: Documentation/admin-guide/kernel-parameters.txt."""
    for word in (tree.text("/proc/cmdline") or "").split():
        name, _, value = word.partition("=")
        if name == "isolcpus":
            cpus = cpus_in(",".join(part for part in value.split(",") if not part[:1].isalpha()))
            if cpus:
                yield word, cpus


def _masks(tree: Tree, online: Cpus, said: set[str]) -> Iterator[Finding]:
    """What keeps a part of the host on some CPUs by no word of systemd's; `said`: where there is one."""
    for unit in (one.removesuffix(".d") for one in _WHOLE_HOST if one not in said):
        path = f"/sys/fs/cgroup/{unit}/cpuset.cpus"
        cpus = cpus_in(tree.text(path))
        if cpus and not online <= cpus:
            text = f"{unit} is kept on {named(cpus)} ({path}), though no AllowedCPUs= says so any more"
            fix = (
                "an empty AllowedCPUs= leaves the old mask in force: "
                f"sudo systemctl set-property --runtime {unit} AllowedCPUs={format_cpulist(online)}"
            )
            yield Finding("warning", "AllowedCPUs", text, fix)


def _drop_in(tree: Tree, path: str, unit: str, value: str) -> Finding:
    online = tree.text("/sys/devices/system/cpu/online") or "0-..."
    return Finding(
        "warning",
        "AllowedCPUs",
        f"{path} keeps {unit} on CPUs {value} (AllowedCPUs=), whether a VM runs or not",
        f"sudo rm {path}; sudo systemctl daemon-reload; and, since an empty value leaves the old one in force: "
        f"sudo systemctl set-property --runtime {unit} AllowedCPUs={online}",
    )


def _allowed_cpus(text: str) -> str:
    """The value that holds; systemd.syntax(7): an empty one resets."""
    value = ""
    for line in text.splitlines():
        name, equals, given = line.strip().partition("=")
        if equals and name.strip() == "AllowedCPUs":
            value = f"{value} {given.strip()}".strip() if given.strip() else ""
    return value


def _hooks(tree: Tree) -> Iterator[str]:
    """libvirt's hooks for QEMU, those of the usual dispatcher (qemu.d/VM/EVENT/STATE/*) among them."""
    yield f"{_LIBVIRT_HOOKS}/qemu"
    pending = [f"{_LIBVIRT_HOOKS}/qemu.d"]
    for _ in range(1000):  # a bound for links in circles
        if not pending:
            return
        folder = pending.pop()
        for name in tree.names(folder):
            path = f"{folder}/{name}"
            if tree.is_directory(path):
                pending.append(path)
            else:
                yield path
