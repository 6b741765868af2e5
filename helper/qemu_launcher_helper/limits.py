"""How much each user may have: built-in defaults, and /etc/qemu-launcher/helper.toml where an administrator wrote one.

The file is read afresh for every call. Refuses a file that somebody other than root could have written, and anything
in it that it does not understand to the last key: then every call is refused (Failed), because a limit that was meant
and not kept is worse than no service. The path is a constant; only tests pass another.
"""

import grp
import logging
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from .contract import INFINITY, MAX_CPUS, MAX_PRIORITY, MAX_VMS, POLICIES
from .cpulist import parse_cpulist
from .errors import Failed

PATH = "/etc/qemu-launcher/helper.toml"
# A hundred entries fit many times; a device or a runaway file does not.
MAX_FILE_BYTES = 64 * 1024
# What may appear in a polkit dialog and in a log line: no markup, no second line, no terminal escape can be made of it.
_PLAIN = re.compile(r"[A-Za-z0-9 ,._-]{1,64}")


class Limits(NamedTuple):
    """What a user may have; one [[limits]] entry of the file.

    cpus: None means every CPU; max_cpus: None means no number of its own; the housekeeping core stays in both cases.
    memlock: bytes per user; None means the host's rule alone (MemTotal less max(2 GiB, 10 %)); INFINITY if written.
    realtime: "shielded" (fifo and rr only on shielded CPUs of the VM) or "anywhere". source: who decided all this.
    users, groups: whom the entry is for; both empty means everybody.
    """

    cpus: frozenset[int] | None = None
    max_cpus: int | None = None
    max_vms: int = 8
    memlock: int | None = None
    policies: frozenset[str] = frozenset(POLICIES)
    max_priority: int = 10
    realtime: str = "shielded"
    source: str = "the built-in defaults"
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


class Settings(NamedTuple):
    """The whole file. comm: patterns of process names that may be tuned (fnmatch; it catches mistakes and is no
    boundary). services: system services whose processes may be targets, for example "my-vm.service".
    """

    entries: tuple[Limits, ...] = ()
    comm: tuple[str, ...] = ("qemu-system-*", "qemu-kvm")
    services: tuple[str, ...] = ()

    def limits_for(self, uid: int) -> Limits:
        """Return the first entry that names the user or one of his groups, or everybody; else the defaults."""
        name, gids = "", list[int]()  # a uid without a name is only ever everybody
        with suppress(KeyError):
            user = pwd.getpwuid(uid)
            name, gids = user.pw_name, os.getgrouplist(user.pw_name, user.pw_gid)
        for entry in self.entries:
            everybody = not entry.users and not entry.groups
            if everybody or name in entry.users or any(_gid(group) in gids for group in entry.groups):
                return entry
        return Limits()


def _gid(group: str) -> int | None:
    with suppress(KeyError):
        return grp.getgrnam(group).gr_gid
    return None


def user_name(uid: int) -> str:
    """Return the account's name; "uid 1000" when there is none, or one that would not be plain text for a person."""
    name = ""
    with suppress(KeyError):
        name = pwd.getpwuid(uid).pw_name
    return name if _PLAIN.fullmatch(name) else f"uid {uid}"


def load() -> Settings:
    """Return the settings as the file has them now. Raises Failed while it is broken or unsafe."""
    try:
        return read(PATH)
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as err:
        logging.critical("no service, %s: %a", PATH, str(err))
        raise Failed("The helper's configuration is broken; journalctl -u qemu-launcher-helper says where") from err


def read(path: str) -> Settings:
    """Read and check the file. Settings that are half understood are never returned.

    Raises OSError; ValueError that says which key; or what Python says of a document of quite another shape.
    """
    # O_NONBLOCK: a FIFO in this place must not hold the helper up before it is refused.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or info.st_uid != 0 or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError("not a regular file that root alone can write")
        text = file.read(MAX_FILE_BYTES)
    if len(text) == MAX_FILE_BYTES:
        raise ValueError("too large")
    document = tomllib.loads(text.decode())
    entries = []
    for number, table in enumerate(document.pop("limits", []), 1):
        place = f"[[limits]] entry {number}"
        entries.append(Limits(source=f"{path}, {place}", **_values(table, _ENTRY, place)))
    if not all(entry.users or entry.groups for entry in entries[:-1]):
        raise ValueError("only the last [[limits]] entry may be without users and groups")
    return Settings(entries=tuple(entries), **_values(document, _TOP_LEVEL, "top level"))


# What a key may hold: a number up to the given one, a text of the given form, or a list, not empty, of such texts.
_TOP_LEVEL: dict[str, Any] = {
    "comm": (r"[A-Za-z0-9 ._*?-]{1,64}",),
    "services": (r"[A-Za-z0-9:_.@-]{1,200}\.service",),
}
_ENTRY: dict[str, Any] = {
    "users": (r"[^\s:,]{1,64}",),
    "groups": (r"[^\s:,]{1,64}",),
    "cpus": r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*",
    "max_cpus": MAX_CPUS,
    "max_vms": MAX_VMS,
    "memlock": r"infinity|[1-9][0-9]{0,5}[KMGT]",
    "policies": ("|".join(POLICIES),),
    "max_priority": MAX_PRIORITY,
    "realtime": "shielded|anywhere",
}


def _bytes(text: str) -> int:
    return INFINITY if text == "infinity" else int(text[:-1]) << 10 * ("KMGT".index(text[-1]) + 1)


_CONVERT: dict[str, Callable[[Any], Any]] = {"cpus": parse_cpulist, "memlock": _bytes, "policies": frozenset}


def _values(table: Mapping[str, Any], schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    values = {}
    for key, value in table.items():
        match schema.get(key), value:
            case int() as most, int() if type(value) is int and 0 <= value <= most:  # a bool is an int to match
                values[key] = value
            case str() as form, str() if re.fullmatch(form, value):
                values[key] = _CONVERT.get(key, str)(value)
            case (str() as form,), [_, *_] if all(isinstance(item, str) and re.fullmatch(form, item) for item in value):
                values[key] = _CONVERT.get(key, tuple)(value)
            case _:
                raise ValueError(f"{place}: key {key} does not exist, or cannot be {value!r}")
    return values
