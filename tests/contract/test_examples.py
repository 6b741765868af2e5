"""Every example in README and in the manual pages is right: definitions load, commands and paths exist.

An example that no rule here knows fails: a new one needs a rule, or has a mistake. Those that can be run are run with
the real QEMU, in tests/qemu/test_documented.py.
"""

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from package.contents import FILES, ROOT
from qemu_launcher import cli, keys
from qemu_launcher.errors import LauncherError
from qemu_launcher_helper import contract, limits
from unit.manual import PAGES, README, Block, blocks
from unit.reading import read

BLOCKS = list(blocks())
SECTIONS = ("launcher", "qemu")
# What others install, and what the kernel has.
OTHERS = (
    "/usr/share/OVMF/OVMF_VARS_4M.ms.fd",
    "/usr/lib/qemu/qemu-bridge-helper",
    "/etc/apparmor.d/usr.bin.swtpm",
    "/etc/apparmor.d/local/usr.bin.swtpm",
)
FOLDERS = ("/proc/", "/sys/fs/cgroup/", "/var/lib/vms/", "~/.config/qemu-launcher")
UNITS = ("init.scope", "system.slice", "user.slice")  # systemd.special(7)
DIRECTIVES = {"Service": ("TimeoutStopSec",), "Scope": ("TimeoutStopSec",), "Slice": ("MemoryMax",)}


# What kind of example it is, and whether it is right


def test_there_are_examples_in_every_document() -> None:
    assert {block.path for block in BLOCKS} == {README, *PAGES.values()}
    assert len(BLOCKS) > 35


@pytest.mark.parametrize("block", BLOCKS, ids=[block.place for block in BLOCKS])
def test_example(block: Block) -> None:
    judge(block)


def judge(block: Block) -> None:
    """Raises whatever the rule for it raises, if it is wrong."""
    rule = next((rule for recognises, rule in RULES if recognises(block)), None)
    assert rule is not None, f"no rule knows what this is:\n{block.text}"
    rule(block.text)


def lines(text: str) -> list[str]:
    """Without comments and empty lines."""
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def is_definition(block: Block) -> bool:
    if block.language == "yaml":
        return True
    try:
        found = yaml.safe_load(block.text)
    except yaml.YAMLError:
        return False
    return isinstance(found, dict) and found.keys() <= {*SECTIONS, *keys.KEY_NAMES}


def definition(text: str) -> None:
    """Whole, or one of the sections, or keys of the section launcher."""
    given = yaml.safe_load(text).keys()
    if given <= set(SECTIONS):
        text += "launcher: {binary: q}\n" * ("launcher" not in given) + "qemu: []\n" * ("qemu" not in given)
    else:
        text = "qemu: []\nlauncher:\n  binary: q\n" + re.sub(r"^(?=.)", "  ", text, flags=re.MULTILINE)
    assert read(text).warnings == ()


def limits_file(text: str) -> None:
    """That whole files are understood by the helper is tried in test_auditors_page.py."""
    for entry in tomllib.loads(text)["limits"]:
        assert entry.keys() <= limits._FORMS.keys() | {"users", "groups"}


def unit_file(text: str) -> None:
    [[section], *directives] = [re.split(r"=", line, maxsplit=1) for line in lines(text)]
    for name, value in directives:
        assert name in DIRECTIVES[section.strip("[]")]
        assert re.fullmatch(r"[0-9]+(?:min|G)", value)


def udev_rules(text: str) -> None:
    for line in lines(text):
        for part in line.split(", "):
            assert re.fullmatch(r'(?:SUBSYSTEM|KERNEL|ENV\{[A-Z_]+\})=="[^"]+"|(?:OWNER|GROUP|MODE)="[^"]+"', part)


def modprobe_file(text: str) -> None:
    for line in lines(text):
        assert re.fullmatch(r"options vfio-pci ids=[0-9a-f:,]+|softdep \w+ pre: vfio-pci", line)


def sysctl_file(text: str) -> None:
    for line in lines(text):
        name, _, value = line.partition(" = ")
        assert Path("/proc/sys", *name.split(".")).exists()
        assert value.isdigit()


