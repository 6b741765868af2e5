"""The ways of keeping CPUs for a VM, best first: partition.py, pool.py, v1.py. Which one depends on the host alone.

Without systemd that is partition.py or v1.py, with groups of our own: raw.py.

A mechanism writes cgroup files of scopes that the records name, and of the groups around these; no others. Every
method may raise OSError; the caller then withdraws.
"""

from ..target import SYSTEMD
from .partition import CGROUP, Partition
from .pool import Pool
from .raw import RawPartition, RawV1 as RawV1
from .v1 import V1

# Where none can be used, the one that says what is missing.
_ALL: tuple[Partition, ...] = (Partition(), Pool(), V1()) if SYSTEMD else (RawPartition(), RawV1())
_LAST = _ALL[0] if SYSTEMD and (CGROUP / "cgroup.controllers").exists() else _ALL[-1]
MECHANISM: Partition = next((one for one in _ALL if not one.lacks()), _LAST)
