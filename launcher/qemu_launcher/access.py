"""Why the helper said no, in words for the person who has to do something about it.

Why it exists: the ways of not having access (the bus's AccessDenied, the helper's NotAuthorized, ServiceUnknown) want
a remedy each. The bus daemon looks at the groups of our process, polkit at the user database; a user
who was put into the group after he logged in is a member for one and not for the other.
Reads the user database; changes nothing.
"""

import grp
import os
import pwd
import re
from pathlib import Path

from . import absence, users
from .errors import PasswordWanted, TuningFailed
from .procfs import PROC

GROUP = "qemu-launcher"
ERROR_PREFIX = "org.qemulauncher.Error."
NOT_AUTHORIZED = f"{ERROR_PREFIX}NotAuthorized"  # polkit's no, also for want of a password
TARGET_REFUSED = f"{ERROR_PREFIX}TargetRefused"  # it does not take the process for the caller's QEMU
# How the helper's text ends where polkit would say yes to a password: its error has no other word for that.
_FOR_A_PASSWORD = " without a password"  # noqa: S105  it is not one
LOOK_AT_JOURNAL = (
    "see what it says with: journalctl -u qemu-launcher-helper "
    "(without systemd: in syslog's files, where a syslog daemon runs)"
)
# Debian has it in dbus-daemon, Alpine in a package of its own.
_STARTED_BY_BUS = (
    "without systemd the bus starts it by dbus-daemon-launch-helper, which has to be there and setuid root"
)
_MAKE_GROUP = {True: "sudo systemd-sysusers", False: f"sudo groupadd --system {GROUP}"}  # by whether there is systemd
NO_BUS = "org.freedesktop.DBus.Error.NoServer"  # nobody listens there; our own use of the name, as libdbus does

# dbus-daemon's, when who is to be activated has not come in time; the helper has no error of that name.
NOT_YET_STARTED = "org.freedesktop.DBus.Error.TimedOut"

_GROUPS = Path("/etc/group")
_OWN_CGROUP = PROC / "self/cgroup"

_DENIED = "org.freedesktop.DBus.Error.AccessDenied"  # by the bus itself
_MISSING = {"org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner"}
_FAILED_TO_START = "org.freedesktop.DBus.Error.Spawn."
_HINTS = {
    "org.freedesktop.DBus.Error.NoReply": LOOK_AT_JOURNAL,
    NOT_YET_STARTED: LOOK_AT_JOURNAL,
    f"{ERROR_PREFIX}Failed": LOOK_AT_JOURNAL,
}


def explained(error_name: str, text: str) -> TuningFailed:
    """The error for the user, from the D-Bus error name and the text of the answer."""
    if error_name == _DENIED:
        return TuningFailed(*not_let_in(), wire_name=error_name)
    if error_name == NOT_AUTHORIZED:
        return _not_authorised(text)
    if error_name in _MISSING:
        return TuningFailed("qemu-launcher-helper is not installed", absence.remedy(), wire_name=error_name)
    if error_name.startswith(_FAILED_TO_START):
        hint = LOOK_AT_JOURNAL if absence.has_systemd() else f"{LOOK_AT_JOURNAL}\n{_STARTED_BY_BUS}"
        return TuningFailed(f"qemu-launcher-helper cannot be started: {text}", hint, wire_name=error_name)
    if error_name == "org.freedesktop.DBus.Error.NoReply":
        text = "qemu-launcher-helper ended without an answer"
    return TuningFailed(
        text or f"qemu-launcher-helper failed: {error_name}", _HINTS.get(error_name), wire_name=error_name
    )


def is_absent(err: TuningFailed) -> bool:
    """Whether there is no helper to ask, or no bus to ask it over."""
    return err.wire_name in {*_MISSING, NO_BUS}


def not_let_in() -> tuple[str, str]:
    """Message and hint for a caller whose call the bus has not passed on."""
    return not_a_member() or (
        f"the system bus lets {users.own_name()} send nothing to qemu-launcher-helper",
        f"if it has just been installed: {absence.reload_bus()}\n"
        "otherwise a file of the administrator's in /etc/dbus-1/system.d decides this",
    )


def _not_authorised(text: str) -> TuningFailed:
    """For a caller whom the bus has let through, and polkit has not: membership is not the reason.

    That he is no member is still worth telling: members are not asked for a password where the package's rule holds.
    """
    if text.endswith(_FOR_A_PASSWORD):
        hint = "start it in a terminal or on a desktop, where polkit can ask"
        return PasswordWanted(text, hint, wire_name=NOT_AUTHORIZED)
    hint = "an administrator's polkit rule decides this, or the question for a password was dismissed"
    gid = _group_gid()
    if gid is not None and not _is_member(gid):
        hint += f"\nmembers of the group {GROUP} are usually not asked: {'; '.join(_to_join(users.own_name()))}"
    return TuningFailed(text or f"{users.own_name()} is not authorised", hint, wire_name=NOT_AUTHORIZED)


def not_a_member() -> tuple[str, str] | None:
    """Message and hint for a user who is no member of the group, or not in this login; None for a member."""
    user = users.own_name()
    gid = _group_gid()
    if gid is None:
        return (
            f"there is no group {GROUP} on this host, so nobody may use qemu-launcher-helper",
            f"{_MAKE_GROUP[absence.has_systemd()]} makes it; then sudo usermod -aG {GROUP} {user}\n"
            "then log out and in again",
        )
    if not _is_member(gid):
        return (
            f"{user} is not a member of the group {GROUP}",
            "\n".join([*_to_join(user), "then log out and in again"]),
        )
    if gid not in {os.getegid(), *os.getgroups()}:
        hint = "log out and in again (closing a terminal is not enough; the whole session counts)"
        # Terminals of GNOME's and KDE's are children of the user manager, and have its groups. It outlives a logout by
        # UserStopDelaySec= (logind.conf(5)), and lingering, or another session, keeps it for good.
        if "/user@" in (_read(_OWN_CGROUP) or ""):
            stays = f"sudo loginctl terminate-user {user}, which ends all you run; or boot"
            hint += f"\nstill so? your user manager has stayed: {stays}"
        return f"{user} is a member of the group {GROUP}, but not yet in this login", hint
    return None


def _to_join(user: str) -> list[str]:
    """The commands that make `user` a member.

    usermod(8) knows the host's own file alone. Where packages are part of an image (Fedora Silverblue), their groups
    are in /usr/lib/group, and it does nothing.
    """
    groups = _read(_GROUPS)
    is_elsewhere = groups is not None and not re.search(rf"^{GROUP}:", groups, re.MULTILINE)
    copied = [f"getent group {GROUP} | sudo tee -a /etc/group"] if is_elsewhere else []
    return [*copied, f"sudo usermod -aG {GROUP} {user}"]


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return None


def _group_gid() -> int | None:
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


def _is_member(gid: int) -> bool:
    """By the user database: what the next login would have."""
    try:
        user = pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return gid in os.getgrouplist(user.pw_name, user.pw_gid)
