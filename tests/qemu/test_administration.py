"""limits, status --all-users and release, by a fake helper on a real bus: what is asked, how, and what is shown."""

import json
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import Home
from qemu.private_bus import PrivateBus
from qemu.test_tuning import CPU, SHIELDED, needs_two_cpus

ME = pwd.getpwuid(os.geteuid()).pw_name
OTHER = 4242  # a number without an account
REFUSED = {"error": ["org.qemulauncher.Error.NotAuthorized", "polkit does not allow this to you in this session"]}
DISPLAY = {"DISPLAY": ":0"}
INTERACTIVE = 4


def asked(bus: PrivateBus) -> list[tuple[str, list[Any], int]]:
    """Each call: member, arguments, and whether a person may be asked."""
    return [(call["member"], call["body"], call["flags"] & INTERACTIVE) for call in bus.calls()]


def row(vm: str, uid: int, cpulist: str, user: str = "alice") -> list[Any]:
    return [vm, uid, user, 4711, 123456, cpulist, "partition" if cpulist else "none"]


# limits


def test_limits(home: Home, bus: PrivateBus) -> None:
    done = home.ask("limits", env=bus.environment | DISPLAY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{ME} may have, by the built-in defaults:\n"
        "  limit         value                         from\n"
        "  cpus          0-15                          default\n"
        "  max_cpus      16                            default\n"
        "  max_vms       8                             default\n"
        "  memlock       28 GiB                        default\n"
        "  policies      batch, fifo, idle, other, rr  default\n"
        "  max_priority  10                            default\n"
        "  realtime      on shielded CPUs              default\n"
        "  deadline      no                            default\n"
        "free CPUs  2-15\n"
        "mechanism  partition: The kernel has remote cpuset partitions\n"
    )
    assert asked(bus) == [("GetLimits", [], 0)]


def test_limits_of_a_file_have_their_lines(home: Home, bus: PrivateBus) -> None:
    toml = home.configuration / "helper.toml"
    toml.write_text('[[limits]]\nusers = ["alice"]\n\n[[limits]]\nmax_vms = 2\n')
    bus.plan(GetLimits={"return": {"limits_source": ["s", f"{toml}, [[limits]] entry 2"], "max_vms": ["t", 2]}})
    shown = home.ask("limits", env=bus.environment).stdout
    assert f"by {toml}, [[limits]] entry 2:\n" in shown
    assert "  max_vms       2                             helper.toml:5\n" in shown
    assert "  max_cpus      16                            default\n" in shown
    toml.write_text(toml.read_text().replace("= 2", "= 3"))
    shown = home.ask("limits", env=bus.environment).stdout
    assert "  max_vms       2                             changed meanwhile\n" in shown
    assert "warning    helper.toml:5 has been changed meanwhile, to max_vms = 3: ask again\n" in shown


def test_limits_for_programs(home: Home, bus: PrivateBus) -> None:
    value = json.loads(home.ask("limits", "--json", env=bus.environment).stdout)
    assert (value["user"], value["uid"], value["cpus"], value["memlock"]) == (ME, os.geteuid(), "0-15", 28 << 30)
    assert value["from"]["cpus"] == "default"
    assert value["warnings"] == []


def test_limits_of_another(home: Home, bus: PrivateBus) -> None:
    done = home.ask("limits", "--owner", str(OTHER), env=bus.environment | DISPLAY)
    assert done.stdout.startswith("uid 4242 may have, by ")
    home.ask("limits", "--owner", ME, env=bus.environment | DISPLAY)
    assert asked(bus) == [("GetLimitsOf", [OTHER], INTERACTIVE), ("GetLimits", [], 0)]


def test_owner_who_does_not_exist(home: Home, bus: PrivateBus) -> None:
    for words in (("limits",), ("release", "win11")):
        done = home.ask(*words, "--owner", "no-such-user", env=bus.environment)
        assert done.returncode == 2
        assert done.stderr.startswith("qemu-launcher: there is no user 'no-such-user' on this host\n")
    assert bus.calls() == []


