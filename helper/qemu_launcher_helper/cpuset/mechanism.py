"""What every way of shielding has to do.

A mechanism writes cgroup files of scopes that the records name, and no others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..arguments import Pin

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Shield:
    """What one VM's threads get: `reserved` CPUs (whole cores) for the shielded pins, `others` for emulator threads."""

    pins: Sequence[Pin]
    reserved: frozenset[int]
    others: frozenset[int]  # empty: every CPU that nobody shields


class Mechanism(Protocol):
    """One way to shield. Every method may raise OSError; the caller then withdraws."""

    name: str

    def settle(self, live: Mapping[str, frozenset[int]]) -> None:
        """Make the levels above the scopes hold exactly what `live` (scope path -> reserved CPUs) needs."""

    def apply(self, scope: str, shield: Shield) -> None:
        """Put every thread of the scope where `shield` wants it. Idempotent. Failed when the kernel did otherwise."""

    def withdraw(self, scope: str) -> None:
        """Give the scope's CPUs back; its threads then run wherever the host's other tasks do. Idempotent."""

    def shielded_threads(self, scope: str) -> dict[int, frozenset[int]] | None:
        """Return the threads pinned inside the shield with the CPUs they have; None when there is no valid shield."""

    def orphans(self, known: frozenset[str]) -> list[str]:
        """Return the scopes of ours that still hold CPUs and are not in `known`."""
