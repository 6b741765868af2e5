"""The three ways of not having access, and becoming the user a VM runs as."""

import ast
import grp
import os
import pwd
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qemu_launcher import absence, access, identity
from qemu_launcher.definition import VmDefinition
from qemu_launcher.errors import LauncherError, PasswordWanted
from unit.reading import ROOT

BUS = "org.freedesktop.DBus.Error."
DENIED = f"{BUS}AccessDenied"
NOT_AUTHORISED = "org.qemulauncher.Error.NotAuthorized"


@pytest.fixture
def alice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """alice, uid 1000, and a group qemu-launcher, 990; `database` and `process` say where she is a member.

    `file` has the groups that are the host's own, `cgroup` tells where we are: in a session of ssh's.
    """
    world = SimpleNamespace(database=[1000], process=[1000], group=True)
    world.file, world.cgroup = tmp_path / "group", tmp_path / "cgroup"
    world.file.write_text("root:x:0:\nqemu-launcher:x:990:bob\n")
    world.cgroup.write_text("0::/user.slice/user-1000.slice/session-3.scope\n")
    monkeypatch.setattr(access, "_GROUPS", world.file)
    monkeypatch.setattr(access, "_OWN_CGROUP", world.cgroup)

    def getgrnam(name: str) -> Any:
        if name != "qemu-launcher" or not world.group:
            raise KeyError(name)
        return SimpleNamespace(gr_gid=990)

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 1000)
    monkeypatch.setattr(os, "getgroups", lambda: [1000])
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_name="alice", pw_gid=1000))
    monkeypatch.setattr(grp, "getgrnam", getgrnam)
    monkeypatch.setattr(os, "getgrouplist", lambda _name, _gid: world.database)
    monkeypatch.setattr(os, "getgroups", lambda: world.process)
    return world


def test_not_a_member(alice: SimpleNamespace) -> None:
    error = access.explained(DENIED, "some text of the bus")
    assert str(error) == "alice is not a member of the group qemu-launcher"
    assert error.hint == "sudo usermod -aG qemu-launcher alice\nthen log out and in again"
    assert error.wire_name == DENIED


def test_member_but_not_in_this_login(alice: SimpleNamespace) -> None:
    alice.database = [1000, 990]
    error = access.explained(DENIED, "")
    assert "but not yet in this login" in str(error)
    assert error.hint == "log out and in again (closing a terminal is not enough; the whole session counts)"


def test_a_desktop_whose_terminals_outlive_the_login(alice: SimpleNamespace) -> None:
    """They are children of the user manager, which has its groups, and stays for a while, or with lingering always."""
    alice.database = [1000, 990]
    unit = "/user.slice/user-1000.slice/user@1000.service"
    alice.cgroup.write_text(f"1:name=systemd:/\n0::{unit}/app.slice/app-org.gnome.Terminal.slice/vte-spawn-1.scope\n")
    error = access.explained(DENIED, "")
    assert error.hint == (
        "log out and in again (closing a terminal is not enough; the whole session counts)\n"
        "still so? your user manager has stayed: sudo loginctl terminate-user alice, which ends all you run; or boot"
    )


@pytest.mark.parametrize("groups", ["root:x:0:\n", "root:x:0:\nqemu-launcher-x:x:7:\n", ""])
def test_a_group_that_is_not_in_the_hosts_own_file(alice: SimpleNamespace, groups: str) -> None:
    """Fedora Silverblue: groups of packages are in /usr/lib/group, and usermod changes /etc/group alone."""
    alice.file.write_text(groups)
    assert access.explained(DENIED, "").hint == (
        "getent group qemu-launcher | sudo tee -a /etc/group\n"
        "sudo usermod -aG qemu-launcher alice\nthen log out and in again"
    )
    hint = access.explained(NOT_AUTHORISED, "polkit does not allow it").hint or ""
    assert hint.endswith(": getent group qemu-launcher | sudo tee -a /etc/group; sudo usermod -aG qemu-launcher alice")


def test_files_that_cannot_be_read(alice: SimpleNamespace) -> None:
    alice.file.unlink()
    alice.cgroup.unlink()
    assert access.explained(DENIED, "").hint == "sudo usermod -aG qemu-launcher alice\nthen log out and in again"
    alice.database = [1000, 990]
    assert "terminate-user" not in (access.explained(DENIED, "").hint or "")


@pytest.mark.parametrize(("database", "is_told"), [([1000], True), ([1000, 990], False)])
def test_bus_that_is_open_to_everybody(alice: SimpleNamespace, database: list[int], is_told: bool) -> None:
    """The bus has let the call through, so it was polkit: neither membership nor this login is the reason."""
    alice.database = database
    error = access.explained(NOT_AUTHORISED, "polkit does not allow it")
    assert str(error) == "polkit does not allow it"
    assert error.hint is not None
    first, *more = error.hint.splitlines()
    assert first.startswith("an administrator's polkit rule decides this, or the question for a password was")
    assert bool(more) == is_told
    assert "log out" not in error.hint


