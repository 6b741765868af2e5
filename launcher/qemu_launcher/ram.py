"""The guest's RAM, as QEMU's options say it: how much there is when it starts, and of which pages.

Why it exists: all of it may have to be locked, so the launcher must know its size before QEMU is there. Pure, over
options alone. None is RAM that the options do not tell in a form we understand: what they mean is QEMU's business, and
nothing is refused here.

Which files are huge pages only the host could tell. A file outside /dev/shm is taken for one: nearly nobody has a
guest's RAM in another, and who has is told by the kernel, as without this module.
"""

import re
from collections.abc import Mapping, Sequence
from string import hexdigits

from .options import QemuOption, each, is_on, settings

DEFAULT_RAM = 128 << 20  # QEMU's own, on every machine type that a person pins (hw/core/machine.c)
MOST_RAM = 1 << 63
_SHM = "/dev/shm/"  # noqa: S108  a file system of ordinary pages, tmpfs(5)
SIZE_SUFFIXES = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}  # util/cutils.c, qemu_strtosz
_FOR_PEOPLE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGTPE])(?:iB?|B)?", re.IGNORECASE)


def guest_ram(options: Sequence[QemuOption]) -> int | None:
    """The guest's RAM in bytes when it starts.

    The machine's own, and what is plugged in from the start (virtio-mem with all that it may grow to): all of it may
    have to be locked.
    """
    if any(option.bare_name == "readconfig" for option in options):
        return None  # it may say anything
    machine, plugged = machine_ram(options), _plugged_ram(options)
    if machine is None or plugged is None or machine + plugged >= MOST_RAM:
        return None
    return machine + plugged


def has_ordinary_pages(options: Sequence[QemuOption]) -> bool:
    """Whether any of the machine's own RAM is not in huge pages, as far as its backends tell."""
    backends = machine_backends(options)
    known = [found for backend in backends if (found := _backend(options, backend)) is not None]
    return not all(map(_is_huge, known)) if backends else not _is_huge(_mem_path(options))


def in_huge_pages(options: Sequence[QemuOption]) -> int:
    """Bytes of the guest's RAM that are in huge pages."""
    own, plugged = machine_backends(options), _plugged_backends(options) or set()
    found = [_backend(options, backend) or {} for backend in own | plugged]
    sizes = [parse_size(backend.get("size", ""), default_unit="B") or 0 for backend in found if _is_huge(backend)]
    if not own and _is_huge(_mem_path(options)):
        sizes.append(machine_ram(options) or 0)
    return sum(sizes)


def _is_huge(backend: Mapping[str, str]) -> bool:
    """Whether this memory backend is of huge pages."""
    if backend.get("qom-type") == "memory-backend-memfd":
        return is_on(backend.get("hugetlb", "off"))
    return "mem-path" in backend and not f"{backend['mem-path']}/".startswith(_SHM)


def _mem_path(options: Sequence[QemuOption]) -> dict[str, str]:
    """-mem-path as a backend: that of all of the machine's RAM that has no other."""
    found = [option.value for option in options if option.bare_name == "mem-path" and isinstance(option.value, str)]
    return {"mem-path": found[-1]} if found else {}


def machine_ram(options: Sequence[QemuOption]) -> int | None:
    """The machine's own, in bytes, without what is plugged in.

    As QEMU: the last size of all `-m`; without one, the size of the machine's memory-backend; else 128 MiB.
    """
    if any(name.startswith("memory.") for found in each(options, "machine", "M") for name in found):
        return None  # what -m stands for since QEMU 7.1; which of the two wins is not worth knowing
    sizes = [found["size"] for found in each(options, "m") if "size" in found]
    if sizes:
        return parse_size(sizes[-1], default_unit="M")
    backend = _machine_backend(options)
    return DEFAULT_RAM if backend is None else _backend_size(options, backend)


def _machine_backend(options: Sequence[QemuOption]) -> str | None:
    """The id of the memory backend that -machine names for the machine's own RAM; -M is the same option."""
    found = [found["memory-backend"] for found in each(options, "machine", "M") if "memory-backend" in found]
    return found[-1] if found else None


def machine_backends(options: Sequence[QemuOption]) -> set[str]:
    """The ids of all that the machine's own RAM consists of; none where it has no backend by name."""
    nodes = {found["memdev"] for found in each(options, "numa") if "memdev" in found}
    backend = _machine_backend(options)
    return nodes if backend is None else nodes | {backend}


def _plugged_ram(options: Sequence[QemuOption]) -> int | None:
    """Bytes of all memory backends that a -device brings into the guest."""
    backends = _plugged_backends(options)
    sizes = None if backends is None else [_backend_size(options, backend) for backend in backends]
    return None if sizes is None or None in sizes else sum(size or 0 for size in sizes)


def _plugged_backends(options: Sequence[QemuOption]) -> set[str] | None:
    """The ids of those, None where one cannot be told. ivshmem's, which is locked as RAM is, among them."""
    backends = set()
    for option in options:
        if option.bare_name == "device" and "memdev" in str(option.value):
            found = settings(option)
            if found is None:
                return None
            backends |= {value for name, value in found.items() if name.endswith("memdev")}
    return backends


def _backend_size(options: Sequence[QemuOption], backend: str) -> int | None:
    found = _backend(options, backend)
    return None if found is None else parse_size(found.get("size", ""), default_unit="B")


def _backend(options: Sequence[QemuOption], backend: str) -> dict[str, str] | None:
    """The memory backend, or whatever object, of this id."""
    return next((found for found in each(options, "object") if found.get("id") == backend), None)


def parse_size(text: str, default_unit: str) -> int | None:
    """A size as QEMU takes it (`2G`, `1.5g`, `4096`, `0x1000`) in bytes, None when it is none."""
    if text[:2].lower() == "0x" and len(text) <= 18 and all(digit in hexdigits for digit in text[2:]) and text[2:]:
        return int(text, 16) << SIZE_SUFFIXES[default_unit]
    unit = text[-1:].upper()
    number = text[:-1] if unit in SIZE_SUFFIXES else text
    shift = SIZE_SUFFIXES[unit if unit in SIZE_SUFFIXES else default_unit]
    whole, _dot, fraction = number.partition(".")
    digits = whole + fraction
    if not whole.isdigit() or not digits.isdigit() or not digits.isascii() or len(digits) > 40:
        return None
    size = (int(digits) << shift) // 10 ** len(fraction)
    return size if size < MOST_RAM else None


def without_byte(text: str) -> str | None:
    """What QEMU takes instead of a size that is written for people, `4GB` or `4 G`; None for anything else."""
    found = _FOR_PEOPLE.fullmatch(text)
    size = found and found[1] + found[2]
    return None if size == text else size
