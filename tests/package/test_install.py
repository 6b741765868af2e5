"""`make install`: exactly these files, at the paths where the bus, polkit and systemd read them, and how they start."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from package.contents import FILES, PACKAGES, ROOT, python_files


def installed(destination: Path) -> dict[str, int]:
    """Every file below `destination`, with its mode."""
    return {
        str(path.relative_to(destination)): stat.S_IMODE(path.lstat().st_mode)
        for path in destination.rglob("*")
        if not path.is_dir()
    }


def make(target: str, *settings: str) -> None:
    """Run the Makefile in the tree; it writes only below DESTDIR and build/man."""
    if shutil.which("go-md2man") is None:
        pytest.skip("go-md2man is not installed: make setup")
    run = subprocess.run(
        ["make", "--no-print-directory", target, *settings],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation as the Debian package makes it, written under a umask that would hide everything."""
    destination = tmp_path_factory.mktemp("install")
    before = os.umask(0o077)
    try:
        folders = (f"PYTHONDIR=/{PACKAGES}", "ZSHDIR=/usr/share/zsh/vendor-completions")
        make("install", f"DESTDIR={destination}", "PREFIX=/usr", *folders)
    finally:
        os.umask(before)
    return destination


def test_exactly_these_files(tree: Path) -> None:
    """Nothing more, nothing less, and nothing in /etc."""
    assert installed(tree) == FILES | python_files()


def test_another_prefix_keeps_the_daemons_folders(tmp_path: Path) -> None:
    """With PREFIX=/opt/ql programs move, what daemons (udev and others) read does not, and paths follow."""
    make("install", f"DESTDIR={tmp_path}", "PREFIX=/opt/ql")
    files = installed(tmp_path)
    fixed = [name for name in FILES if re.search(r"dbus-1|polkit-1|lib/systemd|sysusers|udev", name)]
    assert len(fixed) == 10
    assert set(fixed) <= set(files)
    assert all(name.startswith("opt/ql/") for name in set(files) - set(fixed))
    unit = (tmp_path / "usr/lib/systemd/system/qemu-launcher-helper.service").read_text()
    assert re.search(r"^ExecStart=/opt/ql/libexec/qemu-launcher-helper --serve$", unit, re.MULTILINE)
    assert "/usr/libexec" not in unit
    service = (tmp_path / "usr/lib/systemd/user/qemu-launcher@.service").read_text()
    assert re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE) == ["/opt/ql/bin/qemu-launcher run -- %i"]
    for entry in ("bin/qemu-launcher", "libexec/qemu-launcher-helper"):
        assert 'PACKAGES = "/opt/ql/lib/qemu-launcher"' in (tmp_path / "opt/ql" / entry).read_text()
    # And whoever is sent to the examples finds them.
    pointing = [path for path in tmp_path.rglob("*") if path.is_file() and "doc/qemu-launcher/ex" in path.read_text()]
    assert len(pointing) > 5
    for path in pointing:
        assert "/usr/share/doc/qemu-launcher" not in path.read_text(), path
        assert "/opt/ql/share/doc/qemu-launcher/examples" in path.read_text(), path


def test_folders_that_are_there_keep_their_modes(tmp_path: Path) -> None:
    """polkit's folder of rules is closed to others on Debian 12; /usr/local's belong to a group on some hosts."""
    rules = tmp_path / "usr/share/polkit-1/rules.d"
    rules.mkdir(parents=True)
    rules.chmod(0o700)
    make("install", f"DESTDIR={tmp_path}", "PREFIX=/opt/ql")
    assert stat.S_IMODE(rules.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "opt/ql/bin").stat().st_mode) == 0o755


def test_its_own_modules_come_before_an_older_packages(tmp_path: Path) -> None:
    """`make install` beside the distribution's package: the program runs with the modules that came with it."""
    for folder in ("older/dist-packages", "own"):
        (tmp_path / folder / "qemu_launcher").mkdir(parents=True)
        (tmp_path / folder / "qemu_launcher/__init__.py").touch()
        (tmp_path / folder / "qemu_launcher/__main__.py").write_text(f"main = lambda: print({folder!r})\n")
    script = (ROOT / "launcher/qemu-launcher").read_text()
    script = script.replace('PACKAGES = "/usr/lib/python3/dist-packages"', f'PACKAGES = "{tmp_path}/own"')
    script = script.replace("import sys\n", f"import sys\nsys.path.append('{tmp_path}/older/dist-packages')\n", 1)
    (tmp_path / "script").write_text(script)
    run = subprocess.run(["/usr/bin/python3", "-I", tmp_path / "script"], capture_output=True, text=True, check=False)
    assert run.stdout == "own\n", run.stderr


def test_uninstall_removes_every_file(tmp_path: Path) -> None:
    """The same variables, and no file is left."""
    make("install", f"DESTDIR={tmp_path}", "PREFIX=/opt/ql")
    assert installed(tmp_path)
    make("uninstall", f"DESTDIR={tmp_path}", "PREFIX=/opt/ql")
    assert installed(tmp_path) == {}


