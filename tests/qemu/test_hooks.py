"""before_start and after_stop: in order, as they should be, and with swtpm, the one they are made for."""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from qemu import launched
from qemu.launched import Home, is_alive, wait_gone, wait_until

QUICK = ("version",)  # QEMU says what it is and ends
TELL = 'import os, sys; open(sys.argv[1], "a").write(" ".join(sys.argv[2:]) + "\\n")'


def tell(log: Path, *words: str) -> list[str]:
    """A command that adds a line to `log`."""
    return [sys.executable, "-c", TELL, str(log), *words]


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_line(log: Path) -> str:
    """The first line of `log`, once it is whole."""
    wait_until(lambda: bool(lines(log)) and log.read_text().endswith("\n"))
    return lines(log)[0]


def test_in_order_around_qemu(home: Home, tmp_path: Path) -> None:
    """With the definition's environment and directory, and two variables of ours."""
    log = tmp_path / "log"
    log.touch()
    place = tmp_path / "place"
    place.mkdir()
    show = f'echo "$PWD $A $QEMU_LAUNCHER_VM $QEMU_LAUNCHER_RUNTIME_DIR" >> {log}'
    home.define(
        qemu=QUICK,
        binary="qemu-system-x86_64",
        env={"A": "b"},
        working_directory=str(place),
        before_start=[tell(log, "first", "with  spaces"), shell(show)],
        after_stop=[tell(log, "last"), tell(log, "very", "last")],
    )
    run = home.start()
    assert run.end() == 0, run.output
    assert lines(log) == [
        "first with  spaces",
        f"{place} b vm-under-test {home.runtime}/qemu-launcher",
        "last",
        "very last",
    ]


def test_environment_that_was_cleared(home: Home, tmp_path: Path) -> None:
    log = tmp_path / "log"
    home.define(
        qemu=QUICK,
        binary=shutil.which("qemu-system-x86_64"),
        clear_env=True,
        env={"PATH": os.defpath},
        before_start=[shell(f"env >> {log}")],
    )
    assert home.start().end() == 0
    assert {line.partition("=")[0] for line in lines(log)} - {"PWD", "SHLVL", "_", "OLDPWD"} == {
        "PATH", "QEMU_LAUNCHER_VM", "QEMU_LAUNCHER_RUNTIME_DIR",
    }  # fmt: skip


def test_first_that_fails_is_the_last(home: Home, tmp_path: Path) -> None:
    """QEMU is not started; what was begun is ended."""
    log = tmp_path / "log"
    path = home.define(
        qemu=QUICK, before_start=[tell(log, "one"), ["false", "x y"], tell(log, "three")], after_stop=[tell(log, "end")]
    )
    run = home.start("vm-under-test", "-d")
    assert run.end() == 1
    mark = next(number for number, line in enumerate(path.read_text().splitlines(), 1) if "- 'false'" in line)
    assert f"qemu-launcher: {path}:{mark}:5: before_start: 'false' ended with exit status 1\n" in run.output
    assert "    its command line: false 'x y'\n" in run.output
    assert lines(log) == ["one", "end"]
    assert "will execute" not in run.output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["no-such-program"], "cannot start 'no-such-program': No such file or directory\n    install it, or give its"),
        (
            ["~/x"],
            "cannot start '~/x': No such file or directory\n    ~ and $HOME are the shell's; ",
        ),
        (["/etc/passwd"], "cannot start '/etc/passwd': Permission denied\n"),
        (shell("kill -9 $$"), "'sh' ended by signal 9 (SIGKILL)\n"),
    ],
)
def test_command_that_cannot_do(home: Home, command: list[str], message: str) -> None:
    path = home.define(qemu=QUICK, before_start=[command])
    run = home.start()
    assert run.end() == 1
    assert f"qemu-launcher: {path}:" in run.output
    assert f"before_start: {message}" in run.output


def test_directory_that_is_not_there(home: Home) -> None:
    path = home.define(qemu=QUICK, before_start=[["touch", "/never"]], working_directory="/no/such/place")
    run = home.start()
    assert run.end() == 2
    assert run.output == (
        f"qemu-launcher: {path}:6:22: there is no folder '/no/such/place', or it is closed to you\n"
        "    make it, or correct the path\n"
    )


