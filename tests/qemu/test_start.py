"""`qemu-launcher start`: a VM in the background, with and without a user manager of systemd; the lab has a real one."""

import abc
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import PATIENCE, ROOT, Home, hear, is_alive, wait_gone, wait_until
from qemu.test_finding import held_binary

VM = "vm-under-test"
# What is said of a QEMU that takes more than three seconds.
STILL = "QEMU is still starting"


class World(abc.ABC):
    """A home in which VMs are started in the background, and what stands in for systemd there."""

    def __init__(self, home: Home, desk: Path) -> None:
        self.home = home
        self.desk = desk
        home.runtime = desk / "runtime"  # a socket's path has 108 bytes, and pytest's folders are deep
        home.runtime.mkdir(mode=0o700)
        home.environment |= {"XDG_RUNTIME_DIR": str(home.runtime), "XDG_STATE_HOME": str(home.configuration / "state")}
        for name in ("SSH_CONNECTION", "DBUS_SESSION_BUS_ADDRESS"):
            home.environment.pop(name, None)
        home.environment["DISPLAY"] = ":77"  # as on a desktop; nothing here opens it

    def start(self, *words: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        done = self.home.ask("start", *(words or (VM,)), env=env)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stdout == ""
        return done

    def begin(self, *before: str) -> "subprocess.Popen[bytes]":
        """Start, and do not wait. `before`: what stands before the command, env(1) say."""
        return subprocess.Popen(
            [*before, *self.home.command("start", VM)],
            env=self.home.environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,
        )

    @property
    @abc.abstractmethod
    def messages(self) -> str:
        """What the launcher and QEMU have said."""

    def launcher(self, name: str = VM) -> int:
        return int(self.home.record(name)["launcher"][0])

    def qemu(self, name: str = VM) -> int:
        return int(self.home.record(name)["qemu"][0])

    def sockets(self) -> list[str]:
        return [path.name for path in (self.home.runtime / "qemu-launcher").iterdir() if ".start" in path.name]


class Detached(World):
    log_name = f"state/qemu-launcher/{VM}.log"

    @property
    def log(self) -> Path:
        return self.home.configuration / self.log_name

    @property
    def messages(self) -> str:
        return self.log.read_text()


class Managed(World):
    """With a user manager, which is a socket that somebody listens on, and a systemd-run."""

    def __init__(self, home: Home, desk: Path, listener: socket.socket) -> None:
        super().__init__(home, desk)
        (home.runtime / "systemd").mkdir()
        listener.bind(f"{home.runtime}/systemd/private")
        listener.listen()
        tools = desk / "bin"
        tools.mkdir()
        script = tools / "systemd-run"
        script.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("fake_systemd_run.py").read_text())
        script.chmod(0o755)
        (tools / "systemctl").write_text("#!/bin/sh\necho inactive\n")
        (tools / "systemctl").chmod(0o755)
        home.environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "FAKE_SYSTEMD": str(desk)}

    @property
    def messages(self) -> str:
        return (self.desk / "journal").read_text()

    @property
    def asked(self) -> list[str]:
        words: list[str] = json.loads((self.desk / "asked.json").read_text())
        return words


@pytest.fixture
def desk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ql-start-") as place:
        yield Path(place)


@pytest.fixture
def detached(home: Home, desk: Path) -> Detached:
    return Detached(home, desk)


@pytest.fixture
def managed(home: Home, desk: Path) -> Iterator[Managed]:
    with socket.socket(socket.AF_UNIX) as listener:
        yield Managed(home, desk, listener)


