"""How findings are told, what they come to, and what is asked about programs, sessions and the installation."""

import errno
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qemu_launcher import absence, locate, procfs, record, runtime
from qemu_launcher.check import dryrun, finding, installation, premises, report, start, versions
from qemu_launcher.check.finding import Finding
from qemu_launcher.plan import thread_plan
from qemu_launcher.sizes import INFINITY
from unit.other_host import OtherHost, the_only, told
from unit.reading import launcher

FINDINGS = [
    Finding("ok", "kvm", "/dev/kvm is yours to use"),
    Finding("warning", "smt", "half a core", "pin\nwhole ones"),
    Finding("error", "a", "no", "install it"),
    Finding("error", "b", "no \x1b[31m", "install it"),
]


@pytest.mark.parametrize(
    ("version", "count"), [("239 (239-82.el8)", 1), ("248.3", 1), ("249 (249.11-0ubuntu3)", 0), ("257", 0)]
)
def test_a_systemd_that_cannot_start_the_helper_when_a_vm_ends(version: str, count: int) -> None:
    found = list(installation.old_systemd(f"Some Linux 8.10, systemd {version}"))
    assert [one.severity for one in found] == ["error"] * count


def test_no_systemd_is_no_old_one() -> None:
    assert list(installation.old_systemd("Devuan GNU/Linux 5, no systemd")) == []


def test_words_in_front_fixes_below(capfd: pytest.CaptureFixture[str]) -> None:
    report.show([("launcher", "1.0"), ("definition", "/x.yml")], FINDINGS, "win11 would not start")
    assert capfd.readouterr().out == (
        "launcher    1.0\n"
        "definition  /x.yml\n"
        "\n"
        "ok       /dev/kvm is yours to use\n"
        "warning  half a core\n"
        "         pin\n"
        "         whole ones\n"
        "error    no\n"
        "         install it\n"
        "error    no \\x1b[31m\n"
        "         (as above)\n"
        "\n"
        "win11 would not start\n"
    )


def test_json(capfd: pytest.CaptureFixture[str]) -> None:
    report.say_json({"vm": "win11", "would_start": False}, [("launcher", "1.0\udcff")], FINDINGS[:2])
    assert json.loads(capfd.readouterr().out) == {
        "vm": "win11",
        "would_start": False,
        "left_to_before_start": 0,
        "system": {"launcher": "1.0\\xff"},
        "findings": [
            {"severity": "ok", "about": "kvm", "text": "/dev/kvm is yours to use", "fix": None},
            {"severity": "warning", "about": "smt", "text": "half a core", "fix": "pin\nwhole ones"},
        ],
    }


def test_what_findings_come_to() -> None:
    assert finding.would_stop(FINDINGS)
    assert not finding.would_stop(FINDINGS[:2])
    assert finding.counted(FINDINGS) == "2 errors, 1 warning"
    assert finding.counted(FINDINGS[:1]) == ""
    twice = [Finding("error", "memlock", "not a member"), FINDINGS[0], Finding("error", "pinning", "not a member")]
    assert finding.without_repetitions(twice) == twice[:2]


MADE = Finding("note", "file a", "there is no a", "before_start may make it", may_come=True)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([FINDINGS[0]], "win11 would start"),
        (FINDINGS[:2], "win11 would start: 1 warning"),
        (FINDINGS, "win11 would not start: 2 errors, 1 warning"),
        ([MADE], "win11 would start, if before_start makes 1 file that is not there"),
        ([MADE, *FINDINGS[:2], MADE], "win11 would start, if before_start makes 2 files that are not there: 1 warning"),
        ([MADE, *FINDINGS], "win11 would not start: 2 errors, 1 warning"),
    ],
)
def test_verdict(found: list[Finding], words: str) -> None:
    assert start.verdict("win11", found) == words


