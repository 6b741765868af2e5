"""The Debian package as a file: contents, owners, modes, scripts, and that building it twice gives the same bytes."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from package.building import need, run
from package.contents import FILES, ROOT, python_files

DOCS = "usr/share/doc/qemu-launcher/"
# What debhelper adds to what the Makefile installs.
ADDED = {
    f"{DOCS}changelog.gz": 0o644,
    f"{DOCS}copyright": 0o644,
    "usr/share/lintian/overrides/qemu-launcher": 0o644,
}


@pytest.fixture(scope="module")
def deb() -> Path:
    """The package, built by `make deb` from the tree as it is."""
    need("dpkg-buildpackage", "dh", "dh_python3", "go-md2man")
    run("make", "--no-print-directory", "deb")
    return ROOT / run("make", "--no-print-directory", "-s", "deb-path").strip()


def mode(text: str) -> int:
    """`-rw-r--r--` as a number."""
    return sum(1 << (8 - place) for place, letter in enumerate(text[1:10]) if letter != "-")


def test_contents_owners_and_modes(deb: Path) -> None:
    """Exactly the installed files, all root's, none writable by others, none setuid, nothing in /etc."""
    files: dict[str, int] = {}
    for line in run("dpkg-deb", "--contents", deb).splitlines():
        kind, owner, _size, _date, _time, name = line.split(None, 5)
        assert owner == "root/root", line
        if kind[0] == "d":
            assert kind == "drwxr-xr-x", line
            continue
        if kind[0] == "l":
            assert line.endswith("./usr/sbin/qemu-launcher-helper -> ../libexec/qemu-launcher-helper"), line
            name = name.partition(" -> ")[0]
        else:
            assert kind[0] == "-", f"not a plain file: {line}"
        assert not set(kind) & set("sStT"), line
        files[name.removeprefix("./")] = mode(kind)
    pages = {name: bits for name, bits in FILES.items() if "/man/" in name}
    expected = {name: bits for name, bits in FILES.items() if name not in pages}
    expected |= {f"{name}.gz": bits for name, bits in pages.items()} | python_files() | ADDED
    assert files == expected


def test_no_conffiles(deb: Path, tmp_path: Path) -> None:
    """No file in /etc: an administrator's helper.toml is his own, and an upgrade never asks about it."""
    run("dpkg-deb", "--control", deb, tmp_path)
    assert not (tmp_path / "conffiles").exists()


def test_group_exists_before_the_bus_reads_its_policy(deb: Path, tmp_path: Path) -> None:
    """In the built postinst, sysusers comes before the reload of the bus, and each script is sound for sh."""
    run("dpkg-deb", "--control", deb, tmp_path)
    postinst = (tmp_path / "postinst").read_text()
    group = re.search(r"^\s*systemd-sysusers .*qemu-launcher\.conf", postinst, re.MULTILINE)
    reload = re.search(r"/usr/libexec/qemu-launcher-handover changed", postinst)
    assert "ReloadConfig" in (ROOT / "helper/qemu-launcher-handover").read_text()
    assert group is not None
    assert reload is not None
    assert group.start() < reload.start()
    for script in (
        tmp_path / "postinst",
        tmp_path / "prerm",
        tmp_path / "postrm",
        ROOT / "helper/qemu-launcher-handover",
    ):
        run("sh", "-n", script)


def test_dependencies(deb: Path) -> None:
    """What the programs import, the bus and polkit are required; QEMU is a recommendation, as there are many QEMUs."""
    fields = {name: run("dpkg-deb", "--field", deb, name).strip() for name in ("Depends", "Recommends", "Architecture")}
    names = {re.split(r"[ |(:]", entry.strip())[0] for entry in fields["Depends"].split(",")}
    assert {"python3-yaml", "python3-prctl", "python3-dbus-next", "python3-rich", "polkitd", "python3"} <= names
    assert "default-dbus-system-bus" in names
    assert "qemu-system-x86" in fields["Recommends"]
    assert fields["Architecture"] == "all"


def test_versions_agree(deb: Path) -> None:
    """pyproject's version is the package's, and what both programs say of themselves."""
    metadata = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"$', metadata, re.MULTILINE)
    assert version is not None
    assert run("dpkg-deb", "--field", deb, "Version").strip() == version[1]
    for module in ("launcher/qemu_launcher/cli.py", "helper/qemu_launcher_helper/contract.py"):
        assert f'\nVERSION = "{version[1]}"\n' in (ROOT / module).read_text(), module
    assert f"\n## {version[1]} " in (ROOT / "CHANGELOG.md").read_text()


def test_build_is_reproducible_and_leaves_no_junk(deb: Path, tmp_path: Path) -> None:
    """Built again from a copy elsewhere, under another umask: the same bytes; and debian/ holds its sources only."""
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for name in ("launcher", "helper", "dbus", "polkit", "debian"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy / name)
    before = sorted(path.name for path in (copy / "debian").rglob("*"))
    run("sh", "-c", "umask 027; exec make --no-print-directory deb", cwd=copy)
    assert sorted(path.name for path in (copy / "debian").rglob("*")) == before
    again = next((copy / "build").glob("qemu-launcher_*.deb"))
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(deb.read_bytes()).digest()


def test_lintian_is_silent(deb: Path) -> None:
    """Debian's checker has no warning; what it misjudges is overridden with a reason in debian/."""
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed: make setup")
    argv = [
        "lintian",
        "--no-cfg",
        "--info",
        "--display-info",
        "--pedantic",
        "--fail-on",
        "error,warning,info",
        str(deb),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