@pytest.mark.parametrize("odd", [{"cpus": ["s", "all"]}, {"max_vms": ["s", "8"]}, {"max_cpus": ["b", True]}])
def test_limits_of_another_shape(home: Home, bus: PrivateBus, odd: dict[str, Any]) -> None:
    bus.plan(GetLimits={"return": odd})
    done = home.ask("limits", env=bus.environment)
    assert done.returncode == 1
    assert "answered GetLimits with something that the contract does not know" in done.stderr


def test_broken_file_of_the_administrators_is_told(home: Home, bus: PrivateBus) -> None:
    text = "helper.toml is broken, nobody is served: sudo qemu-launcher-helper --check says why"
    bus.plan(GetLimits={"error": ["org.qemulauncher.Error.Failed", text]})
    done = home.ask("limits", env=bus.environment)
    assert (done.returncode, done.stderr.partition("\n")[0]) == (1, f"qemu-launcher: {text}")


def test_without_a_bus(home: Home) -> None:
    for words in (("limits",), ("status", "--all-users"), ("release", "win11")):
        done = home.ask(*words)
        assert done.returncode == 1
        assert done.stderr.startswith("qemu-launcher: there is no system bus at unix:path=")


# status --all-users


def test_everybodys_vms(home: Home, bus: PrivateBus) -> None:
    bus.plan(ListVms={"return": [row("win11", 1000, "4-7"), row("a\x1b[31m", 1001, "", "bob"), row("b", 1000, "8")]})
    done = home.ask("status", "--all-users", env=bus.environment | DISPLAY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "VM         owner  PID   CPUs  mechanism\n"
        "b          alice  4711  8     partition\n"
        "win11      alice  4711  4-7   partition\n"
        "a\\x1b[31m  bob    4711  none  none\n"
    )
    assert asked(bus) == [("ListVms", [True], INTERACTIVE)]


def test_everybodys_vms_as_json(home: Home, bus: PrivateBus) -> None:
    bus.plan(ListVms={"return": [row("win11", 1000, "4-7"), row("a\x1b[31m", 1001, "", "bob")]})
    done = home.ask("status", "--all-users", "--json", env=bus.environment)
    assert json.loads(done.stdout) == [
        {"name": "win11", "user": "alice", "uid": 1000, "pid": 4711, "cpus": "4-7", "mechanism": "partition"},
        {"name": "a\x1b[31m", "user": "bob", "uid": 1001, "pid": 4711, "cpus": "", "mechanism": "none"},
    ]


def test_nobodys_vm(home: Home, bus: PrivateBus) -> None:
    done = home.ask("status", "--all-users", env=bus.environment)
    assert (done.returncode, done.stdout) == (0, "nobody's VM holds anything; VMs that run untuned are not listed\n")
    assert asked(bus) == [("ListVms", [True], 0)], "nobody is there who could be asked"
    assert home.ask("status", "--json", "--all-users", env=bus.environment).stdout == "[]\n"