@pytest.mark.parametrize(
    ("cgroup", "severity"),
    [
        ("/user.slice/user-1000.slice/session-2.scope", None),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope", None),
        ("/user.slice/user-0.slice/session-1.scope", "error"),
        ("/user.slice/user-10.slice/session-1.scope", "error"),
        ("/system.slice/win11.service", "warning"),
        ("/", "error"),
        ("", "error"),
    ],
)
def test_session(cgroup: str, severity: str | None) -> None:
    assert [one.severity for one in premises.session_of(cgroup, 1000)] == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("cgroup", "wrong"),
    [
        ("", False),
        ("/3", False),
        ("/c3", False),
        ("/rc.init", False),
        ("/rc.initial", True),
        ("/user.slice/user-1000.slice/session-2.scope", False),
        ("/user.slice/user-10.slice/session-2.scope", True),
        ("/openrc.sshd", True),
    ],
)
def test_session_without_systemd(cgroup: str, wrong: bool) -> None:
    found = list(premises.session_of(cgroup, 1000, systemd=False))
    assert [(one.severity, "pam_elogind.so" in (one.fix or "")) for one in found] == [("error", True)] * wrong


# The threads that QEMU would have


@pytest.mark.parametrize(
    ("keys", "smp", "tids"),
    [
        ("vcpu_pinning: [2, 3]", 2, [2, 3]),
        ("vcpu_pinning: {0: {0: {0: 2}, 1: {0: 3}}}", 2, [2, 3]),
        ("vcpu_pinning: [2]", 2, [2]),
        ("vcpu_pinning: {0: {0: {0: 2}}}", 2, [2]),
        ("vcpu_pinning: {0: {die 1: {0: {0: 2, 1: 3}}}}", 2, [2, 3]),
        ("vcpu_pinning: [2-3, 4]", 2, [2, 3]),
        ("vcpu_pinning: [2, 2]\nisolation: cpuset", 2, [2, 3]),
        ("", 3, []),
    ],
)
def test_imagined_threads(keys: str, smp: int, tids: list[int]) -> None:
    definition = launcher(f"{keys}\nscheduler: batch", f"[smp: {smp}]")
    wanted = thread_plan(*dryrun.imagined(definition))
    assert [pin.tid for pin in wanted.pins] == tids
    assert wanted.scheduled == tuple(range(2, 2 + smp)), "pinned or not"


def test_imagined_iothreads_have_numbers_of_their_own() -> None:
    keys = "vcpu_pinning: [2, 3]\niothread_pinning: {disk: 0}\nemulator_pinning: 1"
    definition = launcher(keys, "[smp: 2, object: 'iothread,id=disk']")
    wanted = thread_plan(*dryrun.imagined(definition))
    assert [(pin.tid, set(pin.cpus), pin.shielded) for pin in wanted.pins] == [
        (2, {2}, True),
        (3, {3}, True),
        (4, {0}, False),
    ]
    assert wanted.others == {1}


# Versions


def test_first_line() -> None:
    env = {"SAID": "QEMU emulator version 10\nmore"}
    said = versions.first_line([sys.executable, "-c", "import os; print(os.environ['SAID'])"], env, Path("/"))
    assert said == "QEMU emulator version 10"
    assert versions.first_line(["/nonexistent"], {}, Path("/")) is None
    assert versions.first_line(["true"], os.environ, Path("/nonexistent")) is None
    assert versions.first_line(["true"], os.environ, Path("/")) is None


def test_a_program_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_PATIENCE", 0.2)
    assert versions.first_line(["sleep", "600"], os.environ, Path("/")) is None
    began = time.monotonic()
    assert versions.first_line(["cat", "/dev/zero"], os.environ, Path("/")) is not None, "4 KiB of it are enough"
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Available display backend types:\nnone\ngtk\nsdl\n", "gtk"),
        ("Available display backend types:\nnone\nsdl\ncurses\n", "sdl"),
        ("Available display backend types:\nnone\n", None),
        ("", None),
    ],
)
def test_window_of_a_qemu(tmp_path: Path, said: str, kind: str | None) -> None:
    program = tmp_path / "qemu"
    program.write_text(f'#!/bin/sh\n[ "$*" = "-display help" ] && printf "%s" "{said}"\n')
    program.chmod(0o755)
    assert versions.default_window(str(program), os.environ, tmp_path) == kind


