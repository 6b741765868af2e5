"""CPUs that other cpusets of the host name: those of containers, of libvirt's guests, of units with AllowedCPUs=.

Why it exists: a container that was given a CPU of its own keeps it only until a shield takes that CPU, and nobody
tells either side; with a cpuset that is a partition, or beside the VM's slice, the kernel refuses the shield. Both are
seen beforehand in the cgroup tree, which everybody may read.
Kernel: Documentation/admin-guide/cgroup-v2.rst, "Cpuset Interface Files". Without cgroup v2 nothing is found.
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from ..cpulist import format_cpulist, named
from ..definition import VmDefinition
from .finding import Finding
from .tree import Tree, cpus_in

Cpus = frozenset[int]

ROOT = "/sys/fs/cgroup"
_MOST = 5000  # cgroups that are looked at; a host with hundreds of containers has fewer
_MOST_TOLD = 8
# The whole host's: what is said of their AllowedCPUs= is said elsewhere.
_WHOLE_HOST = ("/init.scope", "/system.slice", "/user.slice")
_OUR_SLICE = "/qemu.slice"  # where the helper shields without partitions
_USERS = re.compile(r"/user\.slice/user-[0-9]+\.slice")
_OURS = re.compile(r"/qemu-launcher-[0-9]+-[^/]+\.scope$")
# Names of cgroups, with what made them: docker's and podman's two drivers, LXC, libvirt (a systemd scope).
_CONTAINERS = re.compile(r"/(?:(docker|libpod)[-/]|(?:crio-|cri-containerd-))([0-9a-f]{64})(?:\.scope)?(?=/|$)")
_LXC = re.compile(r"/lxc(?:\.payload\.|/)([^/]+)")
_LIBVIRT = re.compile(r"/machine-qemu-[0-9]+-([^/]+)\.scope(?=/|$)")
_PROGRAMS = {"docker": "docker", "libpod": "podman"}


class Holder(NamedTuple):
    """Who has named CPUs for itself, in words, and how its owner gives it others; `{}` stands for these."""

    name: str
    fix: str


def others(definition: VmDefinition, wanted: Cpus, online: Cpus, uid: int, tree: Tree) -> Iterator[Finding]:
    """Cpusets of somebody else's that name CPUs of `wanted`: those of the vCPUs, with a shield in whole cores."""
    shield = definition.isolation == "shield"
    # Whose siblings must be left a CPU of those that they name: validate_change in kernel/cgroup/cpuset.c.
    levels = ("", "/user.slice", f"/user.slice/user-{uid}.slice")
    kept: dict[Holder, Cpus] = {}
    partitions: dict[Holder, Cpus] = {}
    bereft: dict[Holder, Cpus] = {}
    for path, cpus, kind in _cpusets(tree):
        if not cpus & wanted or path in levels:
            continue
        if kind == "partition":
            known = partitions
        elif shield and cpus <= wanted and path.rpartition("/")[0] in levels:
            known = bereft
        elif kind == "in use" and path not in _WHOLE_HOST and not _USERS.fullmatch(path):
            known = kept
        else:
            continue
        known[_holder(path)] = known.get(_holder(path), frozenset()) | cpus
    free = format_cpulist(online - wanted) or "other CPUs"
    for holder, cpus in partitions.items():
        text = f"{holder.name} has {named(cpus)} for itself (cpuset.cpus.partition)"
        yield Finding("error", "cpuset", text, f"use other CPUs for the VM; or {holder.fix.replace('{}', free)}")
    for holder, cpus in bereft.items():
        text = (
            f"{holder.name} may use nothing but {named(cpus)} (cpuset.cpus): "
            "the kernel refuses a shield that leaves it none"
        )
        yield Finding("error", "cpuset", text, f"use other CPUs for the VM; or {holder.fix.replace('{}', free)}")
    for holder, cpus in list(kept.items())[:_MOST_TOLD]:
        text = f"{holder.name} is kept on {named(cpus)} (cpuset.cpus)"
        if shield:
            where = f"on {format_cpulist(cpus - wanted)} only" if cpus - wanted else "wherever there is room"
            fix = f"give it others, or use others for the VM: {holder.fix.replace('{}', free)}"
            yield Finding("warning", "cpuset", f"{text}: while this VM runs, it runs {where}", fix)
        else:
            yield Finding("note", "cpuset", f"{text}, and shares them with this VM")
    if len(kept) > _MOST_TOLD:
        yield Finding("note", "cpuset", f"and {len(kept) - _MOST_TOLD} more cpusets name CPUs of this VM")


