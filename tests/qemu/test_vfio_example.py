"""examples/vfio.yml with the real QEMU, as far as this machine goes, and the real swtpm.

What cannot be had here is replaced, and nothing else: KVM by emulation, the passed-through card by nothing, 24 GiB of
huge pages by 256 MiB of ordinary ones, files by smaller ones, sound by silence. What was replaced is counted, so that
a change of the example that slips past here is noticed.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qemu.launched import ROOT, Home, wait_gone
from qemu_launcher import cmdline, definition, fitting, host, ram
from unit.reading import read

EXAMPLE = ROOT / "launcher/examples/vfio.yml"
TEXT = EXAMPLE.read_text()
ALTERNATIVES = re.findall(r"^  # (- .+)$", TEXT, re.MULTILINE)
GIB = 1 << 30
# In the words of several versions: there is no sound server, or no module for it.
NO_SERVER = re.compile("[Cc]ould not init|[Ff]ailed to (?:connect|initialize)|[Uu]nknown audio driver|not found")
RAM = 256 << 20


def sections(text: str = TEXT) -> Any:
    """The two sections; every scalar as it is written, but for the launcher's lists of CPUs."""
    loaded = yaml.load(text, yaml.BaseLoader)
    loaded["launcher"] = yaml.safe_load(text)["launcher"]
    return loaded


def test_it_fits_the_host_that_it_is_for() -> None:
    """16 CPUs, n and n+8 siblings, 32 GB: no warning, nothing of QEMU's on the shield, within the limits."""
    found = definition.load(EXAMPLE, "vfio")
    assert found.warnings == ()
    cpus = frozenset(range(16))
    siblings = {cpu: frozenset({cpu % 8, cpu % 8 + 8}) for cpu in cpus}
    fitting.validate_against_host(found, host.Host(cpus, cpus, siblings))
    assert found.pinning is not None
    assert found.pinning.topology is not None
    assert found.emulator_pinning is not None
    vcpus = [cpu for one in found.pinning.sets for cpu in one.cpus]
    assert len(vcpus) == len(set(vcpus)) == 12
    assert not found.emulator_pinning.cpus & set(vcpus)
    whole = ram.guest_ram(found.options)
    assert whole == 24 * GIB + (64 << 20), "Looking Glass's file is mapped for the card too"
    assert whole + GIB < 31 * GIB - 31 * GIB // 10, "auto, under the helper's default on a host with 32 GB"
    for place, pinned in found.pinning.topology.items():
        core, thread = dict(place)["core"], dict(place)["thread"]
        assert pinned.cpus == {2 + core + 8 * thread}, "the guest's siblings are the host's"


def test_the_size_of_its_memory_is_said_twice_and_alike() -> None:
    argv = cmdline.qemu_argv(definition.load(EXAMPLE, "vfio"))
    [backend] = [word for word in argv if word.startswith("memory-backend-memfd,")]
    assert ",size=24G," in backend
    assert argv[argv.index("-m") + 1] == "24G"
    pages = 24 * GIB // (2 << 20)
    assert f"{pages} pages of 2 MiB" in TEXT
    assert f"vm.nr_hugepages = {pages}\n" in (ROOT / "launcher/man/qemu-launcher.yml.5.md").read_text()


@pytest.mark.parametrize("line", ALTERNATIVES)
def test_what_is_only_suggested_is_understood(line: str) -> None:
    assert read(f"launcher: {{binary: q}}\nqemu:\n  {line}\n").options


def test_there_are_suggestions() -> None:
    assert len(ALTERNATIVES) == 6


