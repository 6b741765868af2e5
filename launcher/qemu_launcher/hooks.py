"""The user's own commands before QEMU is started and after it has ended: before_start and after_stop.

Why it exists: swtpm, virtiofsd and the like must be there before QEMU, and go after it. Each command runs as the user
that the VM is, in the foreground until it has ended, in the definition's environment and directory; one that is to stay
puts itself into the background. None inherits a descriptor of ours but stdout and stderr, so that a daemon cannot keep
the VM's lock; none has the terminal's input, and each is a process group of its own, so that Ctrl-C reaches it through
us alone: as SIGTERM to the group, and SIGKILL to what is left of it when the command has ended, or does not end.

before_start: the first that does not exit 0, or cannot be started, is HookFailed, and QEMU is not started.
after_stop: runs whenever before_start was begun, as ExecStopPost= of systemd.service(5), so also after a failed start;
all of them run, whatever the others did. A failure is a warning, and exit status 1 where it would have been 0.
"""

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import unexpanded
from .definition import HookCommand, VmDefinition
from .errors import HookFailed
from .patience import patiently
from .process import QUIT_GRACE, Ending
from .shutdown import Signals
from .voice import Voice


class Hooks:
    """The commands of one VM; `directory` is where its lock and its sockets are."""

    def __init__(self, definition: VmDefinition, directory: Path, voice: Voice, signals: Signals) -> None:
        self._definition = definition
        self._voice = voice
        self._signals = signals
        self._env = {
            **definition.environment(os.environ),
            "QEMU_LAUNCHER_VM": definition.name,
            "QEMU_LAUNCHER_RUNTIME_DIR": str(directory),
        }

    async def before_start(self) -> signal.Signals | None:
        """Run them in order. HookFailed at the first that fails; a signal that came meanwhile, if one did."""
        for command in self._definition.before_start:
            interrupted = await self._run("before_start", command, (signal.SIGINT, signal.SIGHUP, signal.SIGTERM))
            if interrupted is not None:
                return interrupted
        return None

    async def after_stop(self) -> bool:
        """Run all of them, in order. Returns whether all went well; says so where one did not.

        SIGTERM is no reason to cut one short, everything ends anyway; Ctrl-C is.
        """
        well = True
        self._signals.forget()
        for command in self._definition.after_stop:
            try:
                interrupted = await self._run("after_stop", command, (signal.SIGINT,))
            except HookFailed as err:
                self._voice.warn(err.message, err.hint)
                well = False
            else:
                well = well and interrupted is None
        return well

    async def _run(self, key: str, command: HookCommand, heeded: Sequence[signal.Signals]) -> signal.Signals | None:
        shown = shlex.join(command.argv)
        self._voice.step(f"{key}: {shown}")
        began = time.monotonic()
        try:
            process = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                env=self._env,
                cwd=self._definition.working_directory,
                process_group=0,
            )
        except OSError as err:
            raise _not_started(key, command, err, self._env) from err

        def tell() -> None:
            self._voice.note(f"{key}: waiting for {shown} to end; what is to stay must put itself into the background")

        interrupted = await patiently(self._ended(process, heeded), tell)
        ending = Ending(process.wait())
        self._voice.step(f"{key}: {command.argv[0]} ended {ending}, {(time.monotonic() - began) * 1000:.0f} ms")
        if interrupted is not None:
            self._voice.say(f"{key}: {command.argv[0]} was ended by {interrupted.name}")
            return interrupted
        if ending.code != 0:
            hint = f"its command line: {shown}"
            raise HookFailed(f"{command.mark}: {key}: {command.argv[0]!r} ended {ending}", hint)
        return None

    async def _ended(
        self, process: "subprocess.Popen[bytes]", heeded: Sequence[signal.Signals]
    ) -> signal.Signals | None:
        """Wait for its end; bring it about on a signal that is heeded, which is returned."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        fd = os.pidfd_open(process.pid)  # not reaped yet: the number is its own

        def note() -> None:
            loop.remove_reader(fd)
            ended.set_result(None)

        loop.add_reader(fd, note)
        try:
            while True:
                heard = asyncio.ensure_future(self._signals.next())
                waited: set[asyncio.Future[Any]] = {ended, heard}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if not heard.done():
                    heard.cancel()
                    await asyncio.wait([heard])
                    return None
                if heard.result() not in heeded:
                    continue
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
                    await asyncio.wait([ended], timeout=QUIT_GRACE if number == signal.SIGTERM else None)
                return heard.result()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
            if process.poll() is None:  # we are being cancelled
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _not_started(key: str, command: HookCommand, err: OSError, env: dict[str, str]) -> HookFailed:
    program = command.argv[0]
    message = f"{command.mark}: {key}: cannot start {program!r}: {err.strerror}"
    if err.filename is not None and os.fspath(err.filename) != program:
        folder = os.fspath(err.filename)
        return HookFailed(f"{message}: {folder!r}", unexpanded.hint(folder, "see working_directory"))
    if isinstance(err, FileNotFoundError) and "/" not in program:
        return HookFailed(message, f"install it, or give its whole path; PATH is {':'.join(os.get_exec_path(env))}")
    return HookFailed(message, unexpanded.hint(program))
