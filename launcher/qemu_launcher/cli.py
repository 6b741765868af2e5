"""The command line: words become typed arguments, or a UsageError. Nothing is printed and nothing is looked up here.

`qemu-launcher NAME` is `qemu-launcher run NAME`; a command wins over a VM of the same name, which can still be had
with the word run or after `--`. Options may stand before the command. No abbreviations: they break when options are
added.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from .errors import A_SLIP, PROGRAM, UsageError, did_you_mean, shortened

VERSION = "0.1.0"

HELP = """\
qemu-launcher [run] [--untuned] [-q] NAME
qemu-launcher COMMAND [OPTION...] [NAME]

Run QEMU virtual machines pinned, shielded and real-time, without being root.

Start and end:
  run NAME         Start a VM in the foreground; the word run may be left out
  start NAME       Start it in the background; back when its guest runs
  stop NAME        Ask the guest to power down
  kill NAME        Cut the power
  pause NAME       Let the guest stand still
  resume NAME      Let it go on

See:
  list             Show your definitions, and which of them run
  status [NAME]    Show your running VMs and where their vCPUs run
  check [NAME]     Say what would keep a VM, or without NAME any, from starting
  command NAME     Print QEMU's command line, without starting anything
  import           Make a definition of QEMU's command line, given after --

Talk to QEMU:
  monitor NAME     Its monitor as a prompt; or one line: monitor NAME info block
  qmp NAME CMD     One QMP command, with its arguments as JSON after it

What you may have:
  limits           Show it, and which line of whose file says so
  release NAME     Give back its CPUs, real time and memory lock; it runs on

Options:
  -h --help        Show this help
     --version     Show the version
  -q --quiet       run, start: say nothing as long as all is well
  -d --debug       run, start: explain each step, QMP and helper calls included
     --untuned     run, start: without pinning, scheduling and memory locking
     --json        list, status, command, limits, check: print JSON
     --watch       status: draw it again every two seconds, until Ctrl-C
     --all-users   status: everybody's tuned VMs, instead of yours
     --owner USER  limits, release: of that user, by name or number
     --libvirt VM  import: of this VM of libvirt's, by its name or XML file
  -o --output F    import: write to this new file, instead of printing

To see or release what is another user's takes an administrator's password.

NAME is the name of a definition, NAME.yml in $QEMU_LAUNCHER_CONFIG_DIR if that
is set, otherwise in ~/.config/qemu-launcher, /etc/qemu-launcher/vms or
/usr/local/etc/qemu-launcher; or the path of one, such as ./win11.yml.

Exit status: of run, QEMU's own (128+N if signal N ended it); 1 if something
failed, 2 if the command line or the definition is wrong, or check has found an
error, 3 if a command is for a running VM and it is not running, or if release
finds nothing to give back.

Examples:
  qemu-launcher win11                  Start win11
  qemu-launcher --untuned win11        Start it where tuning does not work
  qemu-launcher command ./win11.yml    Look at what QEMU would be given
  qemu-launcher stop win11             Power it down, from another terminal
  qemu-launcher check win11            See what would keep it from starting
  qemu-launcher list                   See what there is to start, and what runs
  qemu-launcher monitor win11 info block      Ask QEMU what its drives are
  qemu-launcher limits                 See how many CPUs you may have
  qemu-launcher status --all-users     See who holds which CPUs
  qemu-launcher release win11 --owner alice    Take them away from alice
  qemu-launcher import -- qemu-system-x86_64 -m 2G -nographic
  qemu-launcher import --libvirt win11 -o win11.yml

