"""Files of memory that other programs open too, which are there, missing, or somebody else's."""

from pathlib import Path

import pytest

from qemu_launcher.check import asked, sharedfiles
from qemu_launcher.check.finding import Finding
from unit.other_host import OtherHost, the_only, told, with_memory
from unit.reading import launcher


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    """4 GiB in huge pages of 2 MiB, none of 1 GiB."""
    return with_memory(tmp_path)


def shared(host: OtherHost, path: str, size: str = "32M") -> list[Finding]:
    definition = launcher("", f"[object: [memory-backend-file, id: s, share: on, mem-path: {path}, size: {size}]]")
    return list(sharedfiles.shared_files(host.tree, asked.backends(definition), "alice"))


LOOKING_GLASS = "/dev/shm/looking-glass"
TMPFILES = "echo 'f /dev/shm/looking-glass 0660 alice kvm -' | sudo tee -a /etc/tmpfiles.d/qemu-memory.conf"


def test_file_that_is_ours(host: OtherHost) -> None:
    host.write(LOOKING_GLASS)
    assert told(shared(host, LOOKING_GLASS)) == [f"ok: {LOOKING_GLASS} is yours to use"]


def test_file_that_is_not_there_yet(host: OtherHost) -> None:
    severity, text, fix = the_only(shared(host, LOOKING_GLASS))
    assert severity == "note"
    assert text == f"there is no {LOOKING_GLASS} yet; QEMU makes it, for you alone to write"
    assert TMPFILES in fix


def test_file_that_cannot_be_made(host: OtherHost) -> None:
    host.forbid("/dev/shm")
    severity, text, fix = the_only(shared(host, LOOKING_GLASS))
    assert (severity, text) == ("error", f"there is no {LOOKING_GLASS}, and QEMU may not make it in /dev/shm")
    assert fix.startswith(TMPFILES)


def test_file_of_somebody_else(host: OtherHost) -> None:
    host.write(LOOKING_GLASS)
    host.forbid(LOOKING_GLASS)
    severity, text, fix = the_only(shared(host, LOOKING_GLASS))
    assert (severity, text) == ("error", f"{LOOKING_GLASS} is not yours to read and write")
    assert TMPFILES in fix


def test_file_of_another_size(host: OtherHost) -> None:
    host.write(LOOKING_GLASS, "x" * 4096)
    severity, text, fix = the_only(shared(host, LOOKING_GLASS))
    assert (severity, text) == ("error", f"{LOOKING_GLASS} has 4 KiB, and the definition says 32 MiB")
    assert fix.startswith("write size: 4096, or remove the file")
    assert shared(host, LOOKING_GLASS, "4096")[0].severity == "ok"


def test_no_room_for_it(host: OtherHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(host.tree), "free_bytes", lambda *_: 16 << 20)
    host.write(LOOKING_GLASS)
    found = shared(host, LOOKING_GLASS)
    assert [one.severity for one in found] == ["ok", "warning"]
    assert found[1].text.startswith("/dev/shm has 16 MiB left")


def test_kvmfr(host: OtherHost) -> None:
    severity, text, fix = the_only(shared(host, "/dev/kvmfr0", "64M"))
    assert (severity, text) == ("error", "there is no /dev/kvmfr0")
    assert fix == "sudo modprobe kvmfr static_size_mb=64 (Looking Glass)"
    host.write("/dev/kvmfr0")
    host.write("/sys/module/kvmfr/parameters/static_size_mb", "32,0,0\n")
    assert the_only(shared(host, "/dev/kvmfr0", "64M"))[:2] == (
        "error",
        "/dev/kvmfr0 has 32 MiB, and the definition says 64 MiB",
    )
    assert the_only(shared(host, "/dev/kvmfr0"))[0] == "ok"
    host.forbid("/dev/kvmfr0")
    assert 'SUBSYSTEM=="kvmfr", OWNER="alice"' in the_only(shared(host, "/dev/kvmfr0"))[2]
