"""Disk images, the binary, and the variables by which QEMU finds a display and audio."""

from pathlib import Path

import pytest

from qemu_launcher.check import environment, files
from qemu_launcher.check.asked import Image
from qemu_launcher.check.finding import Finding
from unit.other_host import OtherHost, the_only, told
from unit.reading import launcher

VMS = Path("/var/lib/vms")
DISK = Image("win11.qcow2", "drive", writable=True)
ISO = Image("/srv/iso/virtio.iso", "cdrom", writable=False)
MADE = "before_start may make it"


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    host = OtherHost(tmp_path)
    host.write("/var/lib/vms/win11.qcow2")
    host.write("/srv/iso/virtio.iso")
    return host


def images(host: OtherHost, *wanted: Image) -> list[Finding]:
    return list(files.images(host.tree, wanted, VMS, "alice"))


def test_all_is_well(host: OtherHost) -> None:
    host.forbid("/srv/iso/virtio.iso", 2)  # W_OK, which a CD does not need
    assert told(images(host, DISK, ISO)) == ["ok: 2 images and boot files can be opened as wanted"]
    assert told(images(host, DISK)) == ["ok: 1 image or boot file can be opened as wanted"]
    assert images(host) == []


def test_missing(host: OtherHost) -> None:
    severity, text, fix = the_only(images(host, Image("win10.qcow2", "hda", writable=True)))
    assert (severity, text) == ("error", "there is no /var/lib/vms/win10.qcow2 (-hda)")
    assert fix == "/var/lib/vms has: win11.qcow2"


def test_missing_with_its_folder(host: OtherHost) -> None:
    fix = the_only(images(host, Image("/var/lib/machines/a/b.raw", "drive", writable=True)))[2]
    assert fix == "/var/lib exists, /var/lib/machines does not: make it, or correct the path"


@pytest.mark.parametrize("path", ["~/vms/disk.img", "~alice/disk.img", "$HOME/disk.img", "${HOME}/disk.img"])
def test_path_for_a_shell(host: OtherHost, path: str) -> None:
    severity, text, fix = the_only(images(host, Image(path, "drive", writable=True)))
    assert (severity, text) == ("error", f"there is no /var/lib/vms/{path} (-drive)")
    assert fix == "~ and $HOME are the shell's; write the whole path"
    host.write(f"/var/lib/vms/{path}")
    assert images(host, Image(path, "drive", writable=True))[0].severity == "ok"


PATHS = [
    ("gone", "note"),
    ("new/folder/gone", "note"),
    ("/usr/share/OVMF/gone", "warning"),
    ("/usr/share/gone", "warning"),
    ("~/gone", "error"),
    ("/srv/iso", "error"),
]


@pytest.mark.parametrize(("path", "severity"), PATHS)
def test_image_that_may_be_made_before_the_start(host: OtherHost, path: str, severity: str) -> None:
    """Only what is not there, where something of his may put it, and no folder called ~: nobody makes one."""
    host.folder("/usr/share")
    host.forbid("/usr/share", 2)  # W_OK
    wanted = [Image(path, "drive", writable=True)]
    [one] = files.images(host.tree, wanted, VMS, "alice", made_before=True)
    [otherwise] = images(host, *wanted)
    assert (one.severity, one.text, otherwise.severity) == (severity, otherwise.text, "error")
    assert one.may_come == (severity == "note")
    fixes = {"note": MADE, "warning": f"{otherwise.fix}\nbefore_start may make it only with more rights than yours"}
    assert one.fix == fixes.get(severity, otherwise.fix)


def test_not_ours(host: OtherHost) -> None:
    host.forbid("/var/lib/vms/win11.qcow2")
    severity, text, fix = the_only(images(host, DISK))
    assert (severity, text) == ("error", "/var/lib/vms/win11.qcow2 (-drive) is not yours to read and write")
    assert fix == "sudo setfacl -m u:alice:rw /var/lib/vms/win11.qcow2"


def test_readable_only(host: OtherHost) -> None:
    host.forbid("/var/lib/vms/win11.qcow2", 2)
    assert the_only(images(host, DISK))[2].splitlines()[1] == "or, if the guest only reads it: readonly: on"


