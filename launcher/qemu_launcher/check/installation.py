"""`check` without a name: what is installed, and what of it this user may use.

Why it exists: most of what goes wrong before the first VM has one of a dozen causes, and each is to be seen from here
without starting anything. Exit status 2 if something is broken for every VM (no QEMU), for every tuned one (no helper,
no access to it), or in a definition; 0 otherwise, also where a part is missing that a VM can do without (KVM, shields).
"""

import asyncio
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import absence, access, agent, cgroups, locate, users
from ..patience import patiently
from ..programs import is_a_qemus
from ..voice import Voice
from . import devices, finding, leftovers, premises, report, versions
from .files import may_start
from .finding import Finding, Severity
from .tree import Tree

if TYPE_CHECKING:
    from ..limits import Limits
    from .dryrun import Asker

# What of ours has a fixed place, and for whom it is. Not polkit's rule: an administrator may have taken it away, and
# many hosts let nobody look into that folder.
_FILES = (
    ("to have it started by the bus", "/dbus-1/system-services/org.qemulauncher.Helper1.service"),
    ("to be let in by the bus", "/dbus-1/system.d/org.qemulauncher.Helper1.conf"),
    ("for polkit to know its actions", "/polkit-1/actions/org.qemulauncher.policy"),
)
_SHARED = ("/usr/share", "/usr/local/share", "/etc")
_UNITS = ("/usr/lib/systemd/system", "/lib/systemd/system", "/etc/systemd/system", "/usr/local/lib/systemd/system")
_UNIT = "qemu-launcher-helper.service"
_QEMU = "QEMU"
_PROBE_VM = "check"
_MOST_DEFINITIONS = 100
_OLDEST_SYSTEMD = 249  # which has OnSuccess=, systemd.unit(5)


def check_installation(version: str, *, as_json: bool) -> int:
    """Check what is installed. `version`: the launcher's own. Returns the exit status."""
    tree, facts = Tree(), [("launcher", version)]
    user, system = users.own_name(), report.system_facts(tree)
    helper_facts, answers, mechanism = _helper(version)
    found = [*together(list(installed(tree)), answers), *members(user)]
    found += host_facts(tree, user)
    found += old_systemd(dict(system)["system"])
    found += qemus(tree)
    found += definitions(os.environ)
    found += leftovers.settings(tree, frozenset(), mechanism)
    found = finding.without_repetitions(found)
    head = [*facts, *helper_facts, *system]
    stops = finding.would_stop(found)
    if as_json:
        report.say_json({"vm": None, "would_start": not stops}, head, found)
    else:
        report.show(head, found, verdict(found))
    return 2 if stops else 0


def verdict(found: Sequence[Finding]) -> str:
    """What the findings come to: which VMs can be started."""
    broken = {one.about for one in found if one.severity == "error"}
    if not broken:
        words = "tuned VMs can be started"
    elif _QEMU in broken:
        words = "no VM can be started"
    elif broken == {finding.DEFINITION}:
        words = "tuned VMs can be started, but for definitions with mistakes"
    else:
        words = "VMs without tuning can be started, tuned ones can not"
    count = finding.counted(found)
    return f"{words}{count and ': '}{count}"


def together(files: list[Finding], answers: list[Finding]) -> list[Finding]:
    """Not installed, and so nobody who answers: one finding, with the fuller remedy."""
    if not (files and answers and files[0].severity == answers[0].severity == "error"):
        return [*files, *answers]
    missing, answer = files[0], answers[0]
    if (missing.fix or "") not in (answer.fix or ""):
        return [*files, *answers]
    text = missing.text if answer.text in missing.text else f"{missing.text}, and {answer.text}"
    return [missing._replace(text=text, fix=answer.fix), *files[1:], *answers[1:]]


def installed(tree: Tree) -> Iterator[Finding]:
    """The files by which bus, polkit and systemd know the helper."""
    missing = []
    for what, name in _FILES:
        if not any(tree.exists(folder + name) for folder in _SHARED):
            missing.append(f"{name.rpartition('/')[2]} ({what})")
    systemd = absence.has_systemd(tree.root)
    if systemd and not any(tree.exists(f"{folder}/{_UNIT}") for folder in _UNITS):
        missing.append(f"{_UNIT} (for systemd)")
    if missing:
        text = "qemu-launcher-helper is not installed"
        if len(missing) < len(_FILES) + systemd:
            text += f", or not all of it: there is no {', no '.join(missing)}"
        yield Finding("error", "helper", text, absence.HOW_TO_INSTALL)
    else:
        whom = "the bus, polkit and systemd" if systemd else "the bus and polkit"
        yield Finding("ok", "helper", f"qemu-launcher-helper is installed, for {whom}")


