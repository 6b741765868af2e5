"""How much a user may have: each limit of helper.toml refuses, with the value, the limit and where it is written.

Asked by a claimant (claims.py), since a launcher would take seconds for each; `test_kinds.py` has what the launcher
makes of a refusal. Each refusal has its positive control: the same claim, one step smaller, is granted.
"""

import os
import subprocess
from collections.abc import Callable

import pytest

from system import host
from system.claims import Claimant
from system.fixtures import TOML

BROKEN = "helper.toml is broken, nobody is served: sudo qemu-launcher-helper --check says why"
ENTRY = f"({TOML}, [[limits]] entry 1)"


def test_cpus(program: Claimant, helper_toml: Callable[..., None]) -> None:
    helper_toml('[[limits]]\ncpus = "4-7"\n')
    child = program.spawn(2)
    refused = program.pin(child, "vm", 2, 3)
    assert refused.error == "LimitExceeded"
    assert refused.text == f"CPUs 2-3 are not among your 4-7 {ENTRY}; free for you: 4-7"
    assert host.isolated() == frozenset()
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert host.isolated() == {4, 5}


def test_max_cpus_counts_over_all_vms(program: Claimant, helper_toml: Callable[..., None]) -> None:
    helper_toml("[[limits]]\nmax_cpus = 2\n")
    child, other = program.spawn(4), program.spawn(2)
    refused = program.pin(child, "vm", 4, 5, 6, 7)
    assert refused.error == "LimitExceeded"
    assert refused.text == f"Your VMs would hold 4 CPUs, and may hold 2 {ENTRY}"
    assert host.isolated() == frozenset()
    assert program.pin(child, "vm", 4, 5).error == "ok"
    refused = program.pin(other, "other", 6, 7)
    assert refused.text == f"Your VMs would hold 4 CPUs, and may hold 2 {ENTRY}"
    assert host.isolated() == {4, 5}


def test_max_vms(program: Claimant, helper_toml: Callable[..., None]) -> None:
    helper_toml("[[limits]]\nmax_vms = 1\n")
    child, other = program.spawn(1), program.spawn(1)
    assert program.pin(child, "vm", 4, shielded=False).error == "ok"
    refused = program.pin(other, "other", 5, shielded=False)
    assert refused.error == "LimitExceeded"
    assert refused.text == f"You have 1 VMs, and may have 1 {ENTRY}"
    assert host.records() == {"1000-vm"}
    program.end(child.pid)
    assert program.pin(other, "other", 5, shielded=False).error == "ok", "when the first has ended"


def test_memlock_counts_over_all_vms(program: Claimant, helper_toml: Callable[..., None]) -> None:
    """Granted is the smaller of what is asked and what is left; nothing left is a refusal."""
    helper_toml('[[limits]]\nmemlock = "100M"\n')
    child, other, third = program.spawn(1), program.spawn(1), program.spawn(1)
    assert program.set_memlock(child, "vm", 60 << 20).body == [60 << 20]
    assert host.limit(child.pid, "Max locked memory") == (60 << 20, 60 << 20)
    assert program.set_memlock(other, "other", 60 << 20).body == [40 << 20]
    assert host.limit(other.pid, "Max locked memory") == (40 << 20, 40 << 20)
    before = host.limit(third.pid, "Max locked memory")
    refused = program.set_memlock(third, "third", 1 << 20)
    assert refused.error == "LimitExceeded"
    assert ENTRY in refused.text
    assert "100 MiB" in refused.text or str(100 << 20) in refused.text
    assert host.limit(third.pid, "Max locked memory") == before


def test_memlock_without_a_limit_leaves_the_host_its_share(program: Claimant) -> None:
    """The lab has 3 GiB, of which 2 stay: 2^64-1, all that may be had, is what is above that."""
    child = program.spawn(1)
    granted = program.set_memlock(child, "vm", 2**64 - 1).body[0]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert granted == total - (2 << 30)
    assert host.limit(child.pid, "Max locked memory") == (granted, granted)


def test_policies(program: Claimant, helper_toml: Callable[..., None]) -> None:
    helper_toml('[[limits]]\npolicies = ["other", "rr"]\n')
    child = program.spawn(1)
    assert program.pin(child, "vm", 4).error == "ok"
    refused = program.schedule(child, "vm", "fifo", 1)
    assert refused.error == "LimitExceeded"
    assert refused.text == f"Policy fifo is none of yours, other, rr {ENTRY}"
    assert host.scheduling(child.tids[0])[0] == "other"
    assert program.schedule(child, "vm", "rr", 1).error == "ok"
    assert host.scheduling(child.tids[0]) == ("rr", 1, True)


