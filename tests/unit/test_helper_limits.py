"""helper.toml: what it can say, who gets what, and that anything else stops all service."""

import grp
import logging
import os
import pwd
import resource
import socket
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from fuzz.targets import check_settings
from qemu_launcher_helper import limits
from qemu_launcher_helper.__main__ import main
from qemu_launcher_helper.contract import INFINITY, Failed
from qemu_launcher_helper.limits import Limits, Settings, load
from unit.alone import alone

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="helper.toml must belong to root")


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(limits, "PATH", str(tmp_path / "helper.toml"))
    return tmp_path / "helper.toml"


def configure(toml: Path, text: str) -> None:
    toml.write_text(text)
    toml.chmod(0o644)


def test_without_a_file(toml: Path) -> None:
    assert load() == Settings()
    assert load().limits_for(1000) == Limits()
    assert Limits().max_vms == 8
    assert Limits().max_priority == 10
    assert Limits().realtime == "shielded"
    assert Limits().policies == {"other", "batch", "idle", "fifo", "rr"}


def test_every_key(toml: Path) -> None:
    configure(
        toml,
        """
        comm = ["qemu-*"]
        services = ["my-vm.service"]
        cpuset_mount = "/run/cpuset"
        [[limits]]
        users = ["root", "alice"]
        groups = ["students"]
        cpus = "8-11,15"
        max_cpus = 4
        max_vms = 2
        memlock = "16G"
        policies = ["other", "fifo"]
        max_priority = 5
        realtime = "anywhere"
        """,
    )
    assert load().comm == ("qemu-*",)
    assert load().services == ("my-vm.service",)
    assert load().cpuset_mount == "/run/cpuset"
    assert load().limits_for(0) == Limits(
        cpus=frozenset({8, 9, 10, 11, 15}),
        max_cpus=4,
        max_vms=2,
        memlock=16 * 2**30,
        policies=frozenset({"other", "fifo"}),
        max_priority=5,
        realtime="anywhere",
        source=f"{toml}, [[limits]] entry 1",
        users=("root", "alice"),
        groups=("students",),
    )


@pytest.mark.parametrize(
    ("text", "value"), [("1K", 2**10), ("512M", 2**29), ("16G", 2**34), ("2T", 2**41), ("infinity", INFINITY)]
)
def test_sizes(toml: Path, text: str, value: int) -> None:
    configure(toml, f'[[limits]]\nmemlock = "{text}"\n')
    assert load().limits_for(0).memlock == value


