"""privileges: what the process can still do after drop(), read back from the kernel. Needs root; runs in a child."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = Path(__file__).parents[2] / "helper"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

THREE = 1 << 23 | 1 << 24 | 1 << 21


def in_child(code: str, *wrapper: str) -> list[str]:
    """Run `code` in a fresh Python; return the lines it prints."""
    prelude = f"""
import sys
sys.path.insert(0, {str(HELPER)!r})
from qemu_launcher_helper import privileges
def caps(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1], 16)
"""
    run = subprocess.run([*wrapper, sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_at_rest_nothing_is_effective() -> None:
    code = """
privileges.drop()
print(*[caps(name) for name in ("CapEff", "CapInh", "CapAmb", "CapPrm", "CapBnd", "NoNewPrivs")])
import prctl; print(prctl.get_dumpable())
"""
    numbers, dumpable = in_child(code)
    effective, inheritable, ambient, permitted, bounding, no_new = map(int, numbers.split())
    assert (effective, inheritable, ambient, no_new) == (0, 0, 0, 1)
    assert permitted & ~THREE == bounding & ~THREE == 0
    assert permitted != 0
    assert dumpable == "False"


def test_one_is_raised_around_one_act() -> None:
    code = """
privileges.drop()
with privileges.raised("sys_nice"):
    print(caps("CapEff"))
print(caps("CapEff"))
try:
    with privileges.raised("sys_nice"):
        raise KeyError
except KeyError:
    print(caps("CapEff"))
"""
    assert in_child(code) == [str(1 << 23), "0", "0"]


def test_what_was_not_given_cannot_be_raised() -> None:
    code = """
privileges.drop()
try:
    with privileges.raised("sys_admin"):
        print("raised")
except OSError:
    print("refused", caps("CapEff"))
try:
    with privileges.raised("chown"):
        print("raised")
except OSError:
    print("refused", caps("CapEff"))
"""
    assert in_child(code, "setpriv", "--bounding-set=-sys_admin") == ["refused 0", "refused 0"]


def test_under_the_units_bounding_set() -> None:
    """There CAP_SETPCAP is missing, and nothing is left to be dropped from the bounding set."""
    bounding = "--bounding-set=-all,+sys_nice,+sys_admin"
    assert in_child('privileges.drop(); print(caps("CapEff"))', "setpriv", bounding) == ["0"]


def test_a_capability_that_cannot_be_dropped_stops_the_start() -> None:
    """As on a kernel with a capability that python-prctl cannot name."""
    code = """
import prctl
prctl.ALL_CAP_NAMES = tuple(name for name in prctl.ALL_CAP_NAMES if name != "chown")
from qemu_launcher_helper.contract import Failed
try:
    privileges.drop()
except Failed as err:
    print(err)
"""
    [line] = in_child(code)
    assert "start the helper through its systemd unit" in line


def test_what_no_unit_limits() -> None:
    """Descriptors, for select(2), and memory: both soft and hard."""
    code = """
import resource
privileges.drop()
print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_DATA))
"""
    assert in_child(code) == ["(256, 256) (134217728, 134217728)"]
