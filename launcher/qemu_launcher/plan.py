"""From what the definition wants to what has to be done: pure, no /proc, no bus, no QEMU.

Why it exists: the launch has two moments at which it must know what to ask for, before QEMU exists (memory lock) and
when its threads are known (pins, scheduling). Both decisions are made here, from values, so that they can be tested
without any of the parties. What the kernel lets a user do with his own processes is never asked of the helper.

Unfit is raised for a wish that this QEMU cannot meet, TuningFailed for one that this user's limits do not allow.
Nothing has been done then.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from . import locking, ram
from .cpulist import format_cpulist
from .definition import Isolation, Scheduling, VmDefinition
from .errors import Mark, TuningFailed, Unfit
from .hostdevices import vfio_more_containers
from .places import describe_place
from .sizes import INFINITY, format_size
from .threads import Iothread, Threads, Vcpu

# Guest RAM is not all that VFIO and mem-lock=on lock: QEMU's own heap, video memory, firmware, device queues.
MEMLOCK_OVERHEAD = 1 << 30  # bytes


@dataclass(frozen=True, slots=True)
class MemlockNeed:
    """How much memory QEMU must be able to lock.

    `wanted`: bytes, INFINITY for as much as I may. `least`: bytes; less than that is a refusal.
    `unaided`: the hard limit allows it already, the child raises its own soft limit. `several`: the guest's RAM
    counts more than once; `twice`: for VFIO and for mem-lock.
    """

    wanted: int
    least: int
    unaided: bool
    several: bool = False
    twice: bool = False


@dataclass(frozen=True, slots=True)
class Pin:
    """One thread and the host CPUs it belongs on: that of vCPUs, or of the iothread named."""

    tid: int
    cpus: frozenset[int]
    vcpus: tuple[int, ...]  # the vCPUs that the thread runs; several only under TCG's thread=single
    iothread: str | None = None
    shielded: bool = False

    def __str__(self) -> str:
        which = ", ".join(str(index) for index in self.vcpus)
        return f"{f'vCPU {which}' if self.iothread is None else f'iothread {self.iothread!r}'} (TID {self.tid})"


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """What the threads of one QEMU shall be given. Empty `pins`: no pinning; a policy of None: scheduling stays.

    `others`: the CPUs of all threads without a pin; empty: wherever they may run. `emulator`: policy of the emulator
    threads, which are those that are not `named`.
    """

    pins: tuple[Pin, ...]
    isolation: Isolation | None
    scheduled: tuple[int, ...]  # TIDs
    vcpu_policy: Scheduling | None  # of those that are `scheduled`
    others: frozenset[int] = frozenset()
    emulator: Scheduling | None = None
    named: frozenset[int] = frozenset()  # TIDs of all vCPUs and iothreads, pinned or not
    vcpus: Mapping[int, int] = field(default_factory=dict)  # index -> TID, of all vCPUs

    @property
    def cpus(self) -> frozenset[int]:
        """All CPUs that vCPUs are pinned to."""
        return frozenset[int]().union(*(pin.cpus for pin in self.pins if pin.vcpus))

    @property
    def by_helper(self) -> bool:
        """Whether it is the helper who places the threads, since affinity alone does not do."""
        return bool(self.pins) and self.isolation != "affinity"

    def summary(self) -> list[str]:
        """`4 vCPUs on 4-7 (shielded)`, `fifo 1`, `1 iothread on 0-1`, `emulator threads on 0-1 batch`."""
        words = []
        if self.cpus:
            count = sum(len(pin.vcpus) for pin in self.pins)
            known = {"shield": "shielded", "cpuset": "confined, not shielded"}
            how = known.get(self.isolation or "", "nothing is shielded")
            words.append(f"{count} vCPU{'s' * (count != 1)} on {format_cpulist(self.cpus)} ({how})")
        if self.vcpu_policy is not None:
            words.append(str(self.vcpu_policy))
        if iothreads := [pin for pin in self.pins if pin.iothread is not None]:
            cpus = frozenset[int]().union(*(pin.cpus for pin in iothreads))
            words.append(f"{len(iothreads)} iothread{'s' * (len(iothreads) != 1)} on {format_cpulist(cpus)}")
        if self.others or self.emulator:
            place = f" on {format_cpulist(self.others)}" if self.others else ""
            policy = f" {self.emulator}" if self.emulator else ""
            words.append(f"emulator threads{place}{policy}")
        return words

    def summary_of(self, tid: int) -> str:
        """What one vCPU has been given: `on CPU 4 (shielded), fifo 1`."""
        pin = next((pin for pin in self.pins if pin.tid == tid), None)
        words = ["not pinned" if pin is None else f"on CPU {format_cpulist(pin.cpus)}{' (shielded)' * pin.shielded}"]
        if self.vcpu_policy is not None:
            words.append(str(self.vcpu_policy))
        return ", ".join(words)


def memlock_need(definition: VmDefinition, soft_limit: int, hard_limit: int, memory_total: int) -> MemlockNeed | None:
    """None when nothing must be lockable. Bytes: both limits are our own RLIMIT_MEMLOCK, `memory_total` the host's."""
    kind = definition.memlock.kind
    if kind == "none":
        return None
    locked = locking.lockable(definition.options)
    if kind == "auto" and locked is None:
        mark = definition.memlock.mark
        raise Unfit(
            f"{f'{mark}: ' if mark else ''}rlimit_memlock: auto cannot tell the guest's RAM from its options",
            "write rlimit_memlock: true, or a size such as 16G",
        )
    if kind == "auto":
        least = (locked or 0) + MEMLOCK_OVERHEAD
        more = vfio_more_containers(definition.options) * (ram.guest_ram(definition.options) or 0)
        more = more if least + more < ram.MOST_RAM else 0
        wanted = max(least + more, soft_limit)  # it is there to help, and takes nothing from who has more
    elif kind == "size":
        wanted = definition.memlock.bytes or 0
        least = max(wanted, locked or 0)
    else:
        wanted, least = INFINITY, locked or 0
    # `true` asks for all there is; a limit at or above the host's memory is all there is.
    enough = max(memory_total, least) if wanted == INFINITY else wanted
    need = MemlockNeed(
        wanted,
        least,
        unaided=hard_limit >= enough,
        several=(locked or 0) > (ram.guest_ram(definition.options) or 0),
        twice=locking.is_locked_twice(definition.options),
    )
    if kind == "size":
        check_granted(need, wanted, definition.memlock.mark)
    return need


