"""The helper uses internals of dbus-next 0.2.3, which is frozen upstream; here it is nailed to what was audited."""

import hashlib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from dbus_next import __version__

# SHA-256 of the source files that root parses messages with; Debian 12 and 13 ship the same ones. A change means: read
# bus.py's docstring and these files again before touching this table.
AUDITED = {
    "dbus_next._private.marshaller": "876d57883e5f9c990cdd9bd19efb617840f2746301986b3232db6fc33a4a97db",
    "dbus_next._private.unmarshaller": "df30bc3a5fa947d756aaf436d23286bd0c02539180208c1c5f1d15614e01b4e9",
    "dbus_next._private.constants": "b1d59581af5cf407bb056ac0dcd26bd9c8a88591fe25dd6e7a907812708fdd90",
    "dbus_next.constants": "0c449d59f7f2555739feed3028d4131207a966ff4263ca04a0b1fb7bd100adbc",
    "dbus_next.message": "697fbd59fee5d6fa54064681b925d7e2bf7961a964c826d718b1835f95fa2f40",
    "dbus_next.signature": "b75ba1b83f1a2fa3e4489e438470847793a6fe33f5603ecc1f6cfa01d472177a",
    "dbus_next.validators": "1a153eb9a4777ffcd297e81874f7285a110bce2803f79738f5fd1b78af8c5741",
}


def test_version() -> None:
    assert __version__.__version__ == "0.2.3"


@pytest.mark.parametrize("module", AUDITED)
def test_source_is_the_audited_one(module: str) -> None:
    source = inspect.getsource(importlib.import_module(module))
    assert hashlib.sha256(source.encode()).hexdigest() == AUDITED[module]


def test_root_imports_nothing_else(tmp_path: Path) -> None:
    """dbus-next has a part for GLib, which it imports with all others where PyGObject is installed, on each desktop."""
    helper = Path(__file__).parents[2] / "helper"
    (tmp_path / "qemu_launcher_helper").symlink_to(helper / "qemu_launcher_helper")
    (tmp_path / "gi").mkdir()
    (tmp_path / "gi/__init__.py").write_text("raise SystemExit('imported')")
    script = (helper / "qemu-launcher-helper").read_text()
    replaced = {
        'PACKAGES = "/usr/lib/python3/dist-packages"': f'PACKAGES = "{tmp_path}"',
        "raise SystemExit(main())": "print(*(name for name, module in sys.modules.items() if module))",
    }
    for old, new in replaced.items():
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "script").write_text(script)
    command = ["/usr/bin/python3", "-IS", str(tmp_path / "script")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {name.partition(".")[0] for name in done.stdout.split()}
    own = {"__main__", "dbus_next", "prctl", "_prctl", "qemu_launcher_helper"}
    assert names - sys.stdlib_module_names == own
