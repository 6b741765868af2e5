"""Builds the image of a recipe, once, as root or as an ordinary user, and keeps it under the hash of that recipe.

An image is a folder: `root.img` (ext4), `vmlinuz`, `initrd`, and the SSH keys that were made for it. It is built under
a temporary name and renamed when it is whole, so a folder with the right name is always complete; after a failure or a
SIGKILL nothing but a temporary folder is left, which the next build removes. Builds are serialised by a lock. Images
of the same recipe name with another hash are removed after a build, but for the one used last: another checkout's.

As an ordinary user mmdebstrap works in a user namespace (uidmap, a range in /etc/subuid); the file system is made in
the same namespace, where the files have the owners they shall have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lab.errors import LabError, MissingTool
from lab.mirror import host_mirror
from lab.recipe import CACHE, LAB_FOLDER, Recipe

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "ssh-keygen": "openssh-client",
    "tar": "tar",
}

# Unpacks the tarball on stdin to $1/root and makes the file system in the existing file $1/root.img; what it unpacked
# is removed from the same namespace, since outside of it those files belong to somebody else.
MAKE_FILE_SYSTEM = """
set -eu
cd "$1"
trap 'rm -rf root' EXIT
mkdir root root/dev
tar -x --numeric-owner --xattrs --xattrs-include='*' -C root
cat root/boot/vmlinuz-* >vmlinuz
cat root/boot/initrd.img-* >initrd
mke2fs -q -F -t ext4 -m 0 -E lazy_itable_init=1,lazy_journal_init=1,nodiscard -d root root.img "$2"M
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """A complete image in the cache."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root.img"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd"

    @property
    def key(self) -> Path:
        return self.folder / "key"

    @property
    def host_key(self) -> Path:
        return self.folder / "host_key.pub"


def ensure(recipe: Recipe, cache: Path = CACHE) -> Image:
    """The image of `recipe`: from the cache, or built now (about a minute and a half). LabError says why not."""
    images = cache / "images"
    folder = images / f"{recipe.name}-{recipe.digest()}"
    if folder.is_dir():
        os.utime(folder)  # when it was used last
        return Image(folder)
    images.mkdir(parents=True, exist_ok=True)
    with _build_lock(cache):
        if not folder.is_dir():
            _remove(p for p in images.iterdir() if p.name.startswith("."))
            _build(recipe, folder)
            others = [p for p in images.iterdir() if p.name.startswith(f"{recipe.name}-") and p != folder]
            _remove(sorted(others, key=lambda p: p.stat().st_mtime)[:-1])
    return Image(folder)


def check_tools(tools: dict[str, str]) -> None:
    """MissingTool for the first program of `tools` (name to Debian package) that is not installed here."""
    for tool, package in tools.items():
        if shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is None:
            raise MissingTool(tool, package)


def check_image_tools() -> None:
    """MissingTool when something is not there that building an image needs."""
    check_tools(TOOLS)
    if os.geteuid() != 0:
        check_tools({"newuidmap": "uidmap"})
    if not KEYRING.exists():
        raise MissingTool(str(KEYRING), "debian-archive-keyring")


def _build(recipe: Recipe, folder: Path) -> None:
    check_image_tools()
    mirror = host_mirror(recipe.suite)
    say(f"building the image {folder.name} (once; about a minute and a half)")
    # Not below the cache: in the namespace we are another user, who may not be able to enter the project's folders.
    with tempfile.TemporaryDirectory(prefix="lab-image-") as scratch:
        work = Path(scratch)
        work.chmod(0o711)
        keys = work / "keys"
        keys.mkdir(mode=0o700)
        _make_key(keys / "key")
        _make_key(keys / "host_key")
        overlay = keys / "overlay.tar"
        overlay.write_bytes(_overlay(recipe, keys))
        tarball = keys / "root.tar"
        _run(_mmdebstrap(recipe, mirror, overlay, tarball), work / "log")
        enter = [] if os.geteuid() == 0 else ["mmdebstrap", "--unshare-helper"]
        made = Path(tempfile.mkdtemp(dir=work))  # nobody else can guess its name
        if enter:
            made.chmod(0o777)
        for name in ("root.img", "vmlinuz", "initrd"):
            (made / name).touch()
            (made / name).chmod(0o666)
        with tarball.open("rb") as source:
            command = [*enter, "sh", "-c", MAKE_FILE_SYSTEM, "sh", str(made), str(recipe.size_mib)]
            _run(command, work / "log", stdin=source)
        unfinished = folder.parent / f".{folder.name}.{os.getpid()}"
        unfinished.mkdir(mode=0o700)
        for name in ("root.img", "vmlinuz", "initrd"):
            _run(["cp", "--sparse=always", str(made / name), str(unfinished / name)], work / "log")
        for name in ("key", "host_key.pub"):
            shutil.copy(keys / name, unfinished / name)
        unfinished.rename(folder)


def _mmdebstrap(recipe: Recipe, mirror: str, overlay: Path, tarball: Path) -> list[str]:
    inside = shlex.join(["chroot"]) + ' "$1" ' + shlex.join(["sh", "-eu", "/root/customise", *recipe.users])
    return [
        "mmdebstrap",
        "--variant=minbase",
        "--format=tar",
        f"--keyring={KEYRING}",
        f"--include={','.join(recipe.all_packages)}",
        "--skip=output/dev,cleanup/reproducible",
        f"--customize-hook=tar-in {shlex.quote(str(overlay))} /",
        f"--customize-hook={inside}",
        '--customize-hook=rm "$1"/root/customise "$1"/root/customise-init',
        recipe.suite,
        str(tarball),
        mirror,
    ]


def _overlay(recipe: Recipe, keys: Path) -> bytes:
    """A tarball of what goes into the system: the trees below files/, the keys, the scripts; all of it root's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for files in (LAB_FOLDER / "files", LAB_FOLDER / f"files-{recipe.init}"):
            for path in sorted(p for p in files.rglob("*") if p.is_file()):
                _add(tar, str(path.relative_to(files)), path, 0o755 if os.access(path, os.X_OK) else 0o644)
        _add(tar, "etc/ssh/lab_authorized_keys", keys / "key.pub", 0o644)
        _add(tar, "etc/ssh/ssh_host_ed25519_key", keys / "host_key", 0o600)
        _add(tar, "etc/ssh/ssh_host_ed25519_key.pub", keys / "host_key.pub", 0o644)
        _add(tar, "root/customise", LAB_FOLDER / "customise", 0o755)
        _add(tar, "root/customise-init", LAB_FOLDER / f"customise-{recipe.init}", 0o644)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, path: Path, mode: int) -> None:
    content = path.read_bytes()
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    tar.addfile(member, io.BytesIO(content))


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(path)], check=True)


def _run(command: list[str], log: Path, stdin: io.BufferedReader | None = None) -> None:
    """Runs a step of the build; its output is shown only when it fails."""
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    with log.open("ab") as output:
        done = subprocess.run(
            command, stdin=stdin or subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=False
        )
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
        raise LabError(f"{command[0]} ended with status {done.returncode} while building the image:\n{tail}")


@contextlib.contextmanager
def _build_lock(cache: Path) -> Iterator[None]:
    with (cache / "build.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another build of an image to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove(folders: Iterable[Path]) -> None:
    for folder in list(folders):
        shutil.rmtree(folder, ignore_errors=True)


def say(text: str) -> None:
    """One line about the lab itself, on stderr, so that stdout stays that of the command inside."""
    print(f"lab: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the lab is a program for people