def check_granted(need: MemlockNeed, granted: int, mark: Mark | None = None) -> None:
    """TuningFailed, with both numbers, when `granted` lockable bytes do not do; Unfit if no more was wanted."""
    if granted >= need.least:
        return
    if granted >= need.wanted:
        bound = f"{'all locks of ' if need.several else ''}the guest's RAM, {format_size(need.least)}"
        what = f"rlimit_memlock: {format_size(granted)} is less than {bound}"
        place = f"{mark}: " if mark else ""
        way_out = "leave out mem-lock, as VFIO locks it anyway, or " if need.twice else ""
        raise Unfit(f"{place}{what}", f"{way_out}write rlimit_memlock: auto, or a larger size")
    way_out = "give the guest less memory"
    if need.twice:
        way_out = "leave out mem-lock: with VFIO the guest's RAM counts twice"
    raise TuningFailed(
        f"QEMU must be able to lock {format_size(need.least)}, but only {format_size(granted)} was granted",
        f"{way_out}, or ask the administrator for a higher memlock in /etc/qemu-launcher/helper.toml",
    )


def memlock_suspicion(definition: VmDefinition, granted: int | None) -> str | None:
    """What to try when QEMU ended early while it locked all it maps, and `granted` bytes were its limit; or None.

    The guest's RAM and 1 GiB do not hold everything: TCG's code buffer alone takes up to 1 GiB (tcg/region.c of QEMU).
    """
    if granted is None or granted == INFINITY or not locking.has_mem_lock(definition.options):
        return None
    more = -(-(granted + 2 * MEMLOCK_OVERHEAD) >> 30)  # GiB, rounded up
    way_out = "without KVM, accel: [tcg, tb-size: 64] (MiB) also makes it lock less"
    if locking.is_locked_twice(definition.options):
        way_out = "or leave out mem-lock: VFIO locks the guest's RAM anyway, and it counts twice so"
    return (
        f"if it could not lock its memory: it may lock {format_size(granted)}; write rlimit_memlock: {more}G\n{way_out}"
    )


def needs_helper(definition: VmDefinition, memlock: MemlockNeed | None) -> bool:
    """Whether any of it takes more rights than the user has."""
    return (memlock is not None and not memlock.unaided) or definition.threads_by_helper


