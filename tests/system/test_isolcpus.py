"""A host that was booted with isolcpus=, for half of one core and half of another: shields come and go all the same.

Such CPUs are among the kernel's isolated ones, and what a cpuset gives tasks back may be more than they had at boot.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.terminal import observe
from lab import Vm
from system.small_vm import give_to_alice

pytestmark = [pytest.mark.outside, pytest.mark.hosts(more=("isolcpus",), why="it is about how the host was booted")]

START = "setsid qemu-launcher ./vm.yml >vm.log 2>&1 </dev/null & disown"
UNTIL = "for i in $(seq 600); do {} && exit; sleep 0.5; done; exit 1"


def test_shields_on_a_host_with_isolcpus(installed_lab: Vm, tmp_path: Path) -> None:
    vm = installed_lab
    before = observe(vm)
    assert before["init_cpus"] == [0, 1, 2, 3, 4, 7]

    give_to_alice(vm, tmp_path)
    vm.run(START, user="alice")
    vm.run(UNTIL.format("grep -q 'vm: running' /home/alice/vm.log"), timeout=600)
    during = observe(vm)
    [machine] = during["machines"]
    placed = [(one["cpus"], one["policy"]) for one in machine["threads"] if one["name"].startswith("CPU ")]
    assert placed == [([4], "fifo"), ([5], "fifo")]
    assert {4, 5} <= set(during["isolated"])
    assert not {4, 5} & set(during["init_cpus"])

    checked = vm.run("qemu-launcher check ./vm.yml", user="alice", check=False).stdout
    assert "the kernel was started with isolcpus=5-6: nothing of the host runs on CPU 6 by itself, VM or not" in checked

    vm.run("qemu-launcher kill vm", user="alice")
    vm.run(UNTIL.format("! grep 4 /sys/fs/cgroup/cpuset.cpus.isolated"), timeout=600)
    after = observe(vm)
    assert after["machines"] == []
    assert set(before["init_cpus"]) <= set(after["init_cpus"]), "nobody has fewer CPUs than before"
    assert set(after["isolated"]) <= {5, 6}
