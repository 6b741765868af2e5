"""The program: arguments to an action, LauncherError to a message, a hint and an exit status.

Modules are imported when their action is asked for: `command` and `--help` are to be quick, and only a start needs
the rest. Whatever happens to the terminal or the pipe behind stdout ends in an exit status, not in a traceback.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import cli, stdout, terminal
from .errors import PROGRAM, AlreadyRunning, DefinitionError, LauncherError, render

if TYPE_CHECKING:
    from .definition import VmDefinition
    from .starter import Starter

SIGNAL_BASE = 128  # of the exit status, as shells report death by a signal: signal(7), bash(1) "EXIT STATUS"
SIGINT, SIGPIPE = 2, 13  # signal(7); the module signal costs more to import than these are worth


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with `argv` (default: this process's arguments). Returns the exit status."""
    try:
        # Before anything is opened that a child is given by its number: the child's own three would go over it.
        terminal.fill_standard_descriptors()
        arguments = cli.parse_arguments(sys.argv[1:] if argv is None else argv)
        if isinstance(arguments, cli.Run | cli.Start | cli.Check | cli.Import):
            _reset_sigchld()
        status = _act(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except LauncherError as err:
        stdout.say_on_stderr(render(err))
        return err.exit_status
    except BrokenPipeError:
        stdout.abandon(sys.stdout)
        return SIGNAL_BASE + SIGPIPE  # what reading stopped wants is silence: `qemu-launcher command x | head -c0`
    except KeyboardInterrupt:
        return SIGNAL_BASE + SIGINT
    except OSError as err:
        stdout.say_on_stderr(render(_named(err)))
        stdout.abandon(sys.stdout)
        return 1
    return status


def _act(arguments: cli.Arguments) -> int:
    match arguments:
        case cli.Help():
            stdout.say(cli.HELP)
        case cli.Version():
            stdout.say(f"{PROGRAM} {cli.VERSION}\n")
        case cli.Complete():
            from . import completion  # noqa: PLC0415

            return completion.answer(arguments.words, os.environ)
        case cli.Command():
            return _command(arguments)
        case cli.Run() | cli.Start():
            return _run(arguments) if isinstance(arguments, cli.Run) else _start(arguments)
        case cli.Check():
            return _check(arguments)
        case cli.Status(all_users=True) | cli.Limits() | cli.Release():
            return _administer(arguments)
        case cli.List():
            from . import listing  # noqa: PLC0415

            return listing.show(os.environ, as_json=arguments.json)
        case cli.Status():
            return _status(arguments)
        case cli.Monitor() | cli.Qmp():
            return _pass_on(arguments)
        case cli.Stop() | cli.Kill() | cli.Pause() | cli.Resume():
            return _press(arguments)
        case cli.Import():
            return _import(arguments)
    return 0


def _reset_sigchld() -> None:
    """Whoever started us may have ignored SIGCHLD, as `trap '' CHLD` does: nobody would hear how a child has ended."""
    import signal  # noqa: PLC0415

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _command(arguments: cli.Command) -> int:
    from . import cmdline, definition, locate  # noqa: PLC0415

    name, path = locate.find(arguments.vm, os.environ, cli.COMMANDS)
    vm = definition.load(path, name)
    if arguments.json:
        stdout.say_json(cmdline.qemu_argv(vm))
    else:
        stdout.say(cmdline.shell_command(vm, wrapped=sys.stdout is not None and sys.stdout.isatty()) + "\n")
    return 0


def _import(arguments: cli.Import) -> int:
    from .importing import command_line  # noqa: PLC0415

    if arguments.libvirt is None:
        return command_line.import_argv(arguments.words, arguments.output)
    from .importing import libvirt  # noqa: PLC0415

    return libvirt.import_domain(arguments.libvirt, arguments.output)


def _run(arguments: cli.Run) -> int:
    from . import definition, locate, starter  # noqa: PLC0415

    waiting = starter.Starter.taken(os.environ)
    try:
        try:
            waiting.enter_directory()
            name, path = locate.find(arguments.vm, os.environ, cli.COMMANDS)
            vm = definition.load(path, name)
            status = _session(vm, waiting, arguments)
        except OSError as err:
            raise _named(err) from err
    except LauncherError as err:
        if not waiting.is_there:
            _show(arguments.vm, err)
        waiting.say(render(err))
        waiting.ended(err.exit_status)
        raise
    waiting.ended(status)
    return status


def _named(err: OSError) -> LauncherError:
    """One that nobody expected."""
    return LauncherError(f"{err.filename or 'input or output failed'}: {err.strerror or err}")


def _show(vm: str, err: LauncherError) -> None:
    from . import unseen  # noqa: PLC0415

    unseen.show(vm, render(err), os.environ)


def _session(vm: "VmDefinition", waiting: "Starter", arguments: cli.Run) -> int:
    from . import session  # noqa: PLC0415  after all that can be wrong without it

    try:
        return session.run(vm, waiting, untuned=arguments.untuned, quiet=arguments.quiet, debug=arguments.debug)
    except AlreadyRunning as err:
        from . import control  # noqa: PLC0415

        raise control.with_stillness(err, vm.name) from err.__cause__


def _start(arguments: cli.Start) -> int:
    from . import background  # noqa: PLC0415

    options = [word for word, is_on in (("--untuned", arguments.untuned), ("--quiet", arguments.quiet)) if is_on]
    options += ["--debug"] * arguments.debug
    try:
        return background.start(arguments.vm, options, cli.COMMANDS, quiet=arguments.quiet)
    except LauncherError as err:
        _show(arguments.vm, err)
        raise


def _check(arguments: cli.Check) -> int:
    from . import definition, locate  # noqa: PLC0415

    if arguments.vm is None:
        from .check import installation  # noqa: PLC0415

        return installation.check_installation(cli.VERSION, as_json=arguments.json)
    name = arguments.vm
    try:
        name = locate.vm_name(arguments.vm)
        name, path = locate.find(arguments.vm, os.environ, cli.COMMANDS)
        vm = definition.load(path, name)
        from .check import start  # noqa: PLC0415  after all that can be wrong without it

        return start.check_vm(vm, cli.VERSION, as_json=arguments.json)
    except DefinitionError as err:
        if not arguments.json:
            raise
        from .check import start  # noqa: PLC0415  only now is it wanted

        return start.report_mistakes(name, err, cli.VERSION)


def _status(arguments: cli.Status) -> int:
    from . import locate, status  # noqa: PLC0415

    # Not the definition: the VM that runs is what counts, even if its file has changed or gone since.
    name = None if arguments.vm is None else locate.vm_name(arguments.vm)
    if arguments.watch:
        from . import watch  # noqa: PLC0415

        return watch.show(name)
    return status.show(name, as_json=arguments.json)


def _press(arguments: cli.Stop | cli.Kill | cli.Pause | cli.Resume) -> int:
    from . import locate, power  # noqa: PLC0415

    name = locate.vm_name(arguments.vm)
    match arguments:
        case cli.Stop():
            return power.stop(name)
        case cli.Kill():
            return power.kill(name)
        case cli.Pause():
            return power.pause(name)
        case cli.Resume():
            return power.resume(name)


def _pass_on(arguments: cli.Monitor | cli.Qmp) -> int:
    from . import locate, passthrough  # noqa: PLC0415

    name = locate.vm_name(arguments.vm)
    if isinstance(arguments, cli.Monitor):
        return passthrough.monitor(name, arguments.line)
    return passthrough.qmp(name, arguments.command, arguments.arguments)


def _administer(arguments: cli.Status | cli.Limits | cli.Release) -> int:
    from . import administration, locate  # noqa: PLC0415

    match arguments:
        case cli.Limits():
            return administration.show_limits(arguments.owner, as_json=arguments.json)
        case cli.Release():
            return administration.release(locate.vm_name(arguments.vm), arguments.owner)
        case cli.Status():
            return administration.show_all_users(as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
