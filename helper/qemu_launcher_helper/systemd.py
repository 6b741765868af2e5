"""A scope of its own for each VM, made by systemd on our behalf.

systemd answers StartTransientUnit before it has moved the process, so start_scope waits for the job to end; the caller
then verifies the target again. Nothing of what is sent comes from a user but the PID and the validated VM name.
"""

from contextlib import suppress

from .arguments import Typed
from .bus import SYSTEMD, SystemBus
from .claims import user_name
from .cpuset.partition import CGROUP
from .errors import CallFailed, Conflict, Failed, TargetRefused
from .records import Record
from .target import Target

HELPER_UNIT = "qemu-launcher-helper.service"


def scope_name(uid: int, vm: str) -> str:
    """Return the unit name of a VM's scope."""
    return f"qemu-launcher-{uid}-{vm}.scope"


async def start_scope(bus: SystemBus, target: Target, record: Record, unit: str) -> None:
    """Move the target into record.scope, beside the `unit` it lives in; Conflict or Failed when systemd does not."""
    slice_path, _, name = record.scope.rpartition("/")
    properties = [
        ["Description", Typed("s", f"Virtual machine {record.vm} of {user_name(record.uid)}")],
        ["PIDs", Typed("au", [target.pid])],
        ["Slice", Typed("s", slice_path.rpartition("/")[2])],
        ["DelegateControllers", Typed("as", ["cpuset"])],
        # Without it a scope that failed (SIGKILL of QEMU) stays loaded and blocks the VM's next start.
        ["CollectMode", Typed("s", "inactive-or-failed")],
        # The helper is not resident: systemd starts it to reconcile when the scope ends.
        ["OnSuccess", Typed("as", [HELPER_UNIT])],
        ["OnFailure", Typed("as", [HELPER_UNIT])],
        # Stopping runs in the opposite order: at logout and shutdown the launcher has its time to power the guest down.
        ["Before", Typed("as", [unit])],
    ]
    try:
        result = await bus.systemd_job("StartTransientUnit", "ssa(sv)a(sa(sv))", [name, "fail", properties, []])
    except CallFailed as err:
        if err.name == "org.freedesktop.systemd1.UnitExists":
            raise Conflict(f"the scope of an earlier {record.vm} is still ending; try again") from err
        raise Failed(f"systemd does not make a scope for {record.vm}") from err
    if not target.is_alive():
        _give_back(target.pid, name)
    if result != "done":
        raise Failed(f"systemd could not make a scope for {record.vm}")


def _give_back(pid: int, scope: str) -> None:
    """Put a process that inherited the target's number, and was moved in its place, back beside its parent."""
    with suppress(OSError, TargetRefused), Target(pid) as stranger:
        if stranger.cgroup().endswith(f"/{scope}"):
            with Target(int(stranger.status()["PPid"])) as parent:
                (CGROUP / parent.cgroup().lstrip("/") / "cgroup.procs").write_text(str(pid))


async def stop_scope(bus: SystemBus, name: str) -> None:
    """Ask systemd to end what is left of a scope, without waiting: a child that ignores SIGTERM must not hold us up."""
    try:
        await bus.call(*SYSTEMD, "StopUnit", "ss", [name, "fail"])
    except CallFailed as err:
        if err.name != "org.freedesktop.systemd1.NoSuchUnit":
            raise Failed("systemd does not stop a scope whose VM has ended") from err
