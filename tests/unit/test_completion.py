"""What is offered to a shell, and that it is all there is."""

import argparse
import os
from pathlib import Path

import pytest

from qemu_launcher import cli, completion, runtime
from qemu_launcher.procfs import Process
from qemu_launcher.record import RUNNING, Record
from qemu_launcher.runtime import Found

OPTIONS_OF_ALL = ["-h", "--help", "--version"]


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Definitions win11, web and list, of which web runs."""
    for name in ("win11", "web", "list", "a b"):
        (tmp_path / f"{name}.yml").touch()
    web = Found("web", Record(qemu=Process.of(os.getpid()), state=RUNNING), None)
    monkeypatch.setattr(runtime, "find_all", lambda: [web])
    return {"QEMU_LAUNCHER_CONFIG_DIR": str(tmp_path)}


def offered(environ: dict[str, str], line: str) -> list[str]:
    """The words for a line without the program's name, whose last word is to be completed."""
    return [candidate.word for candidate in completion._candidates(line.split(" "), environ)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", [*cli.COMMANDS, "list", "web", "win11"]),
        ("w", ["web", "win11"]),
        ("st", ["start", "stop", "status"]),
        ("no-such", [":files"]),
        ("./w", [":files"]),
        ("-q w", ["web", "win11"]),
        ("run ", ["list", "web", "win11"]),
        ("run -- l", ["list"]),
        ("-- l", ["list"]),
        ("run win11 ", []),
        ("win11 ", []),
        ("win11 -", ["-q", "--quiet", "-d", "--debug", "--untuned", *OPTIONS_OF_ALL]),
        ("win11 -q --u", ["--untuned"]),
        ("run --untuned --u", []),
        ("command w", ["web", "win11"]),
        ("command ~/vms/", [":files"]),
        *((f"{command} ", ["web"]) for command in ("stop", "kill", "pause", "resume", "status", "release")),
        ("status --w", ["--watch"]),
        ("--watch status ", ["web"]),
        ("stop -", OPTIONS_OF_ALL),
        ("stop web ", []),
        ("list ", []),
        ("list --", ["--json", "--help", "--version"]),
        ("limits --owner ", [":users"]),
        ("--owner ", [":users"]),
        ("--owner bob rel", ["release"]),
        ("release --owner bob ", ["web"]),
        ("monitor ", ["web"]),
        ("monitor web ", []),
        ("monitor web -", []),
        ("qmp web ", []),
        ("import ", ["--"]),
        ("import -o ", [":files"]),
        ("import -- ", [":commands"]),
        ("import -- qemu-system-x86_64 -", [":files"]),
    ],
)
def test_offered(environ: dict[str, str], line: str, words: list[str]) -> None:
    assert offered(environ, line) == words


def test_all_options_before_any_command(environ: dict[str, str]) -> None:
    assert offered(environ, "-") == [*cli.OPTIONS, *OPTIONS_OF_ALL]
    assert offered(environ, "--untuned -q --u") == []


def test_no_command_and_no_option_is_missing() -> None:
    """Whoever adds one adds what it takes here too."""
    assert set(completion.ARGUMENTS) == set(cli.COMMANDS)
    assert set(completion.VALUES) == set(cli.VALUED)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_options_are_those_that_the_command_takes(environ: dict[str, str], command: str) -> None:
    actions = cli._parser(command)._actions
    taken = {option for action in actions for option in action.option_strings}
    assert set(offered(environ, f"{command} -")) == taken | set(OPTIONS_OF_ALL)
    valued = {option for action in actions if action.nargs is None for option in action.option_strings}
    assert valued == taken & set(cli.VALUED)
    positional = [action for action in actions if not action.option_strings]
    assert bool(positional) == bool(completion.ARGUMENTS[command])
    assert all(isinstance(action, argparse.Action) for action in positional)


@pytest.mark.parametrize("word", [*cli.COMMANDS, *cli.OPTIONS, *OPTIONS_OF_ALL])
def test_every_word_is_explained_as_the_help_does(word: str) -> None:
    meaning = completion._help()[word]
    assert meaning[0].isupper() or word.startswith("-")
    assert meaning in cli.HELP
    assert not meaning.startswith(("run:", "status:", "limits, release:"))


def test_answer_is_text_for_a_shell(environ: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.answer(["stop", "w"], environ) == 0
    assert completion.answer(["command", "wi"], environ) == 0
    assert completion.answer(["limits", "--owner", ""], environ) == 0
    assert completion.answer([], environ) == 0
    folder = environ["QEMU_LAUNCHER_CONFIG_DIR"]
    assert capsys.readouterr().out == f"web\tPID {os.getpid()}\nwin11\t{folder}/win11.yml\n:users\n"


def test_it_never_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def denied() -> list[Found]:
        raise PermissionError(13, "Permission denied", "/proc")

    monkeypatch.setattr(runtime, "find_all", denied)
    assert completion.answer(["stop", ""], {}) == 0
    (tmp_path / "loop").symlink_to("loop")
    assert completion.answer(["run", ""], {"QEMU_LAUNCHER_CONFIG_DIR": str(tmp_path / "loop")}) == 0
    assert capsys.readouterr().out == ":files\n"


def test_word_for_shells_is_no_vm_s_name() -> None:
    assert cli.parse_arguments([cli.COMPLETE, "run", "--help"]) == cli.Complete(("run", "--help"))
    assert cli.parse_arguments(["run", cli.COMPLETE]) == cli.Run(cli.COMPLETE, untuned=False, quiet=False)
    assert cli.COMPLETE not in cli.HELP
