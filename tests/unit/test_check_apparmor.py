"""swtpm under Ubuntu's AppArmor profile: paths that it may use, and others."""

import shlex
from pathlib import Path

import pytest

from qemu_launcher.check import apparmor
from qemu_launcher.check.finding import Finding
from unit.other_host import OtherHost, the_only
from unit.reading import ROOT, launcher

FOLDER = Path("/var/lib/vms/win11")
# Words of Ubuntu's, as far as they are about files.
PROFILE = """\
#include <tunables/global>
profile swtpm /usr/bin/swtpm {
  #include <abstractions/base>
  # Site-specific additions and overrides. See local/README for details.
  #include <local/usr.bin.swtpm>
  capability chown,
  network inet stream,
  unix (send, receive) type=stream addr=none peer=(label=libvirt-*),
  /usr/bin/swtpm rm,
  /tmp/** rwk,
  owner @{HOME}/** rwk,
  owner /var/lib/libvirt/swtpm/** rwk,
  /run/libvirt/qemu/swtpm/*.sock rwk,
  owner /var/log/swtpm/libvirt/qemu/*.log rwk,
  owner /dev/vtpmx rw,
  owner /etc/nsswitch.conf r,
  owner /var/lib/swtpm/** rwk,
  owner /run/swtpm/sock rw,
}
"""
WIN11 = (
    "before_start: [[swtpm, socket, --tpm2, --tpmstate, dir=/var/lib/vms/win11/tpm, "
    '--ctrl, "type=unixio,path=tpm.sock", --pid, file=/var/lib/vms/win11/tpm.pid, --daemon]]'
)


@pytest.fixture
def ubuntu(tmp_path: Path) -> OtherHost:
    host = OtherHost(tmp_path)
    host.write("/usr/bin/swtpm")
    host.write("/etc/apparmor.d/usr.bin.swtpm", PROFILE)
    host.write("/etc/apparmor.d/local/usr.bin.swtpm", "# Site-specific additions\n")
    host.write("/sys/module/apparmor/parameters/enabled", "Y\n")
    return host


def found(host: OtherHost, keys: str, place: str | None = "/usr/bin", home: str = "/srv/people/alice") -> list[Finding]:
    def where(program: str) -> str | None:
        return place and f"{place}/{program.rpartition('/')[2]}"

    return list(apparmor.swtpm(host.tree, launcher(keys), where, FOLDER, home))


def state(path: str) -> str:
    return f"before_start: [[swtpm, socket, --tpmstate, 'dir={path}']]"


def test_a_folder_that_it_may_not_use(ubuntu: OtherHost) -> None:
    severity, text, fix = the_only(found(ubuntu, WIN11))
    assert severity == "warning"
    assert text == (
        "win11.yml:3:18: AppArmor keeps swtpm out of /var/lib/vms/win11 (/etc/apparmor.d/usr.bin.swtpm): "
        "it ends with Permission denied"
    )
    assert fix == (
        "echo 'owner /var/lib/vms/win11/** rwk,' | sudo tee -a /etc/apparmor.d/local/usr.bin.swtpm\n"
        "sudo apparmor_parser -r /etc/apparmor.d/usr.bin.swtpm"
    )


@pytest.mark.parametrize("path", ["launcher/man/qemu-launcher.yml.5.md", "launcher/examples/vfio.yml"])
def test_the_same_lines_are_in_the_manual_and_in_the_example(ubuntu: OtherHost, path: str) -> None:
    """There for the folder of all VMs."""
    text = (ROOT / path).read_text()
    for line in the_only(found(ubuntu, WIN11))[2].splitlines():
        assert f"   {line.replace('/win11/**', '/**')}\n" in text


@pytest.mark.parametrize("line", ["owner /var/lib/vms/** rwk,", "/var/lib/vms/{win10,win11}/** rwkl,  # mine"])
def test_what_the_administrator_has_added(ubuntu: OtherHost, line: str) -> None:
    """The fix is the end of it."""
    ubuntu.write("/etc/apparmor.d/local/usr.bin.swtpm", f"# Site-specific additions\n{line}\n")
    assert found(ubuntu, WIN11) == []


