"""How long `qemu-launcher command` takes, as a multiple of `python3 -c pass` on the same machine.

    python3 tests/bench_command.py [PROGRAM [ARGUMENT...]]

PROGRAM is the launcher to measure; by default the one of this checkout, run by /usr/bin/python3 as the installed one is.
Both are run in turn, so that a busy machine slows both, and the medians are compared. Exit status 1 above the limit.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 6.0
ROUNDS = 41
ROOT = Path(__file__).resolve().parent.parent
PYTHON = "/usr/bin/python3"
DEFINITION = """\
launcher:
  binary: qemu-system-x86_64
  env: { QEMU_AUDIO_DRV: pa }
  vcpu_pinning: { 0: { 0: { 0: 2, 1: 6 }, 1: { 0: 3, 1: 7 } } }
  scheduler: fifo
  priority: 1
  rlimit_memlock: true
qemu:
- name: my virtual machine
- machine: [ q35, accel: kvm ]
- nographic
- monitor: [ unix:/run/my-vm.sock ]
- cpu: [ host, topoext, migratable: no ]
- smp: [ 4, sockets: 1, cores: 2, threads: 2 ]
- m: 2G
- device: [ vfio-pci, host: 01:00.0, multifunction: on ]
- device: [ ide-hd, bus: ide.0, drive: drive0 ]
- drive: [ file: /var/storage/my-vm.qcow, if: none, id: drive0, format: qcow, readonly ]
- netdev: [ user, id: net0 ]
- device: [ virtio-net-pci, netdev: net0, mac: 52:54:00:12:34:56 ]
"""


def milliseconds(argv: list[str], environ: dict[str, str]) -> float:
    """The wall-clock time of one run of `argv`, which must succeed."""
    begin = time.perf_counter()
    subprocess.run(argv, env=environ, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - begin) * 1000


def main() -> int:
    """Measure and print. Returns the exit status."""
    program = sys.argv[1:] or [PYTHON, "-m", "qemu_launcher"]
    environ = dict(os.environ)
    if not sys.argv[1:]:
        environ["PYTHONPATH"] = str(ROOT / "launcher")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "win11.yml"
        path.write_text(DEFINITION)
        bare = [PYTHON, "-c", "pass"]
        command = [*program, "command", str(path)]
        milliseconds(command, environ)  # the first run may write .pyc files
        pairs = [(milliseconds(bare, environ), milliseconds(command, environ)) for _round in range(ROUNDS)]
    plain, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(  # noqa: T201  what this script is for
        f"qemu-launcher command: {ours:.1f} ms; python3 -c pass: {plain:.1f} ms; "
        f"ratio {ours / plain:.2f} (limit {LIMIT:g}, median of {ROUNDS})"
    )
    return 0 if ours <= LIMIT * plain else 1


if __name__ == "__main__":
    sys.exit(main())