def test_everybodys_vms_are_not_everybodys_business(home: Home, bus: PrivateBus) -> None:
    bus.plan(ListVms=REFUSED)
    done = home.ask("status", "--all-users", env=bus.environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qemu-launcher: ")


def test_plain_status_asks_nobody(home: Home, bus: PrivateBus) -> None:
    done = home.ask("status", env=bus.environment, change="import sys; sys.modules['dbus_next'] = None")
    assert done.returncode == 0, done.stderr
    assert bus.calls() == []


# release


def test_own(home: Home, bus: PrivateBus) -> None:
    bus.plan(ListVms={"return": [row("win11", OTHER, "8"), row("win11", os.geteuid(), "4-7")]})
    done = home.ask("release", "win11", env=bus.environment | DISPLAY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "win11: gave back CPUs 4-7, its real time and its memory lock; PID 4711 runs on\n"
    assert asked(bus) == [("ListVms", [False], 0), ("Release", [os.geteuid(), "win11"], 0)], "nobody is waited for"


def test_anothers(home: Home, bus: PrivateBus) -> None:
    bus.plan(ListVms={"return": [row("win11", os.geteuid(), "8"), row("win11", OTHER, "")]})
    done = home.ask("release", "win11", "--owner", str(OTHER), env=bus.environment | DISPLAY)
    assert done.returncode == 0
    assert done.stdout.startswith("win11 of uid 4242: gave back no CPUs, it held none, its real time and")
    assert asked(bus) == [("ListVms", [True], 0), ("Release", [OTHER, "win11"], INTERACTIVE)]


def test_anothers_takes_one_password(home: Home, bus: PrivateBus) -> None:
    """Whoever has to give it gives it for the release, and not for the list that comes before."""
    bus.plan(ListVms={"unless_asked": "act"}, Release={"unless_asked": "act"})
    there = "from qemu_launcher import cgroups; cgroups.has_scope = lambda *_: True"
    done = home.ask("release", "win11", "--owner", str(OTHER), env=bus.environment | DISPLAY, change=there)
    assert done.stdout == "win11 of uid 4242: gave back its CPUs, real time and memory lock; it runs on\n"
    assert asked(bus) == [("ListVms", [True], 0), ("Release", [OTHER, "win11"], INTERACTIVE)]


def test_nobody_is_asked_for_a_password_for_nothing(home: Home, bus: PrivateBus) -> None:
    bus.plan(ListVms={"unless_asked": "act"})
    absent = "from qemu_launcher import cgroups; cgroups.has_scope = lambda *_: False"
    done = home.ask("release", "win11", "--owner", str(OTHER), env=bus.environment | DISPLAY, change=absent)
    assert done.returncode == 3
    assert "win11 of uid 4242 holds nothing that could be given back: no such VM" in done.stderr
    assert bus.members() == ["ListVms"]


@pytest.mark.parametrize("owner", [(), ("--owner", str(OTHER))])
def test_nothing_to_give_back(home: Home, bus: PrivateBus, owner: tuple[str, ...]) -> None:
    bus.plan(ListVms={"return": [row("win12", os.geteuid(), "4"), row("win11", 77, "5")]})
    done = home.ask("release", "win11", *owner, env=bus.environment)
    assert (done.returncode, done.stdout) == (3, "")
    assert "holds nothing that could be given back: it is not running" in done.stderr
    assert ("\n    see what runs with: qemu-launcher status --all-users\n" in done.stderr) == bool(owner)
    assert bus.members() == ["ListVms"]


def test_untuned_vm_has_nothing_to_give_back(home: Home, bus: PrivateBus) -> None:
    home.define()
    home.start().wait_running()
    done = home.ask("release", "vm-under-test", env=bus.environment)
    assert done.returncode == 3
    assert "vm-under-test holds nothing that could be given back: it runs untuned" in done.stderr


def test_name_that_can_be_none(home: Home, bus: PrivateBus) -> None:
    assert home.ask("release", "a b", env=bus.environment).returncode == 2
    assert bus.calls() == []


def test_refusal_of_a_release_is_told(home: Home, bus: PrivateBus) -> None:
    bus.plan(ListVms={"return": [row("win11", OTHER, "8")]}, Release=REFUSED)
    done = home.ask("release", "win11", "--owner", str(OTHER), env=bus.environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qemu-launcher: ")


@needs_two_cpus
def test_owner_is_told_when_the_shield_is_gone(home: Home, bus: PrivateBus, tmp_path: Path) -> None:
    """The fake shields by affinity alone, so what the cgroup tree says is what it says after a release."""
    home.define(**SHIELDED)
    run = home.start(env=bus.environment)
    run.wait_running()
    assert (run.record()["isolation"], run.record()["cpus"]) == ("shield", str(CPU))
    shown = home.ask("status").stdout
    assert f"  warning     its shield of CPUs {CPU} was taken back: released by you or an administrator, or" in shown


def test_nobody_is_told_of_a_shield_that_never_was(home: Home) -> None:
    home.define(vcpu_pinning=[CPU], isolation="affinity")
    run = home.start()
    run.wait_running()
    assert (run.record()["isolation"], run.record()["cpus"]) == ("affinity", str(CPU))
    assert "warning" not in home.ask("status").stdout
