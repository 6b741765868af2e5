"""How much each user may have: built-in defaults, and /etc/qemu-launcher/helper.toml where an administrator wrote one.

The file is read again when it has changed. Refuses a file that somebody other than root could have written, and
anything it does not understand to the last key: then every call is refused (Failed), because a limit that was meant and
not kept is worse than no service. The path is a constant; only tests pass another.
"""

import grp
import logging
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .contract import INFINITY, MAX_CPUS, MAX_PRIORITY, MAX_VMS, POLICIES
from .cpulist import parse_cpulist
from .errors import ConfigurationError, Failed

PATH = "/etc/qemu-launcher/helper.toml"
# A hundred entries fit many times; a device or a runaway file does not.
MAX_FILE_BYTES = 64 * 1024
BROKEN = "The helper's configuration is broken; ask the administrator to run: qemu-launcher-helper --check"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one user may have.

    cpus: None means every CPU; max_cpus: None means no number of its own; the housekeeping core stays in both cases.
    memlock: bytes per user; None means the host's rule alone (MemTotal less max(2 GiB, 10 %)); INFINITY if written.
    realtime: "shielded" (fifo and rr only on shielded CPUs of the VM) or "anywhere". source: who decided all this.
    """

    cpus: frozenset[int] | None = None
    max_cpus: int | None = None
    max_vms: int = 8
    memlock: int | None = None
    policies: frozenset[str] = frozenset(POLICIES)
    max_priority: int = 10
    realtime: str = "shielded"
    source: str = "the built-in defaults"


@dataclass(frozen=True, slots=True)
class Entry:
    """One [[limits]] table: whom it is for (None and None: everybody) and what they may have."""

    users: frozenset[str] | None
    groups: frozenset[str] | None
    limits: Limits

    def matches(self, user: str, groups: frozenset[str]) -> bool:
        everybody = self.users is None and self.groups is None
        return everybody or user in (self.users or ()) or not groups.isdisjoint(self.groups or ())


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole file. comm: patterns of process names that may be pinned (fnmatch; it catches mistakes and is no
    boundary). services: system services whose processes may be targets, for example "my-vm.service".
    """

    entries: tuple[Entry, ...] = ()
    comm: tuple[str, ...] = ("qemu-system-*", "qemu-kvm")
    services: tuple[str, ...] = ()


class Configuration:
    """The settings in force now."""

    def __init__(self, path: str = PATH) -> None:
        self._path = path
        self._stamp: object = self  # equal to no stamp of a file
        self._settings: Settings | None = None

    @property
    def settings(self) -> Settings:
        """The settings, read again if the file changed. Raises Failed while the file is broken or unsafe."""
        stamp = self._stamp_of_file()
        if stamp != self._stamp:
            self._stamp, self._settings = stamp, None
            try:
                self._settings = Settings() if stamp is None else read(self._path)
            except (ConfigurationError, OSError) as err:
                _log.error("refusing all service: %s", ascii(str(err)))
        if self._settings is None:
            raise Failed(BROKEN)
        return self._settings

    def limits_for(self, uid: int) -> Limits:
        """The first entry that names the user or one of his groups, else the one for everybody, else the defaults."""
        settings = self.settings
        user, groups = _names_of(uid)
        return next((entry.limits for entry in settings.entries if entry.matches(user, groups)), Limits())

    def _stamp_of_file(self) -> tuple[int, ...] | None:
        try:
            info = os.lstat(self._path)
        except FileNotFoundError:
            return None
        except OSError as err:
            return (err.errno or 0,)
        return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _names_of(uid: int) -> tuple[str, frozenset[str]]:
    """The user's name and groups as the user database has them now; ("", none) for a uid without a name."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return "", frozenset()
    names = set()
    for gid in os.getgrouplist(entry.pw_name, entry.pw_gid):
        try:
            names.add(grp.getgrgid(gid).gr_name)
        except KeyError:
            continue  # a group without a name cannot be in the file either
    return entry.pw_name, frozenset(names)


def read(path: str) -> Settings:
    """Read and check the file. Raises ConfigurationError or OSError; settings half understood are never returned."""
    # O_NONBLOCK: a FIFO in this place must not hold the helper up before it is refused.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != 0 or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigurationError(f"{path} is not a regular file that root alone can write")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigurationError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        document = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as err:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigurationError(f"{path}: {err}") from err
    tables = document.pop("limits", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigurationError(f"{path}: limits is not written as [[limits]]")
    entries = tuple(_entry(table, f"{path}, [[limits]] entry {number}") for number, table in enumerate(tables, 1))
    if any(entry.users is None and entry.groups is None for entry in entries[:-1]):
        raise ConfigurationError(f"{path}: a [[limits]] entry without users and groups must be the last one")
    return Settings(entries=entries, **_values(document, _TOP_LEVEL, path))


def _entry(table: dict[str, Any], where: str) -> Entry:
    values = _values(table, _PER_ENTRY, where)
    users, groups = values.pop("users", None), values.pop("groups", None)
    return Entry(users, groups, replace(Limits(), source=where, **values))


def _values(table: dict[str, Any], readers: dict[str, Callable[[Any], Any]], where: str) -> dict[str, Any]:
    values = {}
    for key, value in table.items():
        if key not in readers:
            raise ConfigurationError(f"{where}: unknown key {key!r}")
        try:
            values[key] = readers[key](value)
        except ValueError as err:
            raise ConfigurationError(f"{where}, key {key}: {err}") from err
    return values


def _strings(value: object, pattern: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("not a list of strings")
    for item in value:
        if not isinstance(item, str) or not re.fullmatch(pattern, item):
            raise ValueError(f"{item!r} is not possible here")
    return tuple(value)


def _names(value: object) -> frozenset[str]:
    return frozenset(_strings(value, r"[^\s:,]{1,64}"))


def _policies(value: object) -> frozenset[str]:
    return frozenset(_strings(value, "|".join(POLICIES)))


def _count(highest: int) -> Callable[[object], int]:
    def read_count(value: object) -> int:
        if type(value) is not int or not 0 <= value <= highest:  # a bool is an int to isinstance
            raise ValueError(f"not a number from 0 to {highest}")
        return value

    return read_count


def _text(value: object, pattern: str, meaning: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"not {meaning}")
    return value


def _cpus(value: object) -> frozenset[int]:
    cpus = parse_cpulist(
        _text(value, r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*", 'a cpulist such as "0-3,8"')
    )
    if not cpus or max(cpus) >= MAX_CPUS:
        raise ValueError(f"no CPU, or one above {MAX_CPUS - 1}")
    return cpus


def _memlock(value: object) -> int:
    text = _text(value, r"infinity|[1-9][0-9]{0,5}[KMGT]", 'a size such as "16G", or "infinity"')
    return INFINITY if text == "infinity" else int(text[:-1]) * _UNITS[text[-1]]


def _realtime(value: object) -> str:
    return _text(value, "shielded|anywhere", '"shielded" or "anywhere"')


_TOP_LEVEL: dict[str, Callable[[Any], Any]] = {
    "comm": lambda value: _strings(value, r"[A-Za-z0-9 ._*?-]{1,64}"),
    "services": lambda value: _strings(value, r"[A-Za-z0-9:_.@-]{1,200}\.service"),
}
_PER_ENTRY: dict[str, Callable[[Any], Any]] = {
    "users": _names,
    "groups": _names,
    "cpus": _cpus,
    "max_cpus": _count(MAX_CPUS),
    "max_vms": _count(MAX_VMS),
    "memlock": _memlock,
    "policies": _policies,
    "max_priority": _count(MAX_PRIORITY),
    "realtime": _realtime,
}