@pytest.mark.parametrize(
    ("systemd", "command"), [(True, "systemctl reload dbus"), (False, "dbus-send --system --type=method_call --dest=")]
)
def test_member_whom_the_bus_lets_send_nothing(
    alice: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, systemd: bool, command: str
) -> None:
    monkeypatch.setattr(absence, "has_systemd", lambda *_: systemd)
    alice.database = alice.process = [1000, 990]
    error = access.explained(DENIED, "Rejected send message, 1 matched rules; type=...")
    assert str(error) == "the system bus lets alice send nothing to qemu-launcher-helper"
    assert error.hint is not None
    assert error.hint.startswith(f"if it has just been installed: sudo {command}")


def test_member_whom_a_rule_refuses(alice: SimpleNamespace) -> None:
    alice.database = alice.process = [1000, 990]
    error = access.explained(NOT_AUTHORISED, "alice is not authorised to set memory locks")
    assert str(error) == "alice is not authorised to set memory locks"
    assert not isinstance(error, PasswordWanted)
    assert error.hint is not None
    assert "polkit" in error.hint


def test_a_password_that_nobody_was_asked_for(alice: SimpleNamespace) -> None:
    """Where the bus lets everybody in, membership is not what is lacking."""
    text = "polkit does not allow org.qemulauncher.pin-threads to alice in this session without a password"
    error = access.explained(NOT_AUTHORISED, text)
    assert isinstance(error, PasswordWanted)
    assert (str(error), error.wire_name) == (text, NOT_AUTHORISED)
    assert error.hint is not None
    assert "in a terminal" in error.hint


@pytest.mark.parametrize(
    ("systemd", "command"), [(True, "sudo systemd-sysusers"), (False, "sudo groupadd --system qemu-launcher")]
)
def test_group_that_does_not_exist(
    alice: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, systemd: bool, command: str
) -> None:
    alice.group = False
    monkeypatch.setattr(absence, "has_systemd", lambda: systemd)
    error = access.explained(DENIED, "")
    assert "there is no group qemu-launcher" in str(error)
    assert error.hint is not None
    assert error.hint.startswith(f"{command} makes it; then sudo usermod -aG qemu-launcher alice\n")


@pytest.mark.parametrize(
    ("name", "text", "message", "hint"),
    [
        (f"{BUS}ServiceUnknown", "x", "qemu-launcher-helper is not installed", absence.remedy()),
        (f"{BUS}NameHasNoOwner", "x", "qemu-launcher-helper is not installed", absence.remedy()),
        (f"{BUS}Spawn.ChildExited", "Process exited", "cannot be started: Process exited", access.LOOK_AT_JOURNAL),
        (f"{BUS}NoReply", "x", "ended without an answer", access.LOOK_AT_JOURNAL),
        ("org.qemulauncher.Error.Failed", "it broke", "it broke", access.LOOK_AT_JOURNAL),
        ("org.qemulauncher.Error.Conflict", "CPUs 4-7 are held by VM x of bob", "CPUs 4-7 are held", None),
        ("org.unheard.Of", "", "qemu-launcher-helper failed: org.unheard.Of", None),
    ],
)
def test_other_refusals(monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str, hint: str | None) -> None:
    monkeypatch.setattr(absence, "has_systemd", lambda *_: True)
    error = access.explained(name, text)
    assert message in str(error)
    assert error.hint == hint


def test_what_starts_it_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absence, "has_systemd", lambda *_: False)
    error = access.explained(f"{BUS}Spawn.ExecFailed", "Failed to execute")
    assert error.hint is not None
    assert [line.partition(" ")[0] for line in error.hint.splitlines()] == ["see", "without"]
    assert "dbus-daemon-launch-helper" in error.hint


# Where there is no helper


