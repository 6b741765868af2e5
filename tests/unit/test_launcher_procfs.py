"""/proc read into values, with real processes and threads; cpulists both ways."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, strategies as st

from qemu_launcher import procfs
from qemu_launcher.cpulist import MAX_CPU, format_cpulist, parse_cpulist
from qemu_launcher.procfs import Process, Scheduling
from qemu_launcher.sizes import INFINITY, format_size


@contextmanager
def sleeping(*argv: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(argv or ("sleep", "1000"), stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def test_process_is_alive_until_it_is_a_zombie() -> None:
    with sleeping() as child:
        process = Process.of(child.pid)
        assert process is not None
        assert process.is_alive()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
        assert not process.is_alive()
        assert Process.of(child.pid) is None
        with process.pidfd() as fd:
            assert fd is None
    assert Process.of(child.pid) is None


def test_process_with_another_start_time_is_another() -> None:
    with sleeping() as child:
        process = Process.of(child.pid)
        assert process is not None
        impostor = Process(child.pid, process.start_time + 1)
        assert not impostor.is_alive()
        assert procfs.end(impostor, grace=0) is False
        assert child.poll() is None
        with impostor.pidfd() as fd:
            assert fd is None


def test_start_time_is_read_behind_any_name() -> None:
    """comm may hold spaces and parentheses: everything after the last one counts."""
    with sleeping("sh", "-c", 'printf "%s" ") Z (1 2) " > /proc/$$/comm; echo ready; read x') as child:
        assert procfs.start_time(os.getpid()) is not None
        deadline = time.monotonic() + 30
        while procfs.comm(child.pid) != ") Z (1 2) ":
            assert time.monotonic() < deadline
        process = Process.of(child.pid)
        assert process is not None
        assert process.is_alive()


def test_end_takes_sigterm_first_and_sigkill_then() -> None:
    with sleeping() as child:
        process = Process.of(child.pid)
        assert process is not None
        assert procfs.end(process, grace=60) is True
        assert child.wait() == -signal.SIGTERM
    with sleeping() as child:
        process = Process.of(child.pid)
        assert process is not None
        child.send_signal(signal.SIGSTOP)
        assert procfs.end(process, grace=0) is True
        assert child.wait() == -signal.SIGKILL


def test_threads_affinity_and_scheduling_of_a_thread(tid: int) -> None:
    assert set(procfs.tids(os.getpid())) >= {os.getpid(), tid}
    cpu = min(os.sched_getaffinity(0))
    os.sched_setaffinity(tid, {cpu})
    assert procfs.allowed_cpus(os.getpid(), tid) == frozenset({cpu})
    assert procfs.allowed_cpus(os.getpid(), os.getpid()) == frozenset(os.sched_getaffinity(0))
    os.sched_setscheduler(tid, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    assert procfs.scheduling(tid) == Scheduling("batch", 0, reset_on_fork=True)
    assert str(procfs.scheduling(tid)) == "batch (reset on fork)"


def test_gone_is_an_answer() -> None:
    with sleeping() as child:
        pass
    pid = child.pid
    assert procfs.tids(pid) == ()
    for read in (procfs.start_time, procfs.memlock_limit, procfs.resident, procfs.locked, procfs.owner, procfs.comm):
        assert read(pid) is None
    assert procfs.scheduling(pid) is None
    assert procfs.allowed_cpus(pid, pid) is None


def test_own_facts() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    expected = tuple(INFINITY if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))
    assert procfs.memlock_limit(os.getpid()) == expected
    assert procfs.owner(os.getpid()) == os.getuid()
    assert (procfs.resident(os.getpid()) or 0) > 1 << 20
    assert procfs.locked(os.getpid()) == 0


@pytest.mark.parametrize(
    ("text", "cpus"), [("", []), ("\n", []), ("0", [0]), ("0-3,8\n", [0, 1, 2, 3, 8]), (str(MAX_CPU), [MAX_CPU])]
)
def test_cpulists(text: str, cpus: list[int]) -> None:
    assert parse_cpulist(text) == frozenset(cpus)
    assert format_cpulist(cpus) == text.strip()


@pytest.mark.parametrize("text", ["x", "1-", "-1", "3-1", "1,,2", ",", "1 2", "0x1", "8192", "1-99999", "１"])
def test_what_is_no_cpulist(text: str) -> None:
    with pytest.raises(ValueError):
        parse_cpulist(text)


@given(st.frozensets(st.integers(0, MAX_CPU), max_size=40))
def test_cpulists_survive_both_ways(cpus: frozenset[int]) -> None:
    assert parse_cpulist(format_cpulist(cpus)) == cpus


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (25 << 30, "25 GiB"),
        (48 << 20, "48 MiB"),
        (3 << 40, "3 TiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert format_size(size) == text
