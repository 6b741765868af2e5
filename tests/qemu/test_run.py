"""The ordinary life of a VM: it starts, says so, is seen, is powered down, and its exit status comes back."""

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from demo import guest
from qemu.launched import Home, Run, is_alive, wait_gone, wait_until


def with_guest(home: Home) -> tuple[dict[str, str], ...]:
    """Options of a machine that boots the guest of one sector, which obeys its power button."""
    disk = home.configuration / "guest.img"
    guest.write(disk)
    serial = home.configuration / "serial.log"
    return ({"drive": f"file={disk},format=raw,if=ide,snapshot=on"}, {"serial": f"file:{serial}"})


def wait_guest(run: Run) -> None:
    """Until the guest itself says that it runs."""
    qmp = run.qmp()
    try:
        while guest.GREETING not in (run.home.configuration / "serial.log").read_bytes():
            qmp("query-status")  # gives the guest time, and fails when QEMU has ended
    finally:
        qmp.close()


def test_untuned_vm_runs_and_powers_down_on_ctrl_c(home: Home) -> None:
    home.define(qemu=with_guest(home))
    run = home.start()
    assert re.fullmatch(r"vm-under-test: running, untuned, [0-9.]+ s", run.wait_running())
    wait_guest(run)
    run.signal(signal.SIGINT)
    assert run.end() == 0
    assert "vm-under-test: asked the guest to power down; Ctrl-C again cuts the power" in run.output
    assert guest.FAREWELL in (home.configuration / "serial.log").read_bytes()


def test_stop_powers_the_guest_down(home: Home) -> None:
    home.define(qemu=with_guest(home))
    run = home.start()
    run.wait_running()
    wait_guest(run)
    asked = home.ask("stop", "vm-under-test")
    assert asked.returncode == 0, asked.stderr
    assert run.end() == 0
    assert guest.FAREWELL in (home.configuration / "serial.log").read_bytes()


def test_guest_that_powers_down_under_no_shutdown_ends_qemu_when_asked_by_us(home: Home) -> None:
    home.define(qemu=(*with_guest(home), "no-shutdown"))
    run = home.start()
    run.wait_running()
    wait_guest(run)
    run.signal(signal.SIGHUP)
    assert run.end() == 0


def test_guest_that_is_down_already_is_not_waited_for(home: Home) -> None:
    home.define(qemu=(*with_guest(home), "no-shutdown"))
    run = home.start()
    run.wait_running()
    wait_guest(run)
    assert home.ask("stop", "vm-under-test").returncode == 0
    wait_until(lambda: "shutdown" in home.ask("status", "vm-under-test").stdout)
    asked = home.ask("stop", "vm-under-test")
    assert asked.returncode == 1
    assert "does not run any more (shutdown), so it cannot hear its power button" in asked.stderr
    run.signal(signal.SIGINT)
    assert run.end() == 0
    assert "asked the guest" not in run.output


@pytest.mark.parametrize("hook", ["true", "false"])
def test_ends_of_children_are_heard_of_though_sigchld_was_ignored(home: Home, hook: str) -> None:
    """`trap '' CHLD` in a shell; the kernel reaps children then, and nobody learns how they ended."""
    home.define(before_start=[[hook]])
    run = home.start(argv=["env", "--ignore-signal=CHLD", *home.command("run", "vm-under-test")])
    if hook == "true":
        run.wait_running()
        os.kill(run.qemu_pid, signal.SIGKILL)
        assert run.end() == 128 + signal.SIGKILL
        told = (
            "vm-under-test: warning: QEMU ended by signal 9 (SIGKILL)\n    journalctl -k tells whether the host ran out"
        )
        assert told in run.output
    else:
        assert run.end() == 1
        assert "'false' ended with exit status 1" in run.output


