"""How the running VMs are shown, without any VM."""

from dataclasses import replace
from pathlib import Path

import pytest

from qemu_launcher import power, runtime, status, table
from qemu_launcher.control import State
from qemu_launcher.errors import NotRunning
from qemu_launcher.procfs import Scheduling
from qemu_launcher.record import Record
from qemu_launcher.runtime import Found
from qemu_launcher.status import Memory, Picture, Vcpu

REALTIME = Scheduling("fifo", 1, reset_on_fork=True)
OTHER = Scheduling("other", 0, reset_on_fork=False)
INVALID = "isolated invalid (why)"

PICTURE = Picture(
    name="win11",
    state=State("running", control_socket="ok"),
    pid=4711,
    definition="/home/alice/win11.yml",
    launcher=4700,
    memory=Memory(used=int(24.1 * 2**30), locked=24 * 2**30, lockable=25 * 2**30),
    vcpus=(
        Vcpu(0, 4720, frozenset({4}), shielded=True, shield="isolated", scheduling=REALTIME),
        Vcpu(10, 14721, frozenset({12, 13}), shielded=False, shield=INVALID, scheduling=OTHER),
    ),
)


def plain(*pictures: Picture) -> str:
    page = table.PlainPage()
    status.draw(pictures, page)
    return page.text


def test_plain_text_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain(PICTURE) == (
        "win11: running, PID 4711\n"
        "  definition  /home/alice/win11.yml\n"
        "  launcher    PID 4700\n"
        "  memory      24.1 GiB used, 24 GiB locked, 25 GiB lockable\n"
        "  vCPU  TID    host CPUs  shielded                policy                priority\n"
        "  0     4720   4          yes                     fifo (reset on fork)  1\n"
        "  10    14721  12-13      isolated invalid (why)  other                 0\n"
    )


@pytest.mark.parametrize(
    ("shield", "shielded", "word"),
    [
        (None, False, "no"),
        ("isolated", True, "yes"),
        ("root", True, "yes"),
        ("pool", True, "yes (pool)"),
        ("cpuset-v1", True, "yes (cpuset-v1)"),
        ("pool invalid (CPUs 4 are offline or taken)", False, "pool invalid (CPUs 4 are offline or taken)"),
    ],
)
def test_a_shield_without_partitions_is_named(shield: str | None, shielded: bool, word: str) -> None:
    vcpu = Vcpu(0, 4720, frozenset({4}), shielded=shielded, shield=shield, scheduling=REALTIME)
    assert vcpu.cells()[3] == word


