"""A disposable real host: a Debian system in a file, booted under QEMU for the tests that need one.

The operations of this project cannot be tried on a development machine: they change the cgroups, limits and scheduling
of a host with systemd, logind and polkit. The lab is such a host. It is built once per recipe, cached, and every boot
starts from the same state on an overlay that is thrown away; QEMU never outlives whoever started it (a *kept* lab,
which an engineer starts and stops by hand, is the one exception). Only the standard library is needed to use it.

    with lab.boot() as vm:
        vm.run("systemctl is-system-running", check=False)
        vm.run("qemu-launcher win11", user="alice", stream=True)
"""

from lab.booting import boot
from lab.errors import LabError
from lab.recipe import Machine
from lab.vm import Finished, Vm

__all__ = ["Finished", "LabError", "Machine", "Vm", "boot"]