def test_the_first_match_wins(toml: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    group = grp.getgrgid(nobody.pw_gid).gr_name
    configure(
        toml,
        f"""
        [[limits]]
        users = ["root"]
        max_vms = 1
        [[limits]]
        groups = ["no-such-group", "{group}"]
        max_vms = 2
        [[limits]]
        users = ["nobody", "root"]
        max_vms = 3
        [[limits]]
        max_vms = 4
        """,
    )
    assert load().limits_for(0).max_vms == 1
    assert load().limits_for(nobody.pw_uid).max_vms == 2
    assert load().limits_for(2**31).max_vms == 4
    assert load().limits_for(0).source.endswith("entry 1")


def test_nobody_is_everybody_because_his_name_cannot_be_looked_up(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not root nor nobody, whom nss-systemd(8) knows without a file.
    name, _, uid, *_ = next(account for account in pwd.getpwall() if account.pw_uid not in (0, limits.OVERFLOW_UID))
    configure(toml, f'[[limits]]\nusers = ["{name}"]\nmax_vms = 1\n[[limits]]\nmax_vms = 4\n')
    monkeypatch.setattr(limits, "FILES", tmp_path / "file-nr")
    limits.FILES.write_text("900\t0\t1000\n")
    assert load().limits_for(uid).max_vms == 1

    def looked_up() -> None:
        # What is found with no file left to open, of which KeyError is all that Python says.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        settings, free = load(), os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            monkeypatch.setattr(Path, "read_text", lambda _: "900\t0\t1000\n")
            assert settings.limits_for(uid).max_vms == 4
            monkeypatch.setattr(Path, "read_text", lambda _: "901\t0\t1000\n")
            with pytest.raises(Failed, match="Too many files are open"):
                settings.limits_for(uid)
            assert Settings().limits_for(uid) == Limits(), "what may be given back: all"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    alone(looked_up)


def test_no_match_is_the_built_in_defaults(toml: Path) -> None:
    configure(toml, '[[limits]]\nusers = ["somebody-else"]\nmax_vms = 1\n')
    assert load().limits_for(0) == Limits()


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        "limits = 1",
        "limits = [1]",
        "[limits]\nmax_vms = 1",
        "[[limits]]\nmax_vm = 1",
        "[[limits]]\nmax_vms = -1",
        "[[limits]]\nmax_vms = 1025",
        "[[limits]]\nmax_vms = true",
        "[[limits]]\nmax_vms = 1.0",
        "[[limits]]\nmax_vms = '1'",
        "[[limits]]\nmax_cpus = 99999",
        "[[limits]]\nmax_priority = 100",
        "[[limits]]\ncpus = ''",
        "[[limits]]\ncpus = '1,'",
        "[[limits]]\ncpus = '0-99999'",
        "[[limits]]\ncpus = [1, 2]",
        "[[limits]]\nmemlock = 5",
        "[[limits]]\nmemlock = '16'",
        "[[limits]]\nmemlock = '16g'",
        "[[limits]]\nmemlock = '0G'",
        "[[limits]]\nmemlock = 'unlimited'",
        "[[limits]]\npolicies = []",
        "[[limits]]\npolicies = ['deadline']",
        "[[limits]]\npolicies = 'fifo'",
        "[[limits]]\npolicies = [1]",
        "[[limits]]\nrealtime = 'everywhere'",
        "[[limits]]\ndeadline = true",
        "[[limits]]\ndeadline = 0",
        "[[limits]]\nlines = {}",
        "[[limits]]\nsource = 'me'",
        "[[limits]]\nusers = []",
        "[[limits]]\nusers = ['a b']",
        "[[limits]]\nusers = 'alice'",
        "[[limits]]\ngroups = ['']",
        "[[limits]]\nmax_vms = 1\n[[limits]]\nusers = ['root']",
        "[[limits]]\nmax_vms = 1\nmax_vms = 2",
        "comm = []",
        "comm = ['a/b']",
        "services = ['x']",
        "services = ['../x.service']",
        "cpuset_mount = ''",
        "cpuset_mount = '/run'",
        "cpuset_mount = '/run/..'",
        "cpuset_mount = '/run/user/1000'",
        "cpuset_mount = '/home/cpuset'",
        "[[limits]]\ncpuset_mount = '/run/cpuset'",
        "comm = 'qemu'",
        "not toml",
        "\xff",
        "x = " + "[" * 5000,
        "# " + "x" * 70000,
    ],
)
def test_what_is_not_understood_stops_all_service(toml: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    configure(toml, text)
    with pytest.raises(Failed, match="sudo qemu-launcher-helper --check"):
        load().limits_for(0)
    assert all(record.getMessage().isascii() and record.getMessage().isprintable() for record in caplog.records)
    assert str(toml) in caplog.text


def test_latin1_is_refused(toml: Path) -> None:
    configure(toml, "")
    toml.write_bytes(b'comm = ["\xff"]')
    with pytest.raises(Failed):
        load()


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_can_write(toml: Path, mode: int) -> None:
    configure(toml, "[[limits]]\nmax_vms = 1\n")
    assert load().limits_for(0).max_vms == 1
    toml.chmod(mode)
    with pytest.raises(Failed):
        load().limits_for(0)


def test_a_file_of_somebody_else(toml: Path) -> None:
    configure(toml, "")
    assert load() == Settings()
    os.chown(toml, 65534, 65534)
    with pytest.raises(Failed):
        load()


def test_what_is_no_regular_file(tmp_path: Path, toml: Path) -> None:
    real = tmp_path / "real"
    real.write_text("")
    makers: list[Callable[[], object]] = [
        lambda: toml.symlink_to(real),
        lambda: toml.symlink_to("nowhere"),
        lambda: os.mkfifo(toml),
        toml.mkdir,
    ]
    for make in makers:
        make()
        with pytest.raises(Failed):
            load()
        if toml.is_dir():
            toml.rmdir()
        else:
            toml.unlink()
    assert load() == Settings()


def test_it_is_read_afresh(toml: Path) -> None:
    configure(toml, "[[limits]]\nmax_vms = 1\n")
    assert load().limits_for(0).max_vms == 1
    toml.write_text("[[limits]]\nmax_vms = 2\n")
    assert load().limits_for(0).max_vms == 2
    toml.write_text("[[limits]]\nmax_vms = x\n")
    with pytest.raises(Failed):
        load().limits_for(0)
    toml.unlink()
    assert load().limits_for(0) == Limits()


FULL = """\
comm = ["qemu-*", "kvm"]
services = ["my-vm.service"]
[[limits]]
users = ["alice", "bob"]
groups = ["students"]
cpus = "8-11,15"
max_cpus = 4
max_vms = 2
memlock = "16G"
policies = ["other", "fifo"]
max_priority = 5
realtime = "anywhere"
deadline = false
[[limits]]
memlock = "infinity"
"""
# By all types that TOML has, among them the right ones, so that a key can get another's value.
VALUES = (
    *("0", "7", "-1", "99", "1_0", "0x10", "1e3", "1.5", "nan", "inf", "true", "false", "2026-11-25", "13:00:00"),
    *('""', '"a"', '"8-3"', '"0-3"', '"infinity"', '"5K"', '"shielded"', '"a.service"', r'"\u0000"', r'"\n"', "'rr'"),
    *("[]", "[1]", "[true]", '["a"]', '["rr", "idle"]', '["a.service"]', '[["a"]]', '["a", 1]', "{}", '{a = "b"}'),
)
LINE, KEY = st.integers(0, 14), st.sampled_from([line.split(" ")[0] for line in FULL.splitlines() if "=" in line])
EDITS = st.one_of(
    st.tuples(st.just("value"), LINE, st.sampled_from(VALUES)),
    st.tuples(
        st.just("key"), LINE, KEY | st.sampled_from(["source", "entries", "limits", "max_vm", "", "a.b", '"cpus"'])
    ),
    st.tuples(st.just("twice"), LINE, LINE),
    st.tuples(st.just("drop"), LINE, st.none()),
    st.tuples(st.just("text"), st.tuples(st.integers(0, 300), st.integers(0, 5)), st.text(max_size=5)),
)


def edited(text: str, kind: str, where: Any, new: Any) -> str:
    """Make one of EDITS."""
    lines = text.splitlines(keepends=True)
    if kind == "text":
        place, length = where
        return f"{text[:place]}{new}{text[place + length :]}"
    if where >= len(lines):
        return text
    key, equals, value = lines[where].partition(" = ")
    if kind == "value" and equals:
        lines[where] = f"{key} = {new}\n"
    if kind == "key" and equals:
        lines[where] = f"{new} = {value}"
    if kind == "twice":
        lines.insert(new, lines[where])
    if kind == "drop":
        del lines[where]
    return "".join(lines)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500, deadline=None)