See qemu-launcher(1) and qemu-launcher.yml(5).
"""


class Run(NamedTuple):
    """Start a VM. `vm`, here and below, is a name or a path, not checked yet."""

    vm: str
    untuned: bool
    quiet: bool
    debug: bool = False


class Start(NamedTuple):
    vm: str
    untuned: bool
    quiet: bool
    debug: bool = False


class Command(NamedTuple):
    vm: str
    json: bool


class Status(NamedTuple):
    vm: str | None
    all_users: bool = False
    json: bool = False
    watch: bool = False


class Stop(NamedTuple):
    vm: str


class Kill(NamedTuple):
    vm: str


class Pause(NamedTuple):
    vm: str


class Resume(NamedTuple):
    vm: str


class Monitor(NamedTuple):
    """`line`: the words after the name, None for a prompt."""

    vm: str
    line: str | None


class Qmp(NamedTuple):
    """`arguments`: JSON, not read yet."""

    vm: str
    command: str
    arguments: str | None


class Check(NamedTuple):
    """`vm` None: the installation, and what this user may do."""

    vm: str | None
    json: bool


class List(NamedTuple):
    json: bool


class Limits(NamedTuple):
    """`owner`, here and below: name or number of a user, not looked up yet; None is oneself."""

    json: bool
    owner: str | None


class Release(NamedTuple):
    vm: str
    owner: str | None


class Import(NamedTuple):
    """Either `libvirt`, a VM of libvirt's by its name or XML file, or `words`, a command line of QEMU's, is there.

    `output`: a file for the definition; None: it is printed.
    """

    output: str | None
    libvirt: str | None
    words: tuple[str, ...]


class Complete(NamedTuple):
    """`words`: what stands on a shell's command line up to its cursor, after the program's name."""

    words: tuple[str, ...]


class Help(NamedTuple):
    pass


class Version(NamedTuple):
    pass


Arguments = (
    Run
    | Start
    | Command
    | Status
    | Stop
    | Kill
    | Pause
    | Resume
    | List
    | Check
    | Monitor
    | Qmp
    | Limits
    | Release
    | Import
    | Complete
    | Help
    | Version
)

COMPLETE = "__complete"  # for shells; no VM can be called so
COMMANDS = (
    *("run", "start", "stop", "kill", "pause", "resume"),
    *("list", "status", "check", "command", "import"),
    *("monitor", "qmp"),
    *("limits", "release"),
)
OPTIONS = {
    "-q": ("run", "start"),
    "--quiet": ("run", "start"),
    "-d": ("run", "start"),
    "--debug": ("run", "start"),
    "--untuned": ("run", "start"),
    "--json": ("list", "status", "command", "limits", "check"),
    "--all-users": ("status",),
    "--watch": ("status",),
    "--owner": ("limits", "release"),
    "--libvirt": ("import",),
    "-o": ("import",),
    "--output": ("import",),
}
_FOR_ALL = ("--help", "-h", "--version")
VALUED = ("--owner", "--libvirt", "-o", "--output")


LONGEST_COMPLAINT = 300  # characters; argparse repeats all the words that it does not know
_HINT = f"{PROGRAM} --help shows what can be said"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(shortened(message, LONGEST_COMPLAINT), _HINT)


def _formatter(prog: str) -> argparse.HelpFormatter:
    # Made for each option, though never used here; without a width it imports shutil to ask the terminal for it.
    return argparse.HelpFormatter(prog, width=80)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The meaning of the arguments after the program's name. Raises UsageError."""
    if argv[:1] == [COMPLETE]:
        return Complete(tuple(argv[1:]))
    if argv[:1] == ["help"]:
        return Help()
    command, rest = _split(argv)
    rest, line = _until_name(rest) if command == "monitor" else (rest, None)
    words = rest[: rest.index("--")] if "--" in rest else rest
    if "-h" in words or "--help" in words:
        return Help()
    if "--version" in words:
        return Version()
    parser = _parser(command)
    foreign = [option for word in words if command not in OPTIONS.get(option := word.partition("=")[0], (command,))]
    if len(rest) == len(argv):
        _check_command(words, foreign=bool(foreign))
    if command != "import" or "--" in rest:  # without -- they are QEMU's
        _check_options(parser, command, words, foreign)
    if command == "import":
        return _import(parser, rest)
    found = _found(parser, command, rest, words)
    if command not in _WITHOUT_NAME and found.vm is None:
        parser.error("the name of a VM is missing")
    if command == "status":
        _check_status(parser, found)
    if command == "run" and found.quiet and found.debug:
        parser.error("--quiet and --debug do not go together")
    if command == "monitor":
        return Monitor(found.vm, line)
    if command == "qmp" and not found.command:
        parser.error("the QMP command is missing")
    return _MEANINGS[command](**vars(found))


def _check_command(words: Sequence[str], *, foreign: bool) -> None:
    """Where the word run was left out there is one plain word, a VM; else it was meant for a command.

    `foreign`: there are options that run has not.
    """
    plain = [word for at, word in enumerate(words) if not word.startswith("-") and words[max(0, at - 1)] not in VALUED]
    if not plain or not (foreign or len(plain) > 1):
        return
    hint = did_you_mean(plain[0], COMMANDS, A_SLIP)
    if len(plain) > 1 and plain[1] in COMMANDS:
        hint = hint or f"the command comes first: {PROGRAM} {plain[1]} {shortened(plain[0])}"
    if hint or len(plain) > 1:
        raise UsageError(f"there is no command {shortened(plain[0])!r}", hint or _HINT)


def _check_options(parser: _Parser, command: str, words: Sequence[str], foreign: Sequence[str]) -> None:
    """`foreign`: options that the command has not. No value is given to one that takes none."""
    if foreign:
        parser.error(f"{foreign[0]} is an option of {_either(OPTIONS[foreign[0]])}, not of {command}")
    for option, equals, value in (word.partition("=") for word in words):
        if equals and option in (*OPTIONS, *_FOR_ALL) and option not in VALUED:
            parser.error(f"{option} takes no value, and here is {shortened(value)!r}")


