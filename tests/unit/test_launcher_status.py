"""How the running VMs are shown, without any VM."""

import pytest

from qemu_launcher import runtime, status
from qemu_launcher.errors import NotRunning
from qemu_launcher.status import Picture, VcpuRow

PICTURE = Picture(
    name="win11",
    pid=4711,
    state="running",
    facts=(("definition", "/home/alice/win11.yml"), ("memory", "24.1 GiB used, 24 GiB locked, 25 GiB lockable")),
    vcpus=(
        VcpuRow(0, 4720, "4", "yes", "fifo (reset on fork)", "1"),
        VcpuRow(10, 14721, "12-13", "isolated invalid (why)", "other", "0"),
    ),
)


def test_plain_text_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert status._plain(PICTURE) == (
        "win11: running, PID 4711\n"
        "  definition  /home/alice/win11.yml\n"
        "  memory      24.1 GiB used, 24 GiB locked, 25 GiB lockable\n"
        "  vCPU  TID    host CPUs  shielded                policy                priority\n"
        "  0     4720   4          yes                     fifo (reset on fork)  1\n"
        "  10    14721  12-13      isolated invalid (why)  other                 0\n"
    )


def test_root_is_told_whose_vms_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With `user:` root has started a VM that is that user's, and root's no more."""
    monkeypatch.setattr(runtime, "find_all", list)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert status.show(None) == 0
    assert capsys.readouterr().out == (
        "no VM of root is running; those of another user: sudo -u USER qemu-launcher status\n"
    )
    for command, ask in (("status", status.show), ("stop", status.stop), ("kill", status.kill)):
        with pytest.raises(NotRunning, match=r"^win11 is not running among the VMs of root$") as caught:
            ask("win11")
        assert caught.value.hint == (
            "see what runs with: qemu-launcher status\n"
            f"a VM with user: in its definition is that user's: sudo -u USER qemu-launcher {command} win11"
        )


def test_nothing_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runtime, "find_all", list)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert status.show(None) == 0
    assert capsys.readouterr().out == "no VM of yours is running\n"
    for ask in (status.show, status.stop, status.kill):
        with pytest.raises(NotRunning, match="win11 is not running") as caught:
            ask("win11")
        assert caught.value.exit_status == 3


def test_terminal_without_colour_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert status._show_rich([PICTURE]) is False


def test_terminal_without_rich_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def without_rich(name: str, *rest: object) -> object:
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert status._show_rich([PICTURE]) is False


def test_markup_in_a_path_is_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    picture = Picture("vm", 1, "running", (("definition", "/home/[bold]alice[/bold].yml"),), ())
    assert status._show_rich([picture]) is True
    assert "/home/[bold]alice[/bold].yml" in capsys.readouterr().out