def test_closed_folder_on_the_way(host: OtherHost) -> None:
    host.forbid("/var/lib", 1)
    severity, text, fix = the_only(images(host, DISK))
    assert severity == "error"
    assert text == "/var/lib/vms/win11.qcow2 (-drive) cannot be reached: /var/lib is closed to you"
    assert fix == "sudo setfacl -m u:alice:x /var/lib"


def test_directory(host: OtherHost) -> None:
    assert "is a directory" in the_only(images(host, Image("/srv/iso", "drive", writable=True)))[1]


def test_firmware_that_is_not_installed(host: OtherHost) -> None:
    code = Image("/usr/share/OVMF/OVMF_CODE_4M.fd", "drive", writable=False)
    assert the_only(images(host, code))[2].startswith("on Debian: sudo apt install ovmf")


def test_sockets(host: OtherHost) -> None:
    assert list(files.sockets(host.tree, [], VMS)) == []
    severity, text, fix = the_only(list(files.sockets(host.tree, ["tpm/sock"], VMS)))
    assert (severity, text) == ("error", "there is no socket /var/lib/vms/tpm/sock (-chardev)")
    assert "swtpm" in fix
    host.write("/var/lib/vms/tpm/sock")
    assert list(files.sockets(host.tree, ["tpm/sock"], VMS)) == []
    host.forbid("/var/lib/vms/tpm/sock")
    assert "is not yours to connect to" in the_only(list(files.sockets(host.tree, ["tpm/sock"], VMS)))[1]


def test_socket_that_may_be_made_before_the_start(host: OtherHost) -> None:
    def told_of(path: str) -> tuple[str, str, str]:
        return the_only(list(files.sockets(host.tree, [path], VMS, made_before=True)))

    assert told_of("tpm/sock") == ("note", "there is no socket /var/lib/vms/tpm/sock (-chardev)", MADE)
    assert told_of("$HOME/sock")[0] == "error"
    host.write("/var/lib/vms/tpm/sock")
    host.forbid("/var/lib/vms/tpm/sock")
    assert told_of("tpm/sock")[0] == "error"


def test_commands(host: OtherHost) -> None:
    host.write("/usr/bin/swtpm")
    env = {"PATH": "/usr/bin"}

    def commands(keys: str) -> list[str]:
        return told(list(files.commands(host.tree, launcher(keys), env, VMS)))

    note = "note: what before_start makes is not there yet: it is not executed for a check"
    assert commands("") == []
    assert commands("before_start: [[swtpm, socket], [swtpm]]\nafter_stop: [[swtpm]]") == [note]
    lost = "cannot start 'virtiofsd': it is in no folder of PATH, or not yours to execute"
    assert commands("before_start: [[virtiofsd], [virtiofsd, -x]]")[0].endswith(f"before_start {lost}")
    assert commands("before_start: [[virtiofsd], [virtiofsd, -x]]")[1:] == [note]
    [warning] = commands("after_stop: [[virtiofsd]]")
    assert warning.startswith("warning: win11.yml:3:")
    assert warning.endswith(f"after_stop {lost}")


def test_binary(host: OtherHost) -> None:
    host.write("/usr/bin/qemu-system-x86_64")
    host.write("/var/lib/vms/build/qemu")
    host.folder("/opt/qemu-system-x86_64")
    env = {"PATH": "/opt:/usr/local/bin:/usr/bin"}
    assert files.binary(host.tree, "qemu-system-x86_64", env, VMS) == "/usr/bin/qemu-system-x86_64"
    assert files.binary(host.tree, "build/qemu", env, VMS) == "/var/lib/vms/build/qemu"
    assert files.binary(host.tree, "qemu-system-m68k", env, VMS) is None
    assert files.binary(host.tree, "/opt/qemu-system-x86_64", env, VMS) is None
    host.forbid("/usr/bin/qemu-system-x86_64", 1)
    assert files.binary(host.tree, "qemu-system-x86_64", env, VMS) is None


