"""The packages for Fedora and Arch Linux, really built here from the source archive, and held to what Debian's has.

Built by rpmbuild and makepkg as Debian has them, by a user who is not root, without a look at dependencies: those have
other names. What only the distributions themselves can show is listed in packaging/README.md.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from package.building import need, run
from package.contents import FILES, PACKAGES, ROOT, python_files

SPEC = ROOT / "packaging/rpm/qemu-launcher.spec"
ARCH = ROOT / "packaging/arch"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]

# What each Python dependency is called there. A new one in pyproject.toml has to be looked up.
NAMES = {
    "PyYAML": ("python3-pyyaml", "python-yaml"),
    "python-prctl": ("python3-prctl", "python-prctl"),
    "dbus-next": ("python3-dbus-next", "python-dbus-next"),
    "rich": ("python3-rich", "python-rich"),
}
# Who builds, where the tests run as root: makepkg refuses root, and rpmbuild needs none.
NOBODY = 65534

# What systemd-rpm-macros makes of the scriptlets, in short: systemd's own script does the work.
MACROS = r"""
%update_helper /usr/lib/systemd/systemd-update-helper
%systemd_post() [ $1 -ne 1 ] || %{update_helper} install-system-units %{*} || :
%systemd_preun() [ $1 -ne 0 ] || %{update_helper} remove-system-units %{*} || :
%systemd_postun_with_restart() [ $1 -lt 1 ] || %{update_helper} mark-restart-system-units %{*} || :
"""


class Entry(NamedTuple):
    """A file in a package."""

    mode: int
    owner: str
    target: str


class Tree(NamedTuple):
    """The source archive, unpacked where an ordinary user may build it."""

    path: Path
    macros: Path

    def run(self, *argv: str, umask: str = "022") -> str:
        """Run a program in there as that user, with an environment that has nothing of ours."""
        drop = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups") if os.geteuid() == 0 else ()
        bare = ("env", "-i", "PATH=/usr/bin:/bin", f"HOME={self.path.parent}", "LC_ALL=C.UTF-8")
        shell = ("sh", "-c", f'umask {umask}; exec "$@"', "sh")
        return run(*drop, *bare, *shell, *argv, cwd=self.path)

    def rpm(self, umask: str = "022") -> Path:
        """Build the package for Fedora."""
        self.run("make", "rpm", f"RPMBUILD=rpmbuild --nodeps --load {self.macros}", umask=umask)
        return self.path / f"build/rpm/RPMS/noarch/qemu-launcher-{VERSION}-1.noarch.rpm"

    def arch(self, umask: str = "022") -> Path:
        """Build the package for Arch Linux."""
        self.run("make", "arch", "MAKEPKG=makepkg --nodeps", umask=umask)
        return next((self.path / "build/arch").glob(f"qemu-launcher-{VERSION}-1-any.pkg.tar*"))


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """The archive of `make dist`, which has to be all that a build needs. Not in pytest's folder: that is root's."""
    need("go-md2man", "rpmbuild", "makepkg", "pacman", "bsdtar", "fakeroot")
    run("make", "--no-print-directory", "dist")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        macros = place / "macros"
        macros.write_text(MACROS)
        run("bsdtar", "--extract", "--file", ROOT / f"build/qemu-launcher-{VERSION}.tar.gz", "--directory", place)
        if os.geteuid() == 0:
            for path in (place, *place.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        yield Tree(place / f"qemu-launcher-{VERSION}", macros)


@pytest.fixture(scope="module")
def rpm(tree: Tree) -> Path:
    """The package for Fedora."""
    return tree.rpm()


@pytest.fixture(scope="module")
def arch(tree: Tree) -> Path:
    """The package for Arch Linux."""
    return tree.arch()


def _query(package: Path, tmp_path: Path, *what: str) -> list[str]:
    return run("rpm", "--dbpath", tmp_path / "db", "--query", "--package", package, *what).splitlines()


def _in_rpm(package: Path, tmp_path: Path) -> dict[str, Entry]:
    fields = "[%{FILENAMES}\t%{FILEMODES:octal}\t%{FILEUSERNAME}:%{FILEGROUPNAME}\t%{FILELINKTOS}\n]"
    lines = (line.split("\t") for line in _query(package, tmp_path, "--queryformat", fields))
    return {name.lstrip("/"): Entry(int(mode, 8), owner, target) for name, mode, owner, target in lines}


def _in_arch(package: Path) -> dict[str, Entry]:
    kinds = {tarfile.REGTYPE: 0o100000, tarfile.SYMTYPE: 0o120000, tarfile.DIRTYPE: 0o040000}
    with tarfile.open(package) as archive:
        return {
            member.name: Entry(kinds[member.type] | member.mode, f"{member.uid}:{member.gid}", member.linkname)
            for member in archive
        }


def _as_debian(entries: dict[str, Entry], modules: str, renamed: dict[str, str]) -> dict[str, int]:
    """Files and modes, under the names that Debian's package has for them; no bytecode, which Debian makes later."""
    found = {}
    for name, entry in entries.items():
        if entry.mode & 0o170000 == 0o040000 or "/__pycache__/" in name:
            continue
        place = renamed.get(name, name)
        place = place.replace(f"{modules}/qemu_launcher", f"{PACKAGES}/qemu_launcher")
        place = place.replace("/zsh/site-functions/", "/zsh/vendor-completions/")
        if "/man/" in place:  # whether pages are compressed is the distribution's business
            place = place.removesuffix(".gz")
        found[place] = entry.mode & 0o7777
    return found


