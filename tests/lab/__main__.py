"""The lab from the command line: one-off commands, an interactive console, and labs that are kept for a while.

A kept lab is started and stopped by hand and survives this program; it holds its slot until it is stopped. The exit
status of `run`, `exec` and `shell` is that of the command inside.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from lab import booting, image
from lab.booting import kept_lab
from lab.errors import LabError
from lab.image import say
from lab.recipe import CACHE, RECIPES, TRIXIE, Machine
from lab.vm import Vm


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand; returns its exit status. Errors of the lab itself: 1, with their text on stderr."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so that what we started ends
    try:
        status: int = options.act(options)
    except LabError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _build(options: argparse.Namespace) -> int:
    sys.stdout.write(f"{image.ensure(RECIPES[options.recipe]).folder}\n")
    return 0


def _run(options: argparse.Namespace) -> int:
    with booting.boot(RECIPES[options.recipe], _machine(options)) as vm:
        _prepare(vm, options)
        return _command(vm, options)


def _shell(options: argparse.Namespace) -> int:
    with booting.boot(RECIPES[options.recipe], _machine(options)) as vm:
        _prepare(vm, options)
        return _console(vm, options.user, "the machine ends with it")


def _start(options: argparse.Namespace) -> int:
    folder = kept_lab(options.name)
    if _running(folder):
        raise LabError(f"lab {options.name} runs already")
    vm = booting.start(folder, RECIPES[options.recipe], _machine(options), kept=True)
    try:
        _prepare(vm, options)
    except BaseException:
        vm.close()
        raise
    say(f"it stays until: lab stop --name {options.name}")
    return 0


def _exec(options: argparse.Namespace) -> int:
    return _command(Vm.attach(kept_lab(options.name)), options)


def _console_of(options: argparse.Namespace) -> int:
    return _console(Vm.attach(kept_lab(options.name)), options.user, "the lab stays")


def _put(options: argparse.Namespace) -> int:
    vm = Vm.attach(kept_lab(options.name))
    _prepare(vm, options)
    for pair in options.files:
        vm.put(*_pair(pair))
    return 0


def _get(options: argparse.Namespace) -> int:
    Vm.attach(kept_lab(options.name)).get(options.remote, options.local)
    return 0


def _log(options: argparse.Namespace) -> int:
    sys.stdout.write(Vm.attach(kept_lab(options.name)).report() + "\n")
    return 0


def _stop(options: argparse.Namespace) -> int:
    folder = kept_lab(options.name)
    Vm.attach(folder).close()
    shutil.rmtree(folder)
    return 0


def _list(options: argparse.Namespace) -> int:
    for folder in sorted((CACHE / "run").glob("*")):
        if _running(folder):
            sys.stdout.write(f"{folder.name}\n")
    return 0


def _command(vm: Vm, options: argparse.Namespace) -> int:
    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not words:
        raise LabError("no command given")
    # One word is a line for the shell, as with ssh; several are an argument vector.
    command = words[0] if len(words) == 1 else shlex.join(words)
    data = b"" if sys.stdin.isatty() or not options.stdin else sys.stdin.buffer.read()
    return vm.run(command, user=options.user, check=False, timeout=None, stream=True, input=data).status


def _console(vm: Vm, user: str, afterwards: str) -> int:
    say(f"this is a shell of {user} inside the lab; leave it with exit or Ctrl-D ({afterwards})")
    return subprocess.run(vm.ssh(user, "-t"), check=False).returncode


def _prepare(vm: Vm, options: argparse.Namespace) -> None:
    for deb in options.deb:
        say(f"installing {deb}")
        vm.install(deb)
    for pair in options.put:
        vm.put(*_pair(pair))


def _pair(text: str) -> tuple[Path, str]:
    local, colon, remote = text.rpartition(":")
    if not colon:
        raise LabError(f"{text!r} is not FILE:PATH")
    return Path(local), remote


def _machine(options: argparse.Namespace) -> Machine:
    return Machine(kernel_arguments=tuple(options.append.split()), fresh=options.fresh)


def _running(folder: Path) -> bool:
    try:
        return Vm.attach(folder).alive
    except LabError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab", description="A disposable Debian host for tests.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("--recipe", choices=RECIPES, default=TRIXIE.name, help="which system (default: %(default)s)")
    boots = argparse.ArgumentParser(add_help=False, parents=[images])
    boots.add_argument("--append", default="", metavar="ARGS", help="further kernel arguments")
    boots.add_argument("--fresh", action="store_true", help="boot, even if a booted state is at hand")
    fills = argparse.ArgumentParser(add_help=False)
    fills.add_argument("--deb", action="append", default=[], metavar="FILE", help="install this package first")
    fills.add_argument("--put", action="append", default=[], metavar="FILE:PATH", help="copy a file or folder in")
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--name", default="default", help="which kept lab (default: %(default)s)")
    user = argparse.ArgumentParser(add_help=False)
    user.add_argument("--user", default="root", help="log in as (default: %(default)s)")
    command = argparse.ArgumentParser(add_help=False)
    command.add_argument("--stdin", action="store_true", help="pass standard input on (read to its end first)")
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")

    def add(name: str, act: object, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=parents)
        sub.set_defaults(act=act)
        return sub

    add("build", _build, "build the image, if the cache has it not, and print its folder", images)
    add("run", _run, "boot, run a command, end", boots, fills, user, command)
    add("shell", _shell, "boot, give an interactive shell, end", boots, fills, user)
    add("start", _start, "boot a lab and keep it", boots, fills, named)
    add("exec", _exec, "run a command in a kept lab", named, user, command)
    add("console", _console_of, "an interactive shell in a kept lab", named, user)
    put = add("put", _put, "copy files into a kept lab, or install packages", fills, named)
    put.add_argument("files", nargs="*", metavar="FILE:PATH")
    get = add("get", _get, "copy a file or folder out of a kept lab", named)
    get.add_argument("remote")
    get.add_argument("local")
    add("log", _log, "console and journal of a kept lab", named)
    add("stop", _stop, "end a kept lab", named)
    add("list", _list, "the labs that run now")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("LC_ALL", "C.UTF-8")
    sys.exit(main())
