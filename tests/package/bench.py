"""What a start costs, as ratios: printed by `make bench`, and held to its budget by test_bench.py.

Times differ between machines, and between two runs on a busy one; ratios to a bare Python on the same machine at the
same moment differ little. Both sides are therefore run in turns, and the best of several runs counts: noise only adds.
Processor time is what counts: a longer run is interrupted more often, so that its best moment never comes.

What the launcher does for each vCPU is counted by tests/unit/test_launcher_scale.py, in Python's instructions. What
helper, QEMU and kernel take for it, `pytest -rP tests/system/test_scale.py` prints, from the lab.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "/usr/bin/python3"
ROUNDS = 15

BARE = [PYTHON, "-c", "pass"]
COMMAND = [PYTHON, "-m", "qemu_launcher", "command", str(ROOT / "launcher/examples/vfio.yml")]
COMMAND_BUDGET = 6.0


def command_ratio() -> float:
    """How many times a bare Python's start `qemu-launcher command` costs, with bytecode cached as when installed."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": cache,
            "PYTHONPATH": str(ROOT / "launcher"),
            "PYTHONPYCACHEPREFIX": cache,
        }
        subprocess.run(COMMAND, env=environment, stdout=subprocess.DEVNULL, check=True)
        times: dict[str, list[float]] = {"bare": [], "command": []}
        for _ in range(ROUNDS):
            for name, argv in (("bare", BARE), ("command", COMMAND)):
                times[name].append(_processor_seconds(argv, environment))
    return min(times["command"]) / min(times["bare"])


def _processor_seconds(argv: list[str], environment: Mapping[str, str]) -> float:
    with subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, argv)
    return usage.ru_utime + usage.ru_stime


def work_for_each_vcpu() -> list[str]:
    """A line for each part of a start: how many instructions for each of few vCPUs, and of many."""
    command = [sys.executable, "-m", "pytest", "-q", "-rP", str(ROOT / "tests/unit/test_launcher_scale.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if " instructions for each of " in line]


def main() -> int:
    """Print the figures; 1 if one is over its budget."""
    ratio = command_ratio()
    sys.stdout.write(f"qemu-launcher command: {ratio:.1f} times `python3 -c pass` (budget {COMMAND_BUDGET:.0f})\n")
    sys.stdout.writelines(f"{line}\n" for line in work_for_each_vcpu())
    return 0 if ratio <= COMMAND_BUDGET else 1


if __name__ == "__main__":
    raise SystemExit(main())