# In both, and nowhere in Debian's: that has a copyright file, and a changelog of its own.
DOCUMENTS = {
    "usr/share/licenses/qemu-launcher/LICENSE": 0o644,
    "usr/share/doc/qemu-launcher/README.md": 0o644,
    "usr/share/doc/qemu-launcher/CHANGELOG.md": 0o644,
}


def test_rpm_has_debians_files(rpm: Path, tmp_path: Path) -> None:
    """The same files with the same modes, all root's, none in /etc; folders only where they are the package's own."""
    entries = _in_rpm(rpm, tmp_path)
    assert {entry.owner for entry in entries.values()} == {"root:root"}
    assert _as_debian(entries, "usr/share/qemu-launcher", {}) == FILES | python_files() | DOCUMENTS
    assert entries["usr/sbin/qemu-launcher-helper"].target == "../libexec/qemu-launcher-helper"
    folders = {name: entry.mode & 0o7777 for name, entry in entries.items() if entry.mode & 0o170000 == 0o040000}
    assert set(folders.values()) == {0o755}
    own = r"usr/(share/(doc/|licenses/)?qemu-launcher(/|$)|lib/systemd/system/qemu-\.slice\.d$)"
    assert all(re.match(own, name) for name in folders)


def test_arch_has_debians_files(arch: Path) -> None:
    """The same files with the same modes, all root's, none in /etc; nothing in folders that Arch does not have."""
    entries = _in_arch(arch)
    metadata = {".BUILDINFO", ".INSTALL", ".MTREE", ".PKGINFO"}
    assert metadata <= set(entries)
    inside = {name: entry for name, entry in entries.items() if name not in metadata}
    rules = "usr/share/polkit-1/rules.d"
    assert {entry.owner for name, entry in inside.items() if name != rules} == {"0:0"}
    # As polkit's own package there has it.
    assert inside[rules] == Entry(0o040750, "0:102", "")
    renamed = {
        "usr/lib/qemu-launcher/qemu-launcher-helper": "usr/libexec/qemu-launcher-helper",
        "usr/lib/qemu-launcher/qemu-launcher-handover": "usr/libexec/qemu-launcher-handover",
        "usr/bin/qemu-launcher-helper": "usr/sbin/qemu-launcher-helper",
    }
    assert _as_debian(inside, "usr/lib/qemu-launcher", renamed) == FILES | python_files() | DOCUMENTS
    assert inside["usr/bin/qemu-launcher-helper"].target == "../lib/qemu-launcher/qemu-launcher-helper"
    assert not [name for name in inside if re.match(r"usr/(sbin|libexec|local|lib64)(/|$)|(?!usr(/|$))", name)]


