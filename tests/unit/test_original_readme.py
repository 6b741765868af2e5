"""The examples of the original tool's README, word for word: definitions that people have written after them go on."""

from qemu_launcher import cmdline, restrictions
from unit.reading import launcher, read

HEAD = "launcher:\n  binary: qemu\n"

FIRST = """\
qemu:
- name: my virtual machine
- machine: [ pc, accel: kvm ]
- nographic
- monitor: [ unix:/run/my-vm.sock ]
- cpu: host
- smp: [ 2, sockets: 1, cores: 1, threads: 1 ]
- m: 2G
- device: [ ide-hd, bus: ide.0, drive: drive0 ]
- drive: [ file: /var/storage/my-vm.qcow, if: none, id: drive0, format: qcow, readonly ]
"""
FLAT = """\
qemu:
- name: my virtual machine
- machine: pc,accel=kvm
- nographic
- monitor: unix:/run/my-vm.sock
- cpu: host
- smp: 2,sockets=1,cores=1,threads=1
- m: 2G
- device: ide-hd,bus=ide.0,drive=drive0
- drive: file=/var/storage/my-vm.qcow,if=none,id=drive0,format=qcow,readonly
"""
MIXED = """\
qemu:
- name: [ my virtual machine ] # Array with one element
- machine:
  # Array of strings written in the more verbose way
  - pc,
  - accel=kvm
# Simple flag parameter
- nographic
- monitor:
  - unix:/run/my-vm.sock
# This is simila to the name key, but using a different YAML syntax
- cpu:
  - host
- smp:
  # Simple integer
  - 2
  # Explicit hash
  - { sockets: 1 }
  # Implicit hash
  - cores: 1
  - { threads: 1 }
- m: 2G
- device: ide-hd,bus=ide.0,drive=drive0
- drive: file=/var/storage/my-vm.qcow,if=none,id=drive0,format=qcow,readonly
"""
ARGV = [
    *("-name", "my virtual machine"),
    *("-machine", "pc,accel=kvm"),
    "-nographic",
    *("-monitor", "unix:/run/my-vm.sock"),
    *("-cpu", "host"),
    *("-smp", "2,sockets=1,cores=1,threads=1"),
    *("-m", "2G"),
    *("-device", "ide-hd,bus=ide.0,drive=drive0"),
    *("-drive", "file=/var/storage/my-vm.qcow,if=none,id=drive0,format=qcow,readonly"),
]


def arguments(section: str) -> list[str]:
    return cmdline.qemu_argv(read(HEAD + section))[1:]


def test_first_form() -> None:
    assert arguments(FIRST) == ARGV
    assert read(HEAD + FIRST).warnings == ()


def test_all_values_as_strings() -> None:
    assert arguments(FLAT) == ARGV
    assert read(HEAD + FLAT).warnings == ()


def test_mixed_form() -> None:
    """Its `pc,` gives two commas, as it did with the original, and with that no QEMU starts: so it is told."""
    assert arguments(MIXED) == ["pc,,accel=kvm" if word == "pc,accel=kvm" else word for word in ARGV]
    assert read(HEAD + MIXED).warnings == (
        "win11.yml:5:3: 'pc,' in -machine ends in a comma, and elements are joined with one: to QEMU two commas are "
        "one in the text; remove it",
    )


def test_launcher_section() -> None:
    vm = launcher("env:\n  # Set the audio driver for qemu to use PulseAudio\n  QEMU_AUDIO_DRV: pa")
    assert vm.env == (("QEMU_AUDIO_DRV", "pa"),)
    pinned = launcher(
        "vcpu_pinning:\n  # vCPU socket 0\n  0:\n    # vCPU core 0\n    0:\n"
        "      # vCPU thread 0 : host logical CPU 2\n      0: 2\n      1: 6\n    1:\n      0: 3\n      1: 7"
    )
    assert pinned.pinning is not None
    assert pinned.pinning.topology is not None
    assert {
        tuple(number for _, number in place): set(host.cpus) for place, host in pinned.pinning.topology.items()
    } == {
        (0, 0, 0): {2},
        (0, 0, 1): {6},
        (0, 1, 0): {3},
        (0, 1, 1): {7},
    }


def test_commas_that_are_meant() -> None:
    """A pair is a comma in the text, and the last element joins nothing."""
    vm = read(HEAD + "qemu:\n- drive: ['file=a,,', if=none, 'id=b,']\n- a: 'x,'\n- b: [c: 'd,', e]\n")
    assert list(restrictions.doubtful(vm.options)) == []
    assert len(read(HEAD + "qemu:\n- a: [',,,', b]\n- b: [',', ',', c]\n").warnings) == 3