@pytest.mark.parametrize(
    ("program", "socket", "severity"),
    [("\x7fELF", "wayland-1", "error"), ("\x7fELF", "wayland-0", None), ("#!/bin/sh", "wayland-1", "warning")],
)
def test_window_that_may_open_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, socket: str, severity: str | None
) -> None:
    host = OtherHost(tmp_path)
    host.write("/usr/bin/qemu", program)
    host.write(f"/run/user/1000/{socket}")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setattr(versions, "default_window", lambda *_: "gtk")
    vm = start._Vm(launcher("", "[m: 1G]"), host.tree)
    assert list(vm._window()) == [], "there is no QEMU"
    vm._path = "/usr/bin/qemu"
    assert [one.severity for one in vm._window()] == ([severity] if severity else [])


def test_distribution(tmp_path: Path) -> None:
    host = OtherHost(tmp_path)
    assert versions.distribution(host.tree) == "unknown"
    host.write("/usr/lib/os-release", 'NAME=Debian\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n')
    assert versions.distribution(host.tree) == "Debian GNU/Linux 13 (trixie)"
    assert versions.systemd(host.tree) == "no systemd"


# The installation

FILES = (
    "/usr/share/dbus-1/system-services/org.qemulauncher.Helper1.service",
    "/usr/share/dbus-1/system.d/org.qemulauncher.Helper1.conf",
    "/usr/share/polkit-1/actions/org.qemulauncher.policy",
    "/usr/lib/systemd/system/qemu-launcher-helper.service",
)


def test_installed(tmp_path: Path) -> None:
    host = OtherHost(tmp_path)
    host.folder("/run/systemd/system")
    for path in FILES:
        host.write(path)
    assert the_only(list(installation.installed(host.tree)))[0] == "ok"
    for path in FILES:
        (host.root / path[1:]).unlink()
        severity, text, fix = the_only(list(installation.installed(host.tree)))
        assert severity == "error"
        assert text.startswith(
            f"qemu-launcher-helper is not installed, or not all of it: there is no {Path(path).name} ("
        )
        assert fix == absence.HOW_TO_INSTALL
        host.write(path)
    nothing = OtherHost(tmp_path / "nothing")
    assert the_only(list(installation.installed(nothing.tree)))[1] == "qemu-launcher-helper is not installed"


def test_not_installed_and_no_answer_are_one_thing() -> None:
    files = [Finding("error", "helper", "it is not installed", "install it")]
    no_bus = Finding("error", "helper", "there is no bus", "on the host:\ninstall it")
    whole = Finding("error", "helper", "it is not installed, and there is no bus", "on the host:\ninstall it")
    limits, said = Finding("ok", "limits", "many"), Finding("error", "helper", "it is not installed", "install it")
    assert installation.together(files, [no_bus, limits]) == [whole, limits]
    assert installation.together(files, [said]) == files
    for answers in ([limits], [no_bus._replace(fix="log in again")], []):
        assert installation.together(files, answers) == [*files, *answers]
    fine = [Finding("ok", "helper", "it is installed")]
    assert installation.together(fine, [no_bus]) == [*fine, no_bus]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ([], "tuned VMs can be started: 1 warning"),
        (["helper"], "VMs without tuning can be started, tuned ones can not: 1 error, 1 warning"),
        (["polkit", "definition"], "VMs without tuning can be started, tuned ones can not: 2 errors, 1 warning"),
        (["definition"], "tuned VMs can be started, but for definitions with mistakes: 1 error, 1 warning"),
        (["helper", "QEMU", "definition"], "no VM can be started: 3 errors, 1 warning"),
    ],
)
def test_what_an_installation_comes_to(broken: list[str], words: str) -> None:
    errors = [Finding("error", about, "x") for about in broken]
    others = [Finding("ok", "QEMU", "y"), Finding("warning", "QEMU", "z")]
    assert installation.verdict([*others, *errors]) == words