def tmpfiles_file(text: str) -> None:
    for line in lines(text):
        assert re.fullmatch(r"f /dev/shm/[a-z-]+ 0[0-7]{3} [a-z]+ [a-z]+ -", line)


def shell(text: str) -> None:
    for line in lines(text):
        words = shlex.split(line, comments=True)
        command(words)
        for word in words:
            if re.match(r"[/~.]|launcher/", word) and not word.startswith("..."):
                path(word)


def command(words: list[str]) -> None:
    assert words[0] in COMMANDS, f"no rule for the command {words[0]}"
    COMMANDS[words[0]](words[1:])


def path(word: str) -> None:
    """It is in the package, or in the tree, or is one of few others."""
    name = word.rstrip("/")
    if name in OTHERS or name.startswith(FOLDERS):
        return
    if name.startswith("/"):
        assert is_installed(name), name
    else:
        assert name.startswith("./build/") or (ROOT / name).exists(), name


def is_installed(name: str) -> bool:
    """A file of the package, or a folder that has some."""
    return any(installed == name[1:] or installed.startswith(f"{name[1:]}/") for installed in FILES)


def first_word_of_each_line(block: Block) -> bool:
    return block.language == "sh" or all(re.match(r"[a-z]", line) for line in lines(block.text))


def is_all(pattern: str) -> Callable[[Block], bool]:
    return lambda block: not block.language and all(re.match(pattern, line) for line in lines(block.text))


def drawing(text: str) -> None:
    assert [block.text for block in BLOCKS if block.language == "text"] == [text], "README has one drawing"


RULES: list[tuple[Callable[[Block], bool], Callable[[str], None]]] = [
    (lambda block: block.language == "text", drawing),
    (is_definition, definition),
    (lambda block: "[[limits]]" in block.text, limits_file),
    (lambda block: bool(re.match(r"(?:#.*\n)?\[[A-Z]\w+\]\n", block.text)), unit_file),
    (is_all(r"[A-Z]+=="), udev_rules),
    (is_all(r"(?:options|softdep) "), modprobe_file),
    (is_all(r"[a-z_.]+ = "), sysctl_file),
    (is_all(r"f /"), tmpfiles_file),
    (first_word_of_each_line, shell),
]


# What may stand in a shell's line


def launcher(words: list[str]) -> None:
    cli.parse_arguments(words)


def helper(words: list[str]) -> None:
    assert words == ["--check"]


def sudo(words: list[str]) -> None:
    command(words[2:] if words[0] == "-u" else words)


def systemctl(words: list[str]) -> None:
    options = [word for word in words if word.startswith("-")]
    verb, *rest = [word for word in words if not word.startswith("-")]
    assert set(options) <= {"--user", "--now", "--runtime"}
    assert verb in ("start", "stop", "enable", "status", "set-property", "revert", "reload", "daemon-reload")
    for word in rest:
        if verb == "set-property" and "=" in word:
            assert re.fullmatch(r"AllowedCPUs=[0-9,-]+", word)
        else:
            assert is_unit(word, of_user="--user" in options), word


def is_unit(name: str, *, of_user: bool) -> bool:
    """One of systemd's own, ours, or the scope of a VM."""
    template, at, instance = name.removesuffix(".service").partition("@")
    if of_user:
        return f"usr/lib/systemd/user/{template}@.service" in FILES and bool(at and instance)
    scope = re.fullmatch(r"qemu-launcher-[0-9]+-[A-Za-z0-9_-]+\.scope", name)
    return name in UNITS or scope is not None or f"usr/lib/systemd/system/{name}.service" in FILES


def loginctl(words: list[str]) -> None:
    assert words == ["enable-linger"]