def members(user: str) -> Iterator[Finding]:
    """The group that the bus lets in."""
    if (obstacle := access.not_a_member()) is not None:
        # Root is let in all the same; and what the bus and polkit really say comes from the helper's own answer.
        yield Finding("note" if os.geteuid() == 0 else "warning", "group", *obstacle)
    else:
        yield Finding("ok", "group", f"{user} is a member of the group {access.GROUP}, also in this login")


def _helper(version: str) -> tuple[report.Facts, list[Finding], str | None]:
    """Facts for the head, findings, and the mechanism, from the helper's answers."""
    from . import dryrun  # noqa: PLC0415  importing dbus_next takes as long as all the rest

    async def ask() -> tuple[report.Facts, list[Finding], str | None]:
        async with dryrun.asking(person_there=agent.somebody_is_there(), fatal=True) as asker:
            if isinstance(asker, Finding):
                return [("helper", "no system bus")], [asker], None
            await asker.get_limits()
            if asker.limits is None:
                return asker.facts, asker.findings, None
            found = [*access_findings(asker.limits, version), *await _polkit(asker, asker.limits)]
            return asker.facts, found, asker.limits.mechanism

    voice = Voice("check", quiet=False)
    return asyncio.run(patiently(ask(), lambda: voice.say("waiting for qemu-launcher-helper")))


def access_findings(limits: "Limits", version: str) -> Iterator[Finding]:
    """What the helper says of itself and of this user's limits."""
    if limits.version != version:
        text = f"the helper is {limits.version}, and the launcher {version}"
        end = (
            "systemctl stop qemu-launcher-helper"
            if absence.has_systemd()
            else "pkill -f 'qemu-launcher-helper --serve'"
        )
        fix = f"install both from one package, then: sudo {end}"
        yield Finding("warning", "version", text, fix)
    values = limits.values()
    text = (
        f"you may have: CPUs {values['cpus']}, at most {values['max_cpus']}; {values['max_vms']} VMs; "
        f"{values['memlock']} locked; {values['policies']}, up to priority {values['max_priority']} ({limits.source})"
    )
    yield Finding("ok", "limits", text)
    if limits.mechanism == "none":
        fix = "use a host with cpusets"
        if not absence.has_systemd():
            fix = f"boot with {_switched('hybrid')}, or let the helper mount v1's cpusets: cpuset_mount in helper.toml"
        fix += "; isolation: affinity pins without a shield, and without the helper"
        yield Finding("warning", "shielding", f"no CPUs can be shielded on this host: {limits.reason}", fix)
    elif limits.mechanism in ("pool", "cpuset-v1"):
        text = f"CPUs are shielded without partitions: {limits.reason}"
        other = "cgroup v2 and Linux 6.11" if limits.mechanism == "cpuset-v1" else "Linux 6.11"
        fix = f"man qemu-launcher-helper, SHIELDS, has the differences; with {other} or later there are none"
        yield Finding("note", "shielding", text, fix)
    if limits.mechanism != "none" and not limits.free_cpus:
        yield Finding("note", "limits", "no CPUs are free for a new VM now", "qemu-launcher status --all-users")


async def _polkit(asker: "Asker", limits: "Limits") -> list[Finding]:
    """polkit's answer to each of the three requests.

    A rule may say yes to other CPUs, other VMs: only three times no is an error. What the limits say to these is no
    matter: it is about a VM that does not exist.
    """
    cpu = min(limits.free_cpus or limits.cpus, default=0)
    yes = await asker.probe(_PROBE_VM, cpu)
    found = [one for one in asker.findings if one.about == "polkit"]
    if yes == 3 or not found:
        return [
            Finding("ok", "polkit", "polkit lets you lock memory, pin threads and set policies, without a password")
        ]
    return [one._replace(severity="warning") if yes and one.severity == "error" else one for one in found]