def _found(parser: _Parser, command: str, rest: Sequence[str], words: Sequence[str]) -> argparse.Namespace:
    found, unknown = parser.parse_known_args(rest)
    if unknown:
        raise _unknown(command, unknown, words)
    return found


def _unknown(command: str, unknown: Sequence[str], words: Sequence[str]) -> UsageError:
    """`unknown`: what of the command line nothing is known about. `words`: what of it stands before --."""
    first = next((word for word in unknown if word != "--"), "--")
    if first.startswith("-") and first in words:
        option = first.partition("=")[0]
        known = [*_FOR_ALL, *(own for own, commands in OPTIONS.items() if command in commands)]
        return UsageError(f"there is no option {shortened(option)}", did_you_mean(option, known, A_SLIP) or _HINT)
    if command in _NAMELESS:
        return UsageError(f"{command} takes no NAME, and here is {shortened(first)!r}", _HINT)
    return UsageError(shortened(f"unrecognized arguments: {' '.join(unknown)}", LONGEST_COMPLAINT), _HINT)


def _check_status(parser: _Parser, found: argparse.Namespace) -> None:
    if found.all_users and found.vm is not None:
        parser.error("--all-users shows the VMs of all users, and takes no NAME")
    if found.watch and (found.json or found.all_users):
        other = "--json" if found.json else "--all-users"  # which would ask for a password each time
        parser.error(f"--watch and {other} do not go together")


def _either(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _import(parser: _Parser, words: Sequence[str]) -> Import:
    """What is after `--` is QEMU's, whatever it looks like."""
    end = words.index("--") if "--" in words else len(words)
    found, unknown = parser.parse_known_args(words[:end])
    behind = tuple(words[end + 1 :])
    stray = next((word for word in words[:end] if word in (found.vm, *unknown)), None)
    if stray is not None and stray.startswith("--"):
        raise _unknown("import", [stray], words)
    if stray is not None and "--" not in words:
        from . import noqemu  # noqa: PLC0415  only where something is wrong

        if (refused := noqemu.by_name(words[words.index(stray) :])) is not None:
            raise refused
        hint = f"write -- before QEMU's command line: {PROGRAM} import -- {shortened(stray)} ..."
        raise UsageError(f"import does not know {shortened(stray)!r}", hint)
    if stray is not None:
        parser.error(f"{stray!r} stands before --: write import -- and then QEMU's command line")
    if behind and found.libvirt is not None:
        parser.error("import takes either --libvirt or, after --, QEMU's command line")
    if not behind and found.libvirt is None:
        parser.error("QEMU's command line is missing: write it after import --, as for a shell")
    return Import(found.output, found.libvirt, behind)


_NAMELESS = ("list", "limits")
_WITHOUT_NAME = (*_NAMELESS, "status", "check")
_MEANINGS: dict[str, Callable[..., Arguments]] = {
    "run": Run,
    "start": Start,
    "command": Command,
    "status": Status,
    "stop": Stop,
    "kill": Kill,
    "pause": Pause,
    "resume": Resume,
    "list": List,
    "qmp": Qmp,
    "check": Check,
    "limits": Limits,
    "release": Release,
}


def _parser(command: str) -> _Parser:
    parser = _Parser(prog=PROGRAM, add_help=False, allow_abbrev=False, formatter_class=_formatter)
    if command in OPTIONS["--untuned"]:
        parser.add_argument("-q", "--quiet", action="store_true")
        parser.add_argument("-d", "--debug", action="store_true")
        parser.add_argument("--untuned", action="store_true")
    for option in ("--json", "--all-users", "--watch"):
        if command in OPTIONS[option]:
            parser.add_argument(option, action="store_true")
    if command in OPTIONS["--owner"]:
        parser.add_argument("--owner", metavar="USER")
    if command == "import":
        parser.add_argument("--libvirt", metavar="VM")
        parser.add_argument("-o", "--output", metavar="FILE")
    if command not in _NAMELESS:
        parser.add_argument("vm", metavar="NAME", nargs="?")
    if command == "qmp":
        parser.add_argument("command", metavar="COMMAND", nargs="?")
        parser.add_argument("arguments", metavar="JSON", nargs="?")
    return parser


def _split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command, and the arguments without it: the first plain word that is no option's value is it, or a VM."""
    for position, word in enumerate(argv):
        if word == "--":
            break
        if not word.startswith("-") and argv[max(0, position - 1)] not in VALUED:
            if word in COMMANDS:
                return word, [*argv[:position], *argv[position + 1 :]]
            break
    return "run", list(argv)


def _until_name(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Ours, and the line for QEMU's monitor: all words after the VM's name are its own, with their hyphens."""
    for position, word in enumerate(words):
        if not word.startswith("-") or "--" in words[:position]:
            own = words[position + 1 :]
            return list(words[: position + 1]), " ".join(own[own[0] == "--" :]) if own else None
    return list(words), None
