"""The hosts that the system tests run on, and which test runs on which of them.

Every test of tests/system runs once on each host that it is meant for, with the host's name in its node id; inside the
lab its node id is the same. `make test` runs everything on Debian 13, and on Debian 12 what a shielding mechanism is
there for: the main job, users beside each other, ends, crashes, a host that changes, and what is different there; and
with cgroup v1, with dbus-broker and without systemd, what is different there. `make test-all` runs the rest there too,
and what is for other hosts. A test says so by its marker, see HOSTS_MARKER_HELP. `.ci/run` has an hour, on two cores
without KVM: test-all needs 96 minutes of a processor, and so 50 minutes to more than an hour there.

QEMU_LAUNCHER_HOSTS chooses by hand: names, with all tests that are ever run there, or `all`, as `make test-all` does.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.recipe import BOOKWORM, OPENRC, OPENRC_V1, TRIXIE, Machine, Recipe

VARIABLE = "QEMU_LAUNCHER_HOSTS"
ALL = "all"
FIXTURE = "lab_host"
HOSTS_MARKER = "hosts"
HOSTS_MARKER_HELP = (
    f"{HOSTS_MARKER}(*names, more=(), why=''): a system test that runs on these hosts and, by `make test-all`, on "
    "`more`, because of `why`; without this marker, on Debian 13 and, by `make test-all`, on 12 (tests/lab/hosts.py)"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """An image, and how it is booted."""

    name: str
    recipe: Recipe
    machine: Machine = dataclasses.field(default_factory=Machine)


LEGACY = ("systemd.unified_cgroup_hierarchy=0", "systemd.legacy_systemd_cgroup_controller=1")
HOSTS = {
    host.name: host
    for host in (
        Host("trixie", TRIXIE),  # cgroup v2 with remote partitions
        Host("bookworm", BOOKWORM),  # cgroup v2 without them
        # cgroup v1 alone: "legacy", in the words of systemd.
        Host("legacy", BOOKWORM, Machine(kernel_arguments=LEGACY)),
        # Linux 6.8 to 6.10 (Ubuntu 24.04) have partitions that are not good enough. What the helper does instead, on a
        # newer kernel of which it is told that it is one of these.
        Host("linux-6.8", TRIXIE, Machine(kernel_arguments=("lab.linux=6.8.0",))),
        # Fedora's and Arch's bus: what it does to those who flood it, and to those whom it does not know.
        Host("broker", TRIXIE, Machine(kernel_arguments=("lab.bus=dbus-broker",))),
        # Without systemd: OpenRC and elogind. Partitions; and on Debian 12, cpusets of v1 with cgroup v2 beside them.
        Host("openrc", OPENRC),
        Host("openrc-v1", OPENRC_V1),
        # As many CPUs as an emulated host boots with in some minutes. Only `make test-exhaustive` has tests there. What
        # tells it from the others is a word of ours on its kernel's command line.
        Host("many-cpus", TRIXIE, Machine("64,sockets=1,cores=32,threads=2", kernel_arguments=("lab.cpus=64",))),
        Host("isolcpus", TRIXIE, Machine(kernel_arguments=("isolcpus=5-6",))),  # parts of two cores
    )
}
USUAL, OTHERS = ("trixie",), ("bookworm",)  # of a test that says nothing, by default and with `all`


def chosen(text: str | None = None) -> frozenset[str] | None:
    """The hosts that the environment names; None where it names none. LabError for a name that no host has."""
    names = (os.environ.get(VARIABLE, "") if text is None else text).replace(",", " ").split()
    if unknown := sorted({*names} - {*HOSTS, ALL}):
        raise LabError(f"{VARIABLE} names {unknown[0]!r}; it takes {', '.join(HOSTS)}, or {ALL}")
    return frozenset(HOSTS if ALL in names else names) or None


def hosts_of(marker: pytest.Mark | None) -> tuple[list[str], list[str]]:
    """Where a test with this marker runs by default, and where it ever runs, both in the order of HOSTS.

    LabError when the marker names a host that there is not, or says not why some are left out.
    """
    usual: tuple[str, ...] = USUAL
    more: Iterable[str] = OTHERS
    if marker is not None:
        usual, more = marker.args, marker.kwargs.get("more", ())
        if unknown := [name for name in (*usual, *more) if name not in HOSTS]:
            raise LabError(f"the marker {HOSTS_MARKER} names {unknown[0]!r}; there are {', '.join(HOSTS)}")
        if not marker.kwargs.get("why"):
            raise LabError(f"the marker {HOSTS_MARKER} needs why=")
    return [name for name in HOSTS if name in usual], [name for name in HOSTS if name in {*usual, *more}]


def host_of(item: pytest.Item) -> str:
    """The host that this item of a system test is for."""
    assert isinstance(item, pytest.Function)
    return str(item.callspec.params[FIXTURE])


def is_wanted(item: pytest.Item, wanted: frozenset[str] | None) -> bool:
    """Whether it runs, where these hosts are wanted, or none in particular."""
    usual, _ = hosts_of(item.get_closest_marker(HOSTS_MARKER))
    return host_of(item) in (usual if wanted is None else wanted)


def parametrise(metafunc: pytest.Metafunc) -> None:
    """Makes one item for each host that the test ever runs on; pytest orders them by host."""
    if FIXTURE in metafunc.fixturenames:
        _, ever = hosts_of(metafunc.definition.get_closest_marker(HOSTS_MARKER))
        metafunc.parametrize(FIXTURE, ever, indirect=True, scope="session")


def keep(config: pytest.Config, items: list[pytest.Item], kept: Callable[[pytest.Item], bool]) -> None:
    """Deselects all items but those."""
    left_out = [item for item in items if not kept(item)]
    if left_out:
        items[:] = [item for item in items if kept(item)]
        config.hook.pytest_deselected(items=left_out)


def host_like(suite: str, kernel_arguments: Iterable[str], init: str = "systemd") -> Host:
    """The host that is booted from such an image in such a way: the most particular one."""
    given = {*kernel_arguments}
    alike = [host for host in HOSTS.values() if (host.recipe.suite, host.recipe.init) == (suite, init)]
    return [host for host in alike if given.issuperset(host.machine.kernel_arguments)][-1]


def this_host() -> str:
    """The name of the host that this code runs on, inside the lab."""
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    init = "systemd" if Path("/run/systemd/system").exists() else "openrc"
    return host_like(suite, Path("/proc/cmdline").read_text().split(), init).name
