"""A booted lab on disk: the state of a machine that has just come up, from which others start in seconds.

Booting costs most of a minute under emulation and is the same each time. So the first boot of a machine on an image is
written down (memory by migration into a file, the disk as a qcow2 layer), and later ones begin there, each on an
overlay of its own: equal to a fresh boot but for the time of day, which is set on arrival. A snapshot lies in the
folder of its image, goes with it, and is named after what it depends on: QEMU's version and its complete command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from lab.errors import LabError
from lab.image import Image
from lab.monitor import Monitor, monitor
from lab.vm import Vm

MIGRATION_SECONDS = 300.0
KEPT = 3  # snapshots of one image: those used last
# What a test would otherwise read from the disk first: into the page cache with it.
WARM_UP = """
python3 -c 'import asyncio, dbus_next.aio, prctl, pytest, rich.console, yaml'
qemu-system-x86_64 --version
busctl status org.freedesktop.PolicyKit1
systemctl is-system-running --wait
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """A folder with `disk.qcow2`, `state` and the console's output so far; complete when it exists."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "disk.qcow2"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def exists(self) -> bool:
        return self.folder.is_dir()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def snapshot_of(picture: Image, arguments: list[str]) -> Snapshot:
    """Where the snapshot of a machine with these QEMU `arguments` lies, whether it exists or not."""
    version = subprocess.run([arguments[0], "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version + json.dumps(arguments).encode()).hexdigest()[:16]
    found = Snapshot(picture.folder / f"booted-{digest}")
    if found.exists:
        os.utime(found.folder)  # when it was used last
    return found


def write(vm: Vm, target: Snapshot) -> None:
    """Ends `vm`, which has just booted, and makes its state the snapshot. LabError leaves none behind."""
    vm.run(WARM_UP, check=False)
    vm.leave()
    try:
        with monitor(vm.folder, timeout=MIGRATION_SECONDS) as qmp:
            qmp.command("stop")
            qmp.command("migrate-set-parameters", **{"max-bandwidth": 2**40})
            qmp.command("migrate", uri="exec:cat >state")
            _wait_migrated(qmp)
    finally:
        vm.close()
    unfinished = target.folder.with_name(f".{target.folder.name}.{vm.folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    for source, name in (("overlay.qcow2", "disk.qcow2"), ("state", "state"), ("console.log", "console.log")):
        shutil.move(vm.folder / source, unfinished / name)
    try:
        unfinished.rename(target.folder)
    except OSError:  # another lab was as fast
        shutil.rmtree(unfinished)
    older = sorted(target.folder.parent.glob("booted-*"), key=lambda folder: folder.stat().st_mtime)
    for folder in older[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


def resume(folder: Path) -> None:
    """Returns when the machine in `folder` has read its snapshot and runs. LabError when it does not."""
    # One connection for the whole wait: QEMU 7.2 stopped answering one that came right after another while it reads.
    with monitor(folder, timeout=MIGRATION_SECONDS) as qmp:
        deadline = time.monotonic() + MIGRATION_SECONDS
        while (status := qmp.command("query-status")["status"]) == "inmigrate":
            if time.monotonic() > deadline:
                raise LabError("the snapshot is not read to its end")
            time.sleep(0.1)
        if status != "paused":  # as which it was written
            raise LabError(f"the snapshot does not start: {status}")
        qmp.command("cont")


def _wait_migrated(qmp: Monitor) -> None:
    deadline = time.monotonic() + MIGRATION_SECONDS
    while True:
        answer = qmp.command("query-migrate")
        if answer["status"] == "completed":
            return
        if answer["status"] in ("failed", "cancelled") or time.monotonic() > deadline:
            raise LabError(f"writing the snapshot: {answer.get('error-desc', answer['status'])}")
        time.sleep(0.1)
