"""The systemd unit says what the threat model asks, and nothing that would break the helper."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qemu_launcher_helper import privileges

UNIT = Path(__file__).parents[2] / "helper/qemu-launcher-helper.service"


def settings() -> dict[str, list[str]]:
    """Values by directive, in order."""
    result: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            result.setdefault(key, []).append(value)
    return result


def test_exactly_the_capabilities_the_helper_keeps() -> None:
    [value] = settings()["CapabilityBoundingSet"]
    assert {name.lower().removeprefix("cap_") for name in value.split()} == set(privileges.KEPT)
    assert "AmbientCapabilities" not in settings()


def test_what_must_be_set() -> None:
    found = settings()
    expected = {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateDevices": "yes",
        "PrivateNetwork": "yes",
        "RestrictAddressFamilies": "AF_UNIX",
        "RestrictNamespaces": "yes",
        "MemoryDenyWriteExecute": "yes",
        "MemoryMax": "128M",
        "LimitNOFILE": "256",
        "ProtectProc": "invisible",
        "StartLimitIntervalSec": "0",
        "RuntimeDirectory": "qemu-launcher",
        "RuntimeDirectoryPreserve": "yes",
        "UMask": "0077",
        "Restart": "on-failure",
        "RestartSec": "1s",
    }
    assert {key: found.get(key) for key in expected} == {key: [value] for key, value in expected.items()}
    assert found["SystemCallFilter"] == ["@system-service", "~@privileged", "capset"]


def test_what_must_not_be_set() -> None:
    forbidden = {"RestrictRealtime", "PrivateUsers", "DynamicUser", "PrivatePIDs", "ProtectControlGroups", "User"}
    assert forbidden.isdisjoint(settings())


def reasons(text: str) -> dict[str, str]:
    """What the comment directly above each directive says; above the first of a run of lines, that run's."""
    found: dict[str, str] = {}
    for paragraph in re.findall(r"(?:^[^\n[]+\n)+", text, re.MULTILINE):
        for comment, lines in re.findall(r"((?:^#.*\n)*)((?:^[^#\n].*\n)+)", paragraph, re.MULTILINE):
            keys = list(dict.fromkeys(re.findall(r"^(\w+)=", lines, re.MULTILINE)))
            for key in keys:
                # One comment for several directives says which they are.
                named = len(keys) == 1 or re.search(rf"\b{key}\b", comment)
                found.setdefault(key, comment if named else "")
    return found


def test_each_directive_of_the_sandbox_has_its_reason() -> None:
    """Directly above it, in a comment that is about it."""
    found = reasons(UNIT.read_text())
    assert found.keys() == settings().keys(), "a directive that the test does not see"
    described = {key for key, reason in found.items() if reason.strip("# \n")}
    assert found.keys() - described == {"Description", "Documentation"}


def test_the_reasons_are_told_apart() -> None:
    """The test above would see a directive that stands under another's reason, or after a blank line."""
    text = "[Service]\n# Why.\nA=1\nB=2\n# C, D: why.\nC=1\nD=2\n\nE=1\n# Why.\n\nF=1\n# Three lines.\nG=1\nG=2\n"
    assert {key for key, reason in reasons(text).items() if reason} == {"C", "D", "G"}


def test_exposure() -> None:
    """systemd's own figure; what a running system says of it is tested in the lab."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    run = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", run.stdout)
    assert found, run.stderr
    assert float(found[1]) <= 1.6
