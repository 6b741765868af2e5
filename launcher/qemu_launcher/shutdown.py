"""How a VM is brought down: signals to the launcher become a power-down request, and in the end a cut.

    Ctrl-C, SIGHUP    ask the guest to power down, and wait without limit
    Ctrl-C again      cut the power: `quit`; a third time: SIGKILL
    SIGTERM           ask the guest; `quit` after shutdown_timeout, SIGKILL if QEMU does not take that either; but one
                      that is ending by then has another minute
    RequestStop       of systemd, when it ends the VM's scope: as SIGTERM

SIGHUP never cuts: a login that ends sends SIGTERM and SIGHUP in one go (SendSIGHUP= of systemd.kill(5)), and a closing
terminal may send SIGHUP twice. Signals that were ignored when the launcher was started, as nohup(1) and background
jobs of sh do, stay ignored.
The VM always ends through QEMU's own end; nothing here returns before that.
"""

import asyncio
import contextlib
import enum
import signal
from types import TracebackType
from typing import Any, Self

from .errors import QmpError
from .notify import Manager
from .process import QUIT_GRACE, Ending, Qemu
from .qmp import Event, Qmp, run_state
from .voice import Voice

_HANDLED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
# QEMU's monitor answers at once or hangs; only a hanging one is worth going on without it.
_ANSWER_TIMEOUT = 5.0  # seconds
# For QEMU to say that it has had the same signal: one to the whole process group reaches it before us, or after us.
TOGETHER = 0.5  # seconds
# For a QEMU that is ending as its time runs out: it may still have images to write back.
_WRITE_BACK = 60.0  # seconds
# The most that is left once the guest's time is over: `quit`, SIGTERM's grace, and giving back the CPUs.
_LONGEST_END = 90.0  # seconds
# RunState of qapi/run-state.json: the guest has not run an instruction, so it cannot hear a power button. Nor can one
# that has gone, by itself or to another host.
NOT_STARTED = ("prelaunch", "inmigrate", "preconfig")
GONE = ("shutdown", "postmigrate", "guest-panicked", "internal-error")
DEAF = (*NOT_STARTED, *GONE)
# Its migration to another host is about to succeed or fail; QEMU has no event for `postmigrate`.
_DEPARTING = "finish-migrate"
_LOOK = 1.0  # seconds
# It stands still, and hears it when it goes on.
STANDING = ("paused", "io-error", "watchdog", "debug")