def test_max_priority(program: Claimant, helper_toml: Callable[..., None]) -> None:
    helper_toml("[[limits]]\nmax_priority = 3\n")
    child = program.spawn(1)
    assert program.pin(child, "vm", 4).error == "ok"
    refused = program.schedule(child, "vm", "fifo", 4)
    assert refused.error == "LimitExceeded"
    assert refused.text == f"Priority 4 is above yours, 3 {ENTRY}"
    assert host.scheduling(child.tids[0])[0] == "other"
    assert program.schedule(child, "vm", "fifo", 3).error == "ok"
    assert host.scheduling(child.tids[0]) == ("fifo", 3, True)


def test_the_first_entry_that_fits_counts(program: Claimant, helper_toml: Callable[..., None]) -> None:
    helper_toml(
        '[[limits]]\nusers = ["carol"]\ncpus = "2-3"\n'
        '[[limits]]\ngroups = ["qemu-launcher"]\ncpus = "4-5"\n'
        '[[limits]]\ncpus = "6-7"\n'
    )
    limits = program.call("GetLimits", "").body[0]
    assert limits["cpus"] == "4-5"
    assert limits["limits_source"] == f"{TOML}, [[limits]] entry 2"


def test_a_change_counts_at_once(program: Claimant, helper_toml: Callable[..., None]) -> None:
    """Nobody has to restart anything, and the helper that serves is the same one."""
    assert program.call("GetLimits", "").body[0]["limits_source"] == "the built-in defaults"
    pid = host.helper()
    for cpus in ("4-5", "6-7"):
        helper_toml(f'[[limits]]\ncpus = "{cpus}"\n')
        assert program.call("GetLimits", "").body[0]["cpus"] == cpus
    assert host.helper() == pid


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("[[limits]]\nmax_vms = 1\n", 0o664),
        ("[[limits]]\nmax_vms = 1\n", 0o646),
        ("[[limits]]\nmax_vm = 1\n", 0o644),
        ("[[limits]\n", 0o644),
    ],
)
def test_an_unsafe_or_broken_file_refuses_all_but_giving_back(
    program: Claimant, helper_toml: Callable[..., None], text: str, mode: int
) -> None:
    child = program.spawn(1)
    helper_toml(text, mode=mode)
    for refused in (
        program.pin(child, "vm", 4),
        program.set_memlock(child, "vm", 1 << 20),
        program.schedule(child, "vm", "batch", 0),
        program.call("GetLimits", ""),
    ):
        assert refused.error == "Failed"
        assert refused.text == BROKEN
    assert host.traces() == []
    helper_toml("[[limits]]\nmax_vms = 1\n")
    assert program.pin(child, "vm", 4).error == "ok"
    helper_toml(text, mode=mode)
    assert program.call("Release", "us", program.user.uid, "vm").error == "ok"
    assert host.isolated() == frozenset()


def test_a_file_of_somebody_elses_refuses_all_service(program: Claimant, helper_toml: Callable[..., None]) -> None:
    helper_toml("[[limits]]\nmax_vms = 1\n")
    os.chown(TOML, 1000, 0)
    assert program.call("GetLimits", "").text == BROKEN
    os.chown(TOML, 0, 0)
    assert program.call("GetLimits", "").error == "ok"


def test_realtime_needs_a_shielded_cpu_for_each_thread(program: Claimant) -> None:
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5, shielded=False).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "TargetRefused"
    assert program.pin(child, "vm", 4, 4).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "TargetRefused"
    assert host.realtime_threads() == set()
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    assert host.realtime_threads() == set(child.tids)


def test_realtime_on_cpu_0_is_the_administrators_word(program: Claimant, helper_toml: Callable[..., None]) -> None:
    child = program.spawn(1)
    assert program.pin(child, "vm", 0).error == "ok"
    refused = program.schedule(child, "vm", "fifo", 1)
    assert refused.error == "LimitExceeded"
    assert "CPU 0" in refused.text
    assert host.realtime_threads() == set()
    helper_toml('[[limits]]\nrealtime = "anywhere"\n')
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    assert host.realtime_threads() == set(child.tids)


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("[[limits]]\nmax_vm = 1\n", 1, "[[limits]] entry 1: max_vm = 1: max_vm is not there"),
        ('[[limits]]\nusers = ["ailce"]\n', 1, "names 'ailce', whom this host does not know"),
        ('[[limits]]\nusers = ["alice"]\n', 0, f"{TOML} is understood: 1 [[limits]]"),
    ],
)
def test_an_administrator_checks_the_file(helper_toml: Callable[..., None], text: str, status: int, words: str) -> None:
    helper_toml(text)
    done = subprocess.run(["qemu-launcher-helper", "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    bare = subprocess.run(["qemu-launcher-helper"], capture_output=True, text=True, check=False)
    assert bare.returncode == 2
    assert "The system bus starts this" in bare.stderr
