"""One run of one VM, from its definition to its exit status.

Why it exists: this is the story, and every other module of the launcher is a part of it. Read `_run`, then `_Start`.

Refused before anything is started: a definition that does not fit the host, a user we cannot become, a VM that runs
already. Until `cont` any failure, any signal and any death ends QEMU, and the guest has not run an instruction. From
`cont` on the guest comes first: it ends by itself, as its user wishes, or with QEMU, but not because the launcher
failed. After `cont` nothing is imported any more: the launcher lives as long as its guest, and the files under it may
be upgraded or removed meanwhile.
"""

import asyncio
import contextlib
import os
import shlex
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

from . import (
    absence,
    cmdline,
    fitting,
    host,
    identity,
    locate,
    monitors,
    procfs,
    runtime,
    terminal,
    threads,
    tune,
    unexpanded,
)
from .awake import Awake
from .cpulist import format_cpulist
from .definition import VmDefinition, validate_tunable
from .errors import MOST_PROBLEMS, DefinitionError, LauncherError, QemuFailed, QmpError
from .hooks import Hooks
from .hotplug import Hotplug
from .monitors import Monitors
from .notify import Manager
from .patience import patiently, retrieved
from .process import QUIT_GRACE, Command, Qemu, forked
from .programs import which
from .qmp import ConnectionLost, Qmp, QmpRefused
from .ram import guest_ram
from .record import RUNNING, UNHELD
from .relay import Relay
from .runtime import Claim
from .shutdown import TOGETHER, Shutdown, Signals, quit_qemu
from .sizes import format_size
from .starter import Starter
from .threads import Threads
from .tune import Spelled, Tuning
from .voice import Voice

# The original tool made its cpusets as its caller said here. The helper does not let itself be told where.
_OF_THE_ORIGINAL = ("QEMU_LAUNCHER_CPUSET_MOUNT_PATH", "QEMU_LAUNCHER_CPUSET_PREFIX")


class _Run(NamedTuple):
    """What every step of one run is about, and speaks through."""

    definition: VmDefinition
    spelled: Spelled
    voice: Voice
    manager: Manager
    starter: Starter
    signals: Signals
    claim: Claim
    tuning: Tuning


def run(definition: VmDefinition, starter: Starter, *, untuned: bool, quiet: bool, debug: bool = False) -> int:
    """Run the VM until it ends. Returns QEMU's exit status, 128+N if signal N ended it. Raises LauncherError."""
    voice = Voice(definition.name, quiet=quiet, explains=debug or definition.debug, hear=starter.say)
    voice.step(f"definition {definition.path}{', untuned' * untuned}")
    # As long as the environment is the user's who reads it.
    named = locate.shell_word(definition.name, definition.path, os.environ)
    spelled = Spelled(named, "start" if starter.is_there else "run")
    if not untuned:
        _validate_tuning(definition, spelled, voice)
    manager = Manager.taken(os.environ)
    identity.assume(definition)
    voice.step(f"user {os.geteuid()}, group {os.getegid()}, groups {', '.join(map(str, os.getgroups())) or 'none'}")
    return asyncio.run(_run(definition, spelled, voice, manager, starter, untuned=untuned))


def _validate_tuning(definition: VmDefinition, spelled: Spelled, voice: Voice) -> None:
    try:
        validate_tunable(definition)
        if definition.places_threads:
            here = host.read_host()
            voice.step(f"host CPUs {format_cpulist(here.online)} are online, {format_cpulist(here.possible)} possible")
            fitting.validate_against_host(definition, here)
    except LauncherError as err:
        last = err.problems[:MOST_PROBLEMS][-1] if isinstance(err, DefinitionError) else err
        last.hint = tune.with_way_out(last.hint, spelled)
        raise


