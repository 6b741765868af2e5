"""`qemu-launcher start`: a VM in the background. We stay until its guest runs, or until it is clear why it does not.

Where the user has a systemd user manager the VM becomes a service of that, in a transient unit qemu-launcher-NAME: it
is then in nobody's session, its messages are in the journal, and it is powered down when the user manager ends. Not in
the installed unit qemu-launcher@NAME: that has the user manager's environment and not this terminal's, it knows names
and not paths, and who has changed or enabled it has done so for the boot. Elsewhere the launcher is a process of its
own session, with its messages in a file.

Either way it is `qemu-launcher run`, which knows by an environment variable that we wait, and speaks to us over a
socket (module `starter`): we pass on what it says, and end with its exit status, or with 0 once the guest runs, and
only then: `start x && viewer` counts on it. Ctrl-C, or our death, until then is the end of the start.

Refused here, before anything is started: a wrong definition, and a VM that runs. All else the launcher refuses itself.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import cmdline, control, definition, locate, programs, rundir, runtime, starter, stdout, unseen, users
from .definition import VmDefinition
from .errors import LauncherError, QemuFailed
from .voice import Voice

SYSTEMD_RUN = "systemd-run"
SERVICE = (
    # As in launcher/qemu-launcher@.service, where the reasons are.
    *("KillMode=mixed", "TimeoutStartSec=infinity", "SuccessExitStatus=143", "Documentation=man:qemu-launcher(1)"),
    "SyslogIdentifier=qemu-launcher",  # instead of the interpreter's name
)
LINGER = Path("/var/lib/systemd/linger")  # a file for each user: loginctl(1), enable-linger
# After its QEMU a launcher still has CPUs to give back, and systemd a unit to forget.
_ATTEMPTS, _PAUSE = 100, 0.1  # seconds between them
_INTERRUPTED = 128 + signal.SIGINT


class _Child(NamedTuple):
    """What is to be started: the VM, also as it is spelled on a command line; the launcher's argv, and for whom."""

    name: str
    spelled: str
    argv: Sequence[str]
    environ: Mapping[str, str]
    directory: str


def start(vm: str, options: Sequence[str], commands: Sequence[str], *, quiet: bool) -> int:
    """Start a VM in the background, with these options of `run`.

    Returns 0 when its guest runs, else the launcher's exit status. Raises QemuFailed if that is 0.
    """
    name, path = locate.find(vm, os.environ, commands)
    defined = definition.load(path, name)
    found = runtime.find(name)
    if found is not None and (refusal := runtime.refused(found)) is not None:
        raise control.with_stillness(refusal, name)
    voice = Voice(name, quiet=quiet)
    _mention_terminal(defined, voice, vm)
    spelled = locate.shell_word(name, path, os.environ)
    child = _Child(name, spelled, [*_ourselves(), "run", *options, "--", vm], os.environ, _here())
    place = None if _becomes_somebody_else(defined) else _user_manager(os.environ)
    if place is None:
        return _detached(child, voice)
    return _as_service(child, place, voice)


def _here() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError as err:
        raise LauncherError(
            f"the folder that you are in is gone, or closed to you: {err.strerror}", "go to another one: cd"
        ) from err


def _mention_terminal(defined: VmDefinition, voice: Voice, vm: str) -> None:
    option = cmdline.terminal_option(defined)
    if option is not None:
        voice.warn(
            f"-{option.bare_name} ({option.mark}) has no terminal in the background: what the guest writes there is "
            "among the messages, and no key reaches it",
            f"to use that terminal: qemu-launcher run {vm}",
        )


def _becomes_somebody_else(defined: VmDefinition) -> bool:
    """Root's user manager is no place for a VM of another user: the helper looks for it below that user's slice."""
    return os.geteuid() == 0 and defined.user not in (None, 0, "root")