def test_root_is_told_whose_vms_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With `user:` root has started a VM that is that user's, and root's no more."""
    monkeypatch.setenv("QEMU_LAUNCHER_CONFIG_DIR", str(tmp_path))
    (tmp_path / "win11.yml").touch()
    monkeypatch.setattr(runtime, "find_all", list)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert status.show(None) == 0
    assert capsys.readouterr().out == (
        "no VM of root is running; those of another user: sudo -u USER qemu-launcher status\n"
    )
    for command, ask in (
        ("status", status.show),
        *((ask.__name__, ask) for ask in (power.stop, power.kill, power.pause, power.resume)),
    ):
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
    for ask in (status.show, power.stop, power.kill, power.pause, power.resume):
        with pytest.raises(NotRunning, match="win11 is not running") as caught:
            ask("win11")
        assert caught.value.exit_status == 3


def test_name_that_nothing_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor a definition: it is a slip, of the name of one or of a VM that runs."""
    monkeypatch.setenv("QEMU_LAUNCHER_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (tmp_path / "win11.yml").touch()
    by_path = Found("elsewhere", Record(), None)
    monkeypatch.setattr(runtime, "find_all", lambda: [by_path])
    for name, hint in (
        ("win12", "did you mean win11?\n"),
        ("elswhere", "did you mean elsewhere?\n"),
        ("x", ""),
    ):
        for ask in (status.show, power.stop, power.kill, power.pause, power.resume):
            with pytest.raises(NotRunning) as caught:
                ask(name)
            assert caught.value.message == f"{name} is not running, and there is no {name}.yml in {tmp_path}"
            assert caught.value.hint == f"{hint}see what runs with: qemu-launcher status"


def test_markup_in_a_path_is_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    picture = replace(PICTURE, definition="/home/[bold]alice[/bold].yml")
    page = table.rich_page()
    assert page is not None
    status.draw([picture], page)
    shown = capsys.readouterr().out
    assert "/home/[bold]alice[/bold].yml" in shown
    assert "isolated invalid" in shown


SHIELDED = Record(isolation="shield", cpus=frozenset({4, 12}))
TAKEN_BACK = "its shield of CPUs 4,12 was taken back: "
ONLINE = frozenset(range(16))


@pytest.mark.parametrize(
    ("record", "shielded", "words"),
    [
        (SHIELDED, ("yes", "yes"), None),
        (SHIELDED, ("yes", "no"), None),
        (SHIELDED, ("no", "no"), TAKEN_BACK + "released by you or an administrator, or one of them was offline, or"),
        (SHIELDED, ("isolated invalid (why)", "no"), "its shield of CPUs 4,12 does not hold: isolated invalid (why)\n"),
        (Record(isolation="cpuset", cpus=frozenset({4, 12})), ("no", "no"), None),
        (Record(), ("no", "no"), None),
    ],
)
def test_owner_is_told_of_a_lost_shield(record: Record, shielded: tuple[str, str], words: str | None) -> None:
    loss = status.lost_shield("win11", record, placed(*shielded), ONLINE)
    assert loss == words or (words is not None and loss is not None and loss.startswith(words))


def placed(*shielded: str, cpus: tuple[int, ...] = (4, 12)) -> list[Vcpu]:
    """Two vCPUs, with status's own word for whether they are shielded."""
    return [
        Vcpu(
            index,
            4720 + index,
            frozenset({cpu}),
            shielded=word == "yes",
            shield=None if word == "no" else "isolated" if word == "yes" else word,
            scheduling=OTHER,
        )
        for index, (word, cpu) in enumerate(zip(shielded, cpus, strict=True))
    ]


@pytest.mark.parametrize(
    ("shielded", "online", "lines"),
    [
        (
            ("yes", "yes"),
            ONLINE - {4},
            [
                "of its shield of CPUs 4,12 CPU 4 went offline: its vCPUs share what is left, 12",
                "to bring it online: echo 1 | sudo tee /sys/devices/system/cpu/cpu4/online",
            ],
        ),
        (
            ("isolated invalid (No cpu)",) * 2,
            ONLINE - {4, 12},
            [
                "its shield of CPUs 4,12 does not hold: isolated invalid (No cpu)",
                "to bring them online: echo 1 | sudo tee /sys/devices/system/cpu/cpu4/online "
                "/sys/devices/system/cpu/cpu12/online",
                "to take back the real time that it may have: qemu-launcher release win11",
                "for a new shield: start it anew",
            ],
        ),
        (
            ("no", "no"),
            ONLINE - {4},
            [
                TAKEN_BACK + "CPU 4 went offline",
                "to bring it online: echo 1 | sudo tee /sys/devices/system/cpu/cpu4/online",
                "for a new shield: start it anew",
            ],
        ),
        (("yes", "yes"), ONLINE - {2}, []),
        (("yes", "yes"), None, []),
    ],
)
def test_owner_is_told_of_a_cpu_that_went_offline(
    shielded: tuple[str, str], online: frozenset[int] | None, lines: list[str]
) -> None:
    """The kernel moves a vCPU to what is left of its partition, which stays valid as long as anything is left."""
    loss = status.lost_shield("win11", SHIELDED, placed(*shielded, cpus=(12, 12)), online)
    assert (loss or "").splitlines() == lines


def test_a_line_is_left_empty_between_two_vms() -> None:
    idle = Picture("a", State("starting"))
    assert plain(idle, idle) == "a: starting\n\na: starting\n"


def test_what_to_do_stands_below_the_warning() -> None:
    picture = replace(PICTURE, warnings=("what\ndo this\nor that",), vcpus=())
    assert plain(picture).endswith("  warning     what\n              do this\n              or that\n")
    assert picture.as_json()["warnings"] == ["what; do this; or that"]
