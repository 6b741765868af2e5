"""QEMU options that concern the launcher: each works together with tuning, or is refused at its line.

The table of the same name in qemu-launcher.yml(5) says which. Tuning is what this machine's kernel lets anybody do
(affinity, batch); where the helper must have its say, the fake one stands in for it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import Home, Run
from qemu.private_bus import PrivateBus
from qemu.test_tuning import CPU, SHIELDED, assert_never_ran, needs_two_cpus

TUNED: dict[str, Any] = {"vcpu_pinning": [CPU], "isolation": "affinity", "scheduler": "batch"}
BY_HELPER: dict[str, Any] = {"vcpu_pinning": [CPU], "scheduler": "fifo"}
REFUSED = "org.qemulauncher.Error.TargetRefused"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="optional: QEMU itself takes this from root only")


def has_option(name: str) -> bool:
    """Whether the QEMU that is installed has this option."""
    if shutil.which("qemu-system-x86_64") is None:
        return False
    shown = subprocess.run(["qemu-system-x86_64", "-help"], capture_output=True, text=True, check=True).stdout
    return f"\n-{name}" in shown


def assert_tuned(run: Run) -> None:
    """The thread of the first vCPU is where it was wanted, with the policy that was wanted."""
    qmp = run.qmp()
    vcpu, *_ = qmp("query-cpus-fast")
    qmp.close()
    assert os.sched_getaffinity(vcpu["thread-id"]) == {CPU}
    assert os.sched_getscheduler(vcpu["thread-id"]) == os.SCHED_BATCH


DENY_ALL = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
WORKS: dict[str, tuple[Any, ...]] = {
    "name": ({"name": "guest=foo,debug-threads=on"},),
    "process name": ({"name": ["foo", {"process": "bar) R 1 ("}]},),
    "monitor on stdio": ({"monitor": "stdio"},),
    "qmp on stdio": ({"qmp": "stdio"},),
    "mon": ({"chardev": ["null", {"id": "mine"}]}, {"mon": [{"chardev": "mine"}, {"mode": "control"}]}),
    "sandbox": ({"sandbox": DENY_ALL},),
    "pidfile": ({"pidfile": "PLACE/pid,file"},),
    "snapshot": ("snapshot", "no-reboot", "no-shutdown", {"action": "panic=none"}),
    "global": ({"global": "kvm-pit.lost_tick_policy=delay"}, "only-migratable", {"msg": "timestamp=on"}),
    "debugger": ({"gdb": "unix:PLACE/gdb,server=on,wait=off"}, {"D": "PLACE/log"}, {"d": "guest_errors"}),
    "single thread": ({"accel": "tcg,thread=single"},),
    "readconfig": ({"readconfig": "PLACE/config"},),
    "overcommit": ({"overcommit": [{"cpu-pm": "on"}]}, "mem-prealloc"),
}
CONFIG = '[name]\n  process = "bar"\n[sandbox]\n  enable = "on"\n  resourcecontrol = "deny"\n[smp-opts]\n  cpus = "2"\n'


def placed(options: tuple[Any, ...], place: Path) -> tuple[Any, ...]:
    """`options` with PLACE as what it stands for."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: replaced(inner) for name, inner in value.items()}
        return value.replace("PLACE", str(place)) if isinstance(value, str) else value

    return tuple(replaced(option) for option in options)


@pytest.mark.parametrize("options", WORKS.values(), ids=WORKS)
def test_works_together_with_tuning(home: Home, tmp_path: Path, options: tuple[Any, ...]) -> None:
    (tmp_path / "config").write_text(CONFIG)
    home.define(qemu=placed(options, tmp_path), **TUNED)
    run = home.start()
    assert "(nothing is shielded), batch" in run.wait_running()
    assert_tuned(run)
    assert "vm-under-test: running, PID" in home.ask("status").stdout
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert run.end() == 0


def test_option_that_leaves_a_process_behind_works(home: Home) -> None:
    """-async-teardown makes a second process, which is to outlive QEMU by a moment: it holds no lock of ours."""
    option: Any = {"run-with": "async-teardown=on"} if has_option("run-with") else "async-teardown"
    home.define(qemu=(option,), **TUNED)
    for _ in range(2):
        run = home.start()
        run.wait_running()
        assert_tuned(run)
        assert home.ask("kill", "vm-under-test").returncode == 0
        assert run.end() == 0


@needs_root
@pytest.mark.parametrize("option", ["chroot", "runas"])
def test_what_only_root_may_works_with_what_the_user_may_do_himself(home: Home, tmp_path: Path, option: str) -> None:
    value = {"chroot": str(tmp_path), "runas": "nobody"}[option]
    modern = {"chroot": f"chroot={tmp_path}", "runas": "user=nobody"}[option]
    home.define(qemu=({"run-with": modern} if has_option("run-with") else {option: value},), **TUNED)
    run = home.start()
    run.wait_running()
    assert_tuned(run)
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert run.end() == 0