def qemu_version() -> tuple[int, int]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    shown = subprocess.run(["qemu-system-x86_64", "-version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", shown)
    assert found
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("driver", ["pipewire", "pa"])
def test_sound_is_known_to_qemu(driver: str) -> None:
    """Its option is parsed, whatever sound server is or is not here; pipewire since 8.1, as the example says."""
    assert f"- audiodev: [{driver}, id: sound]\n" in TEXT
    argv = ["qemu-system-x86_64", "-M", "q35", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
    known = qemu_version() >= (8, 1) or driver != "pipewire"
    done = subprocess.run(
        [*argv, "-audiodev", f"{driver},id=sound", "-device", "ich9-intel-hda", "-device", "hda-micro,audiodev=sound"],
        input='{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n',
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    unknown = f"does not accept value '{driver}'"
    assert (unknown not in done.stderr) == known
    assert done.returncode == 0 or not known or NO_SERVER.search(done.stderr)


def takes_direct_io(place: Path) -> bool:
    """A tmpfs does since Linux 6.6 only."""
    try:
        os.close(os.open(place / "VARS.fd", os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


class Adapted:
    """The example, made to fit into `place`. `replaced`: how often something was, by what it was."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.is_direct = takes_direct_io(place)
        self.replaced: dict[str, int] = {}
        self.shared = Path("/dev/shm") / f"looking-glass-{os.getpid()}"
        given = sections()
        self.launcher = {
            key: value for key, value in given["launcher"].items() if not key.endswith(("_pinning", "_memlock"))
        }
        folder = self.launcher["working_directory"]
        self.launcher["working_directory"] = str(place)
        for command in self.launcher["before_start"]:
            command[:] = [word.replace(folder, str(place)) for word in command]
        self.qemu = [self._fitting(option) for option in given["qemu"]]
        self.qemu = [*filter(None, self.qemu), "S"]

    def _note(self, what: str) -> None:
        self.replaced[what] = self.replaced.get(what, 0) + 1

    def _fitting(self, option: Any) -> Any:
        if not isinstance(option, dict):
            return option
        [(name, value)] = option.items()
        flat = [dict([*element.items()][0:1]) if isinstance(element, dict) else element for element in value]
        if isinstance(value, str):
            return {name: "256M"} if name == "m" else option
        first = flat[0]
        if first == "vfio-pci":
            self._note("card")
            return None
        if name == "audiodev":
            self._note("sound")
            return {name: ["none", *flat[1:]]}
        return {name: [self._element(name, element) for element in flat]}

    def _element(self, option: str, element: Any) -> Any:
        swaps: dict[tuple[str, str], tuple[str, str]] = {
            ("accel", "kvm"): ("accel", "tcg"),
            ("size", "24G"): ("size", "256M"),
            ("hugetlb", "on"): ("hugetlb", "off"),
            ("file", "/usr/share/OVMF/OVMF_CODE_4M.ms.fd"): ("file", "CODE.fd"),
            ("mem-path", "/dev/shm/looking-glass"): ("mem-path", str(self.shared)),
        }
        if element == "host":
            self._note("cpu")
            return "max"
        if not isinstance(element, dict):
            return element
        [pair] = element.items()
        if pair[0] in ("topoext", "hv-passthrough", "hugetlbsize"):  # the host's CPU's, KVM's, and huge pages'
            self._note(pair[0])
            return {"merge": "on"} if option == "object" else {pair[0]: "off"}
        if not self.is_direct and pair in (("cache", "none"), ("aio", "native")):
            return {pair[0]: {"cache": "writeback", "aio": "threads"}[pair[0]]}
        if pair in swaps:
            self._note("=".join(pair))
            return dict([swaps[pair]])
        return element


@pytest.fixture
def adapted(tmp_path: Path) -> Iterator[Adapted]:
    for tool in ("swtpm", "qemu-img"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if b"unix" not in subprocess.run(["qemu-system-x86_64", "-spice", "help"], capture_output=True, check=False).stdout:
        pytest.skip("QEMU's module for SPICE is not installed: make setup")
    place = tmp_path / "win11"
    (place / "tpm").mkdir(parents=True)
    for name in ("CODE.fd", "VARS.fd"):
        (place / name).write_bytes(bytes(1 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", place / "disk.qcow2", "1G"], check=True)
    example = Adapted(place)
    try:
        yield example
    finally:
        example.shared.unlink(missing_ok=True)


def test_qemu_takes_it(home: Home, adapted: Adapted) -> None:
    """QEMU starts, stands still before the guest's first instruction as -S wants, and has all that was asked for."""
    assert adapted.replaced == {
        "accel=kvm": 1,
        "cpu": 1,
        "topoext": 1,
        "hv-passthrough": 1,
        "size=24G": 1,
        "hugetlb=on": 1,
        "hugetlbsize": 1,
        "file=/usr/share/OVMF/OVMF_CODE_4M.ms.fd": 1,
        "mem-path=/dev/shm/looking-glass": 1,
        "card": 2,
        "sound": 1,
    }
    (home.configuration / "vfio.yml").write_text(
        yaml.safe_dump({"launcher": adapted.launcher, "qemu": adapted.qemu}, sort_keys=False)
    )
    run = home.start("vfio")
    run.name = "vfio"
    run.wait_line("^vfio: ")
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "prelaunch"
    assert len(qmp("query-cpus-fast")) == 12
    assert [tpm["model"] for tpm in qmp("query-tpm")] == ["tpm-crb"]
    assert [iothread["id"] for iothread in qmp("query-iothreads")] == ["io"]
    backends = {backend["id"]: backend for backend in qmp("query-memdev")}
    assert (backends["ram"]["size"], backends["ram"]["prealloc"]) == (RAM, True)
    assert (backends["looking-glass"]["size"], backends["looking-glass"]["share"]) == (64 << 20, True)
    assert adapted.shared.stat().st_size == 64 << 20
    assert qmp("query-spice")["enabled"]
    swtpm = int((adapted.place / "tpm.pid").read_text())
    assert "swtpm" in Path(f"/proc/{swtpm}/cmdline").read_text()
    qmp.close()
    assert home.ask("kill", "vfio").returncode == 0
    assert run.end() == 0, run.output
    wait_gone(swtpm)
    assert "deprecated" not in run.output, run.output
