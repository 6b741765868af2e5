"""`qmp` and `monitor`: QEMU's own languages, from the command line, a pipe and a terminal."""

import json
import subprocess

import pytest

from qemu.launched import PATIENCE, Home, Run, silent_bus
from qemu.screen import on_terminal
from qemu.test_finding import TUNED, never_started, start_held

VM = "vm-under-test"


@pytest.fixture
def run(home: Home) -> Run:
    """A VM that runs."""
    home.define()
    started = home.start()
    started.wait_running()
    return started


def piped(home: Home, text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        home.command("monitor", VM),
        env=home.environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_qmp_prints_what_a_command_returns(home: Home, run: Run) -> None:
    done = home.ask("qmp", VM, "query-status")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert json.loads(done.stdout)["status"] == "running"
    done = home.ask("qmp", VM, "qom-get", '{"path": "/machine", "property": "type"}')
    assert json.loads(done.stdout) == "pc-q35-7.2-machine" or done.stdout.startswith('"pc-q35-')


def test_qmp_passes_on_what_acts(home: Home, run: Run) -> None:
    assert home.ask("qmp", VM, "stop").stdout == "{}\n"
    assert f"{VM}: paused" in home.ask("status").stdout
    assert home.ask("qmp", VM, "quit").stdout == "{}\n"
    assert run.end() == 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ("query-statu",),
            1,
            "QEMU refused query-statu: The command query-statu has not been found\n    did you mean q",
        ),
        (("qom-get", '{"path": 1}'), 1, "QEMU refused qom-get: "),
        (("qom-get", "{path}"), 2, "the arguments are no JSON object: line 1, column 2: expecting property name"),
        (("\udcff",), 2, "the command is no UTF-8: '\\udcff'"),
    ],
)
def test_qmp_says_what_was_wrong(home: Home, run: Run, words: tuple[str, ...], status: int, message: str) -> None:
    done = home.ask("qmp", VM, *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"qemu-launcher: {message}")


def test_one_line_of_hmp(home: Home, run: Run) -> None:
    done = home.ask("monitor", VM, "info", "status")
    assert (done.returncode, done.stdout, done.stderr) == (0, "VM status: running\n", "")
    assert "unknown command: 'nonsense'" in home.ask("monitor", VM, "nonsense", "-h").stdout


def test_lines_of_hmp_from_a_pipe(home: Home, run: Run) -> None:
    done = piped(home, "info status\n\nstop\ninfo status\nexit\nquit\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "VM status: running\nVM status: paused\n"
    assert f"{VM}: paused" in home.ask("status").stdout


def test_pipe_that_goes_on_after_the_end_of_its_vm(home: Home, run: Run) -> None:
    """The one after `quit` may still meet a QEMU that is about to go; the one after the end does not."""
    assert piped(home, "quit").returncode == 0
    assert run.end() == 0
    done = piped(home, "info status\n")
    assert done.returncode == 3
    assert f"{VM} is not running" in done.stderr


def test_not_running(home: Home) -> None:
    for words in (("qmp", VM, "query-status"), ("monitor", VM), ("monitor", VM, "info", "status")):
        done = home.ask(*words)
        assert (done.returncode, done.stdout) == (3, "")


def test_prompt_lets_others_in_and_says_how_to_leave(home: Home, run: Run) -> None:
    with on_terminal(home, "monitor", VM) as terminal:
        assert "Ctrl-D or exit leaves it" in terminal.wait("(qemu) ")
        terminal.type("info status\n")
        assert "VM status: running\n" in terminal.wait("(qemu) ")
        assert home.ask("pause", VM).returncode == 0  # nobody holds the control socket
        terminal.type("info status\n")
        assert "VM status: paused\n" in terminal.wait("(qemu) ")
        terminal.type("half a line")
        terminal.wait("half a line")
        terminal.wait("(qemu) ", pressing="\x03")
        terminal.type("\x04")
        assert terminal.process.wait(PATIENCE) == 0
    assert f"{VM}: paused" in home.ask("status").stdout


def test_prompt_takes_quit_for_a_slip_once(home: Home, run: Run) -> None:
    with on_terminal(home, "monitor", VM) as terminal:
        terminal.wait("(qemu) ")
        for _ in range(2):
            terminal.type("quit\n")
            assert "without asking the guest: say it once more if you mean that" in terminal.wait("(qemu) ")
            terminal.type("info status\n")
            assert "VM status: running\n" in terminal.wait("(qemu) ")
        terminal.type("q\n")
        terminal.wait("(qemu) ")
        terminal.type("q\n")
        terminal.wait(f"{VM} has ended\n")
        assert run.end() == 0
        assert terminal.process.wait(PATIENCE) == 0


ACTS = (
    ("qmp", VM, "cont"),
    ("qmp", VM, "human-monitor-command", '{"command-line": "c"}'),
    ("monitor", VM, "c"),
    ("monitor", VM, "gdbserver"),
)


def only_looked_at(home: Home, why: str) -> None:
    assert json.loads(home.ask("qmp", VM, "query-status").stdout)["status"] == "prelaunch"
    assert home.ask("monitor", VM, "info", "status").stdout == "VM status: paused (prelaunch)\n"
    for words in (*ACTS, ("resume", VM)):
        done = home.ask(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert why in done.stderr
        if words in ACTS:
            assert "only questions are passed on to it: query-... of QMP, info and help of HMP" in done.stderr
    assert json.loads(home.ask("qmp", VM, "query-status").stdout)["status"] == "prelaunch"


def test_guest_that_was_never_started_is_only_looked_at(home: Home) -> None:
    never_started(home)
    home.runs[-1].qmp().close()  # QEMU is there
    only_looked_at(home, "has never been started: its launcher died before")


def test_guest_that_is_not_tuned_yet_is_only_looked_at(home: Home) -> None:
    """Its launcher waits for a bus that never answers, while QEMU does."""
    with silent_bus(home) as (bus, env):
        home.define(scheduler="fifo")
        run = home.start(env=env)
        connection, _ = bus.accept()
        qmp = run.qmp()
        qmp.close()
        only_looked_at(home, "its launcher lets the guest run when it is tuned, and nobody else may")
        connection.close()


def test_qemu_that_does_not_answer_yet(home: Home) -> None:
    start_held(home, **TUNED)
    for words in (("qmp", VM, "query-status"), *ACTS):
        done = home.ask(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{VM} is still starting" in done.stderr
