"""What a user may have, as the helper says, and the line of helper.toml that each limit comes from.

Why it exists: a user who is refused CPUs wants to know which line of whose file to talk about. The helper names the
entry that holds; the file itself is read here, without privilege, by whoever may read it. It is read for its line
numbers only: what counts is what the helper said, and where the file says something else by now, that is told.

Pure, but for `file_of`, which reads that one file and never fails: None is a file that cannot be had.
"""

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cpulist import format_cpulist, parse_cpulist
from .sizes import INFINITY, UNITS, format_limit

# The keys of an entry, as qemu-launcher-helper.toml(5) has them, and as they are on the wire.
KEYS = ("cpus", "max_cpus", "max_vms", "memlock", "policies", "max_priority", "realtime", "deadline")

_SOURCE = re.compile(r"(/.*), \[\[limits\]\] entry ([0-9]{1,4})")
_HEADER = re.compile(r"\s*\[\[\s*(?:limits|\"limits\"|'limits')\s*\]\]\s*(?:#.*)?")
_OTHER_TABLE = re.compile(r"\s*\[\[?[^\[\],]*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"\s*(?:\"([a-z_]+)\"|'([a-z_]+)'|([a-z_]+))\s*=")
_LARGEST_FILE = 64 * 1024  # bytes; the helper reads no larger one
_REALTIME = {"shielded": "on shielded CPUs", "anywhere": "on any CPU"}


@dataclass(frozen=True, slots=True)
class Limits:
    """The answer to GetLimits. memlock in bytes, INFINITY for no limit. `source`: who decided all this."""

    version: str
    mechanism: str
    reason: str
    source: str
    cpus: frozenset[int]
    max_cpus: int
    max_vms: int
    memlock: int
    policies: tuple[str, ...]
    max_priority: int
    realtime: str
    deadline: bool
    free_cpus: frozenset[int]

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Limits":
        """From the names and values of the wire. ValueError for anything but what the contract says."""

        def get(kind: type, name: str) -> Any:
            value: Any = facts.get(name)
            if type(value) is not kind or (isinstance(value, int) and value < 0):  # type(): a bool is no number here
                raise ValueError(f"{name} cannot be {value!r}")
            return value

        return cls(
            version=get(str, "version"),
            mechanism=get(str, "mechanism"),
            reason=get(str, "reason"),
            source=get(str, "limits_source"),
            cpus=parse_cpulist(get(str, "cpus")),
            max_cpus=get(int, "max_cpus"),
            max_vms=get(int, "max_vms"),
            memlock=get(int, "memlock"),
            policies=tuple(map(str, get(list, "policies"))),
            max_priority=get(int, "max_priority"),
            realtime=get(str, "realtime"),
            deadline=get(bool, "deadline"),
            free_cpus=parse_cpulist(get(str, "free_cpus")),
        )

    @property
    def file(self) -> Path | None:
        """The file that decided, None for the built-in defaults."""
        found = _SOURCE.fullmatch(self.source)
        return None if found is None else Path(found[1])

    @property
    def entry(self) -> int:
        """The number of the entry in that file, from 1; 0 without one."""
        found = _SOURCE.fullmatch(self.source)
        return 0 if found is None else int(found[2])

    @property
    def shielding(self) -> str:
        """How CPUs are shielded on this host, or why they are not."""
        return f"{self.mechanism}: {self.reason}"

    def values(self) -> dict[str, str]:
        """Each limit, by its key, in people's units."""
        return {
            "cpus": format_cpulist(self.cpus) or "none",
            "max_cpus": str(self.max_cpus),
            "max_vms": str(self.max_vms),
            "memlock": format_limit(self.memlock),
            "policies": ", ".join(self.policies) or "none",
            "max_priority": str(self.max_priority),
            "realtime": _REALTIME.get(self.realtime, self.realtime),
            "deadline": "yes" if self.deadline else "no",
        }


@dataclass(frozen=True, slots=True)
class Origins:
    """`of`: by key, `helper.toml:12`, `default`, or the entry where there is no more to be known.

    `remarks`: what the file says by now and the helper did not.
    """

    of: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def file_of(limits: Limits) -> str | None:
    """The text of the file that decided; None if there is none, or it is not ours to read."""
    if limits.file is None:
        return None
    try:
        # O_NONBLOCK: whatever is in this place by now, nobody waits for it.
        with open(os.open(limits.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            data = file.read(_LARGEST_FILE + 1)
        return data.decode() if len(data) <= _LARGEST_FILE else None
    except (OSError, UnicodeDecodeError):
        return None


def origins(limits: Limits, text: str | None) -> Origins:
    """Where each of `limits` comes from. `text`: what `file_of` gave."""
    if limits.file is None:
        return Origins(dict.fromkeys(KEYS, "default"))
    name = limits.file.name
    at_least = Origins(dict.fromkeys(KEYS, f"{name}, entry {limits.entry}"))
    if text is None:
        return at_least
    entry, lines = _entry(text, limits.entry), _lines(text, limits.entry)
    if entry is None:
        return Origins(at_least.of, (f"{name} has been changed meanwhile: ask again",))
    if lines is None or lines.keys() != entry.keys():  # written in a way that has no line for each key
        lines = {}
    found, remarks = {}, []
    for key in KEYS:
        place = f"{name}:{lines[key]}" if key in lines else f"{name}, entry {limits.entry}"
        found[key] = place if key in entry else "default"
        if key in entry and not _agrees(key, entry[key], limits):
            found[key] = "changed meanwhile"
            remarks.append(f"{place} has been changed meanwhile, to {key} = {_toml(entry[key])}: ask again")
    return Origins(found, tuple(remarks))


def _entry(text: str, number: int) -> dict[str, Any] | None:
    """The entry as TOML has it; None if there is no such entry, or no TOML."""
    try:
        entry = tomllib.loads(text)["limits"][number - 1]
    except (tomllib.TOMLDecodeError, LookupError, TypeError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _lines(text: str, number: int) -> dict[str, int] | None:
    """Line of each key of the entry, by a look at the lines alone; None if its header is not found."""
    count, found = 0, dict[str, int]()
    for line, words in enumerate(text.splitlines(), 1):
        if _HEADER.fullmatch(words):
            count += 1
        elif count == number and _OTHER_TABLE.fullmatch(words):
            break
        elif count == number and (key := _KEY.match(words)):
            found.setdefault(key[1] or key[2] or key[3], line)
    return found if count >= number else None


def _agrees(key: str, value: Any, limits: Limits) -> bool:
    """Whether the file's value is the one that the helper told."""
    told = getattr(limits, key)
    try:
        match key:
            case "cpus":
                return bool(parse_cpulist(value) == told)
            case "memlock":
                size = INFINITY if value == "infinity" else int(value[:-1]) << UNITS[value[-1]]
                return bool(size == told)
            case "policies":
                return set(value) == set(told)
            case _:
                return bool(value == told)
    except (ValueError, TypeError, AttributeError, LookupError):
        return False


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