async def _run(
    definition: VmDefinition, spelled: Spelled, voice: Voice, manager: Manager, starter: Starter, *, untuned: bool
) -> int:
    manager.status("starting")
    for warning in definition.warnings:
        voice.warn(warning)
    if not_read := [name for name in _OF_THE_ORIGINAL if name in os.environ]:
        which = f"{' and '.join(not_read)} {'are' if len(not_read) > 1 else 'is'} not read"
        voice.note(f"{which}: shielding is set up by root, see qemu-launcher-helper.toml(5)")
    async with AsyncExitStack() as stack:
        # From here on a signal is a wish, not an end; and nobody else starts this VM.
        signals = stack.enter_context(Signals())
        claim, discarded = stack.enter_context(runtime.claimed(definition.name, definition.path))
        voice.step(f"locked {claim.lock}")
        if discarded is not None:
            voice.say(f"ended a QEMU (PID {discarded.pid}) whose guest had never been started")
        stack.enter_context(terminal.kept())
        tuning = await stack.enter_async_context(
            Tuning(definition, spelled, voice, lambda: signals.put(signal.SIGTERM), untuned=untuned)
        )

        # What the user has to be there before QEMU, and gone after it.
        _check_command(definition)
        hooks = Hooks(definition, claim.directory, voice, signals)
        status, well = 0, True
        try:
            with starter.wanted(asyncio.get_running_loop(), lambda: signals.put(signal.SIGINT)):
                interrupted = await hooks.before_start()
            if interrupted is not None:
                status = 128 + interrupted
            else:
                status = await _run_qemu(_Run(definition, spelled, voice, manager, starter, signals, claim, tuning))
        finally:
            if claim.record.qemu is None or not claim.record.qemu.is_alive():
                well = await hooks.after_stop()
        return status if well or status != 0 else 1


async def _run_qemu(run: _Run) -> int:
    """QEMU from its fork to its end. Returns its exit status, 128+N if signal N ended it, or ended its start."""
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        # Decided once, for -S and for `cont`: tuning that has failed and is left out is not wanted any more.
        holds_guest = run.tuning.wanted

        # The child waits at its gate; before it may pass, the lock file says that it exists.
        relay = stack.enter_context(Relay(run.starter.say)) if run.starter.is_there else None
        with monitors.made(run.claim.listening_socket()) as made:
            command = _command(run, made, relay, holds_guest=holds_guest)
            qemu = forked(command)
            stack.callback(made.ours.close)
        if relay is not None:
            relay.handed_over()
        stack.push_async_callback(_after_end, qemu, run.tuning)
        await stack.enter_async_context(qemu)
        run.claim.update(qemu=qemu.process)
        run.voice.step(f"PID {qemu.pid} will execute{_surroundings(run.definition)}: {shlex.join(command.argv)}")

        # QEMU starts, its guest held; is tuned; and let go. Or it ends, and so do we.
        awake = stack.enter_context(Awake(run.definition, run.voice))
        start = _Start(run, awake, qemu, holds_guest=holds_guest)
        stack.push_async_callback(start.close)
        with run.starter.wanted(asyncio.get_running_loop(), lambda: run.signals.put(signal.SIGINT)):
            outcome = await _started(start, made)
        if isinstance(outcome, int):
            return outcome
        outlook = f"{_stillness(run.definition) or 'running'}, {run.tuning.summary()}"
        run.manager.ready(outlook)
        run.voice.note(f"{outlook}, {time.monotonic() - began:.1f} s")
        run.starter.running()

        # The guest runs, for days perhaps: nothing is left to do but to listen.
        settling = asyncio.ensure_future(start.settle())
        settling.add_done_callback(start.unsettled)
        shutdown = Shutdown(qemu, outcome, run.voice, run.manager, run.definition.shutdown_timeout)
        status = await shutdown.until_ended(run.signals)
        run.voice.step(f"QEMU ended {qemu.ended.result()}")
        settling.cancel()
        await asyncio.wait([settling])
        return status


async def _after_end(qemu: Qemu, tuning: Tuning) -> None:
    """Take back what QEMU had, whether its guest ever ran or not; unless QEMU runs on without us."""
    if qemu.ended.done():
        await tuning.after_end()


