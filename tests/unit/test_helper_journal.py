"""The audit trail: what reaches the journal's socket, byte by byte, and that nothing in it can be forged."""

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_launcher_helper.__main__ import Journal
from qemu_launcher_helper.contract import MESSAGE_ID
from qemu_launcher_helper.records import tell


@pytest.fixture
def sent(tmp_path: Path) -> Iterator[Callable[[], dict[str, str]]]:
    """What one log record became, as fields; the root logger speaks to a socket of the test's own meanwhile."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(str(path))
        journald.settimeout(10)
        handler = Journal(str(path), None)
        logger = logging.getLogger()
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield lambda: fields(journald.recv(65536))
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            handler.close()


def fields(datagram: bytes) -> dict[str, str]:
    """journald's own reading of NAME=VALUE lines; a name twice, or a line without one, is an error here."""
    lines = datagram.decode("ascii").removesuffix("\n").split("\n")
    pairs = [line.split("=", 1) for line in lines]
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def test_a_grant(sent: Callable[[], dict[str, str]]) -> None:
    tell(logging.INFO, "granted", "PinThreads", {"uid": "1000", "pid": "42", "vm": "win11", "cpus": "4-7"})
    assert sent() == {
        "SYSLOG_IDENTIFIER": "qemu-launcher-helper",
        "PRIORITY": "6",
        "MESSAGE_ID": MESSAGE_ID,
        "MESSAGE": "granted PinThreads uid=1000 pid=42 vm=win11 cpus=4-7",
        "QEMU_LAUNCHER_VERDICT": "granted",
        "QEMU_LAUNCHER_OPERATION": "PinThreads",
        "QEMU_LAUNCHER_UID": "1000",
        "QEMU_LAUNCHER_PID": "42",
        "QEMU_LAUNCHER_VM": "win11",
        "QEMU_LAUNCHER_CPUS": "4-7",
        "QEMU_LAUNCHER_REASON": "",
    }


@pytest.mark.parametrize("evil", ["a\nMESSAGE=forged", "\x1b[31m", "%s %(x)s %", "\N{RIGHT-TO-LEFT OVERRIDE}", "'\"\\"])
def test_no_reason_makes_a_second_line_or_field(sent: Callable[[], dict[str, str]], evil: str) -> None:
    tell(logging.WARNING, "refused", "Release", {"uid": "1000"}, evil)
    record = sent()
    assert record["PRIORITY"] == "5"
    assert record["QEMU_LAUNCHER_REASON"] == ascii(evil)[1:-1]
    assert record["MESSAGE"] == f"refused Release uid=1000: {evil!a}"
    assert all(value.isprintable() for value in record.values())


def test_what_a_call_does_not_name_takes_no_place_in_the_line(sent: Callable[[], dict[str, str]]) -> None:
    tell(logging.INFO, "granted", "SetMemlock", {"uid": "1000", "bytes": "4096", "tids": ""})
    assert sent()["MESSAGE"] == "granted SetMemlock uid=1000 bytes=4096"


def test_a_journal_that_is_flooded_by_others_does_not_stop_us(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its socket is everybody's. What it does not take goes to stderr, which systemd reads over a stream of our own."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as full,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood,
    ):
        full.bind(str(tmp_path / "socket"))
        flood.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                flood.sendto(b"x", str(tmp_path / "socket"))
        socket.setdefaulttimeout(0.05)
        try:
            handler = Journal(str(tmp_path / "socket"), None)
            record = logging.LogRecord("x", logging.INFO, "x", 1, "%(MESSAGE)s", ({"MESSAGE": "granted all"},), None)
            handler.handle(record)
            handler.close()
        finally:
            socket.setdefaulttimeout(None)
    assert "granted all" in capsys.readouterr().err


def test_other_words_are_no_part_of_the_trail(sent: Callable[[], dict[str, str]]) -> None:
    logging.warning("polkit gave no answer: %a", "a\nb")
    record = sent()
    assert record["MESSAGE"] == "polkit gave no answer: 'a\\nb'"
    assert "MESSAGE_ID" not in record
    assert record["SYSLOG_IDENTIFIER"] == "qemu-launcher-helper"


def test_without_systemd_it_is_one_line_of_syslog() -> None:
    """RFC 3164: 30 is facility daemon (3), severity informational (6)."""
    handler = Journal("/dev/log", None)
    line = "%(MESSAGE)s"
    record = logging.LogRecord("x", logging.INFO, "x", 1, line, ({"MESSAGE": "granted PinThreads uid=1000"},), None)
    assert handler.makePickle(record) == b"<30>qemu-launcher-helper: granted PinThreads uid=1000"
    record.levelno, record.msg, record.args = logging.CRITICAL, "cannot serve: %a", ("a\nb",)
    assert handler.makePickle(record) == b"<27>qemu-launcher-helper: cannot serve: 'a\\nb'"