@pytest.mark.parametrize("option", [{"runas": "nobody"}, {"run-with": "chroot=/,user=nobody"}])
@pytest.mark.parametrize("launcher", [SHIELDED, BY_HELPER, {"vcpu_pinning": [CPU], "isolation": "cpuset"}])
@needs_two_cpus
def test_another_user_cannot_be_tuned_by_the_helper(home: Home, option: Any, launcher: dict[str, Any]) -> None:
    path = home.define(qemu=(option,), **launcher)
    run = home.start()
    name = next(iter(option))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if name in text)
    assert_never_ran(run, message=f"{path}:{line}:3: -{name} makes QEMU another user's, and", status=2)
    assert "user: in the section launcher:" in run.output


@pytest.mark.parametrize("scheduler", [{}, {"scheduler": "batch"}])
def test_daemonize_is_refused_tuned_or_not(home: Home, scheduler: dict[str, str]) -> None:
    path = home.define(qemu=("daemonize",), **scheduler)
    run = home.start()
    assert run.end() == 2
    assert f"{path}:{len(path.read_text().splitlines())}:3: -daemonize takes QEMU out of the launcher's" in run.output


@needs_two_cpus
def test_name_that_the_helper_does_not_know_for_a_qemu_is_told_at_its_line(home: Home, bus: PrivateBus) -> None:
    """Only the helper knows which names its administrator allows, so it is asked."""
    bus.plan(PinThreads={"error": [REFUSED, "Process 1 is not a QEMU by its name, 'bar'"]})
    path = home.define(qemu=({"name": ["foo", {"process": "bar"}]},), **SHIELDED)
    line = path.read_text().splitlines().index("- name:") + 1
    run = home.start(env=bus.environment)
    assert_never_ran(run, message=f"qemu-launcher: {path}:{line}:3: Process 1 is not a QEMU by its name, 'bar'\n")
    assert "unless comm in qemu-launcher-helper.toml(5) says otherwise: remove process= there" in run.output