def test_second_ctrl_c_cuts_the_power(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    run.signal(signal.SIGINT)
    run.wait_line("asked the guest to power down")
    assert is_alive(run.qemu_pid)
    run.signal(signal.SIGINT)
    assert run.end() == 0


def test_third_ctrl_c_kills_a_qemu_that_does_not_quit(home: Home) -> None:
    home.define()
    # It answers nothing below: no need to wait for it. And no end of time, only the third Ctrl-C, is to kill it.
    hasty = home.with_changed("from qemu_launcher import shutdown as s; s._ANSWER_TIMEOUT, s.QUIT_GRACE = 0.5, 1e6")
    run = home.start(argv=hasty)
    run.wait_running()
    pid = run.qemu_pid
    run.signal(signal.SIGINT)
    run.wait_line("the guest .*power down")
    os.kill(pid, signal.SIGSTOP)
    run.signal(signal.SIGINT)
    wait_pending(pid, signal.SIGTERM)
    assert is_alive(pid)
    run.signal(signal.SIGINT)
    run.wait_line("^vm-under-test: QEMU does not quit: killing it$")
    assert run.end() == 128 + signal.SIGKILL


def wait_pending(pid: int, number: signal.Signals) -> None:
    """Until a stopped process has been sent a signal that it cannot take."""

    def is_pending() -> bool:
        pending = re.search(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert pending is not None
        return bool(int(pending[1], 16) & (1 << number - 1))

    wait_until(is_pending)


def test_first_ctrl_c_waits_without_limit_and_hangup_never_cuts(home: Home) -> None:
    home.define(shutdown_timeout="infinity")
    run = home.start("vm-under-test", "--debug")
    run.wait_running()
    qmp = run.qmp()
    run.signal(signal.SIGTERM)
    qmp.wait_event("POWERDOWN")
    # A login that ends sends SIGTERM and SIGHUP in one go; neither may take what is left of the guest's time.
    run.signal(signal.SIGHUP)
    run.wait_line("heard SIGHUP")
    run.signal(signal.SIGHUP)
    run.wait_lines("heard SIGHUP", 2)
    run.signal(signal.SIGTERM)
    run.wait_lines("heard SIGTERM", 2)
    assert qmp("query-status")["status"] == "running"
    qmp("quit")
    assert run.end() == 0
    assert '"execute": "quit"' not in run.output


def test_guest_that_is_migrated_away_after_it_was_asked(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    qmp = run.qmp()
    run.signal(signal.SIGINT)
    qmp.wait_event("POWERDOWN")
    qmp("migrate", uri="exec:cat >/dev/null")
    assert run.end() == 0
    assert "killing" not in run.output


def test_long_timeout_is_told_in_whole_seconds(home: Home) -> None:
    home.define(shutdown_timeout=1234567)
    run = home.start()
    run.wait_running()
    run.signal(signal.SIGTERM)
    assert run.wait_line("asked the guest").endswith(
        "power down within 1234567 s; to cut its power: qemu-launcher kill vm-under-test"
    )
    home.ask("kill", "vm-under-test")
    assert run.end() == 0


def test_sigterm_quits_after_the_timeout(home: Home) -> None:
    home.define(shutdown_timeout=1)
    run = home.start()
    run.wait_running()
    run.signal(signal.SIGTERM)
    assert run.end() == 0
    assert "the guest did not power down within 1 s: cutting the power" in run.output


def test_sigint_to_the_whole_group_does_not_reach_qemu(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    qmp = run.qmp()
    os.killpg(run.process.pid, signal.SIGINT)
    qmp.wait_event("POWERDOWN")
    assert qmp("query-status")["status"] == "running"
    qmp("quit")
    assert run.end() == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGQUIT, 128 + signal.SIGQUIT)])
def test_other_signals_to_the_whole_group_end_qemu_at_once(home: Home, number: signal.Signals, status: int) -> None:
    """As qemu-launcher(1) says of timeout(1), KillMode=control-group and Ctrl-\\."""
    home.define(shutdown_timeout="infinity")
    # Whoever started the tests in the background of a shell has them ignore SIGQUIT.
    without_core = ["sh", "-c", 'ulimit -c 0; exec env --default-signal=QUIT "$@"', "sh"]
    run = home.start(argv=[*without_core, *home.command("run", "vm-under-test")])
    run.wait_running()
    pid = run.qemu_pid
    os.killpg(run.process.pid, number)
    assert run.end() == status
    wait_gone(pid)


def test_quit_of_a_vm_that_its_user_keeps_paused(home: Home) -> None:
    home.define(qemu=("S",))
    run = home.start()
    run.wait_line("^vm-under-test: paused, as you asked, untuned, ")
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "prelaunch"
    qmp.close()
    refused = home.ask("stop", "vm-under-test")
    assert refused.returncode == 1
    assert "has not been started yet (prelaunch)" in refused.stderr
    run.signal(signal.SIGINT)
    assert run.end() == 0


def test_incoming_waits_for_its_migration(home: Home) -> None:
    home.define(qemu=({"incoming": "defer"},))
    run = home.start()
    run.wait_line("^vm-under-test: waiting for its migration, as you asked, untuned, ")
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "inmigrate"
    qmp("quit")
    assert run.end() == 0
    assert "running" not in run.output


def test_preconfig_waits_for_its_user(home: Home) -> None:
    home.define(qemu=("preconfig",))
    run = home.start()
    run.wait_line("^vm-under-test: waiting in preconfig, as you asked, untuned, ")
    qmp = run.qmp()
    with pytest.raises(RuntimeError, match="only after machine initialization"):
        qmp("query-cpus-fast")
    qmp("x-exit-preconfig")
    assert qmp("query-status")["status"] == "running"
    qmp.close()
    assert "vm-under-test: running, PID" in home.ask("status").stdout
    home.ask("kill", "vm-under-test")
    assert run.end() == 0


def test_exit_status_of_a_killed_qemu(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    os.kill(run.qemu_pid, signal.SIGKILL)
    assert run.end() == 128 + signal.SIGKILL


def test_quiet_says_nothing(home: Home) -> None:
    home.define()
    run = home.start("vm-under-test", "-q")
    run.wait_recorded()
    home.ask("kill", "vm-under-test")
    assert run.end() == 0
    assert "running" not in run.output


@pytest.mark.parametrize(("options", "status"), [(({"device": "nonsense"},), 1), (("no-such-option",), 1)])
def test_early_death_is_told_with_status_and_command_line(home: Home, options: tuple[object, ...], status: int) -> None:
    home.define(qemu=options)
    run = home.start()
    assert run.end() == status
    assert f"QEMU ended with exit status {status} before the guest ran" in run.output
    assert "what this host lacks for it, if anything: qemu-launcher check vm-under-test\n" in run.output
    by_hand = home.ask("command", "vm-under-test").stdout
    assert f"its command line, to be run by hand: {by_hand}" in run.output
    assert "--untuned" not in run.output


def ending(home: Home, line: str) -> Path:
    """A `binary:` that ends with this line of shell, instead of becoming QEMU."""
    wrapper = home.configuration / "ending"
    wrapper.write_text(f"#!/bin/sh\n{line}\n")
    wrapper.chmod(0o755)
    return wrapper


@pytest.mark.parametrize("status", [129, 130, 137, 200, 255])
def test_exit_status_above_128_is_not_taken_for_a_signal(home: Home, status: int) -> None:
    home.define(binary=str(ending(home, f"exit {status}")))
    run = home.start()
    assert run.end() == status
    assert f"QEMU ended with exit status {status} before the guest ran" in run.output


@pytest.mark.parametrize(("number", "name"), [(9, "9 (SIGKILL)"), (15, "15 (SIGTERM)"), (40, "40")])
def test_early_death_by_a_signal(home: Home, number: int, name: str) -> None:
    """Also by a real-time signal, most of which have no name in signal(7)."""
    home.define(binary=str(ending(home, f"kill -{number} $$")))
    run = home.start()
    assert run.end() == 128 + number
    assert f"QEMU ended by signal {name} before the guest ran" in run.output


def test_option_without_its_value_swallows_none_of_ours(home: Home) -> None:
    home.define(qemu=("m",))
    run = home.start()
    assert run.end() == 1
    assert "requires an argument" in run.output


def test_qemu_that_only_prints_something_is_no_failure(home: Home) -> None:
    home.define(qemu=("version",))
    run = home.start()
    assert run.end() == 0


def test_binary_that_is_not_in_path(home: Home) -> None:
    path = home.define(binary="qemu-system-nowhere", env={"PATH": "/usr/bin:/nowhere"})
    run = home.start()
    assert run.end() == 2
    assert (
        f"{path}:2:11: cannot start 'qemu-system-nowhere': it is in no folder of PATH (/usr/bin:/nowhere)" in run.output
    )


@pytest.mark.parametrize(
    ("wrong", "status", "message"),
    [
        ({"binary": "~/qemu"}, 2, ":2:11: cannot start '~/qemu': it is not there, or not yours to execute"),
        ({"working_directory": "$HOME/vms"}, 2, ": there is no folder '$HOME/vms', or it is closed to you"),
        ({"qemu": ({"drive": ["file=~/disk.img"]},)}, 1, "QEMU ended with exit status 1 before the guest ran"),
    ],
)
def test_path_for_a_shell(home: Home, wrong: dict[str, Any], status: int, message: str) -> None:
    home.define(**wrong)
    run = home.start()
    assert run.end() == status
    assert message in run.output
    assert run.output.count("    ~ and $HOME are the shell's; write the whole path\n") == 1


@pytest.mark.parametrize("mode", [None, 0o644])
def test_binary_that_is_not_there_or_not_ours_to_execute(home: Home, mode: int | None) -> None:
    binary = home.configuration / "qemu"
    if mode is not None:
        binary.write_text("x")
        binary.chmod(mode)
    path = home.define(binary=str(binary))
    run = home.start()
    assert run.end() == 2
    assert f"{path}:2:11: cannot start '{binary}': it is not there, or not yours to execute" in run.output
    assert home.leftovers() == []


def test_binary_that_before_start_brings(home: Home) -> None:
    binary = home.configuration / "qemu"
    bring = ["ln", "-s", "/usr/bin/qemu-system-x86_64", str(binary)]
    home.define(binary=str(binary), before_start=[bring], qemu=("version",))
    assert home.start().end() == 0


def test_binary_that_is_no_program(home: Home) -> None:
    binary = home.configuration / "qemu"
    binary.write_text("x")
    binary.chmod(0o755)
    home.define(binary=str(binary))
    run = home.start()
    assert run.end() == 1
    assert f"cannot start '{binary}': could not execute it: Exec format error" in run.output
    assert home.leftovers() == []


def test_working_directory_environment_and_clear_env(home: Home, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    home.define(working_directory=str(place), clear_env=True, env={"COLOUR": "blue", "PATH": os.environ["PATH"]})
    run = home.start()
    run.wait_running()
    environment = Path(f"/proc/{run.qemu_pid}/environ").read_bytes().split(b"\0")
    assert sorted(filter(None, environment)) == sorted([b"COLOUR=blue", f"PATH={os.environ['PATH']}".encode()])
    assert Path(f"/proc/{run.qemu_pid}/cwd").resolve() == place
    home.ask("kill", "vm-under-test")
    assert run.end() == 0


def test_wrapper_that_does_not_become_qemu_is_refused(home: Home) -> None:
    wrapper = home.configuration / "wrapper"
    wrapper.write_text('#!/bin/sh\nqemu-system-x86_64 "$@"\n')
    wrapper.chmod(0o755)
    home.define(binary=str(wrapper))
    run = home.start()
    assert run.end() == 1
    assert "QEMU is not the process that was started" in run.output


def test_second_start_is_refused(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    second = home.start()
    assert second.end() == 1
    assert f"vm-under-test is already running (PID {run.qemu_pid})" in second.output
    assert is_alive(run.qemu_pid)


def test_nothing_is_left_and_the_name_is_free_again(home: Home) -> None:
    home.define()
    for _ in range(2):
        run = home.start()
        run.wait_running()
        pid = run.qemu_pid
        home.ask("kill", "vm-under-test")
        run.end()
        wait_gone(pid)
        assert home.leftovers() == []
        assert home.ask("status", "vm-under-test").returncode == 3
        assert not (home.runtime / "qemu-launcher" / "vm-under-test.sock").exists()


def _descriptors(pid: int) -> dict[int, str]:
    """What they refer to; without one that is closed at this moment."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = str(entry.readlink())
    return found


def test_descriptors_and_signal_mask_of_qemu(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    proc = Path(f"/proc/{run.qemu_pid}")
    links, launchers = _descriptors(run.qemu_pid), {*_descriptors(run.process.pid).values()}
    # Beyond the standard three, it shares only the lock with the launcher: no pipe of the gate, no epoll, no pidfd.
    shared = {link for fd, link in links.items() if fd > 2 and link in launchers and not link.startswith("anon_inode")}
    assert shared == {str(home.runtime / "qemu-launcher" / "vm-under-test.lock")}
    status = (proc / "status").read_text()
    blocked = int(re.search(r"^SigBlk:\s*(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]  # always there
    ignored = int(re.search(r"^SigIgn:\s*(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    assert blocked & (1 << signal.SIGINT - 1)
    assert blocked & (1 << signal.SIGHUP - 1)
    assert not blocked & (1 << signal.SIGTERM - 1)
    assert not ignored & (1 << signal.SIGXFSZ - 1)


def test_runtime_files_are_private(home: Home) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    place = home.runtime / "qemu-launcher"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / "vm-under-test.lock").stat().st_mode) == 0o600


def test_runtime_directory_that_others_may_enter_is_refused(home: Home) -> None:
    place = home.runtime / "qemu-launcher"
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    home.define()
    run = home.start()
    assert run.end() == 1
    assert f"{place} is not yours, or others may enter it" in run.output
    assert not list(place.iterdir())


def test_closed_standard_descriptors_are_not_taken_for_ours(home: Home) -> None:
    """Started with stdin, stdout and stderr closed, the lock must not become QEMU's stderr."""
    home.define()
    words = " ".join(home.command("run", "vm-under-test"))
    home.start(argv=["sh", "-c", f"exec {words} 0<&- 1>&- 2>&-"]).wait_recorded()
    fds = Path(f"/proc/{home.record()['qemu'][0]}/fd")
    assert [str((fds / str(fd)).readlink()) for fd in range(3)] == ["/dev/null"] * 3
    assert home.ask("kill", "vm-under-test").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="optional: only root can become somebody else")
def test_root_starts_it_as_another_user(home: Home) -> None:
    """From the lock to QEMU everything is that user's, and root's runtime directory is not touched."""
    nobody = pwd.getpwnam("nobody")
    place = Path(f"/tmp/qemu-launcher-{nobody.pw_uid}")
    home.define("as-nobody", user="nobody", working_directory="/")
    run = home.start("as-nobody")
    try:
        run.wait_running()
        record = json.loads((place / "as-nobody.lock").read_text())
        status = Path(f"/proc/{record['qemu'][0]}/status").read_text()
        for field, number in (("Uid", nobody.pw_uid), ("Gid", nobody.pw_gid)):
            assert re.search(rf"^{field}:\s+({number}\s*){{4}}$", status, re.MULTILINE)
        groups = re.search(r"^Groups:(.*)$", status, re.MULTILINE)
        assert groups is not None
        assert [int(word) for word in groups[1].split()] == sorted(os.getgrouplist("nobody", nobody.pw_gid))
        assert place.stat().st_uid == nobody.pw_uid
        assert not (home.runtime / "qemu-launcher").exists()
        asked = home.ask("status", "as-nobody")
        assert asked.returncode == 3
        assert "sudo -u USER qemu-launcher status as-nobody\n" in asked.stderr
        os.kill(record["qemu"][0], signal.SIGTERM)
        assert run.end() == 0
    finally:
        shutil.rmtree(place, ignore_errors=True)