def test_cgroups(tmp_path: Path) -> None:
    host = OtherHost(tmp_path)
    host.write("/dev/kvm")

    def first() -> Finding:
        return next(installation.host_facts(host.tree, "alice"))

    assert (first().severity, first().text[:20]) == ("warning", "there are no cpusets")
    assert "mount -t cgroup2" in (first().fix or "")
    host.write("/sys/fs/cgroup/cgroup.controllers", "cpu memory\n")
    assert "without the cpuset controller" in first().text
    host.write("/proc/self/mountinfo", "40 31 0:33 / /run/cpuset rw - cgroup cpuset rw,cpuset\n")
    v1 = ("note", "cgroup", "cpusets are those of cgroup v1, in /run/cpuset")
    assert first()[:3] == v1
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").unlink()
    assert first()[:3] == v1
    host.write("/sys/fs/cgroup/unified/cgroup.controllers", "cpuset\n")
    assert first().severity == "ok"
    host.write("/run/systemd/system/x")
    assert first()[:3] == v1, "systemd uses no controller there"
    host.write("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu memory\n")
    assert first().severity == "ok"
    host.forbid("/dev/kvm")
    assert [one.severity for one in installation.host_facts(host.tree, "alice")] == ["ok", "warning"], "no VM needs it"


def test_qemus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = OtherHost(tmp_path)
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin")
    assert the_only(list(installation.qemus(host.tree)))[0] == "error"
    monkeypatch.setattr(versions, "qemu", lambda *_: "QEMU emulator version 10")
    host.write("/usr/local/bin/kvm")
    assert told(list(installation.qemus(host.tree))) == ["ok: /usr/local/bin/kvm: QEMU emulator version 10"]
    host.write(f"/usr/bin/qemu-system-{os.uname().machine}")
    host.write("/usr/bin/qemu-system-aaa")
    (tmp_path / "usr/bin/qemu-system-one-more").symlink_to("qemu-system-aaa")
    host.write("/usr/bin/qemu-img")
    expected = f"ok: /usr/bin/qemu-system-{os.uname().machine}: QEMU emulator version 10, and 2 more"
    assert told(list(installation.qemus(host.tree))) == [expected]


def test_definitions(tmp_path: Path) -> None:
    environ = {"QEMU_LAUNCHER_CONFIG_DIR": str(tmp_path)}
    assert the_only(list(installation.definitions(environ)))[0] == "note"
    (tmp_path / "good.yml").write_text("launcher: {binary: q}\nqemu: []\n")
    (tmp_path / "bad.yml").write_text("launcher: {binari: q}\nqemu: [{a: b, c: d}]\n")
    (tmp_path / "preconfig.yml").write_text("launcher: {binary: q, scheduler: batch}\nqemu: [preconfig]\n")
    (tmp_path / "lost.yml").symlink_to("nowhere")
    (tmp_path / "my vm.yml").write_text("launcher: {binary: q}\nqemu: []\n")
    (tmp_path / "x.yaml").write_text("launcher: {binary: q}\nqemu: []\n")
    found = list(installation.definitions(environ))
    assert [one.severity for one in found] == ["error"] * 5 + ["ok"]
    bad, lost, misnamed, preconfig, suffix, good = (one.text for one in found)
    assert bad.startswith(f"{tmp_path}/bad.yml:1:")
    assert bad.endswith("more)")
    assert lost == f"cannot read {tmp_path}/lost.yml: No such file or directory"
    assert misnamed == f"{tmp_path}/my vm.yml: 'my vm' is no name for a VM"
    assert preconfig.startswith(f"{tmp_path}/preconfig.yml:2:8: -preconfig stops QEMU")
    assert suffix == f"{tmp_path}/x.yaml is not called x.yml"
    assert good == f"1 definition in {tmp_path} can be read"


