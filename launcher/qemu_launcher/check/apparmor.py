"""swtpm where AppArmor confines it, as Ubuntu's package has it done: whether the profile knows the hook's paths.

Why it exists: swtpm then says "Could not open UnixIO socket: Permission denied" of a folder that is its user's own, and
nothing points to AppArmor but the kernel's log. The profile knows homes, /tmp, /var/lib/swtpm and libvirt's folders;
a file of the administrator's, which it includes, may know more: apparmor.d(5).

Pure judgement over a Tree. Of the profile only rules that name paths are read; what is included besides them adds
folders of the system, and abstractions/user-tmp those for temporary files.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote

from ..definition import HookCommand, VmDefinition
from .finding import Finding
from .tree import Tree

_FOLDER = "/etc/apparmor.d"
_PROFILE, _LOCAL = f"{_FOLDER}/usr.bin.swtpm", f"{_FOLDER}/local/usr.bin.swtpm"
_UNUSED = ("disable", "force-complain")  # a link of its name in one of these: apparmor_parser(8)
_ENABLED = "/sys/module/apparmor/parameters/enabled"
_CONFINED = "/usr/bin/swtpm"  # a copy elsewhere is not
_TEMPORARY = ("/tmp/**", "/var/tmp/**")  # noqa: S108  abstractions/user-tmp
# As parser_lex.l of AppArmor has them. Without quotes a blank may be behind a backslash, and a comma is not the last.
_PATH = r'"(?:/|@\{)(?:\\.|[^"\\])*"|(?:/|@\{)(?:\\.|[^\s"!,\\]|,(?=[^\s"!,]))*'
_WRITE = "[rwalkmxpciuPCIU]*w[rwalkmxpciuPCIU]*"
_RULE = re.compile(rf"(?:(?:allow|audit|file|owner)\s+)*(?:({_PATH})\s+{_WRITE}|{_WRITE}\s+({_PATH}))\s*,")
_PART = re.compile(r"\\.|@\{\w+\}|\*\*|\[(?:\\.|[^\]\\])+\]|.")
_WILD = {"**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")"}


def swtpm(
    tree: Tree, definition: VmDefinition, where: Callable[[str], str | None], folder: Path, home: str
) -> Iterator[Finding]:
    """`where`: the path of a program; `folder`: where relative paths begin; `home`: the user's own."""
    profile = tree.text(_PROFILE)
    if profile is None or tree.text(_ENABLED) != "Y" or re.search(r"flags=\([^)]*\bcomplain\b", profile):
        return
    if any(tree.exists(f"{_FOLDER}/{unused}/usr.bin.swtpm") for unused in _UNUSED):
        return
    rules = _rules(f"{profile}\n{tree.text(_LOCAL) or ''}", home)
    for command in (*definition.before_start, *definition.after_stop):
        program = where(command.argv[0])
        if program is None or tree.target(program) != _CONFINED:
            continue
        closed = [
            place for place, file in _files(tree, command, folder) if not any(rule.fullmatch(file) for rule in rules)
        ]
        if closed:
            yield _finding(command, _joined(closed))


def _finding(command: HookCommand, folders: list[str]) -> Finding:
    text = f"{command.mark}: AppArmor keeps swtpm out of {' and '.join(folders)} ({_PROFILE}): "
    lines = [f"echo {quote(_rule(folder))} | sudo tee -a {_LOCAL}" for folder in folders]
    fix = "\n".join([*lines, f"sudo apparmor_parser -r {_PROFILE}"])
    return Finding("warning", "AppArmor", f"{text}it ends with Permission denied", fix)


def _rule(folder: str) -> str:
    """One that lets it write what is in there."""
    # A ? stays, for any character: apparmor_parser 3.0 makes a quantifier of \?, and takes it for a glob in [?].
    path = re.sub(r'[][{}*"\\]', r"\\\g<0>", folder.rstrip("/")) + "/**"
    return f"owner {path} rwk," if re.fullmatch(r"[\w/.-]+", folder) else f'owner "{path}" rwk,'


def _rules(text: str, home: str) -> list[re.Pattern[str]]:
    """Which paths may be written, a pattern for each rule."""
    found = [rule[1] or rule[2] for line in text.splitlines() if (rule := _RULE.match(line.strip()))]
    paths = [path[1:-1] if path.startswith('"') else path for path in found]
    if re.search(r"^\s*#?include\s+<abstractions/user-tmp>", text, re.MULTILINE):
        paths += _TEMPORARY
    patterns = []
    for path in paths:
        try:
            patterns.append(re.compile(_regex(path, home)))
        except re.error:  # braces that do not match; AppArmor would not take it either
            continue
    return patterns


def _regex(path: str, home: str) -> str:
    """AppArmor's globs. What its variables stand for is known of two; of others it is taken for one folder's name."""
    own = [re.escape(f"/{home.strip('/')}")] if home.strip("/") else []
    variables = {"@{HOME}": f"(?:{'|'.join(['/home/[^/]+', '/root', *own])})", "@{run}": "(?:/run|/var/run)"}
    found, depth = "", 0
    for part in _PART.findall(path):
        depth += (part == "{") - (part == "}")
        if part.startswith("@{"):
            found += variables.get(part, "[^/]*")
        elif part.startswith("[") and len(part) > 1:
            found += _class(part[1:-1])
        elif part == "," and depth:
            found += "|"
        else:
            found += _WILD.get(part) or re.escape(part[-1])
    return found


def _class(characters: str) -> str:
    """[a-z], or [^a-z]."""
    negated = characters.startswith("^")
    parts = re.findall(r"\\.|.", characters[negated:])
    return f"[{'^' * negated}{''.join(part if part == '-' else re.escape(part[-1]) for part in parts)}]"


def _files(tree: Tree, command: HookCommand, folder: Path) -> Iterator[tuple[str, str]]:
    """(folder, file in it) of what its arguments name: dir=..., path=..., file=..."""
    for word in command.argv[1:]:
        for kind, path in re.findall(r"(?:^|,)(dir|file|path)=([^,]+)", word):
            real = _real(tree, os.path.normpath(folder / path))
            yield (real, f"{real.rstrip('/')}/x") if kind == "dir" else (str(Path(real).parent), real)


def _real(tree: Tree, path: str) -> str:
    """Where it is, or would be made: AppArmor sees no symbolic links, and one slash in front."""
    path = f"/{path.lstrip('/')}"  # normpath leaves two there, as POSIX allows
    for parent in (path, *map(str, Path(path).parents)):
        if tree.exists(parent):
            return os.path.normpath(f"/{tree.target(parent).lstrip('/')}/{path[len(parent) :]}")
    return path


def _joined(folders: list[str]) -> list[str]:
    """One folder for all, if it is no more than theirs; else each that is in no other."""
    common = os.path.commonpath(folders)
    if common.count("/") > 1:
        return [common]
    return [one for one in dict.fromkeys(folders) if not any(one.startswith(f"{other}/") for other in folders)]