@pytest.fixture(params=["detached", "managed"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


def test_back_when_the_guest_runs(world: World) -> None:
    """One line, as from `run`; then nobody is left between the VM and the end of the terminal."""
    world.home.define()
    done = world.start()
    assert done.returncode == 0, done.stderr
    first, *rest = (line for line in done.stderr.splitlines() if STILL not in line)
    assert re.fullmatch(rf"{VM}: running, untuned, [0-9.]+ s", first)
    assert rest == ([f"{VM}: its messages go to {world.log}"] if isinstance(world, Detached) else [])
    launcher = world.launcher()
    assert os.getsid(launcher) == launcher != os.getsid(0)
    assert Path(f"/proc/{launcher}/fd/0").readlink() == Path("/dev/null")
    assert world.sockets() == []
    assert world.home.ask("kill", VM).returncode == 0
    wait_gone(launcher)
    # What comes later is not lost: QEMU's own last words, by way of the launcher.
    assert "terminating on signal 15" in world.messages
    assert first in world.messages


def test_the_log_is_its_users_and_begins_anew(detached: Detached) -> None:
    detached.home.define()
    for _ in range(2):
        assert detached.start().returncode == 0
        launcher = detached.launcher()
        detached.home.ask("kill", VM)
        wait_gone(launcher)
    assert stat.S_IMODE(detached.log.stat().st_mode) == 0o600
    assert detached.messages.count("running, ") == 1


def test_environment_of_the_person(world: World) -> None:
    """The caller's whole environment, odd bytes included, less what belongs to his terminal; and nothing of ours."""
    world.home.define()
    theirs = {"MY_TOKEN": "a b\n\udcff$HOME", "TERM": "xterm-odd", "TMUX": "/tmp/x", "LANG": "C.UTF-8"}
    assert world.start(env=theirs).returncode == 0
    raw = Path(f"/proc/{world.qemu()}/environ").read_bytes().split(b"\0")
    assert b"MY_TOKEN=a b\n\xff$HOME" in raw
    found = {entry.partition(b"=")[0].decode() for entry in raw}
    assert {"LANG", "PATH", "HOME", "DISPLAY", "QEMU_LAUNCHER_CONFIG_DIR"} <= found
    assert not found & {"TERM", "TMUX", "NOTIFY_SOCKET", "QEMU_LAUNCHER_STARTER", "ONLY_IN_THE_MANAGER"}
    if isinstance(world, Managed):
        assert b"INVOCATION_ID=0123456789abcdef" in raw
        assert "MY_TOKEN" not in " ".join(world.asked), "to be read by everybody, in the list of processes"


def ended(home: Home, command: Sequence[str], folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command of hers to its end, in a folder other than ours."""
    return subprocess.run(
        command,
        env=home.environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_path_of_a_definition(world: World) -> None:
    """Relative to where `start` was called, whatever systemd would make of a dollar."""
    folder = world.home.configuration / "my $HOME vms"
    folder.mkdir()
    world.home.define("by-path").rename(folder / "by-path.yml")
    done = ended(world.home, world.home.command("start", "./by-path.yml"), folder)
    assert done.returncode == 0, done.stderr
    assert world.home.record("by-path")["definition"] == str(folder / "by-path.yml")
    assert Path(f"/proc/{world.qemu('by-path')}/cwd").readlink() == folder


def test_what_systemd_is_asked_for(managed: Managed) -> None:
    """The settings of the unit that is installed, and the environment by another way than the command line."""
    managed.home.define()
    assert managed.start("--untuned", "-q", VM).returncode == 0
    words = managed.asked
    assert words[:3] == ["--user", "--quiet", "--collect"]
    assert f"--unit=qemu-launcher-{VM}.service" in words
    assert words[words.index("--") + 1 :] == [*managed.home.command("run"), "--untuned", "--quiet", "--", VM]
    unit = (ROOT / "launcher/qemu-launcher@.service").read_text()
    settings = [word.removeprefix("--property=") for word in words if word.startswith("--property=")]
    assert {"KillMode=mixed", "TimeoutStartSec=infinity", "SuccessExitStatus=143"} <= set(settings)
    assert {one for one in settings if one not in unit.splitlines()} == {"SyslogIdentifier=qemu-launcher"}
    assert "--service-type=notify" in words
    assert "\nType=notify\n" in unit


def test_quiet_says_nothing(world: World) -> None:
    world.home.define()
    done = world.start("-q", VM)
    assert (done.returncode, done.stderr) == (0, "")


def test_qemus_and_the_launchers_own_words_and_exit_status(world: World) -> None:
    world.home.define(qemu=({"device": "no-such-device"},))
    by_start = world.start()
    by_run = world.home.ask("run", VM)
    assert by_start.returncode == by_run.returncode == 1
    numbers = re.compile(rf"/dev/fd/\d+|{VM}: {STILL}\n")
    assert numbers.sub("", by_start.stderr) == numbers.sub("", by_run.stderr)
    assert "'no-such-device' is not a valid device model name" in by_start.stderr.splitlines()[0]
    assert "QEMU ended with exit status 1 before the guest ran" in by_start.stderr


def test_wrong_definition_starts_nothing(world: World) -> None:
    path = world.home.define(nonsense=True)
    done = world.start()
    assert done.returncode == 2
    assert f"{path}:3:3: unknown key" in done.stderr
    assert not (world.home.runtime / "qemu-launcher").exists()
    assert world.start("no-such-vm").returncode == 2


def test_what_only_the_launcher_finds_out(world: World) -> None:
    """Exit status 2 comes through from there too; and the way out is for the background again."""
    world.home.define(vcpu_pinning=[4095])
    done = world.start()
    assert done.returncode == 2
    assert f"qemu-launcher start --untuned {VM}\n" in done.stderr
    assert done.stderr.replace("start --untuned", "run --untuned") == world.home.ask("run", VM).stderr


def test_vm_that_runs_is_not_started_again(world: World) -> None:
    world.home.define()
    assert world.start().returncode == 0
    before = world.messages
    done = world.start()
    assert done.returncode == 1
    assert f"{VM} is already running (PID {world.qemu()})" in done.stderr
    assert world.messages == before


def test_qemu_that_leaves_before_its_guest_runs(world: World) -> None:
    """`-version` and the like: QEMU has not failed, the start has; `run` ends as QEMU does."""
    world.home.define(qemu=("version",))
    done = world.start()
    assert done.returncode == 1
    where = f"cat {world.log}" if isinstance(world, Detached) else f"journalctl --user -u qemu-launcher-{VM}.service"
    assert done.stderr == (
        "qemu-launcher: QEMU ended with exit status 0 before the guest ran\n"
        f"    see what it has said: {where}\n"
        f"    or have it said here: qemu-launcher run {VM}\n"
    )
    assert "QEMU emulator version" in world.messages
    by_run = world.home.ask("run", VM)
    assert (by_run.returncode, by_run.stderr) == (0, "")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_end_of_a_start_that_waits_is_the_end_of_the_vm(world: World, end: signal.Signals) -> None:
    """Ctrl-C goes to the whole foreground group, systemd-run included; the others to `start` alone."""
    here, _go = held_binary(world.home)
    world.home.define(binary=str(world.home.configuration / "held-qemu"))
    begun = world.begin()
    hear(here)
    launcher, qemu = world.launcher(), world.qemu()
    if end == signal.SIGINT:
        os.killpg(begun.pid, end)
    else:
        begun.send_signal(end)
    _, said = begun.communicate(timeout=PATIENCE)
    assert begun.returncode == (130 if end == signal.SIGINT else -end)
    assert b"Traceback" not in said
    wait_gone(launcher)
    wait_gone(qemu)


@pytest.mark.parametrize("ends", [[signal.SIGINT], [signal.SIGHUP], [signal.SIGTERM, signal.SIGHUP]])
def test_start_that_ends_while_systemd_starts_it_leaves_no_socket(managed: Managed, ends: list[signal.Signals]) -> None:
    """A login that ends sends the last two in one go. systemd-run is not left waiting either."""
    managed.home.define()
    script = managed.desk / "bin/systemd-run"
    pid = managed.desk / "pid"
    script.write_text(f"#!/bin/sh\necho $$ > {pid}.new; mv {pid}.new {pid}\nexec sleep 60\n")
    begun = managed.begin()
    wait_until(pid.exists)
    assert len(managed.sockets()) == 1
    for end in ends:
        begun.send_signal(end)
    _, said = begun.communicate(timeout=PATIENCE)
    assert begun.returncode in ([130] if ends == [signal.SIGINT] else [-end for end in ends])
    assert said == b""
    assert managed.sockets() == []
    wait_gone(int(pid.read_text()))


def test_start_in_a_scripts_background_can_be_ended(managed: Managed) -> None:
    """A shell without job control has what runs there ignore SIGINT, and so systemd-run."""
    managed.home.define()
    script = managed.desk / "bin/systemd-run"
    pid = managed.desk / "pid"
    script.write_text(f"#!/bin/sh\necho $$ > {pid}.new; mv {pid}.new {pid}\nexec sleep 1000\n")
    begun = managed.begin("env", "--ignore-signal=INT")
    wait_until(pid.exists)
    begun.terminate()
    assert begun.wait(PATIENCE) == -signal.SIGTERM
    wait_gone(int(pid.read_text()))
    assert managed.sockets() == []


def test_nohup_start_is_not_ended_by_a_hangup(managed: Managed) -> None:
    managed.home.define()
    script = managed.desk / "bin/systemd-run"
    (managed.desk / "bin/real").write_text(script.read_text())
    (managed.desk / "bin/real").chmod(0o755)
    script.write_text(f'#!/bin/sh\nkill -HUP $PPID\nexec {managed.desk}/bin/real "$@"\n')
    done = subprocess.run(
        ["nohup", *managed.home.command("start", VM)],
        env=managed.home.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr


def test_vm_is_started_though_nobody_reads_what_is_said(world: World) -> None:
    """`qemu-launcher start win11 |& head -1`: it is the launcher that decides whether there is a VM."""
    world.home.define()
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as unread:
        command = world.home.command("start", VM)
        done = subprocess.run(
            command, env=world.home.environment, stdin=subprocess.DEVNULL, stderr=unread, check=False, timeout=PATIENCE
        )
    assert done.returncode == 0
    assert is_alive(world.qemu())


def test_launcher_that_is_killed_while_it_starts(world: World) -> None:
    here, _go = held_binary(world.home)
    world.home.define(binary=str(world.home.configuration / "held-qemu"))
    begun = world.begin()
    hear(here)
    os.kill(world.launcher(), signal.SIGKILL)
    _, said = begun.communicate(timeout=PATIENCE)
    assert begun.returncode == 1
    assert (
        f"qemu-launcher: the launcher of {VM} has ended without saying why\n    see what it has said: " in said.decode()
    )


def test_nobody_waits_any_more(home: Home) -> None:
    """A launcher that comes when `start` is gone must not start a VM that nobody wants."""
    home.define()
    run = home.start(env={"QEMU_LAUNCHER_STARTER": "/nowhere"})
    assert run.end() == 1
    assert "who has started this in the background is gone" in run.output


def test_directory_that_is_called_systemd_run_is_none(managed: Managed) -> None:
    (managed.desk / "bin/systemd-run").unlink()
    (managed.desk / "bin/systemd-run").mkdir()
    managed.home.define(binary=shutil.which("qemu-system-x86_64"))
    done = managed.start(env={"PATH": f"{managed.desk}/bin"})
    assert done.returncode == 0, done.stderr
    assert "its messages go to" in done.stderr


@pytest.mark.parametrize("closed", ["0<&-", "0<&- 1>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_standard_descriptors_that_are_closed(world: World, closed: str) -> None:
    """What is opened instead of them would be handed to a child by its number, where its own take that."""
    world.home.define()
    done = ended(world.home, ["sh", "-c", f'exec "$@" {closed}', "sh", *world.home.command("start", VM)])
    assert done.returncode == 0, done.stderr
    assert world.home.record()["state"] == "running"
    assert ("running, untuned" in done.stderr) is ("2>" not in closed)


def test_folder_that_is_gone(world: World, tmp_path: Path) -> None:
    world.home.define()
    (tmp_path / "gone").mkdir()
    command = ["sh", "-c", 'rmdir ../gone && exec "$@"', "sh", *world.home.command("start", VM)]
    done = ended(world.home, command, tmp_path / "gone")
    assert done.returncode == 1
    assert done.stderr == (
        "qemu-launcher: the folder that you are in is gone, or closed to you: No such file or directory\n"
        "    go to another one: cd\n"
    )
    assert not (world.home.runtime / "qemu-launcher").exists()


def test_disk_that_is_full(detached: Detached) -> None:
    """No file may grow: it is the launcher that finds out, and `start` that says so."""
    detached.home.define()
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    done = detached.home.ask("start", VM, change=full)
    assert done.returncode == 1
    lock = detached.home.runtime / f"qemu-launcher/{VM}.lock"
    assert f"qemu-launcher: cannot write into {lock}: File too large\n" in done.stderr


def test_systemd_refuses(managed: Managed) -> None:
    managed.home.define()
    (managed.desk / "refuse").write_text("Failed to start transient service unit: no reason\n")
    done = managed.start()
    assert done.returncode == 1
    assert done.stderr == (
        "qemu-launcher: your systemd did not start it: Failed to start transient service unit: no reason\n"
        f"    see what it says with: systemctl --user status qemu-launcher-{VM}.service\n"
        f"    or start it here: qemu-launcher run {VM}\n"
    )
    assert managed.sockets() == []


def test_unit_of_the_last_start_is_waited_for(managed: Managed) -> None:
    """Its launcher still has something to give back, while the VM has ended: systemd then refuses a second unit."""
    managed.home.define()
    refuse, looks = managed.desk / "refuse", managed.desk / "looks"
    refuse.write_text("Unit was already loaded or has a fragment file.\n")
    (managed.desk / "bin/systemctl").write_text(f"#!/bin/sh\necho look >>{looks}; rm -f {refuse}; echo deactivating\n")
    done = managed.start()
    assert done.returncode == 0, done.stderr
    assert looks.read_text() == "look\n"


def test_name_whose_last_unit_does_not_end(managed: Managed) -> None:
    managed.home.define()
    (managed.desk / "refuse").write_text("Unit was already loaded or has a fragment file.\n")
    (managed.desk / "bin/systemctl").write_text("#!/bin/sh\necho deactivating\n")
    change = "from qemu_launcher import background; background._ATTEMPTS = 3"
    done = managed.home.ask("start", VM, change=change)
    assert done.returncode == 1
    assert done.stderr.startswith("qemu-launcher: your systemd did not start it: Unit was already loaded or has a frag")
    assert managed.sockets() == []


@pytest.mark.parametrize(
    ("environment", "is_told"),
    [
        ({}, False),
        ({"SSH_CONNECTION": "192.0.2.1 1 192.0.2.2 22"}, True),
        ({"DISPLAY": ""}, True),
        ({"DISPLAY": "", "WAYLAND_DISPLAY": "wayland-0"}, False),
    ],
)
def test_who_is_not_on_a_desktop_is_told_what_logging_out_does(
    managed: Managed, environment: dict[str, str], is_told: bool
) -> None:
    managed.home.define()
    done = managed.start(env=environment)
    assert ("to have it stay: loginctl enable-linger" in done.stderr) == is_told


def test_without_logging_out_there_is_nothing_to_tell(managed: Managed) -> None:
    """A user who lingers; and a VM without a user manager is a process like any other."""
    managed.home.define()
    change = f"from qemu_launcher import background as b, users; b.LINGER = b.Path({str(managed.desk)!r})"
    (managed.desk / "alice").touch()
    change += "; users.own_name = lambda: 'alice'"
    done = managed.home.ask("start", VM, env={"SSH_CONNECTION": "x"}, change=change)
    assert done.returncode == 0, done.stderr
    assert "linger" not in done.stderr


@pytest.mark.parametrize("option", ["nographic", {"serial": "mon:stdio"}, {"chardev": ["stdio", {"id": "c"}]}])
def test_terminal_in_the_definition(detached: Detached, option: Any) -> None:
    """It is started all the same, as a service would be: somebody may only want no window."""
    path = detached.home.configuration / f"{VM}.yml"
    machine: tuple[Any, ...] = ({"machine": "q35"}, {"accel": "tcg"}, {"m": "64"}, {"display": "none"}, option)
    detached.home.define()
    import yaml

    path.write_text(yaml.safe_dump({"launcher": {"binary": "qemu-system-x86_64"}, "qemu": list(machine)}))
    done = detached.start()
    assert done.returncode == 0, done.stderr
    name = option if isinstance(option, str) else next(iter(option))
    assert f"warning: -{name} ({path}:" in done.stderr
    assert "has no terminal in the background" in done.stderr
    assert f"to use that terminal: qemu-launcher run {VM}" in done.stderr
    assert is_alive(detached.qemu())


def test_qemu_outlives_a_launcher_that_passes_on_its_words(detached: Detached) -> None:
    """What it says then is lost, and must not end it: it ignores SIGPIPE."""
    detached.home.define()
    assert detached.start().returncode == 0
    launcher, qemu = detached.launcher(), detached.qemu()
    ignored = re.search(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{qemu}/status").read_text(), re.MULTILINE)
    assert ignored is not None
    assert int(ignored[1], 16) & (1 << signal.SIGPIPE - 1)
    os.kill(launcher, signal.SIGKILL)
    wait_gone(launcher)
    assert is_alive(qemu)