def test_definitions_that_are_not_used_break_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`list` shows their mistakes too. A folder that cannot be read is told as `list` tells it."""
    folders = [tmp_path / name for name in ("own", "system", "closed")]
    for folder, more in zip(folders, ("", ", colour: red", ""), strict=True):
        folder.mkdir()
        (folder / "a.yml").write_text(f"launcher: {{binary: q{more}}}\nqemu: []\n")
    monkeypatch.setattr(locate, "folders", lambda _: tuple(folders[:2]))
    shadowed, good = installation.definitions({})
    assert shadowed.severity == "note"
    assert shadowed.text.startswith(f"{tmp_path}/system/a.yml:1:23: unknown key in launcher: 'colour'")
    assert shadowed.text.endswith(f"; it is not used: {tmp_path}/own/a.yml comes first")
    assert good.text.startswith("1 definition in ")
    monkeypatch.setattr(locate, "located", lambda _: ([], [(folders[2], "Permission denied")]))
    assert told([next(installation.definitions({}))]) == [f"warning: cannot read {tmp_path}/closed: Permission denied"]


IOMMUFD = "[m: 4G, device: [vfio-pci, host: '01:00.0', iommufd: io]]"


def tuning(host: OtherHost, keys: str, qemu: str, *, runs: bool = False) -> list[Finding]:
    return [one for one in start._Vm(launcher(keys, qemu), host.tree)._tuning(runs=runs) if one.severity == "warning"]


def test_other_vms_with_iommufd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are looked at where the limit is the kernel's to compare, and only then."""
    host = OtherHost(tmp_path)
    host.write("/proc/70/cmdline", "qemu\0-object\0iommufd,id=io\0")
    host.write("/proc/70/status", "VmPin:\t2097152 kB\n")
    process = procfs.Process.of(os.getpid())
    assert process is not None
    others = [
        runtime.Found(name, record.Record(qemu=replace(process, pid=pid)), None)
        for name, pid in (("win11", 70), ("linux", 70))
    ]
    monkeypatch.setattr(procfs.Process, "is_alive", lambda _: True)
    monkeypatch.setattr(runtime, "find_all", lambda: others)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(procfs, "own_memlock_limit", lambda: (1 << 23, 40 << 30))
    [one] = tuning(host, "rlimit_memlock: 5G", IOMMUFD)
    assert "linux has pinned 2 GiB, this guest's RAM is 4 GiB, and QEMU may lock 5 GiB" in one.text
    assert "QEMU may lock 8 MiB" in tuning(host, "rlimit_memlock: false", IOMMUFD)[0].text
    assert tuning(host, "rlimit_memlock: 7G", IOMMUFD) == []
    assert tuning(host, "rlimit_memlock: 5G", IOMMUFD, runs=True) == []
    assert tuning(host, "rlimit_memlock: 5G", IOMMUFD.replace("iommufd", "bus")) == []
    monkeypatch.setattr(procfs, "own_memlock_limit", lambda: (INFINITY, INFINITY))
    assert tuning(host, "rlimit_memlock: true", IOMMUFD) == []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert tuning(host, "rlimit_memlock: 5G", IOMMUFD) == [], "CAP_IPC_LOCK"


@pytest.mark.parametrize(
    ("keys", "severities"),
    [
        ("", []),
        ("rlimit_memlock: 5G", ["error"]),
        ("rlimit_memlock: 5G\non_tuning_failure: continue", ["warning"]),
    ],
)
def test_c_library_without_scheduler_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: str, severities: list[str]
) -> None:
    """Whoever needs the helper needs them: musl's say ENOSYS."""

    def none(_: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "sched_getscheduler", none)
    vm = start._Vm(launcher(keys, "[m: 1G]"), OtherHost(tmp_path).tree)
    found = [one for one in vm._tuning(runs=True) if one.about == "libc"]
    assert [one.severity for one in found] == severities