def host(root: Path, **files: str) -> Path:
    """Another host's file system with these files, __ for / in their names."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_host_without_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("container", raising=False)
    assert absence.remedy(host(tmp_path)) == absence.HOW_TO_INSTALL
    for words in ("sudo apt install ./build/qemu-launcher", "on other distributions: sudo make install", "polkit"):
        assert words in absence.HOW_TO_INSTALL


@pytest.mark.parametrize(
    ("binary", "package"),
    [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("/opt/bin/qemu-system-i386", "qemu-system-x86"),
        ("qemu-system-aarch64", "qemu-system-arm"),
        ("qemu-system-riscv64", "qemu-system"),
        ("qemu-system-", "qemu-system"),
    ],
)
def test_package_of_a_missing_qemu(binary: str, package: str) -> None:
    assert f"sudo apt install {package})" in (absence.qemu(binary, {})[1] or "")


def test_package_of_what_is_no_qemu() -> None:
    assert "apt" not in (absence.qemu("qemu-sytem-x86_64", {})[1] or "")


def test_hint_names_the_package_that_make_deb_builds() -> None:
    built = subprocess.run(
        ["make", "-s", "--no-print-directory", "deb-path"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    pattern = absence.HOW_TO_INSTALL.splitlines()[0].partition("sudo apt install ./")[2]
    assert fnmatch(built, pattern)


@pytest.mark.parametrize(
    ("files", "variable", "kind"),
    [
        ({"run__systemd__container": "lxc\n"}, None, "lxc"),
        ({"run__.containerenv": ""}, None, "podman"),
        ({".dockerenv": ""}, None, "docker"),
        ({".flatpak-info": ""}, None, "flatpak"),
        ({".dockerenv": "", "run__systemd__container": "systemd-nspawn"}, None, "systemd-nspawn"),
        ({}, "oci", "oci"),
    ],
)
def test_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], variable: str | None, kind: str
) -> None:
    monkeypatch.delenv("container", raising=False)
    if variable is not None:
        monkeypatch.setenv("container", variable)
    assert absence.remedy(host(tmp_path, **files)) == (
        f"this is a container ({kind}): install it on the host, and start the VM there, in no container\n"
        f"{absence.HOW_TO_INSTALL}"
    )


@pytest.mark.parametrize("folder", ["usr__share", "usr__local__share", "run"])
def test_installed_while_the_bus_was_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.delenv("container", raising=False)
    where = {f"{folder}__dbus-1__system-services__org.qemulauncher.Helper1.service": ""}
    hint = absence.remedy(host(tmp_path, **where, run__systemd__system__x=""))
    assert hint.startswith("it is installed, but not to the running system's knowledge: sudo systemctl reload dbus\n")
    assert "make install" not in hint


# identity


def vm(user: str | int | None = None, group: str | int | None = None) -> VmDefinition:
    return VmDefinition("win11", Path("/x"), "q", (), user=user, group=group)


def test_oneself_is_accepted_by_name_and_by_number() -> None:
    me = pwd.getpwuid(os.geteuid())
    mine = grp.getgrgid(os.getegid())
    for user in (None, me.pw_name, me.pw_uid):
        for group in (None, mine.gr_name, mine.gr_gid):
            account = identity.wanted_account(vm(user, group))
            assert (account.uid, account.gid) == (os.geteuid(), os.getegid())


@pytest.mark.parametrize(
    ("user", "group", "message"),
    [
        ("no-such-user", None, "there is no user 'no-such-user'"),
        (4000000, None, "there is no user 4000000"),
        (None, "no-such-group", "there is no group 'no-such-group'"),
    ],
)
def test_nobody_of_that_name(user: str | int | None, group: str | None, message: str) -> None:
    with pytest.raises(LauncherError, match=message):
        identity.wanted_account(vm(user, group))


def test_uid_without_an_entry_needs_a_group() -> None:
    assert identity.wanted_account(vm(4000000, 12))[:3] == (4000000, 12, None)


def test_another_user_without_being_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 1000)
    with pytest.raises(LauncherError, match="is to run as user 'root', who is not you") as caught:
        identity.assume(vm("root"))
    assert caught.value.hint is not None
    assert "sudo qemu-launcher win11" in caught.value.hint
    with pytest.raises(LauncherError, match="is to run in group 'root', which is not yours"):
        identity.assume(vm(None, "root"))


def test_root_becomes_the_user_for_good() -> None:
    if os.geteuid() != 0:
        pytest.skip("optional: only root can become somebody")
    nobody = pwd.getpwnam("nobody")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.environ.update({"XDG_RUNTIME_DIR": "/run/user/0", "DBUS_SESSION_BUS_ADDRESS": "x", "KEPT": "1"})
            identity.assume(vm("nobody"))
            try:
                os.setuid(0)
                back = "back"
            except PermissionError:
                back = "never"
            names = ("HOME", "USER", "LOGNAME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "KEPT")
            seen = [os.getresuid(), os.getresgid(), sorted(os.getgroups()), back, [os.environ.get(n) for n in names]]
            os.write(write, repr(seen).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    seen = ast.literal_eval(os.read(read, 4096).decode())
    os.close(read)
    uid, gid = nobody.pw_uid, nobody.pw_gid
    assert seen == [
        (uid,) * 3,
        (gid,) * 3,
        sorted(os.getgrouplist("nobody", gid)),
        "never",
        [nobody.pw_dir, "nobody", "nobody", None, None, "1"],
    ]
