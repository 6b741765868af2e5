"""QEMU options that concern the launcher, with the real helper: the table in qemu-launcher.yml(5).

The others are tried where no root is needed for it, in tests/qemu/test_qemu_options.py.
"""

import subprocess
from collections.abc import Callable

from system import host
from system.people import User
from system.vms import Launch, define, refused

SHIELDED = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "rlimit_memlock": "64M"}


def test_second_process_sandbox_and_named_threads_under_a_shield(alice: User, vm: Callable[..., Launch]) -> None:
    """A process of QEMU's that outlives it by a moment keeps neither its scope nor its CPUs; QEMU 7.2 has none yet."""
    known = subprocess.run(["qemu-system-x86_64", "-help"], check=True, capture_output=True, text=True).stdout
    options = (
        *([{"run-with": "async-teardown=on"}] if "-run-with" in known else []),
        {"sandbox": "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"},
        {"name": "guest=foo,debug-threads=on"},
    )
    define(alice, "options", SHIELDED, *options, cpus=2)
    running = vm(alice, "options")
    assert [host.cpus_of(running.qemu, tid) for tid in running.vcpu_tids] == [{4}, {5}]
    assert {host.scheduling(tid)[0] for tid in running.vcpu_tids} == {"fifo"}
    assert host.isolated() == {4, 5}
    assert running.quit() == 0
    host.wait_until_as_before()


def test_name_that_is_no_qemus_is_refused_at_its_line(alice: User) -> None:
    path = define(alice, "renamed", SHIELDED, {"name": ["foo", {"process": "bar"}]}, cpus=2)
    line = path.read_text().splitlines().index("- name:") + 1
    status, words = refused(alice, "renamed")
    assert status == 1
    assert f"renamed.yml:{line}:3: Process " in words
    assert "is not a QEMU by its name, 'bar'" in words
    assert "remove process= there" in words
    host.wait_until_as_before()
