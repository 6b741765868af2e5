"""`check NAME`: what a start would come to, from its definition and this host, without starting anything.

Why it exists: this is the story of the command. Each topic has its module; here they are asked in the order in which a
start would meet them, as the user that the VM would run as, and told as one line each. Nothing of the host is changed,
nobody is asked for a password, nothing needs root. A definition that is wrong is refused as a start refuses it; with
--json that is a report too, so that who reads it gets an answer always.

Exit status 2 when an error was found, else 0.
"""

import asyncio
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from .. import (
    absence,
    agent,
    cgroups,
    cmdline,
    host,
    identity,
    plan,
    procfs,
    ram,
    runtime,
    unexpanded,
    users,
)
from ..definition import VmDefinition, validate_tunable
from ..errors import DefinitionError, LauncherError, TuningFailed, printable
from ..patience import patiently
from ..voice import Voice
from . import (
    apparmor,
    asked,
    cpus,
    cpusets,
    devices,
    environment,
    files,
    finding,
    hugepages,
    layout,
    leftovers,
    memlock,
    memory,
    numa,
    premises,
    report,
    sharedfiles,
    versions,
    vfio,
)
from .finding import Finding
from .tree import ENTER, Tree

_BROKEN = 2  # exit status


def check_vm(definition: VmDefinition, version: str, *, as_json: bool) -> int:
    """Check one VM. `version`: the launcher's own. Returns the exit status; DefinitionError as a start would raise."""
    validate_tunable(definition)
    tree = Tree()
    found = list(_as_its_user(definition))
    examined = _Vm(definition, tree)
    found = finding.without_repetitions([*found, *examined.findings()])
    head = [
        ("launcher", version),
        *examined.helper_facts,
        ("QEMU", examined.qemu),
        *report.system_facts(tree),
        ("definition", str(definition.path.absolute())),
    ]
    stops = finding.would_stop(found)
    if as_json:
        report.say_json({"vm": definition.name, "would_start": not stops}, head, found)
    else:
        report.show(head, found, verdict(definition.name, found))
    return _BROKEN if stops else 0


def verdict(vm: str, found: Sequence[Finding]) -> str:
    """The last line: whether it would start, on what condition, and how much there is to read above."""
    stops, left = finding.would_stop(found), finding.left_to_before_start(found)
    words = f"{vm} would {'not ' if stops else ''}start"
    if left and not stops:
        words += f", if before_start makes {left} file{'s that are' if left > 1 else ' that is'} not there"
    count = finding.counted(found)
    return f"{words}{count and ': '}{count}"


def report_mistakes(vm: str, error: DefinitionError, version: str) -> int:
    """As JSON: a definition that is wrong, or cannot be had. Nothing else is looked at. Returns the exit status."""
    head = [("launcher", version), *report.system_facts(Tree())]
    report.say_json({"vm": printable(vm), "would_start": False}, head, list(finding.mistakes(error.problems)))
    return _BROKEN


def _as_its_user(definition: VmDefinition) -> Iterator[Finding]:
    try:
        identity.assume(definition)
    except LauncherError as err:
        yield Finding("error", "user", err.message, err.hint)