@pytest.mark.parametrize(
    ("binary", "options", "name"),
    [
        ("/usr/bin/qemu-system-x86_64", "[]", None),
        ("/usr/bin/qemu-kvm", "[name: win11]", None),
        ("/usr/bin/qemu-system-x86_64", "[name: 'win11,process=win11']", "win11"),
        ("/opt/my-qemu-with-a-long-name", "[]", "my-qemu-with-a-"),
        ("/opt/my-qemu-with-a-long-name", "[name: 'win11,process=qemu-system-x']", None),
        ("/opt/wrapper", "[]", None),
        (None, "[]", None),
    ],
)
def test_name_by_which_the_helper_knows_it(host: OtherHost, binary: str | None, options: str, name: str | None) -> None:
    for path in ("/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-kvm", "/opt/my-qemu-with-a-long-name"):
        host.write(path, "\x7fELF and so on")
    host.write("/opt/wrapper", "#!/bin/sh\nexec qemu-system-x86_64\n")
    found = list(files.process_name(host.tree, binary, launcher("", options).options))
    if name is None:
        assert found == []
    else:
        assert the_only(found)[1].endswith(f"this QEMU's process will be called {name!r}")
        assert "qemu-launcher-helper.toml(5)" in the_only(found)[2]
        assert found[0].text.startswith("win11.yml:3:") == ("process" in options)


# Variables

DESKTOP = {"XDG_RUNTIME_DIR": "/run/user/1000", "WAYLAND_DISPLAY": "wayland-0", "HOME": "/home/alice"}


def variables(
    options: str, env: dict[str, str], keys: str = "", *, server: str | None = None, certain: bool = True
) -> list[Finding]:
    return list(environment.variables(launcher(keys, options), env, DESKTOP, server, certain=certain))


@pytest.mark.parametrize(
    ("options", "severity", "text"),
    [
        ("[audiodev: 'pipewire,id=a']", "warning", "audio pipewire needs XDG_RUNTIME_DIR or PIPEWIRE_RUNTIME_DIR"),
        ("[audiodev: [pa, id: a]]", "warning", "audio pa needs XDG_RUNTIME_DIR or PULSE_SERVER or"),
        ("[display: gtk]", "error", "display gtk needs WAYLAND_DISPLAY and XDG_RUNTIME_DIR or DISPLAY, and"),
        ("[display: 'sdl,gl=on']", "error", "display sdl needs"),
    ],
)
def test_cleared_environment(options: str, severity: str, text: str) -> None:
    found = the_only(variables(options, {}, "clear_env: true"))
    assert found[0] == severity
    assert found[1].startswith(text)
    assert found[1].endswith("(clear_env: true)")
    assert found[2].startswith("write env: {")
    assert "XDG_RUNTIME_DIR: /run/user/1000" in found[2]
    assert found[2].endswith("}, or clear_env: false")
    assert [one.severity for one in variables(options, DESKTOP, "clear_env: true")] == ["ok"]


def test_variables_that_are_needed_together() -> None:
    assert [one.severity for one in variables("[display: gtk]", {"WAYLAND_DISPLAY": "wayland-0"})] == ["error"]
    assert [one.severity for one in variables("[display: gtk]", {"DISPLAY": ":0"})] == ["ok"]


SERVER = "/run/user/1000/wayland-0"


@pytest.mark.parametrize(
    ("kind", "session", "finds"),
    [("gtk", None, True), ("gtk", "tty", True), ("sdl", None, True), ("sdl", "Wayland", True), ("sdl", "tty", False)],
)
def test_server_that_no_variable_names(kind: str, session: str | None, finds: bool) -> None:
    env = {} if session is None else {"XDG_SESSION_TYPE": session}
    one = the_only(variables(f"[display: {kind}]", env, server=SERVER))
    assert one[0] == ("ok" if finds else "error")
    assert not finds or one[1] == f"display {kind} finds its server ({SERVER})"
    assert (window("", "[m: 1G]", env, kind, server=SERVER) == []) == finds


