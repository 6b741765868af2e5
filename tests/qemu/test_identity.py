"""user: and group:, started by root and by somebody else. The user database is one of the test's own: bind mounts in a
mount namespace put it over the host's.
"""

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import Home, Run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="optional: only root can become somebody else")

UID, GID, MORE, OTHER = 64123, 64124, 64125, 64126
PASSWD = f"root:x:0:0::/root:/bin/sh\nqltest:x:{UID}:{GID}::/:/bin/sh\nqlother:x:{OTHER}:{OTHER}::/:/bin/sh\n"
GROUP = f"root:x:0:\nqltest:x:{GID}:\nqlmore:x:{MORE}:qltest,x\nqlother:x:{OTHER}:\n"


def children(pid: int) -> list[int]:
    """The processes that `pid` has started, by the kernel's word."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = re.search(r"^PPid:\s+([0-9]+)$", status.read_text(), re.MULTILINE)
        except OSError:
            continue
        if parent is not None and int(parent[1]) == pid:
            found.append(int(status.parent.name))
    return found


@pytest.fixture
def place(home: Home) -> Iterator[Path]:
    """A directory that everybody may read. QEMU is ended afterwards: `home` does not find it by its environment."""
    with tempfile.TemporaryDirectory(prefix="ql-id-") as name:
        path = Path(name)
        path.chmod(0o755)
        (path / "passwd").write_text(PASSWD)
        (path / "group").write_text(GROUP)
        yield path
    for run in home.runs:
        for qemu in children(run.process.pid):
            os.kill(qemu, signal.SIGKILL)
    for uid in (UID, OTHER, 3000000001):
        shutil.rmtree(f"/tmp/qemu-launcher-{uid}", ignore_errors=True)


def there(place: Path, *prefix: str) -> list[str]:
    """A prefix for a command that is to see that user database; `prefix` is executed in it."""
    script = f'mount --bind {place}/passwd /etc/passwd && mount --bind {place}/group /etc/group && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh", *prefix]


def started(home: Home, place: Path, *prefix: str) -> Run:
    return home.start(argv=[*there(place, *prefix), *home.command("run", str(place / "vm-under-test.yml"))])


def define(home: Home, place: Path, **keys: Any) -> Path:
    target = place / "vm-under-test.yml"
    shutil.copy(home.define(working_directory="/", **keys), target)
    return target


def as_seen(run: Run) -> dict[str, list[int]]:
    """Real, effective, saved and file system ids of QEMU, and its supplementary groups, from the kernel."""
    (pid,) = children(run.process.pid)
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.findall(r"^(Uid|Gid|Groups):(.*)$", status, re.MULTILINE)
    return {name: sorted(map(int, words.split())) for name, words in found}


@pytest.mark.parametrize(
    ("keys", "uid", "gid", "groups"),
    [
        ({"user": "qltest"}, UID, GID, [GID, MORE]),
        ({"user": UID}, UID, GID, [GID, MORE]),
        ({"user": "qltest", "group": "qlother"}, UID, OTHER, [MORE, OTHER]),
        ({"user": "qltest", "group": 4294967294}, UID, 4294967294, [MORE, 4294967294]),
        ({"user": 3000000001, "group": 3000000002}, 3000000001, 3000000002, [3000000002]),
        ({"group": "qlmore"}, 0, MORE, [MORE]),
    ],
)
def test_root_becomes_whom_the_definition_names(
    home: Home, place: Path, keys: dict[str, Any], uid: int, gid: int, groups: list[int]
) -> None:
    """The commands around QEMU too."""
    told = place / "told"
    told.mkdir(mode=0o777)
    told.chmod(0o777)
    define(home, place, before_start=[["sh", "-c", f"id -u > {told}/before; id -G >> {told}/before"]], **keys)
    run = started(home, place)
    run.wait_running()
    seen = as_seen(run)
    assert (seen["Uid"], seen["Gid"]) == ([uid] * 4, [gid] * 4)
    assert seen["Groups"] == groups
    said = (told / "before").read_text().splitlines()
    assert int(said[0]) == uid
    assert sorted(map(int, said[1].split())) == groups


AS_QLTEST = ("setpriv", f"--reuid={UID}", f"--regid={GID}", "--init-groups")


@pytest.mark.parametrize(
    "keys", [{"user": "qltest"}, {"user": UID}, {"group": "qltest"}, {"group": GID}, {"user": UID, "group": "qltest"}]
)
def test_ones_own_are_accepted(home: Home, place: Path, keys: dict[str, Any]) -> None:
    define(home, place, **keys)
    run = started(home, place, *AS_QLTEST)
    run.wait_running()
    seen = as_seen(run)
    assert (seen["Uid"], seen["Gid"], seen["Groups"]) == ([UID] * 4, [GID] * 4, [GID, MORE])


def test_own_number_that_has_no_entry_is_accepted(home: Home, place: Path) -> None:
    define(home, place, user=3000000001)
    run = started(home, place, "setpriv", "--reuid=3000000001", f"--regid={GID}", "--clear-groups")
    run.wait_running()
    assert as_seen(run)["Uid"] == [3000000001] * 4


@pytest.mark.parametrize(
    ("keys", "prefix", "message"),
    [
        ({"user": "root"}, AS_QLTEST, "4:9: vm-under-test is to run as user 'root', who is not you\n"
         "    start it as root (sudo qemu-launcher vm-under-test), or remove the key"),
        ({"user": OTHER}, AS_QLTEST, "4:9: vm-under-test is to run as user 64126, who is not you\n"),
        ({"group": "qlother"}, AS_QLTEST, "4:10: vm-under-test is to run in group 'qlother', which is not yours\n"),
        ({"group": "qlmore"}, AS_QLTEST, "4:10: vm-under-test is to run in group 'qlmore'; you are a member, but "
         "not in it now\n    start it from a shell in that group (newgrp qlmore), or remove the key"),
        ({"user": "no-such-user"}, (), "4:9: there is no user 'no-such-user' on this host"),
        ({"user": "qltest", "group": "nobody"}, (), "5:10: there is no group 'nobody' on this host"),
        ({"user": 70000}, (), "4:9: there is no user 70000 on this host\n    add group: as well, since the user"),
    ],
)  # fmt: skip
def test_others_are_refused_before_anything_starts(
    home: Home, place: Path, keys: dict[str, Any], prefix: tuple[str, ...], message: str
) -> None:
    path = define(home, place, **keys, before_start=[["touch", f"{place}/started"]])
    run = started(home, place, *prefix)
    assert run.end() == 2, run.output
    assert f"qemu-launcher: {path}:{message}" in run.output
    assert not (place / "started").exists()
    assert not (home.runtime / "qemu-launcher").exists()
    assert children(run.process.pid) == []
