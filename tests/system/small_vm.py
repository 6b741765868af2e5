"""A small tuned VM of alice's, on CPUs 4 and 5, for tests that watch a lab from outside."""

from __future__ import annotations

from pathlib import Path

from lab import Vm

_DEFINITION = """\
launcher:
  binary: qemu-system-x86_64
  vcpu_pinning: [4, 5]
  scheduler: fifo
  priority: 1
{more}qemu:
  - name: [vm, debug-threads: on]
  - machine: q35
  - accel: tcg,thread=multi,tb-size=8
  - smp: [2, cores: 1, threads: 2]
  - m: 16M
  - nodefaults
  - display: none
"""


def give_to_alice(vm: Vm, tmp_path: Path, more: str = "") -> None:
    """She may tune, and has vm.yml in her home; `more`: further lines of its section launcher."""
    vm.run("usermod -aG qemu-launcher alice")
    (tmp_path / "vm.yml").write_text(_DEFINITION.format(more=more))
    vm.put(tmp_path / "vm.yml", "/home/alice/vm.yml")
    vm.run("chown -R alice: /home/alice")
