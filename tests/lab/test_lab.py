"""The lab's own parts, without booting it."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import accelerator, booting, image, mirror, slots, snapshot
from lab.errors import CommandFailed, CommandTimeout, LabDied, LabError, MissingTool
from lab.image import Image, check_tools
from lab.recipe import LAB_FOLDER, RECIPES, TRIXIE, Machine, Recipe, cache_folder
from lab.vm import STATE, Vm, console_tail, start_time

TARGETS = """\
Other||main|stable|https://packages.example.org/apt/
Debian|Debian-Security|main|bookworm-security|http://one.example.org/debian-security/
Debian|Debian|contrib|bookworm|http://wrong.example.org/debian/
Debian|Debian|main|bookworm|http://one.example.org/debian/
Debian|Debian|main|bookworm-updates|http://one.example.org/debian/
Debian|Debian|main|trixie|http://two.example.org/debian/
"""


@pytest.fixture
def ingredients(tmp_path: Path) -> Path:
    for name in TRIXIE.ingredients:
        source = LAB_FOLDER / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def test_ingredients_exist() -> None:
    found = [name for recipe in RECIPES.values() for name in recipe.ingredients if not (LAB_FOLDER / name).exists()]
    assert found == []


def test_digest_is_that_of_the_content(ingredients: Path) -> None:
    assert TRIXIE.digest(ingredients) == TRIXIE.digest()
    (ingredients / "README").write_text("no ingredient")
    assert TRIXIE.digest(ingredients) == TRIXIE.digest()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "customise").write_text("#!/bin/sh\n"),
        lambda folder: (folder / "customise").chmod(0o644),
        lambda folder: (folder / "customise-systemd").write_text("#\n"),
        lambda folder: (folder / "files-systemd/etc/motd").write_text(""),
        lambda folder: (folder / "files/etc/motd").write_text(""),
        lambda folder: (folder / "files/etc/hosts").rename(folder / "files/etc/hosts.old"),
    ],
)
def test_digest_changes_with_an_ingredient(ingredients: Path, change: Callable[[Path], object]) -> None:
    before = TRIXIE.digest(ingredients)
    change(ingredients)
    assert TRIXIE.digest(ingredients) != before


def test_digest_changes_with_each_field() -> None:
    others = [
        Recipe(name="x"),
        Recipe(suite="bookworm"),
        Recipe(init="openrc"),
        Recipe(packages=("systemd",)),
        Recipe(users=("dave",)),
        Recipe(size_mib=1),
    ]
    assert len(others) == len(dataclasses.fields(Recipe))
    assert len({recipe.digest() for recipe in [*others, TRIXIE]}) == len(others) + 1


def test_an_image_is_built_once_and_anew_when_its_recipe_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of what no recipe names any more, one is kept: another checkout's."""
    built: list[str] = []

    def build(recipe: Recipe, folder: Path) -> None:
        built.append(folder.name)
        folder.mkdir()
        os.utime(folder, (len(built), len(built)))

    monkeypatch.setattr(image, "_build", build)
    recipes = [Recipe(size_mib=size) for size in (100, 200, 300)]
    for recipe in [recipes[0], recipes[0], *recipes]:
        assert image.ensure(recipe, tmp_path).folder.is_dir()
    names = [f"trixie-{recipe.digest()}" for recipe in recipes]
    assert built == names
    assert {path.name for path in (tmp_path / "images").iterdir()} == {names[0], names[2]}


def test_cache_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QEMU_LAUNCHER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "qemu-launcher/lab"
    monkeypatch.setenv("QEMU_LAUNCHER_CACHE", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other/lab"


def test_mirror_of_a_configured_suite() -> None:
    assert mirror.mirror_for("trixie", TARGETS) == "http://two.example.org/debian/"


def test_mirror_of_another_suite_is_the_same_site() -> None:
    assert mirror.mirror_for("forky", TARGETS) == "http://one.example.org/debian/"


@pytest.mark.parametrize("targets", ["", "Debian|Debian|main\n", TARGETS.splitlines()[0], TARGETS.splitlines()[1]])
def test_no_mirror_is_an_error(targets: str) -> None:
    with pytest.raises(LabError, match="no Debian mirror"):
        mirror.mirror_for("trixie", targets)


def test_missing_tool_says_its_package() -> None:
    with pytest.raises(MissingTool, match="apt-get install the-package"):
        check_tools({"a-program-nobody-has": "the-package"})


@pytest.mark.parametrize("text", ["0", "17", "-1", "two", "", "1.5", "²"])
def test_slot_count_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(slots.VARIABLE, text)
    with pytest.raises(LabError, match=slots.VARIABLE):
        slots.slot_count()


def test_slot_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(slots.VARIABLE, raising=False)
    assert slots.slot_count() == 1
    monkeypatch.setenv(slots.VARIABLE, "16")
    assert slots.slot_count() == 16


def test_slot_is_held_as_long_as_a_child_lives(tmp_path: Path) -> None:
    slot = slots.take(tmp_path, "mine", 1)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=(slot,)) as child:
        os.close(slot)
        assert slots.try_lock(tmp_path / "slot-0") is None
        assert (tmp_path / "slot-0").read_text() == "mine"
        child.communicate()
    again = slots.try_lock(tmp_path / "slot-0")
    assert again is not None
    os.close(again)


