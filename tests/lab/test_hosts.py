"""Which system test runs on which host."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lab import hosts
from lab.errors import LabError
from lab.hosts import HOSTS, chosen, host_like, hosts_of
from lab.recipe import PROJECT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("  ", None),
        ("bookworm", {"bookworm"}),
        ("trixie,bookworm", {"trixie", "bookworm"}),
        ("trixie broker", {"trixie", "broker"}),
        ("all", set(HOSTS)),
    ],
)
def test_hosts_are_chosen_by_name(text: str, expected: set[str] | None) -> None:
    assert chosen(text) == expected


def test_a_host_that_there_is_not() -> None:
    with pytest.raises(LabError, match="QEMU_LAUNCHER_HOSTS names 'sid'; it takes trixie, bookworm, "):
        chosen("trixie,sid")


def test_without_a_marker_a_test_runs_on_debian_13_and_can_run_on_12() -> None:
    assert hosts_of(None) == (["trixie"], ["trixie", "bookworm"])


def mark(*names: str, **more: Any) -> Any:
    """As a marker is; the real one is known in tests/system only."""
    return SimpleNamespace(args=names, kwargs=more)


def test_a_marker_leaves_hosts_out_and_says_why() -> None:
    assert hosts_of(mark("trixie", more=("broker",), why="it is long")) == (["trixie"], ["trixie", "broker"])
    assert hosts_of(mark(more=("legacy",), why="it is about v1")) == ([], ["legacy"])
    with pytest.raises(LabError, match="needs why="):
        hosts_of(mark("trixie"))
    with pytest.raises(LabError, match="names 'sid'"):
        hosts_of(mark("trixie", more=("sid",), why="it is long"))


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_a_host_is_known_by_how_it_was_booted(host: hosts.Host) -> None:
    assert (
        host_like(host.recipe.suite, ["root=/dev/vda", "quiet", *host.machine.kernel_arguments], host.recipe.init)
        is host
    )


def collected(choice: str) -> set[str]:
    """The ids of one test, as pytest collects it out here."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/system/test_floods.py"]
    environment = {"PATH": "/usr/bin:/bin", hosts.VARIABLE: choice}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    return {line.partition("[")[2] for line in done.stdout.splitlines() if "::test_a13_floods[" in line}


def test_one_item_for_each_host() -> None:
    ways = ("bursts", "large", "fields", "shapes")
    assert collected("") == {f"{host}-{way}]" for host in ("trixie", "broker") for way in ways}
    assert collected("bookworm,broker") == {f"{host}-{way}]" for host in ("bookworm", "broker") for way in ways}