def test_directory_that_goes_meanwhile(home: Home, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    home.define(before_start=[["rmdir", str(place)]], after_stop=[["true"]], working_directory=str(place))
    run = home.start()
    assert run.end() == 1
    assert f"could not enter its working directory '{place}': No such file or directory" in run.output
    assert f"cannot start 'true': No such file or directory: '{place}'\n    see working_directory" in run.output


def test_all_of_after_stop_run_and_a_failure_is_a_warning(home: Home, tmp_path: Path) -> None:
    log = tmp_path / "log"
    home.define(qemu=QUICK, after_stop=[["false"], tell(log, "end")])
    run = home.start()
    assert run.end() == 1
    assert "vm-under-test: warning: " in run.output
    assert "after_stop: 'false' ended with exit status 1" in run.output
    assert lines(log) == ["end"]


def test_kill_waits_for_a_command_that_does_not_end_and_says_so(home: Home, tmp_path: Path) -> None:
    log = tmp_path / "log"
    home.define(before_start=[shell(f"trap '' TERM; echo here > {log}; sleep 1000")])
    run = home.start()
    wait_line(log)
    killed = home.ask("kill", run.name, change="from qemu_launcher import power; power.QUIT_GRACE = 0.5")
    assert killed.returncode == 1
    assert (
        f"(PID {run.process.pid}) was told to end, and has not ended yet\n    it waits for a command of"
        in killed.stderr
    )
    assert run.end() == 128 + signal.SIGTERM, "after ten seconds it takes SIGKILL"


def test_kill_cuts_the_power_of_a_guest_that_has_begun_to_run_meanwhile(home: Home, tmp_path: Path) -> None:
    """There was no QEMU when `kill` looked, and its SIGTERM comes when the guest runs."""
    log, fifo = tmp_path / "log", tmp_path / "go"
    os.mkfifo(fifo)
    home.define(before_start=[shell(f"echo here > {log}; read go < {fifo}")])
    run = home.start()
    wait_line(log)
    late = (
        "import signal, time; from qemu_launcher import runtime; send = signal.pidfd_send_signal\n"
        "def later(fd, number):\n"
        f"    print('go', file=open({str(fifo)!r}, 'w'))\n"
        "    while runtime.find('vm-under-test').record.state != 'running': time.sleep(0.01)\n"
        "    signal.pidfd_send_signal = send\n"
        "    send(fd, number)\n"
        "signal.pidfd_send_signal = later"
    )
    killed = home.ask("kill", run.name, change=late)
    assert killed.returncode == 0, killed.stderr
    assert home.ask("kill", run.name).returncode == 3, "it was not told that a guest is off which is not"
    assert run.end() in (0, 128 + signal.SIGTERM)


def test_status_of_qemu_counts_more_than_that_of_after_stop(home: Home, tmp_path: Path) -> None:
    log = tmp_path / "log"
    home.define(scheduler="batch", after_stop=[tell(log, "end"), ["false"]])
    run = home.start()
    run.wait_running()
    os.kill(run.qemu_pid, signal.SIGKILL)
    assert run.end() == 137
    assert lines(log) == ["end"]


def test_second_start_runs_none_of_them(home: Home, tmp_path: Path) -> None:
    log = tmp_path / "log"
    home.define(before_start=[tell(log, "begin")], after_stop=[tell(log, "end")])
    run = home.start()
    run.wait_running()
    again = home.start()
    assert again.end() == 1
    assert "is already running" in again.output
    assert lines(log) == ["begin"]
    home.ask("kill", run.name)
    assert run.end() == 0
    assert lines(log) == ["begin", "end"]


def test_binary_that_is_missing_is_found_out_before(home: Home, tmp_path: Path) -> None:
    log = tmp_path / "log"
    home.define(binary="qemu-system-none", before_start=[tell(log, "begin")], after_stop=[tell(log, "end")])
    assert home.start().end() == 2
    assert lines(log) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_command_and_what_it_has_started(home: Home, tmp_path: Path, number: signal.Signals) -> None:
    log, pids = tmp_path / "log", tmp_path / "pids"
    home.define(
        before_start=[shell(f"sleep 1000 & echo $$ $! > {pids}; wait"), tell(log, "next")],
        after_stop=[tell(log, "end")],
    )
    run = home.start()
    leader, child = map(int, wait_line(pids).split())
    assert os.getpgid(leader) == os.getpgid(child) == leader, "Ctrl-C of a terminal does not reach it by itself"
    run.signal(number)
    assert run.end() == 128 + number
    assert f"before_start: sh was ended by {number.name}" in run.output
    wait_gone(leader)
    wait_gone(child)
    assert lines(log) == ["end"]


def test_command_that_takes_long_is_told(home: Home) -> None:
    home.define(before_start=[["sleep", "1000"]])
    run = home.start()
    run.wait_line("before_start: waiting for sleep 1000 to end; what is to stay must put itself into the background")
    assert "starting" in home.ask("status", "vm-under-test").stdout
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert run.end() == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_does_not_cut_after_stop_short(home: Home, tmp_path: Path, number: signal.Signals) -> None:
    log, begun, go = tmp_path / "log", tmp_path / "begun", tmp_path / "go"
    os.mkfifo(go)
    wait = shell(f"echo begun > {begun}; read line < {go}; echo $line >> {log}")
    home.define(qemu=QUICK, after_stop=[wait, tell(log, "end")])
    run = home.start()
    wait_line(begun)
    run.signal(number)
    if number == signal.SIGTERM:
        launched.tell(go, "went on\n")
    assert run.end() == (0 if number == signal.SIGTERM else 1)
    assert lines(log) == ["went on"] * (number == signal.SIGTERM) + ["end"]


def test_daemon_inherits_nothing_of_ours(home: Home, tmp_path: Path) -> None:
    """Above all not the lock: the VM could not be started again as long as the daemon lives."""
    pid_file = tmp_path / "pid"
    daemon = shell(f"setsid sleep 1000 > /dev/null 2>&1 & echo $! > {pid_file}")
    home.define(qemu=QUICK, before_start=[daemon])
    assert home.start().end() == 0
    pid = int(wait_line(pid_file))
    try:
        assert is_alive(pid)
        assert {link.name for link in Path(f"/proc/{pid}/fd").iterdir()} <= {"0", "1", "2"}
        assert str(Path(f"/proc/{pid}/fd/0").readlink()) == "/dev/null"
        assert home.start().end() == 0
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        os.kill(pid, signal.SIGKILL) if is_alive(pid) else None


def test_swtpm(home: Home, tmp_path: Path) -> None:
    """It is there before QEMU, which takes it; it is gone afterwards; and so again."""
    if shutil.which("swtpm") is None:
        pytest.skip("swtpm is not installed")
    state, place, pid_file, log = (tmp_path / name for name in ("state", "place", "swtpm.pid", "log"))
    state.mkdir()
    place.mkdir()
    # Relative, since a socket's path may have 108 bytes and those of pytest's directories are long.
    control = "unixio,path=swtpm.sock"
    begin = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type={control}", "--daemon"]
    end = f"kill -0 $(cat {pid_file}) 2>/dev/null && kill $(cat {pid_file}); echo ended >> {log}"
    qemu: tuple[Any, ...] = (
        {"chardev": ["socket", {"id": "chrtpm"}, {"path": "swtpm.sock"}]},
        {"tpmdev": ["emulator", {"id": "tpm0"}, {"chardev": "chrtpm"}]},
        {"device": ["tpm-tis", {"tpmdev": "tpm0"}]},
    )
    home.define(
        qemu=qemu,
        working_directory=str(place),
        before_start=[[*begin, "--pid", f"file={pid_file}"]],
        after_stop=[shell(end)],
    )
    for start in (1, 2):
        run = home.start()
        run.wait_running()
        swtpm = int(pid_file.read_text())
        assert is_alive(swtpm)
        (tpm,) = run.qmp()("query-tpm")
        assert (tpm["model"], tpm["options"]["type"]) == ("tpm-tis", "emulator")
        assert not [
            link for link in Path(f"/proc/{swtpm}/fd").iterdir() if "vm-under-test.lock" in str(link.readlink())
        ]
        home.ask("kill", run.name)
        assert run.end() == 0, run.output
        wait_gone(swtpm)
        assert lines(log) == ["ended"] * start
        pid_file.unlink(missing_ok=True)
    assert list(state.iterdir()), "what it keeps for the guest"
