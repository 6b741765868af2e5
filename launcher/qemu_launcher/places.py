"""Where vCPUs are in a guest: the levels of its CPU topology."""

MAX_PINNED = 8192  # vCPUs; twice what any of QEMU's machines can have
# From the outside in, as QEMU names them (-smp, and qapi/machine.json, CpuInstanceProperties).
LEVELS = ("drawer", "book", "socket", "die", "cluster", "module", "core", "thread")

# Where a vCPU is: levels and their numbers from the outside in, socket, core and thread among them.
Place = tuple[tuple[str, int], ...]


def describe_place(place: Place) -> str:
    """`socket 0, die 1, core 0, thread 0`."""
    return ", ".join(f"{level} {number}" for level, number in place)