def own(definition: VmDefinition, unshielded: Cpus, uid: int, tree: Tree) -> Iterator[Finding]:
    """Whether the slices above the VM let its threads run where they are pinned; a shield is above that."""
    for path in ("/user.slice", f"/user.slice/user-{uid}.slice"):
        allowed = cpus_in(tree.text(f"{ROOT}{path}/cpuset.cpus"))
        if allowed and (outside := unshielded - allowed):
            name = path.rpartition("/")[2]
            whose = "its threads" if definition.isolation != "shield" else "its threads besides the vCPUs"
            text = (
                f"{name} may only use {named(allowed)} (AllowedCPUs=), and {whose} are pinned to "
                f"{format_cpulist(outside)}"
            )
            everything = format_cpulist(allowed | unshielded)
            fix = f"use others; or sudo systemctl set-property {name} AllowedCPUs={everything}"
            yield Finding("error", "AllowedCPUs", text, fix)


def _cpusets(tree: Tree) -> Iterator[tuple[str, Cpus, Literal["partition", "in use", "empty"]]]:
    """(Path below the root, CPUs) of all cgroups that name CPUs; nothing below a partition, or below one in use."""
    pending = [f"/{name}" for name in tree.names(ROOT)]
    for _ in range(_MOST):
        if not pending:
            return
        path = pending.pop(0)
        folder = f"{ROOT}{path}"
        if path == _OUR_SLICE or _OURS.search(path) or not tree.is_directory(folder):
            continue
        if tree.text(f"{folder}/cpuset.cpus.partition") in ("isolated", "root"):
            yield path, cpus_in(tree.text(f"{folder}/cpuset.cpus.effective")), "partition"
            continue
        if cpus := cpus_in(tree.text(f"{folder}/cpuset.cpus")):
            is_used = "populated 1" in (tree.text(f"{folder}/cgroup.events") or "").splitlines()
            yield path, cpus, "in use" if is_used else "empty"
            if path not in _WHOLE_HOST and not _USERS.fullmatch(path):
                continue
        pending += [f"{path}/{name}" for name in tree.names(folder)]


def _holder(path: str) -> Holder:
    plain = re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), path)  # systemd.unit(5), escaping
    if found := _CONTAINERS.search(plain):
        program, short = _PROGRAMS.get(found[1] or "", ""), found[2][:12]
        fix = f"{program} update --cpuset-cpus {{}} {short}" if program else "give the container other CPUs"
        return Holder(f"the {program or 'CRI'} container {short}", fix)
    if found := _LXC.search(plain):
        return Holder(f"the LXC container {found[1]}", "lxc.cgroup2.cpuset.cpus = {} in its configuration")
    if found := _LIBVIRT.search(plain):
        return Holder(f"libvirt's VM {found[1]}", f"virsh vcpupin {found[1]} shows and changes where it runs")
    unit = path.rpartition("/")[2]
    if unit.endswith((".service", ".scope", ".slice")):
        return Holder(f"the unit {unit}", f"sudo systemctl set-property {unit} AllowedCPUs={{}}")
    return Holder(f"the cgroup {path}", f"echo {{}} | sudo tee {ROOT}{path}/cpuset.cpus")