def _ourselves() -> list[str]:
    """How this very program was started, up to its first argument."""
    own = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if own[-1] == sys.argv[0]:  # a script; else -m or -c and what belongs to it
        own[-1] = os.path.abspath(own[-1])  # noqa: PTH100  which does not resolve links
    return [sys.executable, *own[1:]]


# A service of the user manager


def _user_manager(environ: Mapping[str, str]) -> Path | None:
    """The runtime directory of a user manager; None without one, or without the program to ask it."""
    if programs.which(SYSTEMD_RUN, environ) is None:
        return None
    place = Path(environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}")
    # Only looked at: systemd complains in the journal about who connects and says nothing.
    return place if os.access(place / "systemd/private", os.W_OK) else None


def _as_service(child: _Child, place: Path, voice: Voice) -> int:
    unit = f"qemu-launcher-{child.name}.service"
    manager, talk = _started_service(child, unit, place)
    messages = f"journalctl --user -u {unit}"
    status = talk.until_last_word(child, messages)
    manager.communicate()  # it returns when the unit has started, or has been forgotten
    if status is None:
        _mention_logout(child.environ, voice)
        return 0
    return _failure(status, child, messages)


def _started_service(child: _Child, unit: str, place: Path) -> "tuple[subprocess.Popen[bytes], _Talk]":
    """systemd-run, which waits for it, and the launcher. LauncherError if systemd does not start it."""
    with _ending_in_order(), rundir.listening(f"{child.name}.{os.getpid()}.start") as (listener, path):
        for _ in range(_ATTEMPTS):
            manager = _ask_manager(child, unit, place, path)
            if (talk := _accepted(listener, manager)) is not None:
                return manager, talk
            _, words = manager.communicate()
            if not _is_ending(unit, place):
                break
            time.sleep(_PAUSE)  # the last one of this name is on its way out
    raise LauncherError(
        f"your systemd did not start it: {words.decode(errors='replace').strip() or 'it does not say why'}",
        f"see what it says with: systemctl --user status {unit}\nor start it here: qemu-launcher run {child.spelled}",
    )


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGHUP and SIGTERM leave the context as Ctrl-C does, and then end us as they would have at once.

    A login that ends sends both in one go: what comes after the first is not needed any more.
    """
    heard: list[int] = []

    def end(number: int, _: object) -> None:
        heard.append(number)
        if len(heard) == 1:
            raise KeyboardInterrupt

    handled = [one for one in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(one) == signal.SIG_DFL]
    for one in handled:
        signal.signal(one, end)
    try:
        yield
    finally:
        for one in handled:
            signal.signal(one, signal.SIG_DFL)
        if heard:
            os.kill(os.getpid(), heard[0])


def _ask_manager(child: _Child, unit: str, place: Path, path: Path) -> "subprocess.Popen[bytes]":
    about = [f"--unit={unit}", f"--description=Virtual machine {child.name}", "--service-type=notify"]
    settings = [f"--property={setting}" for setting in SERVICE]
    # systemd replaces $NAME in the words of a command line, and $$ by $: systemd.service(5), "Command lines".
    words = [word.replace("$", "$$") for word in child.argv]
    return subprocess.Popen(
        [
            *(SYSTEMD_RUN, "--user", "--quiet", "--collect", *about, *settings),
            *(f"--setenv={starter.VARIABLE}={path}", "--", *words),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**child.environ, "XDG_RUNTIME_DIR": str(place)},
    )


def _accepted(listener: socket.socket, manager: "subprocess.Popen[bytes]") -> "_Talk | None":
    """The launcher, once it has been started; None if systemd has given up before."""
    manager_ended = os.pidfd_open(manager.pid)
    try:
        readable, _, _ = select.select([listener.fileno(), manager_ended], [], [])
        if listener.fileno() not in readable:
            return None
        connection, _ = listener.accept()
        return _Talk(connection)
    except KeyboardInterrupt:  # a launcher that comes all the same finds nobody
        manager.terminate()  # of Ctrl-C it has heard too, unless the shell has us ignore that: start NAME &
        manager.communicate()
        raise
    finally:
        os.close(manager_ended)


def _is_ending(unit: str, place: Path) -> bool:
    asked = subprocess.run(
        ["systemctl", "--user", "show", "--property=ActiveState", "--value", unit],
        env={**os.environ, "XDG_RUNTIME_DIR": str(place)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return asked.stdout.strip() == b"deactivating"


def _mention_logout(environ: Mapping[str, str], voice: Voice) -> None:
    """On a desktop everybody expects it; who has come through ssh may not."""
    is_desktop = environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY")
    if ("SSH_CONNECTION" in environ or not is_desktop) and not (LINGER / users.own_name()).exists():
        voice.note("it is powered down when your last login ends; to have it stay: loginctl enable-linger")


# A process of its own


def _detached(child: _Child, voice: Voice) -> int:
    log = _log_file(child)
    ours, theirs = socket.socketpair()
    with theirs, open(log, "wb", opener=_open_private) as messages:
        launcher = subprocess.Popen(
            child.argv,
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            start_new_session=True,
            pass_fds=[theirs.fileno()],
            env={**child.environ, starter.VARIABLE: str(theirs.fileno())},
        )
    status = _Talk(ours).until_last_word(child, f"cat {log}")
    if status is None:
        voice.note(f"its messages go to {log}")
        return 0
    launcher.wait()
    return _failure(status, child, f"cat {log}")


def _log_file(child: _Child) -> Path:
    folder = locate.base_directory(child.environ, "XDG_STATE_HOME", "~/.local/state") / rundir.DIRECTORY
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / f"{child.name}.log"


def _open_private(path: str, flags: int) -> int:
    # Both the launcher and QEMU write to it; it begins anew with each start, so that it does not grow for ever.
    return os.open(path, flags | os.O_APPEND | os.O_NOFOLLOW, 0o600)


# What is said


def _failure(status: int, child: _Child, where_more_is: str) -> int:
    """The exit status of a start whose guest does not run; QemuFailed where QEMU sees nothing wrong with that.

    It ends well after -version or -machine help, say; what it prints goes where its messages go.
    """
    if status == 0:
        hint = f"see what it has said: {where_more_is}\nor have it said here: qemu-launcher run {child.spelled}"
        raise QemuFailed("QEMU ended with exit status 0 before the guest ran", hint)
    return status


class _Talk:
    """Our end of the socket to the launcher that is being started."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._interrupted = False

    def until_last_word(self, child: _Child, where_more_is: str) -> int | None:
        """Pass on what the launcher says. None when the guest runs; else its exit status.

        The first Ctrl-C asks it to give up, the second ends us. LauncherError if it ends without its last word.
        """
        said: list[str] = []
        with self._connection, self._giving_up():
            greeting = {"environment": dict(child.environ), "directory": child.directory}
            with contextlib.suppress(BrokenPipeError):
                self._connection.sendall(json.dumps(greeting).encode() + b"\n")
            for line in self._lines():
                message = json.loads(line)
                if "say" in message:
                    said.append(message["say"])
                    stdout.say_on_stderr(message["say"])
                elif "running" in message:
                    return None
                else:
                    if self._interrupted:
                        return int(message["status"]) or _INTERRUPTED
                    if message["status"] != 0:
                        unseen.show(child.name, "".join(said), child.environ)
                    return int(message["status"])
        if self._interrupted:
            return _INTERRUPTED
        raise LauncherError(
            f"the launcher of {child.name} has ended without saying why", f"see what it has said: {where_more_is}"
        )

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        def give_up(*_: object) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)

        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            yield
            return
        before = signal.signal(signal.SIGINT, give_up)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _lines(self) -> Iterator[bytes]:
        rest = b""
        while data := self._receive():
            *lines, rest = (rest + data).split(b"\n")
            yield from lines

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(1 << 16)
        except ConnectionResetError:
            return b""