class _Vm:
    """One VM on this host. `helper_facts` and `qemu` are known after `findings`."""

    def __init__(self, definition: VmDefinition, tree: Tree) -> None:
        self.helper_facts: report.Facts = [("helper", "not needed")]
        self.qemu = "not found"
        self._definition = definition
        self._tree = tree
        self._user = users.own_name()
        self._folder = _where_we_are() / (definition.working_directory or "")
        self._env = definition.environment(os.environ)
        self._path: str | None = None  # of the QEMU program
        self._mechanism: str | None = None

    def findings(self) -> list[Finding]:
        """Everything, in the order of a start."""
        definition, tree = self._definition, self._tree
        found = [Finding("warning", "definition", text) for text in definition.warnings]
        if cmdline.has_option(definition, "readconfig"):
            found.append(Finding("note", "definition", "what the file of -readconfig says is not looked at"))
        runs = runtime.find(definition.name)
        if runs is not None:
            found.append(self._running(runs))
        found += self._binary()
        found += devices.kvm(tree, asked.kvm(definition), self._user)
        found += files.commands(tree, definition, self._env, self._folder)
        found += apparmor.swtpm(tree, definition, self._program, self._folder, os.environ.get("HOME", ""))
        made_before = bool(definition.before_start)
        found += files.images(tree, asked.images(definition), self._folder, self._user, made_before=made_before)
        found += files.sockets(tree, asked.sockets(definition), self._folder, made_before=made_before)
        found += self._window()
        found += devices.evdev(tree, asked.evdev(definition), self._user)
        found += vfio.addresses(asked.no_addresses(definition))
        found += vfio.vfio(tree, asked.vfio(definition), self._user, os.uname().release)
        found += self._memory(runs=runs is not None)
        found += self._tuning(runs=runs is not None)
        return found

    def _program(self, name: str) -> str | None:
        return files.binary(self._tree, name, self._env, self._folder)

    def _running(self, runs: runtime.Found) -> Finding:
        who = f"PID {runs.qemu.pid}" if runs.qemu is not None else "it is being started"
        name = self._definition.name
        text = f"{name} is already running ({who}); what it holds is not looked at"
        return Finding("error", "running", text, f"power it down with: qemu-launcher stop {name}")

    def _binary(self) -> Iterator[Finding]:
        tree, name = self._tree, self._definition.binary
        folder = str(self._folder)
        if not tree.is_directory(folder) or not tree.may(folder, ENTER):
            text = f"QEMU cannot run in {folder} (working_directory)"
            fix = unexpanded.hint(str(self._definition.working_directory or ""), "make it, or correct the path")
            yield Finding("error", "folder", text, fix)
        path = self._path = files.binary(tree, name, self._env, self._folder)
        if path is None:
            text, fix = absence.qemu(name, self._env)
            may_come = self._definition.may_bring_binary and not unexpanded.hint(name)
            yield files.absent("binary", text, fix, may_come=may_come)
            return
        said = versions.qemu(path, self._env, self._where_it_runs())
        self.qemu = f"{said or 'of unknown version'}, {path}"
        if "QEMU" not in (said or ""):
            fix = f"see what it says: {path} --version"
            yield Finding("warning", "binary", f"{path} does not tell its version as a QEMU does", fix)

    def _window(self) -> Iterator[Finding]:
        definition, env, path = self._definition, self._env, self._path
        server = environment.default_server(self._tree, env)
        certain = path is None or files.is_program(self._tree, path)  # a script may add options, and variables
        yield from environment.variables(definition, env, os.environ, server, certain=certain)
        if path is not None:
            kind = partial(versions.default_window, path, env, self._where_it_runs())
            yield from environment.window(definition, env, os.environ, kind, server, certain=certain)

    def _where_it_runs(self) -> Path:
        return self._folder if self._tree.is_directory(str(self._folder)) else Path("/")

    def _memory(self, *, runs: bool) -> Iterator[Finding]:
        tree, backends = self._tree, asked.backends(self._definition)
        yield from sharedfiles.shared_files(tree, backends, self._user)
        if not runs:
            yield from hugepages.huge_pages(tree, backends)
            whole = ram.guest_ram(self._definition.options)
            yield from memory.enough(tree, whole, hugepages.in_huge_pages(tree, backends))
            yield from numa.enough(tree, backends)

    def _tuning(self, *, runs: bool) -> Iterator[Finding]:
        """What a failure does to the start is on_tuning_failure's to say, but for CPUs that are not there."""
        definition, tree = self._definition, self._tree
        if not definition.wants_tuning:
            yield Finding("note", "tuning", "the definition asks for no tuning: it needs no helper")
        need = None
        try:
            need = plan.memlock_need(definition, *procfs.own_memlock_limit(), procfs.memory_total())
        except LauncherError as err:
            yield from self._mildly([Finding("error", "memlock", err.message, err.hint)])
        else:
            if os.geteuid() != 0:  # CAP_IPC_LOCK lifts the limit
                yield from self._memlock(need, runs=runs)
        if definition.places_threads:
            yield from self._cpus()
        yield from self._mildly(cpus.realtime(definition, tree, os.uname().release))
        if plan.needs_helper(definition, need):
            yield from self._mildly(premises.c_library())
            yield from self._place()
            yield from self._mildly(files.process_name(tree, self._path, definition.options))
            if not runs:
                yield from self._helper(need)
        if definition.places_threads:
            vcpus = cpus.of_vcpus(definition)
            yield from leftovers.settings(tree, vcpus, self._mechanism)
            if self._mechanism != "pool":  # which shields by that very setting
                unshielded = cpus.all_named(definition) - (vcpus if definition.isolation == "shield" else frozenset())
                yield from self._mildly(cpusets.own(definition, unshielded, os.geteuid(), tree))

    def _memlock(self, need: plan.MemlockNeed | None, *, runs: bool) -> Iterator[Finding]:
        soft, hard = procfs.own_memlock_limit()
        yield from memlock.own(self._definition, need, soft, hard)
        if runs or not any(device.iommufd for device in asked.vfio(self._definition)):
            return
        own = self._definition.name
        others = [(vm.name, qemu.pid) for vm in runtime.find_all() if (qemu := vm.qemu) and vm.name != own]
        limit = memlock.limit_for(need, soft, hard)
        yield from memlock.pinned_together(self._tree, ram.guest_ram(self._definition.options), limit, others)

    def _cpus(self) -> Iterator[Finding]:
        definition = self._definition
        try:
            facts = host.read_host()
        except LauncherError as err:
            yield Finding("error", "cpus", err.message, err.hint)
            return
        yield from cpus.there(definition, facts)
        yield from cpus.count(definition)
        yield from cpus.cores(definition, facts)
        yield from layout.layout(definition, self._tree)
        yield from numa.elsewhere(definition, self._tree, asked.backends(definition))
        if definition.isolation == "affinity":
            yield from self._mildly(cpus.held(definition, self._tree))
        wanted = cpus.of_vcpus(definition)
        if definition.isolation == "shield":
            wanted = wanted.union(*(facts.siblings.get(cpu, ()) for cpu in wanted))
        yield from self._mildly(cpusets.others(definition, wanted, facts.online, os.geteuid(), self._tree))

    def _place(self) -> Iterator[Finding]:
        path = cgroups.unit_path(self._tree.text("/proc/self/cgroup") or "")
        systemd = absence.has_systemd(self._tree.root)
        # Beside v1, groups of cgroup v2 limit nothing where no controller is v2's, and the helper takes any.
        if systemd or self._tree.text("/sys/fs/cgroup/unified/cgroup.controllers") != "":
            yield from self._mildly(premises.session_of(path, os.geteuid(), systemd))

    def _helper(self, need: plan.MemlockNeed | None) -> Iterator[Finding]:
        from . import dryrun  # noqa: PLC0415  importing dbus_next takes as long as all the rest

        self.helper_facts = [("helper", "gives no answer")]
        voice = Voice(self._definition.name, quiet=False)
        fatal = self._definition.on_tuning_failure != "continue"

        async def ask() -> list[Finding]:
            async with dryrun.asking(person_there=agent.somebody_is_there(), fatal=fatal) as asker:
                if isinstance(asker, Finding):
                    return [asker]
                await asker.get_limits()
                try:
                    await dryrun.start(asker, self._definition, need)
                except TuningFailed as err:
                    asker.findings.append(Finding("error" if fatal else "warning", "plan", err.message, err.hint))
                self.helper_facts = asker.facts
                if asker.limits is not None:
                    self._mechanism = asker.limits.mechanism
                return asker.findings

        yield from asyncio.run(patiently(ask(), lambda: voice.say("waiting for qemu-launcher-helper")))

    def _mildly(self, found: Iterable[Finding]) -> Iterator[Finding]:
        """With on_tuning_failure: continue, what cannot be tuned is only worth a warning."""
        for one in found:
            mild = one.severity == "error" and self._definition.on_tuning_failure == "continue"
            yield one._replace(severity="warning") if mild else one


def _where_we_are() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it has been removed
        return Path("/")
