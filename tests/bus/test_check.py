"""`check` with the real helper and the real polkitd: it tells what a start would be told, does nothing, asks nobody.

What it looks at on the host itself is tests/unit's, and its output as a whole tests/qemu's.
"""

import os
import resource
import sys
from collections.abc import Iterator

import pytest

from bus.test_examples import ASK
from bus.world import NOBODY, User, World, world
from qemu_launcher.__main__ import main
from qemu_launcher.check import dryrun, installation, premises

CPU = max(os.sched_getaffinity(0))
VM = "vm-under-test"
TUNED = f"vcpu_pinning: [{CPU}]\n  scheduler: fifo\n  priority: 3\n  rlimit_memlock: 64M"
WOULD = [
    "ok       the helper would let QEMU lock 64 MiB",
    "ok       the helper would pin and shield 1 thread as wanted",
    "ok       the helper would set policy fifo, priority 3",
]

pytestmark = pytest.mark.skipif(CPU == 0, reason="optional: a shield needs a CPU for the others")


@pytest.fixture(scope="module")
def real() -> Iterator[World]:
    """A world in which the helper would act in earnest."""
    with world(real=True, trace=True) as running:
        (running.cgroups / "cpuset.cpus.isolated").touch()  # the kernel can make remote partitions
        yield running


def checked(
    host: World, user: User, keys: str | None = TUNED, env: dict[str, str] | None = None
) -> tuple[int, list[str]]:
    """Exit status and lines of `check`, for a definition with `keys` or for the installation, run by `user`."""
    (host.folder / f"{VM}.yml").write_text(f"launcher:\n  binary: /bin/true\n  {keys}\nqemu: [m: 32M]\n")
    words = ["check"] if keys is None else ["check", str(host.folder / f"{VM}.yml")]

    def run() -> tuple[int, list[str]]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            os.environ.pop(name, None)
        os.environ.update({"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={host.socket}", "QEMU_LAUNCHER_CONFIG_DIR": "/none"})
        os.environ.update(env or {})
        with open(os.devnull) as nothing:  # noqa: PTH123  no terminal, whatever pytest was started in
            os.dup2(nothing.fileno(), 0)
        premises.session_of = lambda *_: iter(())  # the process that asks is in none
        fd = os.memfd_create("stdout")
        sys.stdout = os.fdopen(os.dup(fd), "w")
        status = main(words)
        return status, os.pread(fd, 1 << 20, 0).decode().splitlines()

    answer: tuple[int, list[str]] = host.run_as(user, run).result()
    return answer


def of_helper(lines: list[str]) -> list[str]:
    """What the helper has answered, and what is wrong."""
    return [line for line in lines if "the helper would" in line or line.startswith(("error", "note"))]


def nothing_done(host: World) -> bool:
    return not list(host.grants.glob("*")) and not host.traced()


def test_what_would_be_granted(real: World, member: User) -> None:
    status, lines = checked(real, member)
    assert status == 0, lines
    assert of_helper(lines) == WOULD
    assert "helper      0.1.0" in lines
    assert nothing_done(real)


@pytest.mark.parametrize(
    ("toml", "text"),
    [
        ("max_priority = 2", "Priority 3 is above yours, 2 ("),
        ('policies = ["other"]', "Policy fifo is none of yours, other ("),
        ('cpus = "0"', f"CPUs {CPU} are not among your 0 ("),
        ('memlock = "32M"', "QEMU must be able to lock 64 MiB, but only 32 MiB was granted"),
    ],
)
def test_what_would_be_refused(real: World, member: User, toml: str, text: str) -> None:
    real.toml.write_text(f"[[limits]]\n{toml}\n")
    try:
        status, lines = checked(real, member)
    finally:
        real.toml.unlink()
    assert status == 2
    [refused] = [line for line in lines if line.startswith("error")]
    assert refused.startswith(f"error    {text}")
    assert len(of_helper(lines)) == 3, "each request is asked about, whatever is said of the others"
    assert nothing_done(real)


def test_broken_configuration(real: World, member: User) -> None:
    real.toml.write_text("max_vms = 1\n")
    try:
        status, lines = checked(real, member)
    finally:
        real.toml.unlink()
    assert status == 2
    assert "error    helper.toml is broken, nobody is served: sudo qemu-launcher-helper --check says why" in lines


def test_a_vcpu_without_a_cpu_of_its_own_gets_no_real_time(real: World, member: User) -> None:
    status, lines = checked(real, member, f"vcpu_pinning: [{CPU}]\n  isolation: cpuset\n  scheduler: fifo")
    assert status == 2
    assert "error    Real time needs every thread to be pinned to one shielded CPU of its own" in lines


@pytest.mark.parametrize("desktop", [True, False])
def test_where_members_are_asked_for_a_password(member: User, desktop: bool) -> None:
    with world(real=True, rules={ASK.name: ASK.read_text()}) as host:
        status, lines = checked(host, member, env={"DISPLAY": ":0"} if desktop else {})
    assert status == (0 if desktop else 2)
    acts = ("lock memory", "pin threads", "set policy fifo")
    found = [line for line in lines if line.startswith(("note", "error"))]
    if desktop:
        assert found == [f"note     a start will ask for a password to {act}" for act in acts]
    else:
        nobody = "and nobody is there who could be asked"
        assert found == [f"error    polkit wants a password to {act}, {nobody}" for act in acts]


def test_who_is_no_member(real: World) -> None:
    """The bus keeps him out. What is lacking is told once, not for each request."""
    status, lines = checked(real, NOBODY)
    assert status == 2
    assert len([line for line in lines if line.startswith("error")]) == 1
    assert nothing_done(real)


def test_installation(real: World, member: User) -> None:
    _, lines = checked(real, member, None)
    assert "ok       polkit lets you lock memory, pin threads and set policies, without a password" in lines
    [limits] = [line for line in lines if line.startswith("ok       you may have: CPUs ")]
    assert limits.endswith(" (the built-in defaults)")
    assert nothing_done(real)


def test_installation_without_the_rule_for_members(member: User) -> None:
    with world(real=True, member_rule=False) as host:
        _, lines = checked(host, member, None)
    found = [line for line in lines if "polkit wants a password to " in line]
    assert len(found) == 3
    assert all(line.startswith("error ") for line in found)


def test_what_is_tested_is_what_is_there() -> None:
    """The modules are imported before the child gives up its rights: it may not be able to read them."""
    assert {module.__name__ for module in (dryrun, installation)} <= set(sys.modules)