def host_facts(tree: Tree, user: str) -> Iterator[Finding]:
    """What tuned VMs stand on, besides the helper."""
    yield from premises.c_library()
    systemd = absence.has_systemd(tree.root)
    # Without systemd they may be in cgroup v2 beside v1.
    at = [f"/sys/fs/cgroup/{folder}cgroup.controllers" for folder in ([""] if systemd else ["", "unified/"])]
    controllers = next((text for path in at if (text := tree.text(path)) is not None), None)
    legacy = cgroups.v1_cpusets(tree.text("/proc/self/mountinfo") or "")
    if controllers is None or (legacy and "cpuset" not in controllers.split()):
        text = (
            f"cpusets are those of cgroup v1, in {legacy}" if legacy else "there are no cpusets, of cgroup v2 or of v1"
        )
        fix = "boot without systemd.unified_cgroup_hierarchy=0 and cgroup_no_v1=; shields are better with cgroup v2"
        if not systemd:
            fix = f"with Linux 6.11 or newer, boot with {_switched('unified')}: shields are better"
            fix += "" if legacy or controllers is not None else "; or: mount -t cgroup2 cgroup2 /sys/fs/cgroup"
        yield Finding("note" if legacy else "warning", "cgroup", text, fix)
    elif "cpuset" not in controllers.split():
        fix = "boot without cgroup_disable=cpuset, and with a kernel that has CONFIG_CPUSETS"
        yield Finding("warning", "cgroup", "cgroup v2 is there, but without the cpuset controller", fix)
    else:
        yield Finding("ok", "cgroup", "cgroup v2 is there, with the cpuset controller")
    for one in devices.kvm(tree, "needed", user):
        yield one._replace(severity="warning") if one.severity == "error" else one


def _switched(mode: str) -> str:
    """What makes cgroups such at boot, without systemd."""
    return f"OpenRC's rc_cgroup_mode={mode} or Void's CGROUP_MODE={mode} in /etc/rc.conf"


def old_systemd(system: str) -> Iterator[Finding]:
    """A systemd that cannot start the helper when a VM ends. `system`: as report.system_facts() has it."""
    version = re.search(r"\bsystemd ([0-9]+)", system)
    if version is not None and int(version[1]) < _OLDEST_SYSTEMD:
        text = f"systemd {version[1]} refuses the scopes of tuned VMs: the helper needs {_OLDEST_SYSTEMD} or newer"
        yield Finding("error", "systemd", text, absence.WITHOUT_HELPER)


def qemus(tree: Tree) -> Iterator[Finding]:
    """The QEMU programs in PATH."""
    found: dict[str, str] = {}  # the first of each name
    for folder in os.get_exec_path():
        for name in tree.names(folder):
            path = f"{folder.rstrip('/')}/{name}"
            if is_a_qemus(name) and may_start(tree, path):
                found.setdefault(name, path)
    if not found:
        text = f"there is no qemu-system-... in PATH ({':'.join(os.get_exec_path())})"
        yield Finding("error", _QEMU, text, "install it: on Debian, sudo apt install qemu-system-x86")
        return
    names = sorted(found)
    here = [name for name in names if name.endswith(os.uname().machine)] or names
    said = versions.qemu(found[here[0]], os.environ, Path("/"))
    others = {tree.target(path) for path in found.values()} - {tree.target(found[here[0]])}
    more = f", and {len(others)} more" if others else ""
    yield Finding("ok", _QEMU, f"{found[here[0]]}: {said or 'of unknown version'}{more}")


def definitions(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The definition files, as `list` finds them. Of each the first mistake: `check NAME` has all."""
    folders = locate.folders(environ)
    located, unreadable = locate.located(folders)
    for folder, reason in unreadable:
        yield Finding("warning", finding.DEFINITION, f"cannot read {folder}: {reason}")
    good = 0
    for one in sorted(located, key=lambda one: one.name)[:_MOST_DEFINITIONS]:
        problems = locate.mistakes(one)
        for first in finding.mistakes(problems[:1]):
            place = "" if str(one.path) in first.text else f"{one.path}: "
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            if one.shadowed_by is not None:  # no name finds it, so nothing is broken yet
                more += f"; it is not used: {one.shadowed_by} comes first"
            severity: Severity = "note" if one.shadowed_by is not None else "error"
            yield first._replace(severity=severity, text=f"{place}{first.text}{more}")
        good += not problems and one.shadowed_by is None
    if good:
        yield Finding(
            "ok",
            finding.DEFINITION,
            f"{good} definition{'s' * (good != 1)} in {', '.join(map(str, folders))} can be read",
        )
    elif not (located or unreadable):
        fix = f"mkdir -p {folders[0]}; cp /usr/share/doc/qemu-launcher/examples/first.yml {folders[0]}"
        yield Finding("note", finding.DEFINITION, f"there is no definition in {', '.join(map(str, folders))} yet", fix)
