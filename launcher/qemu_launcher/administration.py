"""What concerns more than one's own running VM: limits, everybody's VMs, and giving back what a VM holds.

Why it exists: `limits`, `status --all-users` and `release`. All three are questions to the helper, and what reaches
beyond one's own is for whom polkit lets: then a person may be asked for a password, once for a command.

NoGrant (exit 3) when there is nothing to give back; UsageError (exit 2) for a user that does not exist. What the helper
refuses is told as it says it. Nothing is left behind: no connection, no agent on the terminal.
"""

import asyncio
import os
import pwd
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TypeVar

from . import access, agent, cgroups, limits, runtime, stdout, table, users
from .cpulist import format_cpulist
from .errors import NoGrant, TuningFailed, UsageError, printable, shortened
from .helper_proxy import GrantedVm, Helper
from .limits import Limits, Origins

T = TypeVar("T")

COLUMNS = ("VM", "owner", "PID", "CPUs", "mechanism")
LIMIT_COLUMNS = ("limit", "value", "from")


def show_limits(owner: str | None, *, as_json: bool) -> int:
    """Show what the caller, or `owner`, may have. Returns the exit status."""
    uid, name = _user(owner)
    found = asyncio.run(_asked(lambda helper: helper.get_limits(uid)))
    origins = limits.origins(found, limits.file_of(found))
    if as_json:
        stdout.say_json(_limits_as_json(uid, name, found, origins), indent=2)
        return 0
    title, rows, facts = limits_table(name, found, origins)
    with table.page() as page:
        page.line(title, bold=True)
        page.table(LIMIT_COLUMNS, rows, indent=2)
        for fact, value in facts:
            page.line(f"{fact:<9}  {value}")
    return 0


def show_all_users(*, as_json: bool) -> int:
    """Show all VMs that hold a grant, whosever they are. Returns the exit status."""
    granted = sorted(
        asyncio.run(_asked(lambda helper: helper.list_vms(everybodys=True))), key=lambda vm: (vm.user, vm.vm)
    )
    if as_json:
        stdout.say_json([_granted_as_json(vm) for vm in granted], indent=2)
        return 0
    rows = [
        (printable(vm.vm), printable(vm.user), str(vm.pid), printable(vm.cpulist) or "none", printable(vm.mechanism))
        for vm in granted
    ]
    if not rows:
        stdout.say("nobody's VM holds anything; VMs that run untuned are not listed\n")
    else:
        with table.page() as page:
            page.table(COLUMNS, rows)
    return 0


def _granted_as_json(vm: GrantedVm) -> dict[str, object]:
    """The keys are documented in qemu-launcher(1): they stay."""
    return {
        "name": vm.vm,
        "user": vm.user,
        "uid": vm.uid,
        "pid": vm.pid,
        "cpus": vm.cpulist,
        "mechanism": vm.mechanism,
    }


def release(vm: str, owner: str | None) -> int:
    """Give back what a VM of the caller's, or of `owner`, was granted. Returns the exit status. NoGrant if nothing."""
    uid, name = _user(owner)
    own = uid == os.geteuid()
    whose = vm if own else f"{vm} of {name}"
    stdout.confirm(f"{whose}: {asyncio.run(_asked(lambda helper: _released(helper, uid, vm, whose)))}\n")
    return 0


async def _released(helper: Helper, uid: int, vm: str, whose: str) -> str:
    """Release it if it holds anything, and say what came back."""
    own = uid == os.geteuid()
    try:
        # Without a question even for another's: whoever has to give a password gives one, for the release itself.
        granted = await helper.list_vms(everybodys=not own, may_ask=False)
    except TuningFailed as err:
        if err.wire_name != access.NOT_AUTHORIZED:
            raise
        if not cgroups.has_scope(uid, vm):
            raise _no_grant(whose, "no such VM has been granted anything", own=own) from err
        await helper.release(uid, vm)
        return "gave back its CPUs, real time and memory lock; it runs on"
    held = next((one for one in granted if (one.uid, one.vm) == (uid, vm)), None)
    if held is None:
        if not own:
            raise _no_grant(whose, "it is not running, or runs untuned", own=own)
        runs = runtime.find(vm) is not None
        raise _no_grant(whose, "it runs untuned, or is still starting" if runs else "it is not running", own=own)
    await helper.release(uid, vm)
    return _given_back(held)


def _given_back(held: GrantedVm) -> str:
    cpus = f"CPUs {held.cpulist}" if held.cpulist else "no CPUs, it held none"
    return printable(f"gave back {cpus}, its real time and its memory lock; PID {held.pid} runs on")


def _no_grant(whose: str, why: str, *, own: bool) -> NoGrant:
    hint = f"see what runs with: qemu-launcher status{'' if own else ' --all-users'}"
    if own and os.geteuid() == 0:
        hint += f"\nanother user's: qemu-launcher release {whose} --owner USER"
    return NoGrant(f"{whose} holds nothing that could be given back: {why}", hint)


async def _asked(question: Callable[[Helper], Awaitable[T]]) -> T:
    """The answer to one command's questions, over a connection of its own."""
    helper = await Helper.connected(
        interactive=agent.somebody_is_there(), agent=agent.registered if agent.is_possible() else None
    )
    try:
        return await question(helper)
    finally:
        await helper.close()


def _user(owner: str | None) -> tuple[int, str]:
    """uid and name of `owner`, ourselves for None. A number needs no account. UsageError if there is no such user."""
    if owner is None:
        return os.geteuid(), users.own_name()
    try:
        entry = pwd.getpwnam(owner)
    except (KeyError, ValueError):  # the second for a name with a null byte in it
        # 2^32 - 1 is "no change" to the kernel, never a user: setresuid(2).
        if not (owner.isascii() and owner.isdigit() and len(owner) <= 10 and int(owner) < 2**32 - 1):
            raise UsageError(
                f"there is no user {shortened(owner)!r} on this host", "--owner takes a name or a number"
            ) from None
        return int(owner), users.name_of(int(owner)) or f"uid {int(owner)}"
    return entry.pw_uid, entry.pw_name


# How limits are shown


def limits_table(
    name: str, found: Limits, origins: Origins
) -> tuple[str, list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Title, rows of the table, and the facts below it."""
    rows = [(key, printable(value), printable(origins.of[key])) for key, value in found.values().items()]
    facts = [
        ("free CPUs", format_cpulist(found.free_cpus) or "none"),
        ("mechanism", printable(found.shielding)),
        *(("warning", printable(remark)) for remark in origins.remarks),
    ]
    return printable(f"{name} may have, by {found.source}:"), rows, facts


def _limits_as_json(uid: int, name: str, found: Limits, origins: Origins) -> dict[str, object]:
    plain = asdict(found)
    plain["limits_source"] = plain.pop("source")
    for key in ("cpus", "free_cpus"):
        plain[key] = format_cpulist(plain[key])
    return {"user": name, "uid": uid, **plain, "from": dict(origins.of), "warnings": list(origins.remarks)}