class Signals:
    """Signals of this process as a queue. A context manager: outside of it they do what they always do."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._handled = [number for number in _HANDLED if signal.getsignal(number) != signal.SIG_IGN]

    def __enter__(self) -> Self:
        for number in self._handled:
            asyncio.get_running_loop().add_signal_handler(number, self._queue.put_nowait, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._handled:
            asyncio.get_running_loop().remove_signal_handler(number)

    async def next(self) -> signal.Signals:
        """The next signal."""
        return await self._queue.get()

    def forget(self) -> None:
        """What has come and was not taken was about something that is over."""
        while not self._queue.empty():
            self._queue.get_nowait()

    def put(self, number: signal.Signals) -> None:
        """As if this signal had come: one that was taken and not acted on, or a wish that came another way."""
        self._queue.put_nowait(number)


class _Stage(enum.Enum):
    RUNNING = enum.auto()
    ASKED = enum.auto()
    ENDING = enum.auto()
    QUITTING = enum.auto()
    KILLED = enum.auto()


class Shutdown:
    """Brings one running VM down, driven by signals and time."""

    def __init__(self, qemu: Qemu, qmp: Qmp, voice: Voice, manager: Manager, timeout: float | None) -> None:
        self._qemu = qemu
        self._qmp = qmp
        self._voice = voice
        self._manager = manager
        self._timeout = timeout
        self._stage = _Stage.RUNNING
        self._deadline: float | None = None
        self._guest_stands = asyncio.Event()
        qmp.listen(self._hear)

    async def until_ended(self, signals: Signals) -> int:
        """Wait until QEMU has ended, acting on every signal until then. Returns its exit status, 128+N for signal N."""
        loop = asyncio.get_running_loop()
        heard = asyncio.ensure_future(signals.next())
        stands = asyncio.ensure_future(self._guest_stands.wait())
        try:
            while not self._qemu.ended.done():
                waited: set[asyncio.Future[Any]] = {self._qemu.ended, heard, stands}
                left = None if self._deadline is None else max(0.0, self._deadline - loop.time())
                await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if heard.done():
                    number, heard = heard.result(), asyncio.ensure_future(signals.next())
                    await self._on_signal(number)
                elif self._deadline is not None and loop.time() >= self._deadline:
                    await self._on_deadline()
                elif stands.done():
                    self._guest_stands.clear()  # it may go on, and stand once more
                    await self._on_standing()
                    stands = asyncio.ensure_future(self._guest_stands.wait())
            return self._told(self._qemu.ended.result()).exit_status
        finally:
            for task in (heard, stands):
                task.cancel()

    def _told(self, ending: Ending) -> Ending:
        """Say so if it has crashed, or somebody has killed it: with a window of its own nothing else would."""
        if ending.code < 0 and self._stage is not _Stage.KILLED:
            hint = "journalctl -k tells whether the host ran out of memory" if -ending.code == signal.SIGKILL else None
            self._voice.warn(f"QEMU ended {ending}", hint)
        return ending

    async def _on_signal(self, number: signal.Signals) -> None:
        self._voice.step(f"heard {number.name}")
        match self._stage, number:
            case _Stage.RUNNING, _:
                await self._ask(number)
            case _Stage.ASKED | _Stage.ENDING, signal.SIGINT:
                await self._quit()
            case _Stage.ASKED, signal.SIGTERM if self._deadline is None:
                self._set_deadline(self._timeout)
            case _Stage.QUITTING, signal.SIGINT:
                self._kill()

    async def _on_deadline(self) -> None:
        if self._stage is _Stage.ASKED and self._leaves():
            self._voice.say(f"QEMU is ending, and is killed if that takes more than another {_WRITE_BACK:.0f} s")
            self._stage = _Stage.ENDING
            self._manager.stopping("QEMU is ending", _WRITE_BACK + _LONGEST_END)
            self._set_deadline(_WRITE_BACK)
            self._qemu.send(signal.SIGTERM)  # nothing to one that leaves; one that would stay after all leaves by it
        elif self._stage is _Stage.ASKED:
            self._voice.say(f"the guest did not power down within {self._timeout:.0f} s: cutting the power")
            await self._quit()
        elif self._stage in (_Stage.ENDING, _Stage.QUITTING):
            self._kill()

    async def _on_standing(self) -> None:
        """If the guest has gone and QEMU stays, as `-no-shutdown` has it: whoever asked us wants that to end, too.

        It may write its images back first, for as long as that takes, and answers nobody then.
        """
        if self._stage is not _Stage.ASKED or self._leaves():
            return
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                state = run_state(await self._qmp.execute("query-status"))
        except TimeoutError:
            self._guest_stands.set()  # it may answer once that is done
        except QmpError:
            pass
        else:
            if state in GONE:
                await self._quit()
            elif state == _DEPARTING:
                asyncio.get_running_loop().call_later(_LOOK, self._guest_stands.set)

    async def _ask(self, number: signal.Signals) -> None:
        self._stage = _Stage.ASKED
        limit = self._timeout if number == signal.SIGTERM else None
        self._manager.stopping("asked to power down", None if limit is None else limit + _LONGEST_END)
        cut = "Ctrl-C again cuts the power"
        if number != signal.SIGINT:  # it comes from elsewhere, and there may be no terminal
            cut = f"to cut its power: qemu-launcher kill {self._voice.name}"
        if await self._is_leaving(number):
            self._say_leaving(cut)
            self._set_deadline(limit)
            return
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                state = run_state(await self._qmp.execute("query-status"))
                hears = state not in DEAF
                if hears:
                    await self._qmp.execute("system_powerdown")
        except (QmpError, TimeoutError) as err:
            if self._leaves():
                self._say_leaving(cut)
            else:
                self._voice.say(f"the guest cannot be asked to power down: {str(err) or 'QEMU does not answer'}")
        else:
            if not hears:
                await self._quit()  # a power button that nobody can hear would be waited for without end
                return
            within = "" if limit is None else f" within {limit:.0f} s"
            self._voice.say(f"asked the guest to power down{within}; {cut}")
            if state in STANDING:  # for a reason that we do not know
                resume = f"qemu-launcher resume {self._voice.name}"
                self._voice.say(f"{stillness(state)}, and hears that when it goes on: {resume}")
            elif state == _DEPARTING:
                self._guest_stands.set()
        self._set_deadline(limit)

    async def _is_leaving(self, number: signal.Signals) -> bool:
        """Whether QEMU is on its way out, perhaps by the same signal; SIGINT never reaches it."""
        if number != signal.SIGINT:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TOGETHER):
                    await self._qmp.leaving.wait()
        return self._leaves()

    def _leaves(self) -> bool:
        return self._qmp.leaving.is_set() or self._qemu.ended.done()

    def _say_leaving(self, cut: str) -> None:
        if not self._qemu.ended.done():
            self._voice.say(f"QEMU is ending already; {cut}")

    async def _quit(self) -> None:
        self._stage = _Stage.QUITTING
        self._manager.status("cutting the power")
        self._set_deadline(QUIT_GRACE)
        await quit_qemu(self._qemu, self._qmp)

    def _kill(self) -> None:
        self._stage = _Stage.KILLED
        self._set_deadline(None)
        self._voice.say("QEMU does not quit: killing it")
        self._qemu.send(signal.SIGKILL)

    def _set_deadline(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds

    def _hear(self, event: Event) -> None:
        if event.get("event") == "STOP":
            self._guest_stands.set()


def stillness(state: str) -> str:
    """How a guest in one of these states stands still, as the beginning of a sentence."""
    return "it is paused" if state == "paused" else f"it stands still ({state})"


async def quit_qemu(qemu: Qemu, qmp: Qmp | None) -> None:
    """Tell QEMU to leave: by `quit`, or by SIGTERM, which it takes for the same but comments on."""
    if qmp is not None and not qmp.leaving.is_set():
        with contextlib.suppress(QmpError, TimeoutError):
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                await qmp.execute("quit")
                return
    qemu.send(signal.SIGTERM)
