"""The user a VM runs as: a launcher started by root becomes him, before it makes anything.

Why it exists: `user:` and `group:` in a definition. From here on everything belongs to that user, QEMU, sockets, the
connection to the bus; to the helper it is that user's ordinary start.
Refused before anything starts, at its place: a user or group other than one's own without being root; one that does not
exist. A group is one's own only if it is the one that one's files get: nobody but root can start a QEMU in another.
After a failure nothing has changed, except when the kernel refuses half way: then the launcher must end, and does.
"""

import grp
import os
import pwd
from typing import NamedTuple

from . import users
from .definition import VmDefinition
from .errors import DefinitionError, LauncherError

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
    account = wanted_account(definition)
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
        what = f"user {account.uid} and group {account.gid}"
        raise LauncherError(f"{definition.name} cannot become {what}: {err.strerror}") from err
    if account.uid != 0:
        _adopt_environment(account)


def wanted_account(definition: VmDefinition) -> Account:
    """The account behind the two keys; what is not given stays as it is. DefinitionError if there is none."""
    gid = None if definition.group is None else _gid(definition, definition.group)
    account = _account(definition, definition.user, gid)
    return account if gid is None else account._replace(gid=gid)


def _account(definition: VmDefinition, user: str | int | None, gid: int | None) -> Account:
    """That of `user`, or one's own. A number that no entry has will do where it is one's own, or `gid` is given."""
    if user is not None:
        try:
            entry = pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)
            return Account(entry.pw_uid, entry.pw_gid, entry.pw_name, entry.pw_dir, entry.pw_shell)
        except KeyError as err:
            if isinstance(user, str):
                raise _refusal(definition, "user", f"there is no user {user!r} on this host") from err
            if user != os.geteuid():
                if gid is not None:
                    return Account(user, gid, None, "/", "/bin/sh")
                hint = "add group: as well, since the user database cannot tell it"
                raise _refusal(definition, "user", f"there is no user {user} on this host", hint) from err
    uid = os.geteuid()
    return Account(uid, os.getegid(), users.name_of(uid), os.environ.get("HOME", "/"), os.environ.get("SHELL", ""))


def _gid(definition: VmDefinition, group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as err:
        raise _refusal(definition, "group", f"there is no group {group!r} on this host") from err


def _check_own(definition: VmDefinition, account: Account) -> None:
    hint = f"start it as root (sudo qemu-launcher {definition.name}), or remove the key"
    if account.uid != os.geteuid():
        what = f"{definition.name} is to run as user {definition.user!r}, who is not you"
        raise _refusal(definition, "user", what, hint)
    if definition.group is not None and account.gid != os.getegid():
        if account.gid in os.getgroups():
            what = f"{definition.name} is to run in group {definition.group!r}; you are a member, but not in it now"
            hint = f"start it from a shell in that group (newgrp {definition.group}), or remove the key"
        else:
            what = f"{definition.name} is to run in group {definition.group!r}, which is not yours"
        raise _refusal(definition, "group", what, hint)


def _refusal(definition: VmDefinition, key: str, what: str, hint: str | None = None) -> DefinitionError:
    return DefinitionError(what, hint, mark=definition.marks.get(key))


def _adopt_environment(account: Account) -> None:
    for name in [name for name in os.environ if name.startswith("XDG_") or name in _OF_THE_SESSION]:
        del os.environ[name]
    os.environ["HOME"] = account.home
    os.environ["SHELL"] = account.shell or "/bin/sh"
    for name in ("USER", "LOGNAME"):
        os.environ[name] = account.name or str(account.uid)