@pytest.mark.parametrize(
    "line",
    [
        "owner /var/lib/vms/** r,",
        "owner /var/lib/vms/* rwk,",
        "#/var/lib/vms/** rwk,",
        "deny /var/lib/vms/** rwk,",
        "r /var/lib/vms/**,",
        "/var/lib/vms/[^w]*/** rwk,",
        "/var/lib/vms/[0-9]*/** rwk,",
        "/var/lib/vms/[z-a]*/** rwk,",
        "/var/lib/@{vm}/*.pid rwk,",
        '"/var/lib/vms/\\*/**" rwk,',
        "@{run}/vms/** rwk,",
    ],
)
def test_what_does_not_help(ubuntu: OtherHost, line: str) -> None:
    ubuntu.write("/etc/apparmor.d/local/usr.bin.swtpm", f"{line}\n")
    assert len(found(ubuntu, WIN11)) == 1


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("/run/user/[0-9]*/qemu/** rwk,", "/run/user/1000/qemu/tpm"),
        ("/run/user/[^a-z]*/qemu/** rwk,", "/run/user/1000/qemu/tpm"),
        ("/data/[a\\]&&[]/** rwk,", "/data/]/tpm"),
        ("owner @{run}/user/@{uid}/qemu/** rwk,", "/run/user/1000/qemu/tpm"),
        ("rwk /data/tpm/**,", "/data/tpm"),
        ("owner file rwk /data/{t,u}pm/** ,", "/data/tpm"),
        ('owner "/srv/My VMs/**" rwk,', "/srv/My VMs/tpm"),
        ('rwk "/srv/My VMs/**",', "/srv/My VMs/tpm"),
        (r"/srv/My\ VMs/** rwk,", "/srv/My VMs/tpm"),
        ("/data/a.b+c/** rwk,", "/data/a.b+c"),
        ("/* rwk,", "/"),
    ],
)
def test_rules_as_apparmor_takes_them(ubuntu: OtherHost, line: str, path: str) -> None:
    assert len(found(ubuntu, state(path))) == 1
    ubuntu.write("/etc/apparmor.d/local/usr.bin.swtpm", f"{line}\n")
    assert found(ubuntu, state(path)) == []


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("/srv/My VMs/tpm", 'owner "/srv/My VMs/tpm/**" rwk,'),
        ("/srv/it's/tpm", 'owner "/srv/it\'s/tpm/**" rwk,'),
        ("/srv/[1]{b}*?/tpm", r'owner "/srv/\[1\]\{b\}\*?/tpm/**" rwk,'),
        ('/srv/"@{run}"/tpm', r'owner "/srv/\"@\{run\}\"/tpm/**" rwk,'),
        ("/srv/vm-1.d/tpm_é", "owner /srv/vm-1.d/tpm_é/** rwk,"),
    ],
)
def test_a_path_that_is_to_be_quoted(ubuntu: OtherHost, path: str, rule: str) -> None:
    """apparmor_parser 3.0 reads these as the path itself, ? as any character; with the line it is well."""
    keys = state(path.replace("'", "''"))
    first = the_only(found(ubuntu, keys))[2].splitlines()[0]
    assert shlex.split(first) == ["echo", rule, "|", "sudo", "tee", "-a", "/etc/apparmor.d/local/usr.bin.swtpm"]
    ubuntu.write("/etc/apparmor.d/local/usr.bin.swtpm", f"{rule}\n")
    assert found(ubuntu, keys) == []


@pytest.mark.parametrize("home", ["/srv/people/alice/", "//srv/people/alice"])
def test_a_home_that_is_written_otherwise(ubuntu: OtherHost, home: str) -> None:
    assert found(ubuntu, state("/srv/people/alice/tpm"), home=home) == []


