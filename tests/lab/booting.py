"""Starts a lab: a fresh overlay on the cached image, QEMU, and the wait until it is ready; ends it in every case.

QEMU is told to die with the process that started it (setpriv --pdeathsig), so even a SIGKILL of the test runner leaves
nothing behind; the signal belongs to the starting *thread*, so boot from one that lives as long as the lab shall. A
kernel panic on the way up is emulation's fault more often than ours: it is booted again, three times at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lab import accelerator, image, slots, snapshot
from lab.errors import LabDied, LabError
from lab.image import Image, say
from lab.monitor import monitor
from lab.recipe import CACHE, TRIXIE, Machine, Recipe
from lab.vm import Vm, console_tail

TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "ssh": "openssh-client",
    "setpriv": "util-linux",
}
DESCRIPTION = "made-from"
ATTEMPTS = 3
RESUME_SECONDS = 120.0  # for the first command after a resume
STALL_SECONDS = 600.0  # without a new byte on the console; emulation on a busy machine is slow, but never that slow
PANIC = re.compile(rb"Kernel panic - not syncing")
KERNEL_ARGUMENTS = (
    "root=/dev/vda", "rw", "console=ttyS0", "net.ifnames=0",
    "panic=-1", "oops=panic",  # whatever goes wrong in the kernel ends QEMU at once (with -no-reboot)
    "mitigations=off",  # they cost time, and there is nobody to keep out
    # Under emulation a page that is filled with zeros takes as long as a small program: not twice, not for 2 MiB that
    # will not be used, and not by an instruction that QEMU repeats word by word.
    "init_on_alloc=0", "transparent_hugepage=never", "clearcpuid=rep_good",
    "systemd.show_status=true", "TERM=dumb",  # the boot's progress, for the stall watch and for people; no colours
    "systemd.ssh_auto=no",  # systemd 256 and later: no second sshd on vsock
)  # fmt: skip

_counter = itertools.count(1)


def kept_lab(name: str) -> Path:
    """The folder of a lab that is kept under this name."""
    return CACHE / "run" / f"kept-{name}"


@contextlib.contextmanager
def boot(recipe: Recipe = TRIXIE, machine: Machine = Machine(), *, cache: Path = CACHE) -> Iterator[Vm]:  # noqa: B008
    """A running lab that ends with the block; when the block ends with an exception, its console and journal are shown.

    Waits for a slot. Raises MissingTool, LabError (image, accelerator), or LabDied when it does not come up.
    """
    _forget_dead_sessions(cache / "run")
    folder = cache / "run" / f"session-{os.getpid()}-{next(_counter)}"
    vm = start(folder, recipe, machine, cache=cache)
    try:
        yield vm
    except Exception:
        print(vm.report(), file=sys.stderr, flush=True)  # noqa: T201 - for the person who reads the failure
        raise
    finally:
        vm.close()
        shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, recipe: Recipe, machine: Machine, *, cache: Path = CACHE, kept: bool = False) -> Vm:
    """A running lab in `folder`, which is made (and may be left over from a dead one). The caller closes it.

    `kept`: it outlives this process. After an exception nothing runs and the slot is free.
    """
    check_tools()
    picture = image.ensure(recipe, cache)
    slot = slots.take(cache / "slots", folder.name, slots.slot_count())
    try:
        accel = accelerator.choose(picture, cache)
        arguments = qemu_arguments(picture, machine, accel, recipe.cpu_features if accel == accelerator.TCG else "")
        session = _Session(folder, recipe, machine, picture, arguments, slot, kept)
        begun = time.monotonic()
        # Under KVM a boot is nearly as fast as reading its result, and need not trust that every CPU state migrates.
        resume = machine.resumable and accel == accelerator.TCG
        vm = _resumed(session) if resume else _booted(session)
        say(f"{folder.name} is up after {time.monotonic() - begun:.0f} s ({accel})")
        return vm
    finally:
        os.close(slot)  # QEMU holds its own


def description(folder: Path) -> tuple[str, list[str], str]:
    """Of the lab in `folder`: the suite of its image, what was added to its kernel's arguments, its init system."""
    try:
        suite, init, *arguments = (folder / DESCRIPTION).read_text().split()
    except FileNotFoundError as error:
        raise LabError(f"no lab runs in {folder}") from error
    return suite, arguments, init


def check_tools() -> None:
    """MissingTool when something is not there that booting (not building) needs."""
    image.check_tools(TOOLS)


