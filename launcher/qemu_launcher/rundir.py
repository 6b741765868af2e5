"""Where this user's runtime files are, and what else may stand there.

Why it exists: `$XDG_RUNTIME_DIR` is not always set, and not always the same. What is made here is the user's alone;
what somebody else has put in its place is neither followed nor waited for nor removed, but named (LauncherError).
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import LauncherError

DIRECTORY = "qemu-launcher"
_TMP = Path("/tmp")  # noqa: S108 (what we make in it is checked by is_ours_alone)

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFREG: "a file",
}


def candidates() -> list[Path]:
    """Where this user's runtime files may be, best first."""
    uid = os.geteuid()
    places = [Path(f"/run/user/{uid}") / DIRECTORY]
    if (given := os.environ.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        places.insert(0, Path(given) / DIRECTORY)
    # Neither logind nor anything like it (cron without a session, containers): sticky /tmp and our own checks.
    places.append(_TMP / f"{DIRECTORY}-{uid}")
    return list(dict.fromkeys(places))


def made(places: list[Path]) -> Path:
    """The first place whose parent is ours (or /tmp), made if need be. What is wrong there is not passed over."""
    place = next(place for place in places if place.parent == _TMP or _is_owned(place.parent))
    hint = "set XDG_RUNTIME_DIR to a directory that is yours alone (mode 0700)"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
    except OSError as err:
        raise LauncherError(f"cannot make {place} for the runtime files: {err.strerror}", hint) from err
    if not is_ours_alone(place):
        raise LauncherError(f"{place} is not yours, or others may enter it", f"remove it, or {hint}")
    return place


def _is_owned(place: Path) -> bool:
    try:
        return place.stat().st_uid == os.geteuid()
    except OSError:
        return False


def is_ours_alone(place: Path) -> bool:
    """Whether `place` is a directory of this user's that nobody else may enter."""
    try:
        about = place.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for `path` that fits into sun_path, 108 bytes (unix(7)), however deep the directory lies."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextlib.contextmanager
def listening(name: str) -> Iterator[tuple[socket.socket, Path]]:
    """A socket of that file name among the runtime files, and its path; both are gone when the context ends."""
    path = made(candidates()) / name
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            path.unlink(missing_ok=True)  # of one that was killed, and had the name that we have now
            with short_path(path) as short:
                listener.bind(short)
            listener.listen(1)
        except OSError as err:
            raise not_made("socket", path, err.strerror, wanted=stat.S_IFSOCK) from err
        try:
            yield listener, path
        finally:
            path.unlink(missing_ok=True)


def opened_lock(lock: Path) -> int:
    """A descriptor of the lock file, made if need be. LauncherError for what is no file, which is not waited for."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as err:
        raise not_made("lock file", lock, err.strerror, wanted=stat.S_IFREG) from err
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise not_made("lock file", lock, "it is no file", wanted=stat.S_IFREG)
    return fd


def not_made(what: str, path: Path, why: str | None, *, wanted: int) -> LauncherError:
    """The error for a file of ours that cannot be made: what is in its place if that is of another kind, or `why`."""
    try:
        kind = stat.S_IFMT(path.lstat().st_mode)
    except OSError:  # nothing is there, and that is not the problem: a full disk, say
        kind = wanted
    if kind != wanted:
        why = f"{_KINDS.get(kind, 'something else')} is in its place"
    return LauncherError(
        f"cannot make the {what} {path}: {why}",
        None if kind == wanted else "no launcher has put it there: remove it, and start again",
    )