def journalctl(words: list[str]) -> None:
    for option, value in zip(words, [*words[1:], ""], strict=True):
        if option in ("-u", "--user-unit"):
            assert is_unit(value, of_user="--user" in words), value
        elif option.startswith("MESSAGE_ID="):
            assert option == f"MESSAGE_ID={contract.MESSAGE_ID}"
        elif option.startswith("QEMU_LAUNCHER_"):  # fields: test_auditors_page.py
            assert re.fullmatch(r"QEMU_LAUNCHER_[A-Z]+=\w+", option)
    assert {word for word in words if word.startswith("-")} <= {"-u", "-o", "-t", "-p", "--user"}


def make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(words) == 1
    assert words[0] in targets


def apt(words: list[str]) -> None:
    assert words == ["install", f"./build/qemu-launcher_{cli.VERSION}_all.deb"]


def usermod(words: list[str]) -> None:
    assert words[:2] == ["-aG", "qemu-launcher"]
    assert re.search(r"^g qemu-launcher ", (ROOT / "helper/qemu-launcher.sysusers.conf").read_text(), re.MULTILINE)


def virsh(words: list[str]) -> None:
    if shutil.which("virsh") is None:
        pytest.skip("virsh is not installed: make setup")
    shown = subprocess.run(["virsh", "help", words[0]], capture_output=True, text=True, check=True).stdout
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--\w+", shown))


def echo(words: list[str]) -> None:
    rule, pipe, *rest = words
    assert re.fullmatch(r"owner /var/lib/vms/\*\* rwk,", rule)
    assert pipe == "|"
    command(rest)


def plain(words: list[str]) -> None:
    """Its paths are looked at by `shell`."""


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "qemu-launcher": launcher,
    "qemu-launcher-helper": helper,
    "sudo": sudo,
    "systemctl": systemctl,
    "loginctl": loginctl,
    "journalctl": journalctl,
    "make": make,
    "apt": apt,
    "usermod": usermod,
    "virsh": virsh,
    "echo": echo,
    **dict.fromkeys(
        ("apparmor_parser", "cat", "cp", "dpkg-statoverride", "grep", "install", "mkdir", "qemu-img", "tee"), plain
    ),
}


# That the rules can fail


@pytest.mark.parametrize(
    "text",
    [
        "launcher:\n  binary: q\n  memlock: true\nqemu: []\n",
        "scheduler: deadline\n",
        "qemu-launcher boot win11\n",
        "qemu-launcher status --owner bob\n",
        "sudo systemctl start qemu-launcher.service\n",
        "systemctl --user start qemu-launcher-win11\n",
        "systemctl --user begin qemu-launcher@win11\n",
        "cat /usr/share/doc/qemu-launcher/examples/none.yml\n",
        "rm -rf /\n",
        "make install-all\n",
        "vm.nr_hugepage = 12\n",
        "[Service]\nTimeoutStopSecs=10min\n",
        "1. This is no example\n",
    ],
)
def test_mistakes_are_found(text: str) -> None:
    with pytest.raises((AssertionError, LauncherError)):
        judge(Block(README, 1, "", text))


# Paths in the text


@pytest.mark.parametrize("document", [README, *PAGES.values()], ids=lambda document: document.name)
def test_installed_files_that_are_named_are_there(document: Path) -> None:
    found = re.findall(r"(?<![\w~.])/usr/(?!local/)[\w./@-]*qemu-?launcher[\w./@-]*", document.read_text())
    assert [name for name in found if not is_installed(name.rstrip("./"))] == []


def test_files_of_the_tree_that_readme_links_to_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert len(links) > 5
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_readme_s_first_definition_is_the_example() -> None:
    [first] = [block for block in BLOCKS if block.path == README and "256M" in block.text]
    assert yaml.safe_load(first.text) == yaml.safe_load((ROOT / "launcher/examples/first.yml").read_text())


def test_swtpm_is_always_given_a_whole_path() -> None:
    """As a daemon it leaves its directory: it would look for a relative one in /, and its TPM does not begin."""
    texts = [block.text for block in BLOCKS] + [path.read_text() for path in (ROOT / "launcher/examples").glob("*.yml")]
    states = [word for text in texts for word in re.findall(r"--tpmstate,?\s+(?:- )?dir=([^\s,]+)", text)]
    assert len(states) == 3
    assert [state for state in states if not state.startswith("/")] == []
