"""How errors look on a terminal, and that none can upset it."""

import pytest

from qemu_launcher.errors import (
    MOST_PROBLEMS,
    DefinitionError,
    LauncherError,
    Mark,
    NotRunning,
    QemuFailed,
    QmpError,
    TuningFailed,
    Unfit,
    UsageError,
    printable,
    render,
)

HERE = Mark("/home/alice/.config/qemu-launcher/win11.yml", 7, 14)


def test_message_place_and_hint() -> None:
    error = DefinitionError("priority 120 is out of range for fifo (1-99)", "write one\nor the other", mark=HERE)
    assert render(error) == (
        "qemu-launcher: /home/alice/.config/qemu-launcher/win11.yml:7:14: "
        "priority 120 is out of range for fifo (1-99)\n"
        "    write one\n"
        "    or the other\n"
    )
    assert str(error).startswith("/home/alice/.config/qemu-launcher/win11.yml:7:14: priority")


def test_without_place_or_hint() -> None:
    assert render(LauncherError("no")) == "qemu-launcher: no\n"
    assert render(DefinitionError("no")) == "qemu-launcher: no\n"


def test_exit_status() -> None:
    errors = [LauncherError, UsageError, DefinitionError, NotRunning, QemuFailed, QmpError, TuningFailed, Unfit]
    assert [error("x").exit_status for error in errors] == [1, 2, 2, 3, 1, 1, 1, 2]
    assert QemuFailed("x", exit_status=130).exit_status == 130


def test_several_are_sorted_and_told_once() -> None:
    def at(line: int, text: str) -> DefinitionError:
        return DefinitionError(text, mark=HERE._replace(line=line))

    error = DefinitionError.several([at(9, "c"), DefinitionError.several([at(10, "d"), at(2, "a")]), at(9, "c")])
    assert [problem.message for problem in error.problems] == ["a", "c", "d"]
    assert error.message == "a"
    assert render(error).count("\n") == 3
    alone = at(1, "x")
    assert DefinitionError.several([alone]) is alone


def test_more_than_a_screenful() -> None:
    error = DefinitionError.several([DefinitionError(f"m{n}", mark=HERE._replace(line=n)) for n in range(1, 99)])
    lines = render(error).splitlines()
    assert len(lines) == MOST_PROBLEMS + 1
    assert lines[-1] == "qemu-launcher: and more"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢\nline", "plain ü 漢\nline"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\rb\tc\x00\x7f\x9b", "a\\rb\\tc\\x00\\x7f\\x9b"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\udcff\udc80", "\\xff\\x80"),
        ("\ud800", "\\ud800"),
        ("\u2028", "\\u2028"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()