def test_slot_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(slots, "say", said.put)
    monkeypatch.setattr(slots, "POLL_SECONDS", 0.01)
    first, second = slots.take(tmp_path, "one", 2), slots.take(tmp_path, "two", 2)
    third: list[int] = []
    waiting = threading.Thread(target=lambda: third.append(slots.take(tmp_path, "three", 2)))
    waiting.start()
    assert "2 in use by: one, two" in said.get(timeout=60)
    assert third == []
    os.close(second)
    waiting.join()
    assert (tmp_path / "slot-1").read_text() == "three"
    assert said.empty()  # it says so once
    os.close(first)
    os.close(third[0])


def picture(folder: Path) -> Image:
    return Image(folder)


def test_qemu_has_no_way_out_of_the_lab(tmp_path: Path) -> None:
    arguments = booting.qemu_arguments(picture(tmp_path), Machine(), accelerator.TCG)
    (network,) = [value for value in arguments if value.startswith("user,")]
    assert network.split(",")[2:] == ["restrict=on", "hostfwd=tcp:127.0.0.1:0-:22"]


def test_kernel_arguments_come_last(tmp_path: Path) -> None:
    machine = Machine(kernel_arguments=("quiet", "systemd.unified_cgroup_hierarchy=0"))
    arguments = booting.qemu_arguments(picture(tmp_path), machine, accelerator.TCG)
    assert arguments[arguments.index("-append") + 1].endswith(" quiet systemd.unified_cgroup_hierarchy=0")


def test_only_the_plain_machine_starts_from_a_booted_state() -> None:
    assert Machine().resumable
    assert Machine(memory_mib=4096).resumable
    assert not Machine(fresh=True).resumable
    assert not Machine(kernel_arguments=("quiet",)).resumable


def test_booted_state_is_named_after_the_command_line(tmp_path: Path) -> None:
    fake = tmp_path / "qemu"
    fake.write_text("#!/bin/sh\necho version 1\n")
    fake.chmod(0o755)
    one = snapshot.snapshot_of(picture(tmp_path), [str(fake), "-m", "3072M"])
    assert one == snapshot.snapshot_of(picture(tmp_path), [str(fake), "-m", "3072M"])
    assert one != snapshot.snapshot_of(picture(tmp_path), [str(fake), "-m", "4096M"])
    fake.write_text("#!/bin/sh\necho version 2\n")
    assert one != snapshot.snapshot_of(picture(tmp_path), [str(fake), "-m", "3072M"])


@pytest.mark.parametrize(("works", "expected"), [(True, accelerator.KVM), (False, accelerator.TCG)])
def test_kvm_is_tried_once_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool, expected: str) -> None:
    tried: list[Image] = []

    def kvm_boots(image: Image) -> bool:
        tried.append(image)
        return works

    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr(accelerator, "kvm_boots", kvm_boots)
    assert [accelerator.choose(picture(tmp_path), tmp_path) for _ in range(2)] == [expected] * 2
    assert len(tried) == 1
    (note,) = tmp_path.glob("kvm-*.json")
    note.write_text(json.dumps({"boot_id": "another", "works": not works}))
    assert accelerator.choose(picture(tmp_path), tmp_path) == expected
    assert len(tried) == 2


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("echo 'VFS: Unable to mount root fs on unknown-block(0,0)'; exec sleep 600", True),
        ("echo 'KVM internal error. Suberror: 1' >&2; exec sleep 600", False),
        ("echo 'Linux version 6'; exit 1", False),
    ],
)
def test_kvm_is_judged_by_what_the_kernel_says(script: str, answer: bool) -> None:
    assert accelerator.says_alive(["sh", "-c", script], 60.0) is answer


