"""`check` for real: a fake helper on a real bus, the QEMU that is installed, this machine's own /sys.

What it must never do: start QEMU for its guest, change anything, ask anybody.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import Home
from qemu.private_bus import PrivateBus
from qemu.test_tuning import CPU, SHIELDED, needs_two_cpus
from qemu_launcher import cli
from qemu_launcher.check import versions

ERROR = "org.qemulauncher.Error"
MEMLOCK = "40G"  # more than any machine of ours lets an ordinary login lock
VM = "vm-under-test"
QEMU = "/usr/bin/qemu-system-x86_64"
IN_SESSION = (
    "from qemu_launcher.check import premises\n"
    "premises.session_of = lambda *_: ()\n"
    "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))"
)


def check(home: Home, bus: PrivateBus | None, *words: str, env: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """Exit status and lines of `check`, as in a session of the user's own."""
    done = home.ask(
        "check", *(words or (VM,)), env={**(bus.environment if bus else {}), **(env or {})}, change=IN_SESSION
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def findings(lines: list[str]) -> list[str]:
    """`error what`, without ok, without fixes."""
    words = [line.split(None, 1) for line in lines if line.startswith(("note", "warning", "error"))]
    return [f"{word[0]}: {word[1]}" for word in words]


def asked(bus: PrivateBus) -> list[tuple[str, list[Any], int]]:
    return [(call["member"], call["body"], call["flags"] & 4) for call in bus.calls()]


def test_vm_that_needs_nothing(home: Home, bus: PrivateBus) -> None:
    home.define()
    status, lines = check(home, bus)
    assert status == 0
    assert lines[-1] == f"{VM} would start"
    assert findings(lines) == ["note: the definition asks for no tuning: it needs no helper"]
    assert bus.calls() == []
    assert not (home.runtime / "qemu-launcher").exists(), "nothing was made"


def test_head_of_a_bug_report(home: Home, bus: PrivateBus) -> None:
    home.define(vcpu_pinning=[CPU])
    _, lines = check(home, bus)
    head = dict(line.split(None, 1) for line in lines[: lines.index("")])
    assert list(head) == ["launcher", "helper", "shielding", "QEMU", "kernel", "system", "user", "definition"]
    assert (head["launcher"], head["helper"]) == ("0.1.0", "0.1.0")
    assert head["shielding"] == "partition: The kernel has remote cpuset partitions"
    assert head["QEMU"].startswith("QEMU emulator version ")
    assert head["QEMU"].endswith("/qemu-system-x86_64")
    assert head["kernel"].startswith(f"Linux {os.uname().release} ")
    assert head["definition"] == str(home.configuration / f"{VM}.yml")


def test_threads_without_a_pin_are_where_we_are(home: Home, bus: PrivateBus) -> None:
    """The helper then refuses real time, or has an administrator's leave for it anywhere: both are its to say."""
    home.define(vcpu_pinning=[CPU], scheduler="rr", qemu=({"smp": 2},), emulator_scheduler="fifo")
    check(home, bus)
    everywhere = sorted(os.sched_getaffinity(0))
    assert [call[1] for call in asked(bus)[-2:]] == [
        [VM, [[2, [CPU], True], [3, everywhere, False]], "rr", 1],
        [VM, [[2, everywhere, False]], "fifo", 1],
    ]


@needs_two_cpus
def test_everything_is_asked_and_nothing_done(home: Home, bus: PrivateBus) -> None:
    home.define(**{**SHIELDED, "rlimit_memlock": MEMLOCK, "scheduler": "fifo", "priority": 3})
    bus.plan(CheckMemlock={"return": 40 << 30})
    status, lines = check(home, bus, env={"DISPLAY": ":0"})
    assert status == 0, lines
    assert asked(bus) == [
        ("GetLimits", [], 0),
        ("CheckMemlock", [VM, 40 << 30], 0),
        ("CheckPins", [VM, [[2, [CPU], True]], []], 0),
        ("CheckScheduler", [VM, [[2, [CPU], True]], "fifo", 3], 0),
    ], "and nobody would have been asked, though a desktop is there"
    assert "ok       the helper would pin and shield 1 thread as wanted" in lines
    assert "ok       the helper would set policy fifo, priority 3" in lines
    assert "ok       the helper would let QEMU lock 40 GiB" in lines


@pytest.mark.parametrize(
    ("plan", "line", "fix"),
    [
        (
            {"CheckPins": {"error": [f"{ERROR}.LimitExceeded", "CPUs 1 are not among your 4-7 (helper.toml)"]}},
            "error    CPUs 1 are not among your 4-7 (helper.toml)",
            "qemu-launcher limits shows what you may have",
        ),
        (
            {"CheckPins": {"error": [f"{ERROR}.Conflict", "CPUs 1 are held by VM x of bob; free for you: 2-3"]}},
            "error    CPUs 1 are held by VM x of bob; free for you: 2-3",
            "",
        ),
        (
            {"CheckScheduler": {"error": [f"{ERROR}.LimitExceeded", "Priority 3 is above yours, 1"]}},
            "error    Priority 3 is above yours, 1",
            "qemu-launcher limits",
        ),
        (
            {"CheckMemlock": {"return": 1 << 30}},
            "error    QEMU must be able to lock 40 GiB, but only 1 GiB was granted",
            "give the guest less memory, or ask the administrator",
        ),
        (
            {"CheckPins": {"error": ["org.freedesktop.DBus.Error.UnknownMethod", "no such method"]}},
            "warning  qemu-launcher-helper 0.1.0 cannot say whether it would pin threads",
            "install launcher and helper from one package",
        ),
        (
            {"CheckPins": {"return": 7, "signature": "t"}},
            "error    qemu-launcher-helper answered CheckPins with something that the contract does not know",
            "launcher and helper may be of different versions",
        ),
    ],
)
def test_refusals(home: Home, bus: PrivateBus, plan: dict[str, Any], line: str, fix: str) -> None:
    home.define(vcpu_pinning=[CPU], rlimit_memlock=MEMLOCK, scheduler="fifo", priority=3)
    bus.plan(**{"CheckMemlock": {"return": 40 << 30}, **plan})
    status, lines = check(home, bus)
    place = lines.index(line)
    assert lines[place + 1].strip().startswith(fix)
    assert status == (2 if line.startswith("error") else 0)
    assert lines[-1].startswith(f"{VM} would {'not ' if status else ''}start: 1 ")


@pytest.mark.parametrize("times", [1, 2])
def test_helper_that_takes_longer_to_start_than_the_bus_waits(home: Home, bus: PrivateBus, times: int) -> None:
    """As where many VMs start at once, with the host: it is asked once more, and then no more."""
    home.define(vcpu_pinning=[CPU], isolation="cpuset")
    late = {"error": ["org.freedesktop.DBus.Error.TimedOut", "Failed to activate service 'x': timed out"]}
    bus.plan(CheckPins=[late] * times + ["act"])
    status, lines = check(home, bus)
    assert [call[0] for call in asked(bus)] == ["GetLimits", "CheckPins", "CheckPins"]
    assert status == (0 if times == 1 else 2)
    assert [line for line in lines if line.startswith("error")] == (
        [] if times == 1 else ["error    Failed to activate service 'x': timed out"]
    )


@needs_two_cpus
def test_more_than_fits_into_a_message(home: Home, bus: PrivateBus) -> None:
    """The helper reads nothing so large, and answers nothing: who asked would wait for a minute."""
    cpus = sorted(os.sched_getaffinity(0))
    count = 24 * 1024 // (16 + 4 * len(cpus)) + 1
    home.define(vcpu_pinning=[cpus] * count, isolation="cpuset", qemu=({"smp": count},))
    status, lines = check(home, bus)
    assert status == 2
    [error] = [line for line in lines if line.startswith("error")]
    assert re.fullmatch(r"error +CheckPins would be a message of \d+ KiB, and .* reads no more than 24 KiB: .*", error)
    assert lines[lines.index(error) + 1].strip().startswith("give each vCPU fewer host CPUs")
    assert [call[0] for call in asked(bus)] == ["GetLimits"]


def test_with_continue_what_cannot_be_tuned_is_a_warning(home: Home, bus: PrivateBus) -> None:
    home.define(vcpu_pinning=[CPU], on_tuning_failure="continue")
    bus.plan(CheckPins={"error": [f"{ERROR}.LimitExceeded", "Your VMs would hold 4 CPUs, and may hold 2"]})
    status, lines = check(home, bus)
    assert status == 0
    assert "warning: Your VMs would hold 4 CPUs, and may hold 2" in findings(lines)


@pytest.mark.parametrize("desktop", [True, False])
def test_password(home: Home, bus: PrivateBus, desktop: bool) -> None:
    home.define(vcpu_pinning=[CPU])
    text = "polkit does not allow org.qemulauncher.pin-threads to alice in this session without a password"
    bus.plan(CheckPins={"error": [f"{ERROR}.NotAuthorized", text]})
    status, lines = check(home, bus, env={"DISPLAY": ":0"} if desktop else {})
    assert status == (0 if desktop else 2)
    if desktop:
        assert "note: a start will ask for a password to pin threads" in findings(lines)
    else:
        assert "error: polkit wants a password to pin threads, and nobody is there who could be asked" in findings(
            lines
        )


def test_no_bus(home: Home) -> None:
    home.define(vcpu_pinning=[CPU])
    status, lines = check(home, None)
    assert status == 2
    assert any(line.startswith("error    there is no system bus at ") for line in lines)
    assert "helper      gives no answer" in lines


def test_helper_that_dies_is_not_asked_again(home: Home, bus: PrivateBus) -> None:
    home.define(vcpu_pinning=[CPU], scheduler="fifo", rlimit_memlock=MEMLOCK)
    bus.plan(GetLimits="die", CheckMemlock="die", CheckPins="die")
    status, lines = check(home, bus)
    assert status == 2
    assert bus.members() == ["GetLimits"]
    assert any("ended without an answer" in line for line in lines)


def test_definition_errors_are_those_of_run(home: Home, bus: PrivateBus) -> None:
    path = home.define(vcpu_pinning=["x"], schedular="fifo")
    checked = home.ask("check", VM, env=bus.environment)
    run = home.ask("run", VM, env=bus.environment)
    assert (checked.returncode, checked.stdout) == (2, "")
    assert checked.stderr == run.stderr
    assert f"{path}:" in checked.stderr
    assert checked.stderr.count(f"qemu-launcher: {path}:") == 2
    assert bus.calls() == []


def test_several_things_at_once(home: Home, bus: PrivateBus, tmp_path: Path) -> None:
    """One run names them all: the user repairs them in one go."""
    definition = (
        {"drive": [{"file": str(tmp_path / "gone.qcow2")}, {"if": "virtio"}]},
        {"device": ["vfio-pci", {"host": "ff:1f.7"}]},
        {"device": ["vfio-pci", {"host": "1:00"}]},
        {"object": ["input-linux", {"id": "k"}, {"evdev": "/dev/input/by-id/none-event-kbd"}]},
        {"object": ["memory-backend-memfd", {"id": "r"}, {"size": "1T"}, {"hugetlb": "on"}]},
    )
    home.define(vcpu_pinning=[8191], qemu=definition, clear_env=True)
    status, lines = check(home, bus)
    assert status == 2
    text = "\n".join(findings(lines))
    for part in (
        "gone.qcow2",
        "0000:ff:1f.7",
        "'1:00' is no PCI address",
        "none-event-kbd",
        "huge page",
        "no host CPU 8191",
    ):
        assert part in text
    assert bus.members()[0] == "GetLimits"


@pytest.mark.parametrize(
    ("binary", "text"),
    [
        ("qemu-system-none", "is in no folder of PATH"),
        ("./qemu", "cannot start './qemu': it is not there, or not yours to execute"),
        ("~/qemu", "~ and $HOME are the shell's; write the whole path"),
    ],
)
def test_no_binary(home: Home, bus: PrivateBus, binary: str, text: str) -> None:
    home.define(binary=binary)
    status, lines = check(home, bus)
    assert status == 2
    assert any(text in line for line in lines)
    assert "QEMU        not found" in lines


def test_directory_of_the_name_of_a_binary_is_none(home: Home, bus: PrivateBus, tmp_path: Path) -> None:
    """A start says the same as a check."""
    (tmp_path / "here/qemu-system-here").mkdir(parents=True)
    home.define(binary="qemu-system-here", env={"PATH": f"{tmp_path}/here"})
    text = f"cannot start 'qemu-system-here': it is in no folder of PATH ({tmp_path}/here)"
    _, lines = check(home, bus)
    assert any(text in line for line in lines)
    run = home.start()
    assert run.end() == 2
    assert text in run.output


def test_binary_below_a_folder_of_path_that_is_relative(home: Home, bus: PrivateBus, tmp_path: Path) -> None:
    """To where QEMU will run, which a check of it and a start know of."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/qemu-system-here").symlink_to(shutil.which("qemu-system-x86_64") or "")
    home.define(binary="qemu-system-here", env={"PATH": "bin"}, working_directory=str(tmp_path))
    _, lines = check(home, bus)
    assert any(f"{tmp_path}/bin/qemu-system-here" in line for line in lines), lines
    home.start().wait_running()


def test_path_for_a_shell(home: Home, bus: PrivateBus) -> None:
    """Nor can before_start have made it: it will not make a folder of that name."""
    home.define(working_directory="~/vms", before_start=[["true"]], qemu=({"hda": "$HOME/disk.img"},))
    status, lines = check(home, bus)
    assert status == 2
    hint = "         ~ and $HOME are the shell's; write the whole path"
    assert lines[lines.index(hint) - 1].endswith("~/vms (working_directory)")
    assert any(line.startswith("error ") and "$HOME/disk.img" in line for line in lines)


def test_binary_that_is_no_qemu(home: Home, bus: PrivateBus) -> None:
    home.define(binary="/bin/true")
    status, lines = check(home, bus)
    assert status == 0
    assert "warning: /bin/true does not tell its version as a QEMU does" in findings(lines)


def test_display_of_qemus_own_choice(home: Home, bus: PrivateBus) -> None:
    """What check says of it is what a start comes to."""
    path = home.define()
    path.write_text(path.read_text().replace("- display: none\n", ""))
    window = versions.default_window(QEMU, {}, home.configuration)
    status, lines = check(home, bus, env={"DISPLAY": "", "WAYLAND_DISPLAY": ""})
    errors = [line for line in lines if line.startswith("error")]
    assert [line.partition(", needs ")[0] for line in errors] == [
        f"error    no option names a display, and QEMU's own choice, {window}"
    ] * (window is not None)
    assert status == (2 if window else 0)
    if window:
        done = home.ask("run", VM, env={"DISPLAY": "", "WAYLAND_DISPLAY": ""})
        assert done.returncode != 0
        assert re.search("gtk initialization failed|[Cc]ould not initialize SDL", done.stderr)


def test_running_already(home: Home, bus: PrivateBus) -> None:
    home.define(scheduler="batch")
    run = home.start(env=bus.environment)
    run.wait_running()
    status, lines = check(home, bus)
    assert status == 2
    assert f"error: {VM} is already running (PID {run.qemu_pid}); what it holds is not looked at" in findings(lines)
    assert home.ask("status", VM).returncode == 0


def test_what_is_made_before_the_start_may_be_missing(home: Home, bus: PrivateBus, tmp_path: Path) -> None:
    home.define(qemu=({"hda": "gone.img"},), before_start=[["touch", str(tmp_path / "made")]])
    status, lines = check(home, bus)
    assert status == 0
    assert any(line.startswith("note     there is no ") and "gone.img" in line for line in lines)
    assert lines[-1] == f"{VM} would start, if before_start makes 1 file that is not there"
    assert json.loads("\n".join(check(home, bus, "--json", VM)[1]))["left_to_before_start"] == 1
    assert not (tmp_path / "made").exists(), "it is not executed"


@pytest.mark.skipif(os.geteuid() != 0, reason="optional: only root can become somebody")
def test_for_another_user_it_is_his_access_that_counts(home: Home, bus: PrivateBus) -> None:
    image = home.configuration / "mine.img"
    image.touch(0o600)
    home.configuration.chmod(0o755)
    home.define(user="nobody", qemu=({"hda": str(image)},))
    status, lines = check(home, bus)
    assert status == 2
    assert any(line.startswith("user        nobody (") for line in lines)
    assert any(line.startswith("error ") and "mine.img" in line for line in lines)


def test_as_json(home: Home, bus: PrivateBus) -> None:
    home.define(vcpu_pinning=[CPU])
    bus.plan(CheckPins={"error": [f"{ERROR}.Conflict", "CPUs 1 are held by VM x of bob"]})
    done = home.ask("check", "--json", VM, env=bus.environment, change=IN_SESSION)
    said = json.loads(done.stdout)
    assert (done.returncode, said["vm"], said["would_start"]) == (2, VM, False)
    assert said["system"]["helper"] == "0.1.0"
    [error] = [one for one in said["findings"] if one["severity"] == "error"]
    assert error == {"severity": "error", "about": "pinning", "text": "CPUs 1 are held by VM x of bob", "fix": None}


@pytest.mark.parametrize(
    ("launcher", "texts"),
    [
        ({"vcpu_pinning": ["x"], "schedular": "fifo"}, ["4:5: the host CPU of vCPU 0", "5:3: unknown key"]),
        ({"scheduler": "batch"}, ["10:3: -preconfig stops QEMU before"]),
    ],
)
def test_mistakes_as_json(home: Home, launcher: dict[str, Any], texts: list[str]) -> None:
    """Where people read stderr, programs get their object all the same, and nothing beside it."""
    path = home.define(qemu=("preconfig",), **launcher)
    done = home.ask("check", "--json", str(path))
    said = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (2, "")
    assert (said["vm"], said["would_start"], said["system"]["launcher"]) == (VM, False, cli.VERSION)
    assert len(said["findings"]) == len(texts)
    for one, text in zip(said["findings"], texts, strict=True):
        assert set(one) == {"severity", "about", "text", "fix"}
        assert (one["severity"], one["about"]) == ("error", "definition")
        assert one["text"].startswith(f"{path}:{text}")


@pytest.mark.parametrize("name", ["no-such-vm", "no name", "./no-such-file.yml"])
def test_no_definition_as_json(home: Home, name: str) -> None:
    done = home.ask("check", "--json", name)
    said = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (2, "")
    assert (said["vm"], said["would_start"]) == (name.removeprefix("./").removesuffix(".yml"), False)
    [one] = said["findings"]
    by_run = home.ask("run", name)
    assert by_run.stderr.startswith(f"qemu-launcher: {one['text']}\n")


# Without a name


def installation(home: Home, bus: PrivateBus | None, *words: str) -> tuple[int, list[str]]:
    change = "from qemu_launcher.check import installation; installation.installed = lambda _: ()"
    done = home.ask("check", *words, env=bus.environment if bus else {}, change=change)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_installation(home: Home, bus: PrivateBus) -> None:
    home.define()
    status, lines = installation(home, bus)
    assert status == 0, lines
    assert bus.members() == ["GetLimits", "CheckMemlock", "CheckPins", "CheckScheduler"]
    assert {call["flags"] & 4 for call in bus.calls()} == {0}
    assert any(
        line.startswith("ok       you may have: CPUs 0-15, at most 16; 8 VMs; 28 GiB locked; ") for line in lines
    )
    assert "ok       polkit lets you lock memory, pin threads and set policies, without a password" in lines
    assert any("qemu-system-x86_64: QEMU emulator version" in line for line in lines)
    assert f"ok       1 definition in {home.configuration} can be read" in lines
    assert lines[-1].startswith("tuned VMs can be started")


def test_installation_without_a_bus(home: Home) -> None:
    status, lines = installation(home, None)
    assert status == 2
    assert any(line.startswith("error    there is no system bus at ") for line in lines)
    assert lines[-1].startswith("VMs without tuning can be started, tuned ones can not: 1 error")


@pytest.mark.parametrize("members", [("CheckPins",), ("CheckPins", "CheckMemlock", "CheckScheduler")])
def test_installation_whose_policy_says_no(home: Home, bus: PrivateBus, members: tuple[str, ...]) -> None:
    """A rule may say yes to other CPUs, and other VMs; three times no is no access."""
    no = {"error": [f"{ERROR}.NotAuthorized", "polkit does not allow org.qemulauncher.pin-threads to alice"]}
    bus.plan(**dict.fromkeys(members, no))
    assert installation(home, bus)[0] == (2 if len(members) == 3 else 0)


def test_installation_where_limits_refuse_what_polkit_allows(home: Home, bus: PrivateBus) -> None:
    no = {"error": [f"{ERROR}.LimitExceeded", "You have 8 VMs, and may have 8"]}
    bus.plan(CheckPins=no, CheckMemlock=no)
    status, lines = installation(home, bus)
    assert status == 0
    assert not any("You have 8 VMs" in line for line in lines)


def test_installation_of_two_versions(home: Home, bus: PrivateBus) -> None:
    bus.plan(
        GetLimits={"return": {"version": ["s", "9.9"], "mechanism": ["s", "none"], "reason": ["s", "No cgroup v2"]}}
    )
    status, lines = installation(home, bus)
    assert status == 0
    assert "warning: the helper is 9.9, and the launcher 0.1.0" in findings(lines)
    assert "warning: no CPUs can be shielded on this host: No cgroup v2" in findings(lines)


def test_installation_with_a_broken_definition(home: Home, bus: PrivateBus) -> None:
    home.define(schedular="fifo")
    status, lines = installation(home, bus, "--json")
    assert status == 2
    said = json.loads("\n".join(lines))
    [error] = [one for one in said["findings"] if one["severity"] == "error"]
    assert error["about"] == "definition"
    assert error["text"].startswith(f"{home.configuration}/{VM}.yml:")