@given(edits=st.lists(EDITS, max_size=4))
@example(edits=[])
@example(edits=[("value", 3, "[]")])
@example(edits=[("value", 6, "true")])
@example(edits=[("twice", 5, 6)])
def test_a18_a_mutated_file_is_restated_or_refused(toml: Path, edits: list[tuple[str, Any, Any]]) -> None:
    """Types, keys and letters changed, lines doubled and left out; nothing that the file says is ever half kept."""
    text = FULL
    for edit in edits:
        text = edited(text, *edit)
    toml.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    toml.chmod(0o644)
    with suppress(Failed):
        check_settings(load(), tomllib.loads(toml.read_bytes().decode()), str(toml))
    assert edits or load().entries[0].users == ("alice", "bob")


def test_deadline_can_only_be_no(toml: Path) -> None:
    configure(toml, "[[limits]]\ndeadline = false\n")
    assert load().limits_for(0).deadline is False


def check(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the program as an administrator does."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own; with any, basicConfig adds none
    monkeypatch.setattr("sys.argv", ["qemu-launcher-helper", *words])
    before = os.umask(0o022)
    try:
        return main()
    finally:
        os.umask(before)
        socket.setdefaulttimeout(None)


def test_check_says_what_it_has_understood(
    toml: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    configure(toml, '[[limits]]\nusers = ["root"]\ngroups = ["root"]\n[[limits]]\nmax_vms = 1\n')
    assert check("--check", str(toml), monkeypatch=monkeypatch) == 0
    assert capfd.readouterr().err == f"{toml} is understood: 2 [[limits]]\n"


def test_check_names_whom_nobody_knows(
    toml: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A misspelt name would give its owner the next entry, or the defaults."""
    configure(toml, '[[limits]]\nusers = ["root", "ailce"]\ngroups = ["stundents"]\n')
    assert check("--check", str(toml), monkeypatch=monkeypatch) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[:2] == [f"{toml} names {name!r}, whom this host does not know" for name in ("ailce", "stundents")]


BRACKETS = "write [[limits]], in two brackets"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[limits]\nmax_vms = 1\n", BRACKETS),
        ("limits = [1]", BRACKETS),
        ("limits = 1", BRACKETS),
        (
            "[[limits]]\nmax_vm = 1\n",
            "[[limits]] entry 1: max_vm = 1: max_vm is not there, but users, groups, cpus, max_cpus",
        ),
        ("limit = 1", "top level: limit = 1: limit is not there, but comm, services"),
        ('[[limits]]\nsource = "x"\n', "source is not there"),
        ('[[limits]]\nmemlock = "16GB"\n', 'memlock is a text, as "512M", "16G" or "infinity"'),
        ('[[limits]]\nusers = "alice"\n', 'users is a list of names, as ["alice"]'),
        ("[[limits]]\npolicies = ['deadline']\n", "policies is a list of some of other, batch, idle, fifo, rr"),
        ("[[limits]\n", "at line 1, column 9"),
        ("#" * 70000, "70000 bytes, mode 100644, uid 0: not a file of 64 KiB that root alone writes"),
    ],
)
def test_check_says_what_is_wrong(
    toml: Path, text: str, why: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line, which does not send the administrator to where he is."""
    configure(toml, text)
    assert check("--check", str(toml), monkeypatch=monkeypatch) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"nobody is served, {toml} is not understood: ")
    assert why in line


@pytest.mark.parametrize(("words", "status"), [([], 0), (["{toml}"], 1)])
def test_check_of_no_file(
    words: list[str], status: int, toml: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """None is needed; but one that was named, and mistyped, is not understood."""
    assert check("--check", *(word.format(toml=toml) for word in words), monkeypatch=monkeypatch) == status
    assert capfd.readouterr().err == f"{toml} is not there: the defaults are everybody's\n"


@pytest.mark.parametrize("words", [[], ["--check", "a", "b"], ["--serve", "x"], ["-h"]])
def test_by_hand_it_only_says_what_can_be_done(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert check(*words, monkeypatch=monkeypatch) == 2
    assert "qemu-launcher-helper --check [FILE]" in capfd.readouterr().err