@needs_two_cpus
def test_name_that_comes_from_elsewhere_is_explained(home: Home, bus: PrivateBus, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(CONFIG)
    bus.plan(SetScheduler={"error": [REFUSED, "Process 1 is not a QEMU by its name, 'bar'"]})
    home.define(qemu=({"readconfig": f"{tmp_path}/config"},), **BY_HELPER)
    run = home.start(env=bus.environment)
    assert_never_ran(run, message="qemu-launcher: Process 1 is not a QEMU by its name, 'bar'\n")
    assert "says otherwise: use a binary of such a name, and no process= with -name\n" in run.output


@needs_two_cpus
@pytest.mark.parametrize(
    ("container", "hint"),
    [
        (None, ""),
        ("podman", "    this is a container (podman): the helper tunes processes of the host, start it there\n"),
    ],
)
def test_refusal_of_an_ordinary_qemu_is_not_explained_away(
    home: Home, bus: PrivateBus, container: str | None, hint: str
) -> None:
    bus.plan(PinThreads={"error": [REFUSED, "Process 1 is in no session or service of yours"]})
    home.define(qemu=({"name": ["foo", {"process": "qemu-system-foo"}]},), **SHIELDED)
    change = f"from qemu_launcher import absence; absence.container_of = lambda: {container!r}"
    run = home.start(argv=home.with_changed(change), env=bus.environment)
    what = "qemu-launcher: Process 1 is in no session or service of yours\n"
    assert_never_ran(run, message=f"{what}{hint}    start it without")


# Options that hold the guest back


def test_pause_and_tuning(home: Home) -> None:
    home.define(qemu=("S",), **TUNED)
    run = home.start()
    run.wait_line("paused, as you asked, 1 vCPU on")
    assert_tuned(run)
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "prelaunch"
    qmp("quit")
    assert run.end() == 0


def migrated(home: Home, place: Path) -> str:
    """The state of a VM of the same shape, in a file; the option that reads it."""
    home.define("source")
    run = home.start("source")
    run.wait_running()
    qmp = run.qmp()
    qmp("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    qmp("migrate", uri=f"exec:cat > {place}/state")
    while qmp.wait_event("MIGRATION")["data"]["status"] != "completed":
        qmp.events.clear()
    qmp("quit")
    assert run.end() == 0
    return f"exec:cat {place}/state"


@pytest.mark.parametrize(("option", "ends"), [((), "RESUME"), (("S",), "STOP")])
def test_incoming_guest_is_tuned_first_and_runs_when_it_has_come(
    home: Home, tmp_path: Path, option: tuple[str, ...], ends: str
) -> None:
    """Without -S of the user's own it runs by itself, as under QEMU alone; with it, it stays paused."""
    source = migrated(home, tmp_path)
    home.define(qemu=({"incoming": "defer"}, *option), **TUNED)
    run = home.start()
    run.wait_line("as you asked, 1 vCPU on")
    assert_tuned(run)
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "inmigrate"
    qmp("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    qmp("migrate-incoming", uri=source)
    while qmp.wait_event("MIGRATION")["data"]["status"] != "completed":
        qmp.events.remove(qmp.wait_event("MIGRATION"))
    if ends == "RESUME":
        qmp.wait_event("RESUME")
    assert qmp("query-status")["status"] == {"RESUME": "running", "STOP": "paused"}[ends]
    qmp("quit")
    assert run.end() == 0


def test_state_of_an_image_is_loaded_tuned_and_runs(home: Home, tmp_path: Path) -> None:
    image = tmp_path / "state, saved.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    drive = {"drive": [{"file": str(image)}, {"format": "qcow2"}, {"if": "virtio"}]}
    home.define(qemu=(drive,))
    run = home.start()
    run.wait_running()
    qmp = run.qmp()
    assert qmp("human-monitor-command", **{"command-line": "savevm then"}) == ""
    qmp("quit")
    assert run.end() == 0
    home.define(qemu=(drive, {"loadvm": "then"}), **TUNED)
    run = home.start()
    run.wait_running()
    assert_tuned(run)
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "running"
    qmp("quit")
    assert run.end() == 0


# A file with a comma in its name


def test_file_with_a_comma_wherever_a_file_may_be_named(home: Home, tmp_path: Path) -> None:
    """`name: value` doubles it as QEMU wants; what takes a file and nothing else wants it as it stands."""
    place = tmp_path / "a,b"
    (place / "x,y").mkdir(parents=True)
    names = ("drive", "hdb", "cdrom", "pflash", "loader", "kernel", "flat", "json")
    files = {name: place / f"{name},,{name}.img" for name in names}
    for file in files.values():
        file.write_bytes(b"\0" * 4096)
    json_form = json.dumps({"driver": "file", "node-name": "json", "filename": str(files["json"])})
    home.define(
        qemu=(
            {"drive": [{"file": str(files["drive"])}, {"format": "raw"}, {"if": "none"}, {"id": "d"}]},
            {"drive": f"file={str(files['flat']).replace(',', ',,')},format=raw,if=none,id=flat"},
            {"blockdev": json_form},
            {"hdb": str(files["hdb"])},
            {"cdrom": str(files["cdrom"])},
            {"device": ["loader", {"file": str(files["loader"])}, {"addr": "0x100000"}]},
            {"kernel": str(files["kernel"])},
            {"chardev": ["file", {"id": "c"}, {"path": f"{place}/c,d"}]},
            {"serial": f"file:{place}/e,f"},
            {"object": ["memory-backend-file", {"id": "m"}, {"size": "1M"}, {"mem-path": f"{place}/g,h"}]},
            {"fw_cfg": [{"name": "opt/x"}, {"file": str(files["loader"])}]},
            {"qmp": [f"unix:{place}/q".replace(",", ",,"), {"server": "on"}, {"wait": "off"}]},
            {"pidfile": f"{place}/i,j"},
        )
    )
    run = home.start()
    run.wait_running()
    qmp = run.qmp()
    block = {entry["device"]: entry["inserted"]["file"] for entry in qmp("query-block") if "inserted" in entry}
    assert block["d"] == str(files["drive"])
    assert block["flat"] == str(files["flat"])
    assert str(files["hdb"]) in block.values()
    assert str(files["cdrom"]) in block.values()
    assert [n["file"] for n in qmp("query-named-block-nodes") if n["node-name"] == "json"] == [str(files["json"])]
    qmp("quit")
    assert run.end() == 0
    assert {"c,d", "e,f"} <= {file.name for file in place.iterdir()}


def test_mixed_form_of_the_original_readme_is_passed_on_and_its_fault_is_told(home: Home) -> None:
    """It writes `- pc,` as an element, which no QEMU has ever taken: two commas are one in the text."""
    path = home.define()
    path.write_text("launcher: {binary: qemu-system-x86_64}\nqemu:\n- machine:\n  - pc,\n  - accel=tcg\n")
    assert home.ask("command", "vm-under-test").stdout == "qemu-system-x86_64 -machine pc,,accel=tcg\n"
    run = home.start()
    assert run.end() == 1
    assert f"warning: {path}:3:3: 'pc,' in -machine ends in a comma, and elements are joined with one:" in run.output
    assert "QEMU ended with exit status 1 before the guest ran" in run.output
