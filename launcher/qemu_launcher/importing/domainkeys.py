"""What libvirt's XML says about threads and memory, as keys of the launcher section. Pure.

libvirt pins and no more: other tasks may run on those CPUs too. A definition shields them unless it says otherwise; so
what cannot be had together with a shield is written as a suggestion, in a comment that says why.
"""

from collections.abc import Sequence

from .. import sizes
from ..cpulist import format_cpulist
from ..hostdevices import pinned_by
from ..keys import REALTIME_POLICIES
from ..locking import has_mem_lock
from ..options import QemuOption
from .command_line import memlock_key, suggested_pinning
from .domainxml import Tuning
from .drafting import Key

MOST_ON_A_LINE = 16  # vCPUs whose CPUs are written on one line

_SHIELDED = "In libvirt other tasks could run on these CPUs too. Here they cannot, unless isolation is cpuset."
_SHARED = "As in libvirt, the virtual CPUs share these CPUs, with each other and with other tasks."
_CLASH = "These are CPUs of the shield, which is for virtual CPUs alone: choose others, or isolation: cpuset."
_SOME_CLASH = "Behind # are CPUs of the shield, for virtual CPUs alone: choose others, or isolation: cpuset."
_NO_REAL_TIME = "Real time needs a shielded CPU for each virtual CPU, and each its own."
_OUTSIDE = "The helper refuses real time outside the shield, unless the administrator allows it (realtime = anywhere)."


def thread_keys(found: Tuning) -> list[Key]:
    pins = found.vcpu_pins
    ours = frozenset[int]().union(*pins.values())
    is_shared = sum(map(len, pins.values())) > len(ours)
    shield = frozenset[int]() if is_shared else ours
    keys = [_pinning(found, is_shared=is_shared)]
    if is_shared:
        keys.append(Key("isolation", ("cpuset",)))
    if found.emulator_pin:
        clashes = bool(shield & found.emulator_pin)
        why = (_CLASH,) if clashes else ()
        keys.append(Key("emulator_pinning", (_in_flow(found.emulator_pin),), why, only_suggested=clashes))
    if found.iothread_pins:
        keys.append(_iothread_pinning(found.iothread_pins, shield))
    return keys + _schedules(found, may_be_real_time=bool(shield) and found.started <= pins.keys())


def _pinning(found: Tuning, *, is_shared: bool) -> Key:
    pins = found.vcpu_pins
    if not pins:
        return suggested_pinning(len(found.started))
    unpinned = found.started - pins.keys()
    remarks: tuple[str, ...] = (_SHARED if is_shared else _SHIELDED,)
    if unpinned:
        remarks += (f"Not pinned in libvirt: virtual CPU {format_cpulist(unpinned)}.",)
    if later := pins.keys() - found.started:
        remarks += (f"May be plugged in later: virtual CPU {format_cpulist(later)}.",)
    if max(pins) >= len(pins):
        return Key("vcpu_pinning", ("", *_by_topology(found)), remarks)
    texts = [_in_flow(pins[index]) for index in range(len(pins))]
    if len(texts) <= MOST_ON_A_LINE:
        return Key("vcpu_pinning", (f"[{', '.join(texts)}]",), remarks)
    return Key("vcpu_pinning", ("", *(f"- {text}" for text in texts)), remarks)


def _iothread_pinning(pins: dict[str, frozenset[int]], shield: frozenset[int]) -> Key:
    """Those that clash with the shield are suggestions, below the others."""
    lines = [f"{name}: {_in_flow(cpus)}" for name, cpus in pins.items() if not shield & cpus]
    clashing = [f"{name}: {_in_flow(cpus)}" for name, cpus in pins.items() if shield & cpus]
    if not lines:
        return Key("iothread_pinning", ("", *clashing), (_CLASH,), only_suggested=True)
    why = (_SOME_CLASH,) if clashing else ()
    return Key("iothread_pinning", ("", *lines, *(f"# {line}" for line in clashing)), why)


def _by_topology(found: Tuning) -> list[str]:
    """The form that can leave out vCPUs before the last."""
    cores, threads = found.topology
    places: dict[int, dict[int, list[str]]] = {}
    for index, cpus in found.vcpu_pins.items():
        core, thread = divmod(index, threads)
        socket, core = divmod(core, cores)
        places.setdefault(socket, {}).setdefault(core, []).append(f"{thread}: {_in_flow(cpus)}")
    lines = []
    for socket, members in places.items():
        lines.append(f"{socket}:")
        lines += [f"  {core}: {{{', '.join(texts)}}}" for core, texts in members.items()]
    return lines


def _in_flow(cpus: frozenset[int]) -> str:
    text = format_cpulist(cpus)
    return f"'{text}'" if "," in text else text


def _schedules(found: Tuning, *, may_be_real_time: bool) -> list[Key]:
    keys = []
    kinds = set(found.vcpu_schedules.values())
    if len(kinds) == 1 and found.vcpu_schedules.keys() == found.started:
        (kind,) = kinds
        real_time = kind.policy in REALTIME_POLICIES
        missing = real_time and not may_be_real_time
        keys.append(Key("scheduler", (kind.policy,), (_NO_REAL_TIME,) if missing else (), only_suggested=missing))
        if real_time:
            keys.append(Key("priority", (str(kind.priority),), only_suggested=missing))
    elif kinds:
        what = "; ".join(
            f"{kind.policy} {kind.priority or ''}".strip()
            + " for virtual CPU "
            + format_cpulist(index for index, other in found.vcpu_schedules.items() if other == kind)
            for kind in sorted(kinds)
        )
        text = f"In libvirt: {what}. Here all virtual CPUs have one policy."
        keys.append(Key("scheduler", (max(kinds).policy,), (text,), only_suggested=True))
    emulator = found.emulator_schedule
    if emulator is not None and emulator.policy in REALTIME_POLICIES:
        line = f"{{policy: {emulator.policy}, priority: {emulator.priority}}}"
        keys.append(Key("emulator_scheduler", (line,), (_OUTSIDE,), only_suggested=True))
    elif emulator is not None:
        keys.append(Key("emulator_scheduler", (emulator.policy,)))
    return keys


def memory_keys(found: Tuning, options: Sequence[QemuOption]) -> list[Key]:
    if not (has_mem_lock(options) or pinned_by(options)):
        return []
    if found.memory_limit is not None:
        return [Key("rlimit_memlock", (_size_text(found.memory_limit),), ("libvirt's memtune/hard_limit.",))]
    return memlock_key(options)


def _size_text(size: int) -> str:
    for unit, shift in reversed(sizes.UNITS.items()):
        if size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)
