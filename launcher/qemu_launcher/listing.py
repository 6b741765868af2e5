"""What a user has: all definitions, and which of them run.

Why it exists: `list`. One line for each definition file in the folders that are searched, also for one that another
hides and for one that cannot be used, and for each VM that runs without any of them. A mistake in one file is told in
its line and hides no other.

Nothing is refused and nothing is waited for longer than the control socket's timeouts, which all VMs share: they are
asked at the same time.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import locate, runtime, stdout, table
from .errors import DefinitionError, one_line, printable
from .locate import Located
from .runtime import Found
from .voice import Voice

if TYPE_CHECKING:
    from .control import State

COLUMNS = ("VM", "state", "PID", "definition", "remark")
NOT_RUNNING, SHADOWED = "not running", "shadowed"


class Entry(NamedTuple):
    """One line. `path` is the definition; for a VM that runs without one in the folders, what it was started from.

    `started_from` is given where that is not `path`.
    """

    name: str
    state: str
    pid: int | None = None
    path: str | None = None
    shadowed_by: str | None = None
    started_from: str | None = None
    problems: tuple[DefinitionError, ...] = ()
    remark: str | None = None

    def cells(self) -> tuple[str, ...]:
        """In the order of COLUMNS."""
        place, remarks = self.path or "", []
        if self.problems:
            first = self.problems[0]
            if first.mark is not None:
                place += f":{first.mark.line}:{first.mark.column}"
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            remarks.append(f"error: {first.message}{more}")
        if self.shadowed_by is not None:
            remarks.append(f"not used: {self.shadowed_by} comes first")
        if self.started_from is not None:
            remarks.append(f"was started from {self.started_from}")
        if self.remark is not None:
            remarks.append(self.remark)
        pid = "" if self.pid is None else str(self.pid)
        return tuple(map(one_line, (self.name, self.state, pid, place, "; ".join(remarks))))

    def as_json(self) -> dict[str, object]:
        """The keys are documented in qemu-launcher(1): they stay."""
        return {
            "name": self.name,
            "state": self.state,
            "pid": self.pid,
            "definition": self.path,
            "shadowed_by": self.shadowed_by,
            "started_from": self.started_from,
            "remark": self.remark,
            "errors": [
                {
                    "line": None if problem.mark is None else problem.mark.line,
                    "column": None if problem.mark is None else problem.mark.column,
                    "message": problem.message,
                    "hint": problem.hint,
                }
                for problem in self.problems
            ],
        }


def show(environ: Mapping[str, str], *, as_json: bool) -> int:
    """Show all definitions and running VMs of this user. Returns the exit status."""
    where = locate.folders(environ)
    located, unreadable = locate.located(where)
    for folder, reason in unreadable:
        Voice("qemu-launcher", quiet=False).warn(f"cannot read {folder}: {reason}")
    found = runtime.find_all()
    listed = entries(located, found, _states(found))
    if as_json:
        stdout.say_json([entry.as_json() for entry in listed], indent=2)
    elif not listed:
        places = ", ".join(map(str, where))
        stdout.say(printable(f"there is no definition in {places}, and no VM of yours is running\n"))
    else:
        with table.page() as page:
            page.table(COLUMNS, [entry.cells() for entry in listed])
    return 0


def entries(located: Sequence[Located], found: Sequence[Found], states: Sequence["State"]) -> list[Entry]:
    """The lines, by name; of one name the definition that counts comes first. `states` are those of `found`."""
    running = {vm.name: (vm, state) for vm, state in zip(found, states, strict=True)}
    listed = []
    for one in located:
        path, problems = os.fspath(one.path), locate.mistakes(one)
        if one.shadowed_by is not None:
            shadow = os.fspath(one.shadowed_by)
            listed.append(Entry(one.name, SHADOWED, path=path, shadowed_by=shadow, problems=problems))
            continue
        entry = Entry(one.name, NOT_RUNNING, path=path, problems=problems)
        listed.append(_with_run(entry, *running.pop(one.name)) if one.name in running else entry)
    for vm, state in running.values():
        entry = _with_run(Entry(vm.name, NOT_RUNNING, path=vm.record.definition or None), vm, state)
        if entry.path is None:
            entry = _remarked(entry, "its definition is not known")
        elif not os.path.lexists(entry.path):
            entry = _remarked(entry, "its definition is gone")
        listed.append(entry)
    return sorted(listed, key=lambda entry: entry.name)


def _with_run(entry: Entry, vm: Found, state: "State") -> Entry:
    qemu, origin = vm.qemu, vm.record.definition
    entry = entry._replace(state=state.word, pid=None if qemu is None else qemu.pid, remark=state.remark)
    if origin and entry.path is not None and not _same_file(origin, entry.path):
        entry = entry._replace(started_from=origin)
    return entry


def _remarked(entry: Entry, remark: str) -> Entry:
    return entry._replace(remark=remark if entry.remark is None else f"{entry.remark}; {remark}")


def _same_file(one: str, other: str) -> bool:
    if os.path.abspath(one) == os.path.abspath(other):  # noqa: PTH100  Path.absolute keeps `..`
        return True
    try:
        return os.path.samefile(one, other)  # noqa: PTH121
    except OSError:  # one of them has gone
        return False


def _states(found: Sequence[Found]) -> Sequence["State"]:
    if not found:
        return ()
    import asyncio  # noqa: PLC0415  only where somebody is to be asked: it takes longer than all the rest

    from . import control  # noqa: PLC0415

    async def asked() -> list["State"]:
        return list(await asyncio.gather(*map(control.state_of, found)))

    return asyncio.run(asked())