def test_kvm_that_says_nothing_does_not_work() -> None:
    assert not accelerator.says_alive(["sleep", "600"], 0.2)


def test_no_kvm_device_is_emulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(accelerator, "kvm_boots", lambda image: pytest.fail("tried"))
    assert accelerator.choose(picture(tmp_path), tmp_path) == accelerator.TCG


# Stands for QEMU while it boots: FATE says how each attempt ends.
FAKE_QEMU = """#!/bin/sh
echo run >>"$ATTEMPTS"
touch qmp.sock
set -- $FATE
shift $(($(wc -l <"$ATTEMPTS") - 1))
case $1 in
    panic) echo 'Kernel panic - not syncing: int3' >console.log; exec sleep 600;;
    dies) echo 'no such machine'; exit 1;;
    ready) echo lab-ready >ready.log; exec sleep 600;;
esac
"""


@pytest.fixture
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[booting._Session, Path]]:
    """A session whose QEMU is the fake, and the file with one line for each of its starts."""
    fake = tmp_path / "fake-qemu"
    fake.write_text(FAKE_QEMU)
    fake.chmod(0o755)
    image = tmp_path / "image"
    image.mkdir()
    for name in ("key", "host_key.pub"):
        (image / name).write_text("key\n")
    (image / "root.img").write_bytes(bytes(65536))
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed: apt-get install qemu-utils")

    def session(fate: str) -> tuple[booting._Session, Path]:
        monkeypatch.setenv("FATE", fate)
        monkeypatch.setenv("ATTEMPTS", str(tmp_path / "attempts"))
        monkeypatch.setattr(booting, "_enter", lambda session, process: process)
        slot = os.open(tmp_path / "slot", os.O_RDWR | os.O_CREAT)
        run = booting._Session(tmp_path / "run", TRIXIE, Machine(), Image(image), [str(fake)], slot, False)
        return run, tmp_path / "attempts"

    return session


Attempts = Callable[[str], tuple[booting._Session, Path]]


@pytest.mark.parametrize("fate", ["ready", "panic ready", "panic dies ready"])
def test_panic_is_booted_again(attempts: Attempts, fate: str) -> None:
    session, log = attempts(fate)
    process = booting._booted(session)
    assert isinstance(process, subprocess.Popen)
    process.kill()
    process.wait()
    assert len(log.read_text().splitlines()) == len(fate.split())


@pytest.mark.parametrize(
    ("fate", "words"), [("panic panic panic ready", "panicked"), ("dies dies dies", "no such machine")]
)
def test_third_failure_is_the_last(attempts: Attempts, fate: str, words: str) -> None:
    session, log = attempts(fate)
    with pytest.raises(LabDied, match=words):
        booting._booted(session)
    assert len(log.read_text().splitlines()) == 3


def test_silent_console_is_given_up(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(booting, "STALL_SECONDS", 0.3)
    session, _ = attempts("none")
    (session.picture.folder.parent / "fake-qemu").write_text("#!/bin/sh\ntouch qmp.sock\nexec sleep 600\n")
    with pytest.raises(LabDied, match="silent"):
        booting._booted(session)


class Here(Vm):
    """Commands run on this machine instead of the lab's: all that `Vm` does but for the login itself."""

    def ssh(self, user: str, *options: str) -> list[str]:
        return ["sh", "-c"]


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path, os.getpid(), 0)