@pytest.mark.parametrize("path", ["//data/tpm", "//home/../data/tpm"])
def test_a_path_with_two_slashes(ubuntu: OtherHost, path: str) -> None:
    [one] = found(ubuntu, state(path))
    assert "out of /data/tpm " in one.text
    ubuntu.folder("/data")
    [one] = found(ubuntu, state(path))
    assert "out of /data/tpm " in one.text


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("/home/alice/vms/tpm", True),
        ("/home/alice", True),
        ("/root/tpm", True),
        ("/srv/people/alice/tpm", True),
        ("/srv/people/bob/tpm", False),
        ("/tmp/tpm", True),
        ("/tmp", True),
        ("/var/lib/swtpm/win11", True),
        ("/var/lib/libvirt/swtpm/win11", True),
        ("/home", False),
        ("/data", False),
        ("/home/../data", False),
        ("tpm", False),
        ("../../../../home/alice/tpm", True),
    ],
)
def test_places(ubuntu: OtherHost, path: str, good: bool) -> None:
    assert (found(ubuntu, state(path)) == []) == good


def test_a_link_is_followed(ubuntu: OtherHost) -> None:
    """As AppArmor does: it judges where a file is."""
    ubuntu.folder("/data/vms")
    ubuntu.link("/home/alice/vms", "/data/vms")
    [one] = found(ubuntu, state("/home/alice/vms/tpm"))
    assert "out of /data/vms/tpm " in one.text


def test_folders_with_nothing_in_common(ubuntu: OtherHost) -> None:
    keys = (
        "before_start: [[swtpm, socket, --tpmstate, dir=/data/tpm, --ctrl, 'type=unixio,path=/srv/tpm.sock,mode=0600']]"
    )
    _, text, fix = the_only(found(ubuntu, keys))
    assert "out of /data/tpm and /srv " in text
    assert fix.splitlines()[:2] == [
        "echo 'owner /data/tpm/** rwk,' | sudo tee -a /etc/apparmor.d/local/usr.bin.swtpm",
        "echo 'owner /srv/** rwk,' | sudo tee -a /etc/apparmor.d/local/usr.bin.swtpm",
    ]


def test_files_of_the_root_folder(ubuntu: OtherHost) -> None:
    assert "echo 'owner /** rwk,' | " in the_only(found(ubuntu, "before_start: [[swtpm, --pid, file=/pid]]"))[2]


def test_after_stop_too(ubuntu: OtherHost) -> None:
    assert len(found(ubuntu, "after_stop: [[/usr/bin/swtpm, socket, --tpmstate, dir=/data/tpm]]")) == 1


def test_programs_that_it_is_not_about(ubuntu: OtherHost) -> None:
    assert found(ubuntu, "before_start: [[virtiofsd, --socket-path=/data/x, file=/data/y]]") == []
    assert found(ubuntu, WIN11, "/usr/local/bin") == []
    assert found(ubuntu, WIN11, None) == []


@pytest.mark.parametrize("enabled", ["N\n", None])
def test_a_kernel_without_apparmor(ubuntu: OtherHost, enabled: str | None) -> None:
    if enabled is None:
        (ubuntu.root / "sys/module/apparmor/parameters/enabled").unlink()
    else:
        ubuntu.write("/sys/module/apparmor/parameters/enabled", enabled)
    assert found(ubuntu, WIN11) == []


def test_a_profile_that_is_not_there_or_not_used(ubuntu: OtherHost) -> None:
    ubuntu.link("/etc/apparmor.d/disable/usr.bin.swtpm", "/etc/apparmor.d/usr.bin.swtpm")
    assert found(ubuntu, WIN11) == []
    (ubuntu.root / "etc/apparmor.d/disable/usr.bin.swtpm").unlink()
    ubuntu.write(
        "/etc/apparmor.d/usr.bin.swtpm", PROFILE.replace("/usr/bin/swtpm {", "/usr/bin/swtpm flags=(complain) {")
    )
    assert found(ubuntu, WIN11) == []
    (ubuntu.root / "etc/apparmor.d/usr.bin.swtpm").unlink()
    assert found(ubuntu, WIN11) == []


def test_a_profile_with_the_abstraction_for_temporary_files(ubuntu: OtherHost) -> None:
    """Of newer versions, in place of the rule for /tmp."""
    newer = PROFILE.replace("  /tmp/** rwk,\n", "  include <abstractions/user-tmp>\n")
    ubuntu.write("/etc/apparmor.d/usr.bin.swtpm", newer)
    assert found(ubuntu, state("/tmp/tpm")) == []
    assert found(ubuntu, state("/var/tmp/tpm")) == []
    assert len(found(ubuntu, state("/data/tpm"))) == 1