@pytest.mark.parametrize(
    ("kind", "modules", "helper"),
    [
        ("rpm", "usr/share/qemu-launcher", "usr/libexec/qemu-launcher-helper"),
        ("arch", "usr/lib/qemu-launcher", "usr/lib/qemu-launcher/qemu-launcher-helper"),
    ],
)
def test_what_starts_finds_what_is_installed(
    kind: str, modules: str, helper: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Entry scripts name the modules' folder, unit and bus the helper; bytecode survives new times."""
    run("bsdtar", "--extract", "--file", request.getfixturevalue(kind), "--directory", tmp_path)
    for script in ("usr/bin/qemu-launcher", helper):
        assert f'\nPACKAGES = "/{modules}"\n' in (tmp_path / script).read_text()
    unit = (tmp_path / "usr/lib/systemd/system/qemu-launcher-helper.service").read_text()
    assert re.findall(r"^ExecStart=(\S+)", unit, re.MULTILINE) == [f"/{helper}"]
    bus = (tmp_path / "usr/share/dbus-1/system-services/org.qemulauncher.Helper1.service").read_text()
    assert re.findall(r"^Exec=(\S+)", bus, re.MULTILINE) == [f"/{helper}"]
    user = (tmp_path / "usr/lib/systemd/user/qemu-launcher@.service").read_text()
    assert re.findall(r"^ExecStart=(\S+)", user, re.MULTILINE) == ["/usr/bin/qemu-launcher"]
    for source in (tmp_path / modules).rglob("*.py"):
        (compiled,) = (source.parent / "__pycache__").glob(f"{source.stem}.cpython-*.pyc")
        content = compiled.read_bytes()
        assert content[4:8] == b"\x03\0\0\0", "not compared by the source's contents"
        # The path that a traceback shows is the installed one.
        assert str(tmp_path).encode() not in content
        assert f"/{source.relative_to(tmp_path)}".encode() in content
    # With its modules where they lie now, the installed program runs.
    program = (tmp_path / "usr/bin/qemu-launcher").read_text().replace(f'"/{modules}"', f'"{tmp_path / modules}"')
    here = tmp_path / "program"
    here.write_text(program)
    assert run("/usr/bin/python3", "-I", here, "--version") == f"qemu-launcher {VERSION}\n"


def test_rpm_requirements(rpm: Path, tmp_path: Path) -> None:
    """What the programs import, the bus and polkit are required under Fedora's names; QEMU and virsh are not."""
    required = {line.split(" ")[0] for line in _query(rpm, tmp_path, "--requires")}
    python = {NAMES[name][0] for name in _dependencies()}
    assert python | {"python3", "dbus", "polkit", "systemd", "shadow-utils"} <= required
    # All else comes from the contents: interpreters, and rpm's own features.
    rest = required - python - {"python3", "dbus", "polkit", "systemd", "shadow-utils", "/bin/sh", "/usr/bin/python3"}
    assert all(name.startswith(("rpmlib(", "group(")) for name in rest), rest
    assert _query(rpm, tmp_path, "--recommends") == ["(qemu-system-x86-core or qemu-kvm)"]
    assert _query(rpm, tmp_path, "--suggests") == ["libvirt-client"]
    assert _query(rpm, tmp_path, "--queryformat", "%{ARCH} %{LICENSE}") == ["noarch GPL-3.0-or-later"]


def test_rpm_scripts(rpm: Path, tmp_path: Path) -> None:
    """The group is made before the files are there, once; the helper goes with the package or for a new one."""
    scripts = {
        name: "\n".join(_query(rpm, tmp_path, "--queryformat", f"%{{{name}}}"))
        for name in ("PREIN", "POSTIN", "PREUN", "POSTUN")
    }
    for name, text in scripts.items():
        path = tmp_path / name
        path.write_text(text)
        run("sh", "-n", path)
        assert not re.search(r"%\w", text), f"a macro that is none: {text}"
    removing = "/usr/libexec/qemu-launcher-handover removing"
    assert scripts["PREUN"].index(removing) < scripts["PREUN"].index("remove-system-units qemu-launcher-helper.service")
    assert "mark-restart-system-units qemu-launcher-helper.service" in scripts["POSTUN"]
    called = tmp_path / "called"
    for tool in ("getent", "groupadd"):
        stub = tmp_path / "bin" / tool
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\necho "{tool} $*" >> {called}\n[ {tool} = groupadd ] || exit "$KNOWN"\n')
        stub.chmod(0o755)
    for known, calls in (("0", ["getent"]), ("2", ["getent", "groupadd"])):
        called.unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "KNOWN": known}
        subprocess.run(["/bin/sh", tmp_path / "PREIN", "1"], env=environment, check=True)
        assert [line.split()[0] for line in called.read_text().splitlines()] == calls
    assert "groupadd --system qemu-launcher" in called.read_text().splitlines()


