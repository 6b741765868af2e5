"""The ways of keeping CPUs for a VM, best first: partition.py, pool.py. Which one depends on the running kernel alone.

A mechanism writes cgroup files of scopes that the records name, and of the groups around these; no others. Every
method may raise OSError; the caller then withdraws.
"""

from .partition import Partition
from .pool import Pool

MECHANISM = Pool() if Partition().lacks() and not Pool().lacks() else Partition()