class _Start:
    """The way of one QEMU from its gate to its running guest."""

    def __init__(self, run: _Run, awake: Awake, qemu: Qemu, *, holds_guest: bool) -> None:
        self.run = run
        self.qemu = qemu
        self.qmp: Qmp | None = None
        self.holds_guest = holds_guest
        self._found: Threads | None = None
        self._awake = awake

    async def until_running(self, made: Monitors) -> Qmp:
        """Returns the monitor when the guest runs; or when it stands still because its user wants it to."""
        tuning, claim, voice = self.run.tuning, self.run.claim, self.run.voice
        await tuning.before_exec(self.qemu)
        if not self.holds_guest:
            claim.update(state=UNHELD)
        await self.qemu.open_gate()
        self._awake.begin()
        await tuning.while_starting()
        self.qmp = qmp = await patiently(
            Qmp.negotiated(made.ours, voice.step if voice.explains else None), self._tell_progress
        )
        found = await self._threads(qmp)
        self._found = found
        claim.update(vcpus=found.tids())
        await tuning.before_cont(self.qemu, found)
        await self._awake.settle()
        # Written first: a guest that ran must never be taken for one that did not.
        isolation, cpus = tuning.placement
        claim.update(state=RUNNING, isolation=isolation, cpus=cpus)
        # With -incoming this starts nothing yet: QEMU will let the guest run when it has come, as without our -S.
        if self.holds_guest and not cmdline.has_option(self.run.definition, "S"):
            await qmp.execute("cont")
        self.qemu.let_run()
        return qmp

    async def settle(self) -> None:
        """What is left to do while the guest runs: sort threads, hear systemd, tune vCPUs that are plugged in."""
        await self.run.tuning.after_cont(self.qemu)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.run.tuning.until_bus_is_lost())
            qmp, found = self.qmp, self._found
            if qmp is not None and found is not None and self.run.tuning.follows_vcpus:
                watch = Hotplug(self.qemu.pid, found, lambda: self._read_threads(qmp), self._follow)
                tasks.create_task(watch.watch(qmp))

    def unsettled(self, settling: asyncio.Future[None]) -> None:
        """Say that nobody looks after it any more, if that ended otherwise than with QEMU: no failure ends a guest."""
        if settling.cancelled() or (error := settling.exception()) is None or self.qemu.ended.done():
            return
        first = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
        self.run.voice.warn(
            f"cannot look after it any more: {type(first).__name__}: {first}; the guest runs on",
            "vCPUs that are plugged in are not tuned, and systemd cannot ask it to power down",
        )

    async def _follow(self, found: Threads) -> None:
        news = await self.run.tuning.follow(self.qemu, found)
        isolation, cpus = self.run.tuning.placement
        try:
            self.run.claim.update(vcpus=found.tids(), isolation=isolation, cpus=cpus)
        except LauncherError as err:
            self.run.voice.warn(f"{err.message}; `status` does not know of its new vCPUs", err.hint)
        for line in news:
            self.run.voice.note(line)

    async def close(self) -> None:
        """Let go of the monitor, however far the start has come."""
        if self.qmp is not None:
            await self.qmp.close()

    async def _threads(self, qmp: Qmp) -> Threads:
        try:
            return await self._read_threads(qmp)
        except QmpRefused:
            if self.holds_guest:
                raise
            # Under -preconfig there are none yet. Only `status` would like to know, and asks for itself.
            return Threads((), ())

    async def _read_threads(self, qmp: Qmp) -> Threads:
        cpus = await qmp.execute("query-cpus-fast")
        possible = None
        if self.holds_guest:
            with contextlib.suppress(QmpRefused):  # a machine without CPU hotplug: what is there is all there can be
                possible = await qmp.execute("query-hotpluggable-cpus")
        found = threads.read_threads(cpus, possible, await qmp.execute("query-iothreads"))
        strangers = {vcpu.tid for vcpu in found.vcpus} - set(procfs.tids(self.qemu.pid))
        if strangers:
            raise LauncherError(
                f"QEMU is not the process that was started (PID {self.qemu.pid}), but another one below it",
                "a wrapper script as binary: must end in exec qemu-system-x86_64, so that QEMU takes its place",
            )
        return found

    def _tell_progress(self) -> None:
        ram, used = guest_ram(self.run.definition.options), procfs.resident(self.qemu.pid)
        if ram is not None and used is not None and self.holds_guest:
            progress = f"preparing memory, {format_size(min(used, ram))} of {format_size(ram)}"
        else:
            progress = "QEMU is still starting"
        self.run.manager.status(progress)
        self.run.voice.note(progress)


