"""qemu-launcher-migration(7) is true: each definition in it does what the page says of it.

The first word that is said of one tells: Refused, Warns, Means. In "What becomes of the hook's lines", what is set in
backquotes are the keys and options to write.
"""

import re

import pytest

from qemu_launcher import cli, cmdline
from qemu_launcher.definition import VmDefinition
from qemu_launcher.errors import DefinitionError
from unit.manual import README, blocks, bold, page, section, terms
from unit.reading import read

PAGE = page("qemu-launcher-migration.7")
VERDICTS = ("Refused", "Warns", "Means")
LISTED = [(bold(term)[0], said) for term, said in terms(section(PAGE, "What is refused, or means something else"))]
TABLE = re.findall(r"^\| `(.+?)` \| (\w+)", section(README.read_text(), "From the original tool"), re.MULTILINE)
HOOKS = section(PAGE, "What becomes of the hook's lines")


def definition_with(example: str) -> VmDefinition:
    """`- ...` is an option of the qemu section; anything else a key of the section launcher, or several in braces."""
    if example.startswith("- "):
        return read(f"launcher: {{binary: q}}\nqemu:\n{example}\n")
    keys = example.removeprefix("{").removesuffix("}") if example.startswith("{") else example
    options = "[object: [iothread, id: io]]" if "iothread_pinning" in example else "[]"
    return read(f"launcher: {{binary: q, {keys}}}\nqemu: {options}\n")


def verdict(example: str) -> str:
    try:
        found = definition_with(example)
    except DefinitionError as err:
        return "Refused" if all(problem.mark is not None for problem in err.problems) else "refused without a place"
    return "Warns" if found.warnings else "Means"


def test_all_of_them_are_read() -> None:
    assert len(LISTED) == len(
        re.findall(r"^: ", section(PAGE, "What is refused, or means something else"), re.MULTILINE)
    )
    assert len(LISTED) > 12


@pytest.mark.parametrize(("example", "said"), LISTED, ids=[example for example, _ in LISTED])
def test_what_the_page_says_of_it(example: str, said: str) -> None:
    told = re.split(r"[ :,.]", said)[0]
    assert told in VERDICTS
    assert verdict(example) == told


@pytest.mark.parametrize(("example", "told"), TABLE, ids=[example for example, _ in TABLE])
def test_what_readme_says_of_it(example: str, told: str) -> None:
    expected = {"refused": "Refused", "warns": "Warns"}.get(told, "Means")
    assert told in ("refused", "warns", "means", "same")
    assert verdict(example) == expected


def test_readme_has_a_table_of_them() -> None:
    lines = [
        line for line in section(README.read_text(), "From the original tool").splitlines() if line.startswith("|")
    ]
    assert len(TABLE) == len(lines) - 2
    assert len(TABLE) >= 10


def test_what_stays_the_same_stays() -> None:
    """The page's first example, without a word; each of its keys has arrived."""
    [example, *_] = [block for block in blocks() if block.path.name == "qemu-launcher-migration.7.md"]
    found = read(example.text)
    assert found.warnings == ()
    assert (found.clear_env, found.env) == (True, (("QEMU_AUDIO_DRV", "pa"),))
    assert found.isolation == "shield"
    assert (found.scheduler, found.priority, found.memlock.kind) == ("fifo", 1, "all")
    assert (found.user, found.group) == (1000, 1000)
    assert cmdline.qemu_argv(found)[1:] == [
        "-nographic",
        *("-m", "2G"),
        *("-cpu", "host"),
        *("-smp", "4,sockets=1,cores=2,threads=2"),
        *("-drive", "file=my-vm.qcow2,if=none,id=drive0,readonly"),
    ]


def test_hexadecimal_goes_to_qemu_as_it_is_written() -> None:
    [(example, _)] = [(example, said) for example, said in LISTED if "0x1f" in example]
    assert cmdline.qemu_argv(definition_with(example))[-1].endswith(",addr=0x1f")


@pytest.mark.parametrize("example", re.findall(r"`([^`]+)`", HOOKS))
def test_what_replaces_a_hook_is_understood(example: str) -> None:
    assert verdict(example) == "Means"


def test_commands_that_replace_virsh() -> None:
    rows = re.findall(r"^\| \*\*.*\| (.+) \|$", section(PAGE, "Commands"), re.MULTILINE)
    named = {word for row in rows for word in bold(row)}
    assert len(rows) > 6
    assert named <= set(cli.COMMANDS)