def qemu_arguments(picture: Image, machine: Machine, accel: str, cpu_features: str = "") -> list[str]:
    """QEMU's argument vector; relative paths are in the lab's folder, which is its working directory."""
    append = [*KERNEL_ARGUMENTS, *machine.kernel_arguments]
    return [
        "qemu-system-x86_64",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "q35",
        "-accel", accel,
        "-cpu", accelerator.CPU[accel] + cpu_features,
        "-smp", machine.smp,
        "-m", f"{machine.memory_mib}M",
        "-kernel", str(picture.kernel),
        "-initrd", str(picture.initrd),
        "-append", " ".join(append),
        "-drive", "file=overlay.qcow2,format=qcow2,if=virtio,cache=unsafe,discard=unmap",
        "-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22",
        "-device", "virtio-net-pci,netdev=net,romfile=",
        "-device", "virtio-rng-pci",
        "-chardev", "file,id=console,path=console.log,append=on",
        "-serial", "chardev:console",
        "-serial", "file:ready.log",
        "-qmp", "unix:qmp.sock,server=on,wait=off",
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Session:
    """What the ways to start a lab have in common."""

    folder: Path
    recipe: Recipe
    machine: Machine
    picture: Image
    arguments: list[str]
    slot: int
    kept: bool


def _booted(session: _Session) -> Vm:
    """A machine that went through its whole boot, in the third attempt at the latest."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _qemu(session, session.picture.root, "raw") as process:
                _wait_ready(session.folder, process)
                return _enter(session, process)
        except LabDied as error:
            if attempt == ATTEMPTS:
                raise
            say(f"{str(error).splitlines()[0]}; booting again ({attempt + 1} of {ATTEMPTS})")
    raise AssertionError("the loop returns or raises")


def _resumed(session: _Session) -> Vm:
    """A machine that begins where an earlier one had just booted; that one is booted now if it never was."""
    saved = snapshot.snapshot_of(session.picture, session.arguments)
    if not saved.exists:
        say("booting, and writing down the result; later labs start from there")
        snapshot.write(_booted(session), saved)
    try:
        with _qemu(session, saved.disk, "qcow2", saved) as process:
            snapshot.resume(session.folder)
            vm = _enter(session, process)
            vm.run(f"date --set=@{time.time():.3f}", timeout=RESUME_SECONDS)
            return vm
    except LabError as error:
        say(f"the booted state cannot be used, booting instead: {error}")
        saved.remove()
        return _booted(session)


@contextlib.contextmanager
def _qemu(
    session: _Session, disk: Path, disk_format: str, saved: snapshot.Snapshot | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU in a clean folder on an overlay of `disk`; it is killed when the block ends with an exception."""
    folder = session.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    shutil.copy(session.picture.key, folder / "key")
    (folder / DESCRIPTION).write_text(
        " ".join([session.recipe.suite, session.recipe.init, *session.machine.kernel_arguments])
    )
    (folder / "known_hosts").write_text(f"lab {session.picture.host_key.read_text()}")
    overlay = ["-b", str(disk), "-F", disk_format, str(folder / "overlay.qcow2")]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *overlay], check=True)
    command = session.arguments
    if saved is not None:
        (folder / "saved").symlink_to(saved.state)
        shutil.copy(saved.folder / "console.log", folder / "console.log")
        command = [*command, "-incoming", "exec:cat saved"]
    if not session.kept:
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(session.slot,),
            start_new_session=True,  # Ctrl-C is for us; what ends QEMU is our close, or our death
        )
    try:
        Vm(folder, process.pid, 0).save()  # so that a kept lab can be stopped even if we do not live to see it up
        _wait_monitor(folder, process)
        yield process
    except BaseException:
        process.kill()
        process.wait()
        raise


def _enter(session: _Session, process: subprocess.Popen[bytes]) -> Vm:
    vm = Vm(session.folder, process.pid, _ssh_port(session.folder))
    vm.save()
    vm.connect()
    return vm


def _wait_monitor(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Returns when QEMU listens; LabDied, with its words, when it ended instead."""
    while not (folder / "qmp.sock").exists():
        if process.poll() is not None:
            words = (folder / "qemu.log").read_text(errors="replace")
            raise LabDied(f"QEMU ended with status {process.returncode}: {words}")
        time.sleep(0.02)


def _forget_dead_sessions(folder: Path) -> None:
    """Removes the folders of sessions that were killed; their QEMU died with them."""
    for session in folder.glob("session-*"):
        if not Path(f"/proc/{session.name.split('-')[1]}").exists():
            shutil.rmtree(session, ignore_errors=True)


def _wait_ready(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Returns when the lab says that it is up. LabDied when QEMU ended, the kernel panicked, or nothing moves."""
    console, ready = folder / "console.log", folder / "ready.log"
    seen, last_change = -1, time.monotonic()
    while True:
        ended = process.poll() is not None
        text = console.read_bytes() if console.exists() else b""
        if ready.exists() and b"lab-ready" in ready.read_bytes():
            return
        if PANIC.search(text):
            raise LabDied(f"the lab's kernel panicked while booting\n{console_tail(folder)}")
        if ended:
            words = (folder / "qemu.log").read_text(errors="replace")
            raise LabDied(
                f"QEMU ended with status {process.returncode} before the lab was up\n{words}{console_tail(folder)}"
            )
        if len(text) != seen:
            seen, last_change = len(text), time.monotonic()
        elif time.monotonic() - last_change > STALL_SECONDS:
            raise LabDied(f"the lab's console was silent for {STALL_SECONDS:.0f} s\n{console_tail(folder)}")
        time.sleep(0.2)


def _ssh_port(folder: Path) -> int:
    with monitor(folder) as qmp:
        text = qmp.human("info usernet")
    # "  TCP[HOST_FORWARD]  14       127.0.0.1 41563       10.0.2.15    22"
    found = re.search(r"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s", text)
    if found is None:
        raise LabError(f"QEMU does not say which port leads into the lab: {text!r}")
    return int(found.group(1))
