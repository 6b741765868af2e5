"""How much a disk may do, libvirt's <iotune>: QEMU's throttle filter in front of it.

libvirt sets this by QMP when QEMU runs, so virsh prints nothing of it. The filter stands where the device takes its
disk, above all else, and counts what the guest does, as with libvirt. Disks with one <group_name> share one object and
so one budget; that they ask for the same, virsh has seen to. Pure.
"""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..options import Property
from .domainplaces import attribute, disk_ids
from .domainxml import number
from .drafting import Option
from .members import member, with_member

_MOST = (1 << 64) - 1  # libvirt's unsignedLong; QEMU has 10^15, and virsh knows
_LIMITS = {  # QEMU's ThrottleLimits, by libvirt's element
    f"{what}_{unit}_sec{end}": f"{short}-{what}{end.replace('_', '-')}"
    for unit, short in (("bytes", "bps"), ("iops", "iops"))
    for what in ("total", "read", "write")
    for end in ("", "_max", "_max_length")
} | {"size_iops_sec": "iops-size"}
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_TARGET = re.compile("[a-z]{1,16}")  # vda; and QEMU's names of nodes are short


class _Budget(NamedTuple):
    """A throttle-group of QEMU's, and how the filter of this disk is called."""

    ident: str
    limits: dict[str, int]
    node: str
    is_read_only: bool  # by the XML; a cdrom's node says it too


def throttled(options: Sequence[Option], root: ET.Element) -> tuple[list[Option], list[str]]:
    """The same options with the filters; and for which disks there can be none. DefinitionError for wrong numbers."""
    devices = ((at, option) for at, option in enumerate(options) if option.bare_name == "device")
    places = {ident: at for at, option in devices if (ident := member(option, "id"))}
    disks = root.findall("devices/disk[iotune]")
    budgets: dict[int, _Budget] = {}
    lost = [] if any(map(_is_filter, options)) else list(_shown_by_a_newer_virsh(root))
    for disk, budget in zip(disks, _budgets(disks), strict=True):
        at = next((places[ident] for ident in disk_ids(disk) if ident in places), None)
        # An empty drive has no filter, and what a lun's guest asks of the host's device does not go through one.
        if at is None or budget is None or not member(options[at], "drive") or disk.get("device") == "lun":
            lost.append(_named("iotune", disk))
        else:
            budgets[at] = budget
    return list(_with_filters(options, budgets)), lost


def _with_filters(options: Sequence[Option], budgets: dict[int, _Budget]) -> Iterator[Option]:
    made: set[str] = set()
    nodes = [option for option in options if option.bare_name == "blockdev" and member(option, "read-only") == "on"]
    read_only = {member(option, "node-name") for option in nodes}
    for at, option in enumerate(options):
        budget = budgets.get(at)
        if budget is None:
            yield option
            continue
        if budget.ident not in made:
            yield _group(budget)
        made.add(budget.ident)
        drive = member(option, "drive") or ""
        yield _filter(budget, drive, is_read_only=budget.is_read_only or drive in read_only)
        yield with_member(option, "drive", budget.node)


def _is_filter(option: Option) -> bool:
    return option.bare_name == "blockdev" and isinstance(option.value, tuple) and option.value[0] == "throttle"


def _shown_by_a_newer_virsh(root: ET.Element) -> Iterator[str]:
    """libvirt 11.2 has another way, several groups for a disk, and puts that on the command line itself."""
    yield from (_named("throttlefilters", disk) for disk in root.iterfind("devices/disk[throttlefilters]"))


def _named(what: str, disk: ET.Element) -> str:
    return f"{what} of {_target(disk) or 'a disk'}"


def _target(disk: ET.Element) -> str:
    name = attribute(disk, "target", "dev")
    return name if _TARGET.fullmatch(name) else ""


def _budgets(disks: Sequence[ET.Element]) -> Iterator[_Budget | None]:
    others: dict[str, int] = {}  # groups with names that QEMU has not, or that these get: .1
    shared: dict[str, dict[str, int]] = {}  # a member may have nothing but the name
    for disk in disks:
        shared[_group_name(disk)] = shared.get(_group_name(disk)) or _limits(disk)
    for disk in disks:
        name, group = _target(disk), _group_name(disk)
        limits = shared[group] if group else _limits(disk)
        if group and not _NAME.fullmatch(group):
            group = f".{others.setdefault(group, len(others) + 1)}"
        ident = f"throttle-group-{group}" if group else f"throttle-{name}"
        yield _Budget(ident, limits, f"throttled-{name}", disk.find("readonly") is not None) if name else None


def _group_name(disk: ET.Element) -> str:
    return (disk.findtext("iotune/group_name") or "").strip()


def _limits(disk: ET.Element) -> dict[str, int]:
    """0 is no limit; and no length, which is one second."""
    given = ((_LIMITS.get(str(part.tag)), part) for part in disk.iterfind("iotune/*"))
    found = {name: number(part.text, str(part.tag), 0, _MOST) for name, part in given if name}
    return {name: value for name, value in found.items() if value}


def _group(budget: _Budget) -> Option:
    """In JSON: without it the limits have names only that QEMU calls unstable."""
    limits = {"limits": budget.limits} if budget.limits else {}
    return Option("object", json.dumps({"qom-type": "throttle-group", "id": budget.ident} | limits))


def _filter(budget: _Budget, drive: str, *, is_read_only: bool) -> Option:
    """What the guest frees goes through it, for the nodes below to decide. It may only be read if they may."""
    names = {"node-name": budget.node, "throttle-group": budget.ident, "file": drive, "discard": "unmap"}
    names |= {"read-only": "on"} if is_read_only else {}
    return Option("blockdev", ("throttle", *(Property(*pair) for pair in names.items())))
