"""The command line: words become typed arguments, or a UsageError. Nothing is printed and nothing is looked up here.

`qemu-launcher NAME` is `qemu-launcher run NAME`; a command wins over a VM of the same name, which can still be had
with the word run or after `--`. Options may stand before the command. No abbreviations: they break when options are
added.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from .errors import PROGRAM, UsageError

VERSION = "0.1.0"

HELP = """\
qemu-launcher [run] [--untuned] [-q] NAME
qemu-launcher COMMAND [OPTION...] [NAME]

Run QEMU virtual machines pinned, shielded and real-time, without being root.

Commands:
  run NAME         Start a VM in the foreground; the word run may be left out
  command NAME     Print QEMU's command line, without starting anything
  status [NAME]    Show your running VMs and where their vCPUs run
  stop NAME        Ask the guest to power down
  kill NAME        Cut the power

Options:
  -h --help        Show this help
     --version     Show the version
  -q --quiet       run: say nothing as long as all is well
     --untuned     run: without pinning, scheduling and memory locking
     --json        command: print a JSON array

NAME is the name of a definition, NAME.yml in $QEMU_LAUNCHER_CONFIG_DIR if that
is set, otherwise in ~/.config/qemu-launcher, /etc/qemu-launcher/vms or
/usr/local/etc/qemu-launcher; or the path of one, such as ./win11.yml.

Exit status: of run, QEMU's own (128+N if signal N ended it); 1 if something
failed, 2 if the command line or the definition is wrong, 3 if status, stop or
kill is asked about a VM that is not running.

Examples:
  qemu-launcher win11                  Start win11
  qemu-launcher --untuned win11        Start it where tuning does not work
  qemu-launcher command ./win11.yml    Look at what QEMU would be given
  qemu-launcher stop win11             Power it down, from another terminal

See qemu-launcher(1) and qemu-launcher.yml(5).
"""


class Run(NamedTuple):
    """Start a VM. `vm`, here and below, is a name or a path, not checked yet."""

    vm: str
    untuned: bool
    quiet: bool


class Command(NamedTuple):
    vm: str
    json: bool


class Status(NamedTuple):
    vm: str | None


class Stop(NamedTuple):
    vm: str


class Kill(NamedTuple):
    vm: str


class Help(NamedTuple):
    pass


class Version(NamedTuple):
    pass


Arguments = Run | Command | Status | Stop | Kill | Help | Version

COMMANDS = ("run", "command", "status", "stop", "kill")
OPTIONS = {"-q": "run", "--quiet": "run", "--untuned": "run", "--json": "command"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"{PROGRAM} --help shows what can be said")


def _formatter(prog: str) -> argparse.HelpFormatter:
    # Made for each option, though never used here; without a width it imports shutil to ask the terminal for it.
    return argparse.HelpFormatter(prog, width=80)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The meaning of the arguments after the program's name. Raises UsageError."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    if "-h" in words or "--help" in words:
        return Help()
    if "--version" in words:
        return Version()
    command, rest = _split(argv)
    parser = _Parser(prog=PROGRAM, add_help=False, allow_abbrev=False, formatter_class=_formatter)
    for option in (word.partition("=")[0] for word in words):
        if OPTIONS.get(option, command) != command:
            parser.error(f"{option} is an option of {OPTIONS[option]}, not of {command}")
    if command == "run":
        parser.add_argument("-q", "--quiet", action="store_true")
        parser.add_argument("--untuned", action="store_true")
    elif command == "command":
        parser.add_argument("--json", action="store_true")
    parser.add_argument("vm", metavar="NAME", nargs="?")
    found = parser.parse_args(rest)
    if found.vm is None and command != "status":
        parser.error("the name of a VM is missing")
    match command:
        case "command":
            return Command(found.vm, found.json)
        case "status":
            return Status(found.vm)
        case "stop":
            return Stop(found.vm)
        case "kill":
            return Kill(found.vm)
        case _:
            return Run(found.vm, found.untuned, found.quiet)


def _split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command, and the arguments without it. No option takes a value, so the first plain word is it, or a VM."""
    for position, word in enumerate(argv):
        if word == "--":
            break
        if not word.startswith("-"):
            if word in COMMANDS:
                return word, [*argv[:position], *argv[position + 1 :]]
            break
    return "run", list(argv)
