"""The definitions in README, in the manual pages and in the smaller examples: the real QEMU takes each.

As they stand, but for what depends on the host: KVM, sizes, the disk's path, whose it is, tuning, a screen.
examples/vfio.yml has a test of its own.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from qemu.launched import ROOT, Home, wait_gone
from qemu_launcher import definition
from qemu_launcher.options import vcpu_limit
from unit.manual import blocks

WHOLE = {
    block.place: block.text
    for block in blocks()
    if re.search(r"^launcher:", block.text, re.MULTILINE) and re.search(r"^qemu:", block.text, re.MULTILINE)
}
WHOLE |= {name: (ROOT / "launcher/examples" / name).read_text() for name in ("first.yml", "tuned.yml")}
REPLACED = [
    (r"accel: kvm", "accel: tcg"),
    (r"cpu: (host|\[host\])", "cpu: max"),
    (r"- m: \S+", "- m: 64M"),
    (r"mem-lock: on", "mem-lock: off"),  # more than this login may lock
    (r"file([:=] ?)[^,\s]+\.qcow2", r"file\1DISK"),
    (r"\n  (user|group): [0-9]+(?=\n)", ""),
]


def test_they_are_found() -> None:
    assert len(WHOLE) >= 8


@pytest.mark.parametrize("text", WHOLE.values(), ids=WHOLE.keys())
def test_qemu_takes_it(text: str, home: Home, tmp_path: Path) -> None:
    """It starts, held by -S, with as many virtual CPUs and disks as the definition says."""
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    for pattern, replacement in REPLACED:
        text = re.sub(pattern, replacement, text)
    path = home.configuration / "documented.yml"
    added = "  - S\n" if re.search("nographic|display", text) else "  - S\n  - display: none\n"
    path.write_text(text.replace("DISK", str(disk)) + added)
    run = home.start("documented", "--untuned")
    run.name = "documented"
    run.wait_line("^documented: paused, as you asked, untuned")
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "prelaunch"
    assert len(qmp("query-cpus-fast")) == (vcpu_limit(definition.load(path, "documented").options) or 1)
    files = [block["inserted"]["file"] for block in qmp("query-block") if "inserted" in block]
    assert files == [str(disk)] * text.count("DISK")
    qmp.close()
    assert home.ask("kill", "documented").returncode == 0
    assert run.end() == 0, run.output


def test_tpm_example(home: Home, tmp_path: Path) -> None:
    """Without the shared folder: swtpm keeps the guest's TPM in the folder of the example, and ends with QEMU."""
    for tool in ("qemu-img", "swtpm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    place = tmp_path / "tpm"
    place.mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", place / "disk.qcow2", "64M"], check=True)
    text = (ROOT / "launcher/examples/tpm.yml").read_text()
    assert text.count("/home/alice/vms/tpm") == 2
    for pattern, replacement in [*REPLACED[:3], ("size: 4G", "size: 64M")]:
        text = re.sub(pattern, replacement, text)
    given = yaml.load(text.replace("/home/alice/vms/tpm", str(place)), yaml.BaseLoader)
    swtpm, virtiofsd = given["launcher"]["before_start"]
    assert "virtiofsd" in virtiofsd[-1]
    given["launcher"]["before_start"] = [[*swtpm, "--pid", f"file={place}/pid"]]
    shared = [option for option in given["qemu"] if "shared" in str(option)]
    assert len(shared) == 2
    given["qemu"] = [option for option in given["qemu"] if option not in shared] + [{"display": "none"}, "S"]
    (home.configuration / "tpm.yml").write_text(yaml.safe_dump(given, sort_keys=False))
    run = home.start("tpm", "--untuned")
    run.name = "tpm"
    run.wait_line("^tpm: paused, as you asked, untuned")
    qmp = run.qmp()
    assert [tpm["model"] for tpm in qmp("query-tpm")] == ["tpm-crb"]
    qmp.close()
    pid = int((place / "pid").read_text())
    assert [path.name for path in place.glob("tpm2-*.permall")] == ["tpm2-00.permall"]
    assert home.ask("kill", "tpm").returncode == 0
    run.end()  # with 1: after_stop has no virtiofsd to end
    wait_gone(pid)