def test_arch_metadata(arch: Path) -> None:
    """.PKGINFO: version, licence, and dependencies under Arch's names; .INSTALL: its functions, and a hint."""
    with tarfile.open(arch) as archive:
        text = {name: _text(archive, name) for name in (".PKGINFO", ".INSTALL")}
    fields = re.findall(r"^(\w+) = (.*)$", text[".PKGINFO"], re.MULTILINE)
    assert dict(fields)["pkgver"] == f"{VERSION}-1"
    assert dict(fields)["arch"] == "any"
    assert dict(fields)["license"] == "GPL-3.0-or-later"
    depends = {re.split("[<>=]", value)[0] for name, value in fields if name == "depend"}
    assert depends == {NAMES[name][1] for name in _dependencies()} | {"python", "dbus", "polkit", "systemd"}
    functions = re.findall(r"^(\w+)\(\)", text[".INSTALL"], re.MULTILINE)
    assert functions == ["post_install", "post_upgrade", "pre_remove"]
    with tarfile.open(arch) as archive:
        for called in re.findall(r"/(\S*handover)", text[".INSTALL"]):
            assert archive.getmember(called).mode & 0o111
    hint = run("bash", "-euc", f"{text['.INSTALL']}\npost_install")
    assert "usermod -aG qemu-launcher NAME" in hint


def _text(archive: tarfile.TarFile, name: str) -> str:
    file = archive.extractfile(name)
    assert file is not None
    return file.read().decode()


def _dependencies() -> list[str]:
    return [re.split("[<>=]", entry)[0] for entry in PROJECT["dependencies"]]


def test_versions_and_names_agree() -> None:
    """Both recipes build pyproject's version and know its dependencies; the spec's newest change is it."""
    assert set(NAMES) == set(_dependencies())
    spec = SPEC.read_text()
    recipe = (ARCH / "PKGBUILD").read_text()
    assert re.findall(r"^Version: +(\S+)$", spec, re.MULTILINE) == [VERSION]
    assert re.findall(r"^pkgver=(\S+)$", recipe, re.MULTILINE) == [VERSION]
    assert re.findall(r"^\* .* - (\S+)$", spec.partition("\n%changelog\n")[2], re.MULTILINE)[0] == f"{VERSION}-1"
    needed = PROJECT["requires-python"].removeprefix(">=")
    assert f"\nRequires:       python3 >= {needed}\n" in spec
    assert f"'python>={needed}'" in recipe


def test_builds_are_reproducible(tree: Tree, rpm: Path, arch: Path) -> None:
    """Archive and both packages come out the same from files with other times and under another umask."""
    built = [tree.path / f"build/qemu-launcher-{VERSION}.tar.gz", rpm, arch]
    before = [_digest(path) for path in built]
    assert before[0] == _digest(ROOT / f"build/qemu-launcher-{VERSION}.tar.gz")
    shutil.rmtree(tree.path / "build")
    for path in tree.path.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    assert [tree.rpm("027"), tree.arch("027")] == [rpm, arch]
    assert [_digest(path) for path in built] == before


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_rpmlint_is_silent(rpm: Path) -> None:
    """The checker has nothing to say of spec and package but what rpmlint.toml explains."""
    need("rpmlint")
    done = subprocess.run(
        ["rpmlint", "--config", str(SPEC.with_name("rpmlint.toml")), str(SPEC), str(rpm)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert "1 packages and 1 specfiles checked" in done.stdout, done.stdout + done.stderr
    assert re.findall(r"^\S+: [EWI]: .*$", done.stdout, re.MULTILINE) == []
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_is_silent() -> None:
    """The shell of the recipe for Arch."""
    need("shellcheck")
    assert run("shellcheck", ARCH / "PKGBUILD", ARCH / "qemu-launcher.install") == ""