def test_run_gives_status_and_both_streams(here: Here) -> None:
    done = here.run("echo out; echo err >&2; exit 7", check=False)
    assert (done.status, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_run_quotes_an_argument_vector(here: Here) -> None:
    assert here.run(["printf", "%s|", "a b", "$HOME", "'"]).stdout == "a b|$HOME|'|"


def test_run_checks_the_status(here: Here) -> None:
    with pytest.raises(CommandFailed, match="exit status 3\nwhy") as caught:
        here.run("echo why; exit 3")
    assert caught.value.status == 3


def test_run_streams(here: Here, capfd: pytest.CaptureFixture[str]) -> None:
    here.run("echo out; echo err >&2", stream=True)
    assert tuple(capfd.readouterr()) == ("out\n", "err\n")


def test_run_passes_much_input_and_output(here: Here) -> None:
    data = b"0123456789abcdef" * 100_000
    assert here.run("cat", input=data).stdout.encode() == data


def test_run_survives_a_command_that_does_not_read(here: Here) -> None:
    assert here.run("exec <&-; echo done", input=bytes(1_000_000)).stdout == "done\n"


def test_run_gives_up_in_time(here: Here) -> None:
    with pytest.raises(CommandTimeout, match=r"no end after 3\.0 s\nbefore"):
        here.run("echo before; exec sleep 600", timeout=3.0)


def test_run_takes_bytes_that_are_no_text(here: Here) -> None:
    assert here.run(r"printf 'a\377b'").stdout == "a\ufffdb"


def test_status_255_of_a_live_machine_is_the_commands(here: Here) -> None:
    assert here.run("exit 255", check=False).status == 255


def test_status_255_of_a_dead_machine_is_its_death(tmp_path: Path) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as machine:
        vm = Here(tmp_path, machine.pid, 0)
        (tmp_path / "console.log").write_text("last words\n")
        machine.communicate()
        with pytest.raises(LabDied, match="last words"):
            vm.run("exit 255", check=False)


def test_put_and_get_a_folder(here: Here, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub" / "__pycache__").mkdir(parents=True)
    (tree / "sub" / "__pycache__" / "x.pyc").write_text("")
    (tree / "program").write_text("#!/bin/sh\n")
    (tree / "program").chmod(0o755)
    (tree / "sub" / "link").symlink_to("../program")
    here.put(tree, str(tmp_path / "a b" / "there"))
    here.get(str(tmp_path / "a b" / "there"), tmp_path / "back")
    assert (tmp_path / "back" / "program").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "back" / "sub" / "link").readlink() == Path("../program")
    assert not (tmp_path / "back" / "sub" / "__pycache__").exists()


def test_put_follows_a_link_to_the_thing(here: Here, tmp_path: Path) -> None:
    (tmp_path / "package_1.0.deb").write_text("content")
    (tmp_path / "package.deb").symlink_to("package_1.0.deb")
    here.put(tmp_path / "package.deb", str(tmp_path / "there.deb"))
    assert (tmp_path / "there.deb").read_text() == "content"
    assert not (tmp_path / "there.deb").is_symlink()


def test_a_deep_folder_has_no_shared_connection(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    shared = [Vm(folder, os.getpid(), 1).ssh("root") for folder in (Path("/short"), deep)]
    assert ["ControlPath" in " ".join(arguments) for arguments in shared] == [True, False]


def test_users_never_share_a_connection() -> None:
    assert "ControlPath" not in " ".join(Vm(Path("/short"), os.getpid(), 1).ssh("alice"))


def test_get_of_nothing_is_an_error(here: Here, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="cannot read"):
        here.get(str(tmp_path / "nothing"), tmp_path / "back")


def test_attach_finds_what_was_saved(here: Here, tmp_path: Path) -> None:
    here.save()
    assert Vm.attach(tmp_path).pid == os.getpid()


def test_attach_refuses_another_process_with_that_number(here: Here, tmp_path: Path) -> None:
    state = {"pid": os.getpid(), "port": 1, "start_time": (start_time(os.getpid()) or 0) - 1}
    (tmp_path / STATE).write_text(json.dumps(state))
    with pytest.raises(LabError, match="its process is gone"):
        Vm.attach(tmp_path)


def test_attach_refuses_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no lab runs"):
        Vm.attach(tmp_path)


def test_console_tail_is_a_tail(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_bytes(b"one\r\ntwo\r\nthr\xffee\r\n")
    assert console_tail(tmp_path, 2).splitlines()[1:] == ["two", "thr\ufffdee"]
    assert console_tail(tmp_path / "nothing").startswith("--- console")


def test_dead_sessions_are_forgotten(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    for name in (f"session-{gone.pid}-1", f"session-{os.getpid()}-2", "kept-mine"):
        (tmp_path / name).mkdir()
    booting._forget_dead_sessions(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept-mine", f"session-{os.getpid()}-2"]


@pytest.mark.parametrize("program", ["lab", "shell"])
def test_commands_explain_themselves(program: str) -> None:
    done = subprocess.run(
        [LAB_FOLDER / program, "--help"], check=True, capture_output=True, text=True, cwd="/", env={**os.environ}
    )
    assert "usage: lab" in done.stdout
    assert sys.version_info >= (3, 11)
