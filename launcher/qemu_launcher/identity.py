"""The user a VM runs as: a launcher started by root becomes him, before it makes anything.

Why it exists: `user:` and `group:` in a definition. From here on everything belongs to that user, QEMU, sockets, the
connection to the bus; to the helper it is that user's ordinary start.
Refused before anything starts: a user other than oneself without being root; a user or group that does not exist.
After a failure nothing has changed, except when the kernel refuses half way: then the launcher must end, and does.
"""

import grp
import os
import pwd
from typing import NamedTuple

from .definition import VmDefinition
from .errors import LauncherError

# What root's environment says of root's session is wrong for anybody else, and dangerous to write into.
_OF_THE_SESSION = ("DBUS_SESSION_BUS_ADDRESS", "XAUTHORITY", "XDG_SESSION_ID", "MAIL")


class Account(NamedTuple):
    """Whom to become. `name` is None for a uid without an entry in the user database."""

    uid: int
    gid: int
    name: str | None
    home: str
    shell: str


def assume(definition: VmDefinition) -> None:
    """Become the user and group of the definition, for good. LauncherError if that is not possible."""
    if definition.user is None and definition.group is None:
        return
    account = wanted_account(definition.user, definition.group)
    if os.geteuid() != 0:
        _check_own(definition, account)
        return
    try:
        if account.name is None:
            os.setgroups([account.gid])
        else:
            os.initgroups(account.name, account.gid)
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
    except OSError as err:
        raise LauncherError(f"cannot become user {definition.user!r}: {err.strerror}") from err
    if account.uid != 0:
        _adopt_environment(account)


def wanted_account(user: str | int | None, group: str | int | None) -> Account:
    """The account behind the two keys; what is not given stays as it is. LauncherError if there is none."""
    if user is None:
        account = Account(os.geteuid(), os.getegid(), access_name(os.geteuid()), os.environ.get("HOME", "/"), "")
    else:
        account = _account(user, group)
    return account if group is None else account._replace(gid=_gid(group))


def access_name(uid: int) -> str | None:
    """Name of a uid, None if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _account(user: str | int, group: str | int | None) -> Account:
    try:
        entry = pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)
    except KeyError as err:
        if isinstance(user, int) and group is not None:
            return Account(user, _gid(group), None, "/", "/bin/sh")
        hint = "add group: as well, since the user database cannot tell it" if isinstance(user, int) else None
        raise LauncherError(f"there is no user {user!r} on this host", hint) from err
    return Account(entry.pw_uid, entry.pw_gid, entry.pw_name, entry.pw_dir, entry.pw_shell)


def _gid(group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as err:
        raise LauncherError(f"there is no group {group!r} on this host") from err


def _check_own(definition: VmDefinition, account: Account) -> None:
    hint = f"start it as root (sudo qemu-launcher {definition.name}), or remove the key"
    if account.uid != os.geteuid():
        raise LauncherError(f"{definition.name} is to run as user {definition.user!r}, who is not you", hint)
    if definition.group is not None and account.gid != os.getegid():
        raise LauncherError(f"{definition.name} is to run in group {definition.group!r}, which is not yours", hint)


def _adopt_environment(account: Account) -> None:
    for name in [name for name in os.environ if name.startswith("XDG_") or name in _OF_THE_SESSION]:
        del os.environ[name]
    os.environ["HOME"] = account.home
    os.environ["SHELL"] = account.shell or "/bin/sh"
    for name in ("USER", "LOGNAME"):
        os.environ[name] = account.name or str(account.uid)