async def _started(start: _Start, made: Monitors) -> Qmp | int:
    """The monitor of a running guest; the exit status if QEMU has ended, or a signal has ended it, before that."""
    qemu, signals = start.qemu, start.run.signals
    starting = asyncio.ensure_future(start.until_running(made))
    starting.add_done_callback(retrieved)
    interrupted = asyncio.ensure_future(signals.next())
    waited: set[asyncio.Future[Any]] = {starting, interrupted, qemu.ended}
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not qemu.ended.done() and starting.done() and isinstance(starting.exception(), ConnectionLost):
            await asyncio.wait([qemu.ended], timeout=QUIT_GRACE)  # its sockets close a moment before it ends
        if qemu.ended.done():
            code = qemu.ended.result().code
            if code in (0, -signal.SIGTERM):  # by the same signal as we, perhaps, which may come to us a moment later
                await asyncio.wait([interrupted], timeout=TOGETHER if code else 0)
                if interrupted.done():
                    return 128 + interrupted.result()
            return _early_end(start)
        if starting.done():
            if interrupted.done():
                signals.put(interrupted.result())
            return await _result_or_quit(start, starting)
        starting.cancel()
        await asyncio.wait([starting])
        if interrupted.result() == signal.SIGTERM:  # to the whole process group, perhaps
            await asyncio.wait([qemu.ended], timeout=TOGETHER)
        await quit_qemu(qemu, start.qmp)
        await asyncio.wait([qemu.ended], timeout=QUIT_GRACE)
        await qemu.end()
        return 128 + interrupted.result()
    finally:
        for task in (starting, interrupted):
            task.cancel()
        await asyncio.wait(waited - {qemu.ended})


async def _result_or_quit(start: _Start, starting: asyncio.Future[Qmp]) -> Qmp:
    try:
        return starting.result()
    except LauncherError as err:
        if isinstance(err, QmpError) and start.holds_guest:
            err.hint = tune.with_way_out(err.hint, start.run.spelled)
        await quit_qemu(start.qemu, start.qmp)
        await asyncio.wait([start.qemu.ended], timeout=QUIT_GRACE)
        raise


def _early_end(start: _Start) -> int:
    """QEMU ended before its guest was known to run. Its own words are on the terminal already."""
    run, qemu = start.run, start.qemu
    if (failure := qemu.exec_failure()) is not None:
        raise failure
    ending = qemu.ended.result()
    if ending.code == 0:
        return 0  # -version, -device help, a `quit` in the user's own monitor
    hint = (
        f"what this host lacks for it, if anything: qemu-launcher check {run.spelled.vm}\n"
        f"its command line, to be run by hand: {cmdline.shell_command(run.definition, wrapped=False)}"
    )
    if unexpanded.is_among(qemu.command.argv):
        hint = f"{unexpanded.HINT}\n{hint}"
    if (suspicion := run.tuning.suspicion()) is not None:
        hint = tune.with_way_out(f"{suspicion}\n{hint}", run.spelled)
    raise QemuFailed(f"QEMU ended {ending} before the guest ran", hint, exit_status=ending.exit_status)


def _command(run: _Run, made: Monitors, relay: Relay | None, *, holds_guest: bool) -> Command:
    """QEMU's own options come last: one whose value is missing must not swallow ours."""
    binary, *options = cmdline.qemu_argv(run.definition)
    hold = ("-S",) if holds_guest else ()
    return Command(
        argv=(binary, *made.arguments, *hold, *options),
        env=run.definition.environment(os.environ),
        working_directory=run.definition.working_directory,
        inherited=(run.claim.lock_fd, *made.inherited),
        soft_memlock=run.tuning.soft_memlock,
        stderr=None if relay is None else relay.writing,
    )


def _surroundings(definition: VmDefinition) -> str:
    """` in /srv/vms, with only DISPLAY in its environment`: what of them the definition says."""
    place = f" in {definition.working_directory}" if definition.working_directory else ""
    if not (definition.clear_env or definition.env):
        return place
    names = ", ".join(name for name, _ in definition.env) or "nothing"
    return f"{place}, with {'only ' * definition.clear_env}{names} in its environment"


def _check_command(definition: VmDefinition) -> None:
    """What is wrong with it that can be told before the user's own commands run, and with its place."""
    binary, env, folder = definition.binary, definition.environment(os.environ), definition.working_directory
    if folder is not None and not os.access(folder, os.X_OK):
        hint = unexpanded.hint(str(folder), "make it, or correct the path")
        mark = definition.marks["working_directory"]
        raise DefinitionError(f"there is no folder {str(folder)!r}, or it is closed to you", hint, mark=mark)
    if not definition.may_bring_binary and which(binary, env, folder or Path()) is None:
        raise DefinitionError(*absence.qemu(binary, env), mark=definition.marks["binary"])


def _stillness(definition: VmDefinition) -> str | None:
    """What the guest does while it stands still because its user himself wants it to; None if it is to run at once."""
    ways = {"preconfig": "waiting in preconfig", "incoming": "waiting for its migration", "S": "paused"}
    words = [word for option, word in ways.items() if cmdline.has_option(definition, option)]
    return f"{words[0]}, as you asked" if words else None