@pytest.mark.parametrize(
    ("env", "severity"),
    [
        ({"GDK_BACKEND": "broadway"}, "warning"),
        ({"WAYLAND_SOCKET": "3"}, "warning"),
        ({"WAYLAND_DISPLAY": "/elsewhere"}, "warning"),
        ({"WAYLAND_DISPLAY": "wayland-1"}, "error"),
    ],
)
def test_server_that_gtk_is_told_of_in_another_way(env: dict[str, str], severity: str) -> None:
    """And a QEMU that is a script may set any variable."""
    for found in (variables("[display: gtk]", env), window("", "[]", env)):
        assert the_only(found)[0] == severity
    assert the_only(variables("[display: gtk]", env, certain=False))[0] == "warning"


def test_where_a_server_is_found_without_a_name(host: OtherHost) -> None:
    env = {"XDG_RUNTIME_DIR": "/run/user/1000"}
    assert environment.default_server(host.tree, env) is None
    host.write(SERVER)
    assert environment.default_server(host.tree, env) == SERVER
    assert environment.default_server(host.tree, {**env, "WAYLAND_DISPLAY": ""}) is None, "which is a name"
    assert environment.default_server(host.tree, {}) is None
    host.forbid(SERVER)
    assert environment.default_server(host.tree, env) is None


def test_login_without_a_desktop() -> None:
    found = list(environment.variables(launcher("", "[display: gtk]"), {}, {}, None, certain=True))
    assert the_only(found)[1].endswith("QEMU would have none of them in this login")
    assert the_only(found)[2] == "start it from the desktop, or write env: with the values it has there"


def test_who_may_enter_an_x_display_is_told_too() -> None:
    ours = {"DISPLAY": ":0", "XAUTHORITY": "/run/user/1000/x auth"}
    definition = launcher("clear_env: true", "[display: gtk]")
    fix = the_only(list(environment.variables(definition, {}, ours, None, certain=True)))[2]
    assert fix == "write env: {DISPLAY: :0, XAUTHORITY: '/run/user/1000/x auth'}, or clear_env: false"


@pytest.mark.parametrize(
    "options",
    [
        "[nographic]",
        "[display: none]",
        "[display: vnc=:1]",
        "[audiodev: 'alsa,id=a']",
        "[audiodev: 'pa,id=a,server=tcp:x']",
    ],
)
def test_what_needs_no_variables(options: str) -> None:
    assert variables(options, {}, "clear_env: true") == []


def window(
    keys: str,
    qemu: str,
    env: dict[str, str],
    kind: str | None = "gtk",
    *,
    server: str | None = None,
    certain: bool = True,
) -> list[Finding]:
    return list(environment.window(launcher(keys, qemu), env, {}, lambda: kind, server, certain=certain))


def test_window_that_nobody_asked_for() -> None:
    severity, text, fix = the_only(window("", "[m: 1G]", {}))
    assert (severity, text) == (
        "error",
        "no option names a display, and QEMU's own choice, gtk, needs WAYLAND_DISPLAY and XDG_RUNTIME_DIR or DISPLAY, "
        "and QEMU would have none of them in this login",
    )
    assert fix.splitlines()[0] == "start it from the desktop, or write env: with the values it has there"
    assert fix.splitlines()[1].startswith("or, for no window, add - display: none, - nographic or - vnc: ")
    assert the_only(window("clear_env: true", "[display: default]", {}))[1].endswith(" (clear_env: true)")
    assert the_only(window("", "[]", {}, certain=False))[0] == "warning"
    assert the_only(window("", "[]", {}, "sdl"))[0] == "warning"
    assert the_only(window("", "[]", {"GDK_BACKEND": "broadway"}))[0] == "warning"
    assert window("", "[]", {"DISPLAY": ":0"}) == []
    assert window("", "[]", {}, None) == []


@pytest.mark.parametrize(
    "option",
    [
        *("display: none", "display: gtk", "display: 'vnc=:7'", "display: [vnc: ':7']"),
        *("nographic", "vnc: ':1'", "spice: [port: 5930]", "readconfig: x", "version"),
    ],
)
def test_no_window_of_its_own(option: str) -> None:
    assert window("", f"[{option}]", {}) == []