def test_what_starts_the_helper_exists(tree: Path) -> None:
    """The unit's ExecStart and the activation file's SystemdService name what is installed."""
    unit = (tree / "usr/lib/systemd/system/qemu-launcher-helper.service").read_text()
    started = re.findall(r"^ExecStart=(\S+)", unit, re.MULTILINE)
    assert started == ["/usr/libexec/qemu-launcher-helper"]
    assert str(Path(started[0]).relative_to("/")) in FILES
    activation = (tree / "usr/share/dbus-1/system-services/org.qemulauncher.Helper1.service").read_text()
    assert re.findall(r"^SystemdService=(.*)$", activation, re.MULTILINE) == ["qemu-launcher-helper.service"]
    assert re.findall(r"^Name=(.*)$", activation, re.MULTILINE) == ["org.qemulauncher.Helper1"]


def test_what_the_users_unit_starts_exists(tree: Path, tmp_path: Path) -> None:
    """Its ExecStart is the installed program, and systemd has nothing to say about the unit."""
    path = tree / "usr/lib/systemd/user/qemu-launcher@.service"
    started = re.findall(r"^ExecStart=(\S+)", path.read_text(), re.MULTILINE)
    assert started == ["/usr/bin/qemu-launcher"]
    assert str(Path(started[0]).relative_to("/")) in FILES
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = path.read_text().replace("/usr/bin/qemu-launcher", f"{tree}/usr/bin/qemu-launcher")
    assert _said_by_systemd(text, tmp_path) == []
    assert len(_said_by_systemd(f"{text}Wanted=yes\n", tmp_path)) == 1, "what would be said is not seen"


def _said_by_systemd(unit: str, place: Path) -> list[str]:
    instance = place / "qemu-launcher@win-11.service"
    instance.write_text(unit)
    run = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(instance)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(place)},  # without one it looks at nothing
        capture_output=True,
        text=True,
        check=False,
    )
    return [line for line in run.stderr.splitlines() if instance.name in line]


def test_desktop_entry(tree: Path) -> None:
    """The example of a menu entry is one, by the desktop's own checker."""
    if shutil.which("desktop-file-validate") is None:
        pytest.skip("desktop-file-validate is not installed: make setup")
    path = tree / "usr/share/doc/qemu-launcher/examples/win11.desktop"
    run = subprocess.run(["desktop-file-validate", str(path)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout


def test_the_group_of_the_policy_is_the_group_that_is_made(tree: Path) -> None:
    """An unknown group voids its rule in the bus policy, so the two names must be one."""
    policy = (tree / "usr/share/dbus-1/system.d/org.qemulauncher.Helper1.conf").read_text()
    sysusers = (tree / "usr/lib/sysusers.d/qemu-launcher.conf").read_text()
    assert set(re.findall(r'group="([^"]+)"', policy)) == {"qemu-launcher"}
    assert re.findall(r"^g (\S+) ", sysusers, re.MULTILINE) == ["qemu-launcher"]


@pytest.mark.parametrize(
    ("script", "package", "options"),
    [
        ("launcher/qemu-launcher", "qemu_launcher", "-IXutf8"),
        ("helper/qemu-launcher-helper", "qemu_launcher_helper", "-IS"),
    ],
)
def test_entry_script_takes_packages_from_the_distribution_only(
    script: str, package: str, options: str, tmp_path: Path
) -> None:
    """Isolated, and without /usr/local: shown by running the script with a stand-in for the package.

    The positive control is the stand-in itself: it runs, from PACKAGES, and prints the path it was given.
    """
    text = (ROOT / script).read_text()
    assert text.splitlines()[0] == f"#!/usr/bin/python3 {options}"
    stand_in = tmp_path / "packages" / package
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "__main__.py").write_text(
        "import sys\n\ndef main():\n    print(sys.flags.isolated, *sys.path, sep='\\n')\n    return 7\n"
    )
    planted = tmp_path / "planted"
    (planted / package).mkdir(parents=True)
    (planted / package / "__init__.py").write_text("raise SystemExit(99)\n")
    entry = tmp_path / "entry"
    packages = f'PACKAGES = "{tmp_path}/packages"'
    entry.write_text(re.sub("^PACKAGES = .*$", packages, text, flags=re.MULTILINE))
    entry.chmod(0o755)
    run = subprocess.run(
        [str(entry)],
        cwd=planted,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(planted), "HOME": str(planted)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert run.returncode == 7
    isolated, *path = run.stdout.splitlines()
    assert isolated == "1"
    assert str(tmp_path / "packages") in path
    assert not [folder for folder in path if folder.startswith("/usr/local/")]
    assert str(planted) not in path


def test_usr_local_would_come_first_without_the_entry_script() -> None:
    """Why the scripts take it out: Debian's isolated Python looks into /usr/local before its own packages."""
    code = "import sys; print(*sys.path, sep='\\n')"
    run = subprocess.run(["/usr/bin/python3", "-I", "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    path = run.stdout.splitlines()
    local = [number for number, folder in enumerate(path) if folder.startswith("/usr/local/")]
    if not local:
        pytest.skip("optional: this machine has no /usr/local dist-packages folder")
    assert local[0] < path.index("/usr/lib/python3/dist-packages")


@pytest.mark.parametrize("name", ["first.yml", "tpm.yml", "tuned.yml", "vfio.yml"])
def test_example_definitions_are_accepted(name: str) -> None:
    """What the documentation shows, the program takes: each example gives a command line."""
    run = subprocess.run(
        ["/usr/bin/python3", "-m", "qemu_launcher", "command", f"./{name}"],
        cwd=ROOT / "launcher/examples",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "launcher"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("qemu-system-x86_64 ")
