"""Where a VM's definition is: by its name in the configuration folders, or by a path.

What is refused: names that could not travel to the helper as a VM name (for a path, the file's name without its
ending), and names without a definition; the message then says which folders were searched and what is near.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .errors import A_SLIP, DefinitionError, did_you_mean, shortened
from .names import VM_NAME

MOST_OF_A_PATH = 200  # characters that a message repeats of a path that is none
SUFFIX = ".yml"
SUFFIXES = (SUFFIX, ".yaml")
SYSTEM_FOLDERS = (Path("/etc/qemu-launcher/vms"), Path("/usr/local/etc/qemu-launcher"))


class Located(NamedTuple):
    """A definition file in one of the folders. `problem`: why its file can be no VM's, whatever is in it."""

    name: str
    path: Path
    shadowed_by: Path | None = None
    problem: DefinitionError | None = None


def folders(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The folders that hold definitions, the first to be searched first."""
    if own := environ.get("QEMU_LAUNCHER_CONFIG_DIR"):
        return (Path(own),)
    return (base_directory(environ, "XDG_CONFIG_HOME", "~/.config") / "qemu-launcher", *SYSTEM_FOLDERS)


def base_directory(environ: Mapping[str, str], variable: str, default: str) -> Path:
    """A directory of the XDG base directory specification, by which a relative path is to be ignored."""
    given = environ.get(variable, "")
    return Path(given if given.startswith("/") else os.path.expanduser(default))  # noqa: PTH111


def names(where: Sequence[Path]) -> list[str]:
    """The names of all VMs that have a definition in one of the folders `where`, sorted."""
    return sorted({one.name for one in located(where)[0] if one.problem is None})


def located(where: Sequence[Path]) -> tuple[list[Located], list[tuple[Path, str]]]:
    """All definition files in the folders `where`, each name's first one first; and the folders that cannot be read.

    As `find` sees them: the first folder wins, and NAME.yaml is a mistake that is told where there is no NAME.yml.
    Hidden files, as editors leave them, are none.
    """
    found: dict[str, Located] = {}
    shadowed, misnamed, unreadable = list[Located](), list[Located](), list[tuple[Path, str]]()
    for folder in where:
        try:
            files = sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):  # most people have one of the three
            continue
        except OSError as err:
            unreadable.append((folder, err.strerror or str(err)))
            continue
        for file in files:
            stem, suffix = os.path.splitext(file)  # noqa: PTH122  names, not paths
            path = folder / file
            if file.startswith(".") or suffix not in SUFFIXES:
                continue
            if VM_NAME.fullmatch(stem) is None:
                misnamed.append(Located(stem, path, problem=_no_name(stem)))
            elif suffix != SUFFIX:
                misnamed.append(Located(stem, path, problem=_wrong_suffix(stem, path)))
            elif stem in found:
                shadowed.append(Located(stem, path, shadowed_by=found[stem].path))
            else:
                found[stem] = Located(stem, path)
    wrong = [one for one in misnamed if one.name not in found]
    return [*found.values(), *wrong, *shadowed], unreadable


def mistakes(one: Located) -> tuple[DefinitionError, ...]:
    """All that keeps a definition by itself from being started; whether the host can give what it asks for is not."""
    from . import definition  # noqa: PLC0415  names alone do without, and completing them is to be quick

    if one.problem is not None:
        return (one.problem,)
    try:
        definition.validate_tunable(definition.load(one.path, one.name))
    except DefinitionError as err:
        return err.problems
    return ()


def is_path(argument: str) -> bool:
    """Whether `argument` is the path of a definition rather than a name."""
    return "/" in argument or argument.endswith(SUFFIXES)


def vm_name(argument: str) -> str:
    """The name of the VM meant by `argument`, a name or a path. Raises DefinitionError if it can be none."""
    name = argument
    if is_path(argument):
        name = os.path.basename(argument)  # noqa: PTH119  Path would forget a final slash
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
        name = name.removesuffix(suffix)
    if VM_NAME.fullmatch(name):
        return name
    raise _no_name(name, argument)


def find(argument: str, environ: Mapping[str, str], commands: Sequence[str] = ()) -> tuple[str, Path]:
    """Name and definition file of the VM meant by `argument`. Raises DefinitionError; the file may still be unreadable.

    `commands`: words that may have been meant if there is no such VM.
    """
    name = vm_name(argument)
    where = folders(environ)
    if is_path(argument):
        path = Path(argument)
        if _exists(path):
            return name, path
        raise DefinitionError(f"cannot read {argument}: {os.strerror(errno.ENOENT)}", _meant(argument, name, where))
    for folder in where:
        path = folder / (name + SUFFIX)
        if _exists(path):
            return name, path
    for folder in where:
        other = folder / (name + SUFFIXES[1])
        if _exists(other):
            raise _wrong_suffix(name, other)
    if name in commands:  # written after `run` or `--`
        hint: str | None = f"{name} is a command too: qemu-launcher {name}"
    else:
        hint = did_you_mean(name, names(where)) or did_you_mean(name, commands, A_SLIP)
    raise DefinitionError(
        f"there is no VM {name!r}: no {name}{SUFFIX} in {', '.join(map(str, where))}",
        hint or _no_folder(environ) or "its definition is described in qemu-launcher.yml(5)",
    )


def _meant(path: str, name: str, where: Sequence[Path]) -> str | None:
    """A hint for the path of a file that is not there."""
    if not path.endswith(SUFFIXES) and _exists(Path(path + SUFFIX)):
        return f"did you mean {path}{SUFFIX}?"
    known = names(where)
    hint = f"did you mean {name}?" if name in known else did_you_mean(name, known)
    return hint and f"{hint} with a slash or {SUFFIX} it is the path of a file"


def shell_word(name: str, path: Path, environ: Mapping[str, str]) -> str:
    """How to tell a shell the definition `path` of the VM `name`: by its name if that finds this very file."""
    from shlex import quote  # noqa: PLC0415  only for messages, and `command` is to be quick

    try:
        if path.samefile(find(name, environ)[1]):
            return name
    except (DefinitionError, OSError):  # the name finds nothing, or another
        pass
    text = os.fspath(path)
    return quote(f"./{text}" if text.startswith("-") else text)


def _no_folder(environ: Mapping[str, str]) -> str | None:
    """A hint where the one folder to be searched is none."""
    own = environ.get("QEMU_LAUNCHER_CONFIG_DIR")
    return "QEMU_LAUNCHER_CONFIG_DIR names no folder; no other is searched" if own and not Path(own).is_dir() else None


def _no_name(name: str, argument: str | None = None) -> DefinitionError:
    what = repr(shortened(name))
    if argument not in (None, name):
        what = f"{shortened(argument or '', MOST_OF_A_PATH)!r} gives {what}, which"
    return DefinitionError(
        f"{what} is no name for a VM", "use letters, digits, - and _, beginning with a letter or digit; at most 48"
    )


def _wrong_suffix(name: str, path: Path) -> DefinitionError:
    return DefinitionError(f"{path} is not called {name}{SUFFIX}", f"rename it, or give its path: {path}")


def _exists(path: Path) -> bool:
    try:
        path.lstat()  # a dangling link is there: reading it says what is wrong
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as err:
        raise DefinitionError(f"cannot read {path}: {err.strerror}") from err
    except ValueError:  # a NUL in the path: so does reading it
        return True
    return True
