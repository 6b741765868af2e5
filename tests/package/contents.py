"""What an installation consists of: the list that both the Makefile and the Debian package are held to."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Everything but the Python packages, as the Debian package installs it.
FILES = {
    "usr/bin/qemu-launcher": 0o755,
    "usr/libexec/qemu-launcher-helper": 0o755,
    "usr/libexec/qemu-launcher-handover": 0o755,
    "usr/sbin/qemu-launcher-helper": 0o777,  # a link to the one above, for `--check`
    "usr/lib/systemd/system/qemu-launcher-helper.service": 0o644,
    "usr/lib/systemd/user/qemu-launcher@.service": 0o644,
    "usr/lib/sysusers.d/qemu-launcher.conf": 0o644,
    "usr/lib/systemd/system/qemu-.slice.d/10-defaults.conf": 0o644,
    "usr/lib/udev/rules.d/60-qemu-launcher.rules": 0o644,
    "usr/share/dbus-1/interfaces/org.qemulauncher.Helper1.xml": 0o644,
    "usr/share/dbus-1/system-services/org.qemulauncher.Helper1.service": 0o644,
    "usr/share/dbus-1/system.d/org.qemulauncher.Helper1.conf": 0o644,
    "usr/share/polkit-1/actions/org.qemulauncher.policy": 0o644,
    "usr/share/polkit-1/rules.d/50-qemu-launcher.rules": 0o644,
    "usr/share/man/man1/qemu-launcher.1": 0o644,
    "usr/share/man/man5/qemu-launcher.yml.5": 0o644,
    "usr/share/man/man5/qemu-launcher-helper.toml.5": 0o644,
    "usr/share/man/man7/qemu-launcher-migration.7": 0o644,
    "usr/share/man/man8/qemu-launcher-helper.8": 0o644,
    "usr/share/bash-completion/completions/qemu-launcher": 0o644,
    "usr/share/zsh/vendor-completions/_qemu-launcher": 0o644,
    "usr/share/fish/vendor_completions.d/qemu-launcher.fish": 0o644,
    "usr/share/doc/qemu-launcher/examples/first.yml": 0o644,
    "usr/share/doc/qemu-launcher/examples/tpm.yml": 0o644,
    "usr/share/doc/qemu-launcher/examples/tuned.yml": 0o644,
    "usr/share/doc/qemu-launcher/examples/vfio.yml": 0o644,
    "usr/share/doc/qemu-launcher/examples/win11.desktop": 0o644,
    "usr/share/doc/qemu-launcher/examples/helper.toml": 0o644,
    "usr/share/doc/qemu-launcher/examples/30-qemu-launcher-students.rules": 0o644,
    "usr/share/doc/qemu-launcher/examples/40-qemu-launcher-ask.rules": 0o644,
    "usr/share/doc/qemu-launcher/examples/qemu-launcher-everybody.conf": 0o644,
}
PACKAGES = "usr/lib/python3/dist-packages"


def python_files() -> dict[str, int]:
    """The modules of both packages, as they are in the tree."""
    found = {}
    for source in ("launcher/qemu_launcher", "helper/qemu_launcher_helper"):
        top = ROOT / source
        for path in top.rglob("*.py"):
            found[f"{PACKAGES}/{top.name}/{path.relative_to(top)}"] = 0o644
    return found
