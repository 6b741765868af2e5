"""Tables, with and without rich."""

import builtins

import pytest

from qemu_launcher import table


def test_columns_are_aligned_and_lines_end_at_their_last_word() -> None:
    assert table.aligned([("VM", "owner"), ("win11", "al"), ("a", "")]) == ["VM     owner", "win11  al", "a"]


def test_terminal_without_colour_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert table.rich_page() is None


def test_what_is_no_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert table.page_for_stdout() is None
    assert table.rich_page() is not None


def test_terminal_without_rich_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_rich(name: str, *rest: object) -> object:
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert table.rich_page() is None


def test_narrow_terminal_loses_no_part_of_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path ends in the line and the column of a mistake."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    page = table.rich_page()
    assert page is not None
    page.table(("VM", "definition"), [("win11", "/home/alice/.config/qemu-launcher/win11.yml:12:7")])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "12:7" in shown
