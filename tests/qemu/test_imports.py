"""After `cont` nothing is imported any more, and a VM without tuning never pays for D-Bus.

The launcher lives as long as its guest. An upgrade that replaces or removes the files under it must not matter.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qemu.launched import ROOT, Home
from qemu.private_bus import PrivateBus

# Runs the launcher with an import hook that refuses every import once `cont` has been sent.
GUARDED = """\
import sys
from qemu_launcher import qmp
class Guard:
    def find_spec(self, name, path=None, target=None):
        print(f"IMPORTED AFTER CONT: {name}", file=sys.stderr, flush=True)
        raise ModuleNotFoundError(name)
execute = qmp.Qmp.execute
async def watched(self, command, arguments=None):
    if command == "cont":
        sys.meta_path.insert(0, Guard())
        sys.path_importer_cache.clear()
    return await execute(self, command, arguments)
qmp.Qmp.execute = watched
from qemu_launcher.__main__ import main
status = main(sys.argv[1:])
sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Guard)]
sys.exit(status)
"""

CPU = max(os.sched_getaffinity(0))


def guarded(home: Home) -> list[str]:
    return [sys.executable, "-c", GUARDED, "run", "vm-under-test"]


@pytest.mark.parametrize("way", ["ctrl-c twice", "sigterm and timeout", "killed qemu"])
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="optional: a shield needs a CPU for the others")
def test_nothing_is_imported_after_cont(home: Home, bus: PrivateBus, way: str) -> None:
    """With a helper, so that the release is on the way too: where there is no scope it is always asked for."""
    home.define(vcpu_pinning=[CPU], shutdown_timeout=1)
    run = home.start(argv=guarded(home), env=bus.environment)
    run.wait_running()
    if way == "ctrl-c twice":
        run.signal(signal.SIGINT)
        run.wait_line("asked the guest")
        run.signal(signal.SIGINT)
        assert run.end() == 0
    elif way == "sigterm and timeout":
        run.signal(signal.SIGTERM)
        assert run.end() == 0
    else:
        os.kill(run.qemu_pid, signal.SIGKILL)
        assert run.end() == 137
    assert "IMPORTED AFTER CONT" not in run.output
    assert bus.members()[-1] == "Release"


def test_guard_would_notice(home: Home) -> None:
    """The guard itself works: an import after `cont` fails loudly."""
    home.define(scheduler="batch")
    script = GUARDED.replace("    return await execute", "        import colorsys\n    return await execute")
    run = home.start(argv=[sys.executable, "-c", script, "run", "vm-under-test"])
    run.wait_line("IMPORTED AFTER CONT: colorsys")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_package_removed_under_a_running_launcher(home: Home, tmp_path: Path, number: signal.Signals) -> None:
    copy = tmp_path / "installed"
    shutil.copytree(ROOT / "launcher", copy, ignore=shutil.ignore_patterns("__pycache__"))
    home.define(scheduler="batch", shutdown_timeout=1)
    run = home.start(env={"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"})
    run.wait_running()
    shutil.rmtree(copy)
    run.signal(number)
    run.wait_line("asked the guest to power down")
    if number == signal.SIGINT:
        run.signal(number)
    assert run.end() == 0
    assert "Traceback" not in run.output


def test_untuned_vm_imports_neither_dbus_nor_rich(home: Home, bus: PrivateBus) -> None:
    home.define()
    run = home.start(
        argv=[sys.executable, "-X", "importtime", "-m", "qemu_launcher", "vm-under-test"], env=bus.environment
    )
    run.wait_running()
    home.ask("kill", "vm-under-test")
    assert run.end() == 0
    modules = {line.rpartition("|")[2].strip() for line in run.output.splitlines() if line.startswith("import time:")}
    assert "qemu_launcher.session" in modules
    assert not {name.partition(".")[0] for name in modules} & {"dbus_next", "rich", "prctl"}
    assert bus.calls() == []


@pytest.mark.parametrize(
    "words", [("command", "vm-under-test"), ("command", "--json", "vm-under-test"), ("--help",), ("--version",)]
)
def test_command_imports_nothing_of_a_run(home: Home, words: tuple[str, ...]) -> None:
    home.define()
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qemu_launcher", *words],
        env=home.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert not {name.partition(".")[0] for name in modules} & {"asyncio", "dbus_next", "rich", "prctl"}


@pytest.mark.parametrize(
    "words", [("list",), ("list", "--json"), ("status",), ("pause", "vm-under-test"), ("resume", "vm-under-test")]
)
def test_everyday_commands_need_neither_bus_nor_rich(home: Home, words: tuple[str, ...]) -> None:
    """Nor YAML where they read no definition."""
    home.define()
    run = home.start()
    run.wait_running()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qemu_launcher", *words],
        env=home.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    unneeded = {"dbus_next", "rich", "prctl"} | ({"yaml"} if "list" not in words else set())
    assert not {name.partition(".")[0] for name in modules} & unneeded
