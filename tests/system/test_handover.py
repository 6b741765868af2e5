"""What packages and `make install` call when the helper's code comes, changes or goes: qemu-launcher-handover."""

from __future__ import annotations

import subprocess

import pytest

from system import host
from system.claims import Child, Claimant

WHY = "who gives CPUs back depends on the mechanism, and on who else is there"
pytestmark = pytest.mark.hosts("trixie", "bookworm", "legacy", "openrc", more=("openrc-v1",), why=WHY)

SCRIPT = "/usr/libexec/qemu-launcher-handover"


def handover(*arguments: str) -> tuple[int, str]:
    """Run it as root; exit status and all that it says."""
    done = subprocess.run(
        [SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def tuned(program: Claimant) -> Child:
    """A VM with everything."""
    child = program.spawn(2)
    for answer in (
        program.set_memlock(child, "vm", 64 << 20),
        program.pin(child, "vm", 4, 5),
        program.schedule(child, "vm", "fifo", 1),
    ):
        assert answer.error == "ok", answer
    assert host.isolated() == {4, 5}
    return child


def test_removing_gives_back_what_nobody_else_would(program: Claimant) -> None:
    """With partitions and systemd the VM keeps all, and they end it with the VM; real time never outlives a shield."""
    child = tuned(program)
    assert handover("removing") == (0, "")
    assert host.helper() is None
    kept = host.has_systemd() and host.mechanism() == "partition"
    assert host.isolated() == ({4, 5} if kept else frozenset())
    assert host.realtime_threads() == ({*child.tids} if kept else set())
    assert (host.limit(child.pid, "Max locked memory") == (64 << 20, 64 << 20)) == kept
    assert host.is_alive(child.pid)


def test_changed_ends_the_older_helper_alone(program: Claimant) -> None:
    """The VM keeps all; the next helper knows of it, and is there at once where nobody else sees a VM end."""
    child = tuned(program)
    older = host.helper()
    assert older is not None
    assert handover("changed") == (0, "")
    host.wait_for("the older helper has ended", lambda: not host.is_alive(older))
    assert (host.helper() is None) == host.has_systemd()
    assert host.isolated() == {4, 5}
    assert host.realtime_threads() == {*child.tids}
    assert program.call("Release", "us", program.user.uid, "vm").error == "ok"
    assert host.isolated() == frozenset()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("remove",)])
def test_other_words(arguments: tuple[str, ...]) -> None:
    assert handover(*arguments) == (2, "usage: qemu-launcher-handover removing | changed\n")