def thread_plan(definition: VmDefinition, threads: Threads) -> ThreadPlan:
    """What to do with the threads of this QEMU. Unfit when they are not those of the definition."""
    emulator = definition.emulator_pinning
    vcpu_tids = tuple(dict.fromkeys(vcpu.tid for vcpu in threads.vcpus))
    return ThreadPlan(
        pins=(*_vcpu_pins(definition, threads), *_iothread_pins(definition, threads.iothreads)),
        isolation=definition.isolation if definition.places_threads else None,
        scheduled=vcpu_tids if definition.scheduler else (),
        vcpu_policy=Scheduling(definition.scheduler, definition.priority) if definition.scheduler else None,
        others=emulator.cpus if emulator else frozenset(),
        emulator=definition.emulator_scheduler,
        named=frozenset((*vcpu_tids, *(iothread.tid for iothread in threads.iothreads))),
        vcpus=threads.tids(),
    )


def _vcpu_pins(definition: VmDefinition, threads: Threads) -> tuple[Pin, ...]:
    wanted: dict[int, tuple[frozenset[int], list[Vcpu]]] = {}  # by TID
    for vcpu, cpus in _assigned(definition, threads):
        known, members = wanted.setdefault(vcpu.tid, (cpus, []))
        if known != cpus:
            place = f"{definition.pinning.mark}: " if definition.pinning else ""
            raise Unfit(
                f"{place}{members[0]} and {vcpu} are one thread of QEMU's (TID {vcpu.tid}), "
                f"which cannot be on CPU {format_cpulist(known)} and CPU {format_cpulist(cpus)} at once",
                "QEMU runs all vCPUs in one thread (TCG thread=single): use KVM, or TCG with thread=multi",
            )
        members.append(vcpu)
    shielded = definition.isolation == "shield"
    return tuple(
        Pin(tid, cpus, tuple(vcpu.index for vcpu in members), shielded=shielded)
        for tid, (cpus, members) in wanted.items()
    )


def _iothread_pins(definition: VmDefinition, iothreads: tuple[Iothread, ...]) -> Iterator[Pin]:
    """Never shielded: they work for devices, next to the emulator threads."""
    by_id = {iothread.id: iothread for iothread in iothreads}
    for name, cpus in (definition.iothread_pinning or {}).items():
        if name not in by_id:
            hint = f"it has {', '.join(by_id)}" if by_id else "it has none at all: add - object: [iothread, id: ...]"
            raise Unfit(f"{cpus.mark}: QEMU has no iothread {name!r}", hint)
        yield Pin(by_id[name].tid, cpus.cpus, (), iothread=name)


def _assigned(definition: VmDefinition, threads: Threads) -> list[tuple[Vcpu, frozenset[int]]]:
    """Every pinned vCPU that is there with its host CPUs; one that can be plugged in later is waited for.

    A vCPU that the definition leaves out stays an emulator thread's equal.
    """
    if definition.pinning is None:
        return []
    pairs = []
    if definition.pinning.topology is not None:
        for place, cpus in definition.pinning.topology.items():
            found = threads.at(place)
            if len(found) > 1:
                raise Unfit(
                    f"{cpus.mark}: {found[0]} and {found[1]} are both at {describe_place(place)}: this machine does "
                    "not tell them apart so",
                    "use the short form, vcpu_pinning: [CPU of vCPU 0, CPU of vCPU 1, ...]",
                )
            if not found and not threads.can_be_at(place):
                raise _unknown(describe_place(place), cpus.mark, threads.vcpus)
            pairs += [(vcpu, cpus.cpus) for vcpu in found]
        return pairs
    by_index = {vcpu.index: vcpu for vcpu in threads.vcpus}
    for index, cpus in enumerate(definition.pinning.by_index or ()):
        if index in by_index:
            pairs.append((by_index[index], cpus.cpus))
        elif index >= threads.possible:
            raise _unknown(str(index), cpus.mark, threads.vcpus)
    return pairs


def _unknown(which: str, mark: Mark, vcpus: tuple[Vcpu, ...]) -> Unfit:
    shown = "; ".join(str(vcpu) for vcpu in vcpus[:4])
    more = f"; {len(vcpus) - 4} more" if len(vcpus) > 4 else ""
    hint = f"it has {shown}{more}\n-smp gives it more" if vcpus else "it has none at all"
    return Unfit(f"{mark}: QEMU has no vCPU {which}", hint)
