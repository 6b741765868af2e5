"""The manual pages have every key, command and option that there is, and none that there is not."""

import re

import pytest
import yaml

from qemu_launcher import cli, keys
from qemu_launcher.definition import VmDefinition
from unit.manual import PAGES, README, ROOT, blocks, bold, page, section, terms

COMMANDS = page("qemu-launcher.1")
KEYS = section(page("qemu-launcher.yml.5"), "THE LAUNCHER SECTION")
EVERYWHERE = ("-h", "--help", "--version")


def test_every_key() -> None:
    told = [key for term, _ in terms(KEYS) for key in bold(term)]
    assert sorted(told) == sorted(keys.KEY_NAMES)


def test_defaults() -> None:
    """What stands in parentheses behind a key is what it is when it is not given."""
    told = dict(re.findall(r"^\*\*([a-z_]+)\*\*(?:, \*\*[a-z_]+\*\*)* \(\*([a-z0-9]+)\*\)", KEYS, re.MULTILINE))
    fields = VmDefinition._field_defaults
    ours = {key: fields[keys._KEYS[key][0]] for key in told}
    shown = {
        key: str(value).lower() if isinstance(value, bool) else f"{value:.0f}" if isinstance(value, float) else value
        for key, value in ours.items()
    }
    assert told == shown
    simple = {key for key, (field, _) in keys._KEYS.items() if isinstance(fields.get(field), bool | str)}
    conditional = {bold(term)[0] for term, _ in terms(KEYS) if re.search(r"\(\*\w+\* w\w+ .*\)", term)}
    assert simple <= told.keys() | conditional


def synopsis() -> dict[str, str]:
    """By command, all lines of the synopsis that are about it."""
    found: dict[str, str] = {}
    for line in section(COMMANDS, "SYNOPSIS").splitlines():
        if line:
            command = re.match(r"\*\*qemu-launcher(?: ([a-z]+))?", line)
            assert command, line
            name = command[1] or "run"
            found[name] = found.get(name, "") + line
    return found


def test_every_command() -> None:
    told = [bold(term)[0].split()[0] for term, _ in terms(section(COMMANDS, "COMMANDS"))]
    assert tuple(told) == cli.COMMANDS, "in the order of --help"
    assert tuple(synopsis()) == cli.COMMANDS, "in the order of --help"


def test_every_option() -> None:
    told = [option for term, _ in terms(section(COMMANDS, "OPTIONS")) for option in bold(term)]
    assert sorted(told) == sorted([*cli.OPTIONS, *EVERYWHERE])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_options_of_a_command(command: str) -> None:
    """In its synopsis are its own, each by one of its names, and no others."""
    pairs = [set(bold(term)) for term, _ in terms(section(COMMANDS, "OPTIONS"))]
    told = {word for word in bold(synopsis()[command]) if word.startswith("-") and word != "--"}
    told |= {option for entry in bold(synopsis()[command]) for option in re.findall(r"--\w[\w-]+", entry)}
    for names in pairs:
        owned = {name for name in names if command in cli.OPTIONS.get(name, ())}
        assert bool(owned) == bool(names & told), f"{command}: {names}"
    assert told <= {name for name, owners in cli.OPTIONS.items() if command in owners}


def test_no_other_option_is_written_anywhere() -> None:
    """What looks like an option of ours in bold is one."""
    for name in ("qemu-launcher.1", "qemu-launcher.yml.5", "qemu-launcher-migration.7"):
        for words in bold(page(name)):
            if words.startswith("qemu-launcher "):
                options = {word for word in words.split() if word.startswith("--") and word != "--"}
                assert options <= {*cli.OPTIONS, *EVERYWHERE}, words


def test_readme_has_every_command() -> None:
    told = re.findall(r"^\| `qemu-launcher ([a-z]+|NAME)\b", section(README.read_text(), "Everyday"), re.MULTILINE)
    assert ["run" if name == "NAME" else name for name in told] == list(cli.COMMANDS)


def test_every_example_definition_is_told_of() -> None:
    pages = README.read_text() + page("qemu-launcher.yml.5")
    names = [path.name for path in (ROOT / "launcher/examples").glob("*.yml")]
    assert len(names) > 2
    assert [name for name in names if f"{name}" not in pages and name != "tuned.yml"] == []
    assert yaml.safe_load((ROOT / "launcher/examples/tuned.yml").read_text())["launcher"] == next(
        yaml.safe_load(block.text)["launcher"] for block in blocks() if block.path == README and "fifo" in block.text
    ), "README shows it"


def test_pages_refer_to_each_other_and_exist() -> None:
    ours = {name.rpartition(".")[0]: name.rpartition(".")[2] for name in PAGES}
    for name in PAGES:
        for other, number in re.findall(r"\*\*(qemu-launcher[a-z.-]*)\*\*\(([0-9])\)", page(name)):
            assert ours.get(other) == number, f"{name}: {other}({number})"
        if name != "qemu-launcher.1":
            assert "**qemu-launcher**(1)" in section(page(name), "SEE ALSO")


def test_every_page_is_built_into_its_section() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in PAGES:
        assert f"build/man/{name}" in makefile
        assert f"$(MANDIR)/man{name[-1]}/{name}" in makefile, "uninstall removes it"


@pytest.mark.parametrize("name", sorted(PAGES))
def test_heading_and_sections(name: str) -> None:
    """man(1) and whatis(1) find the page by these."""
    text = page(name)
    title, _, number = name.rpartition(".")
    assert text.startswith(f"% {title.upper()} {number}\n\n# NAME\n\n{title} - ")
    headings = re.findall(r"^# (.+)$", text, re.MULTILINE)
    assert headings == [heading.upper() for heading in headings]
    assert headings[-1] == "SEE ALSO"
    assert len(set(headings)) == len(headings)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_see_also_names_each_page_once(name: str) -> None:
    named = re.findall(r"\*\*([^*]+)\*\*\([0-9]\)", section(page(name), "SEE ALSO"))
    assert sorted(set(named)) == sorted(named)


def test_no_page_was_forgotten() -> None:
    files = {
        path.name for folder in ("launcher", "helper", "dbus", "polkit") for path in (ROOT / folder).rglob("*.[1-8].md")
    }
    assert files == {f"{name}.md" for name in PAGES}
    assert len(files) == 5


def test_environment_variables() -> None:
    """Those of ours that a document names are known to the launcher; fields of the journal are in the helper's page."""
    source = "".join(path.read_text() for path in (ROOT / "launcher/qemu_launcher").rglob("*.py"))
    for text in (README.read_text(), *(page(name) for name in PAGES if "helper" not in name)):
        for name in set(re.findall(r"\bQEMU_LAUNCHER_[A-Z_]*[A-Z]\b", text)):
            assert f'"{name}"' in source, name
