"""What qemu-launcher-helper(8) and qemu-launcher-helper.toml(5) say of the code is so: names, numbers, order, keys."""

import ast
import importlib
import re
from collections import defaultdict
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from qemu_launcher_helper import contract, limits, privileges, service
from qemu_launcher_helper.contract import Caller, Pin
from system.legacy import FSTAB

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "helper/qemu_launcher_helper"
PAGE = (ROOT / "helper/man/qemu-launcher-helper.8.md").read_text()
TOML_PAGE = (ROOT / "helper/man/qemu-launcher-helper.toml.5.md").read_text()
README = (ROOT / "README.md").read_text()

ALICE = Caller(":1.7", 1000, 4242, "alice", 1000)
# One call with all that a call can name.
EVERYTHING: dict[str, Any] = {
    "uid": 0,
    "vm": "win11",
    "policy": "fifo",
    "priority": 1,
    "bytes": 1,
    "pins": (Pin(4243, frozenset([4]), shielded=False),),
    "others": frozenset(),
}


def section(title: str, page: str = PAGE) -> str:
    """The text below a heading, with the subsections that have one of their own."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[2]


def named(text: str) -> list[str]:
    """The functions and tables of the source that a text names, in order."""
    return re.findall(r"`((?:[A-Za-z_0-9]+\.)+[A-Za-z_0-9]+)`", text)


def words(text: str) -> str:
    """The text with its line breaks as spaces."""
    return " ".join(text.split())


@pytest.mark.parametrize("name", sorted(set(named(PAGE))))
def test_what_the_page_names_exists(name: str) -> None:
    """Classes and functions, by the modules that define them."""
    first = re.match(r"(?:cpuset\.)?[a-z0-9]+(?=\.)", name)
    assert first
    module = importlib.import_module(f"qemu_launcher_helper.{first[0]}")
    found = reduce(getattr, name.removeprefix(f"{first[0]}.").split("."), module)
    assert getattr(found, "__module__", module.__name__) == module.__name__, "it is defined elsewhere"


def test_every_backquoted_word_is_such_a_name() -> None:
    """So that none escapes the test above by its spelling."""
    assert sorted(re.findall(r"`([^`]+)`", PAGE)) == sorted(named(PAGE))


def test_every_module_has_its_place_in_the_order() -> None:
    """None is left out but the one that starts all."""
    modules = {str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".") for path in PACKAGE.rglob("*.py")}
    modules -= {"__init__", "__main__", "cpuset.__init__", "privileges"}
    steps = named(section("The order of checks"))
    assert {module for module in modules if any(step.startswith(f"{module}.") for step in steps)} == modules
    assert any(step.startswith("privileges.") for step in named(section("Capabilities")))


def test_the_steps_of_a_call_are_in_the_pages_order() -> None:
    """The numbers are in order, and `_serve` makes the calls that the steps name in that order."""
    steps = section("The order of checks")
    numbers = [int(number) for number in re.findall(r"^([0-9]+)\. ", steps, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    tree = ast.parse((PACKAGE / "service.py").read_text())
    [serve] = [node for node in ast.walk(tree) if getattr(node, "name", "") == "_serve"]
    calls = [node for node in ast.walk(serve) if isinstance(node, ast.Call)]
    # An argument is evaluated before the call that it is for.
    calls.sort(key=lambda call: (call.end_lineno or 0, call.end_col_offset or 0))
    made = [call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "") for call in calls]
    told = [name.rpartition(".")[2] for name in named(steps)]
    order = ["_identify", "slot", "parse", "_details", "_authorise", "load", "perform", "tell"]
    assert [name for name in dict.fromkeys(made) if name in order] == order
    assert [name for name in dict.fromkeys(told) if name in order] == order


def test_the_line_of_fstab_is_the_one_that_is_tried() -> None:
    assert f"*{FSTAB}*" in PAGE


def test_capabilities() -> None:
    """Exactly those that are kept, each with the one function that raises it; v1 has one more, for other tasks."""
    raising = defaultdict[str, list[str]](list)
    for path in PACKAGE.rglob("*.py"):
        module = str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
        for owner, function in functions(ast.parse(path.read_text())):
            for node in ast.walk(function):
                match node:
                    case ast.Call(func=ast.Attribute(attr="raised"), args=[ast.Constant(value=str() as capability)]):
                        raising[capability].append(f"{module}.{owner}{function.name}")
    assert raising.keys() == privileges.KEPT.keys()
    assert sum(map(len, raising.values())) == len(raising) + 1, "two functions raise it"
    told = re.findall(r"\*\*CAP_([A-Z_]+)\*\*\n:((?:.|\n.)*)", section("Capabilities"))
    functions_told = {name.lower(): sorted(re.findall(r"`([^`]+)`", text)) for name, text in told}
    assert functions_told == {name: sorted(found) for name, found in raising.items()}
    assert set(re.findall(r"CAP_([A-Z_]+)", PAGE)) == {name.upper() for name in privileges.KEPT}


def functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions of a module and of its classes, with "Class." or ""."""
    found: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = []
    owners: list[ast.Module | ast.ClassDef] = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for owner in owners:
        prefix = f"{owner.name}." if isinstance(owner, ast.ClassDef) else ""
        found += [(prefix, node) for node in owner.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return found


def test_actions() -> None:
    actions = {method[2] for method in contract.METHODS.values() if method[2]}
    assert set(re.findall(r"\*(org\.qemulauncher\.[a-z-]+)\*", PAGE)) == actions


def test_details() -> None:
    """polkit's details are those that the page tells rule writers of; so it is with the examples."""
    given = set(service._details(ALICE, EVERYTHING))
    told = set(re.findall(r"\*\*([a-z]+)\*\*", section("Asking for a password, or deciding by what is asked for")))
    assert told == given
    for rules in (ROOT / "polkit").rglob("*.rules"):
        assert set(re.findall(r'lookup\("(\w+)"\)', rules.read_text())) <= given, rules.name


def test_when_a_cpulist_is_too_long_for_a_detail() -> None:
    cpus = [*range(100, 130, 2), 1000]
    text = ",".join(map(str, cpus))
    assert len(text) == 64
    assert "list of more than 64 characters" in words(PAGE)

    def told(more: list[int]) -> str:
        pin = Pin(4243, frozenset(cpus + more), shielded=False)
        return service._details(ALICE, {"pins": (pin,), "others": frozenset()})["cpus"]

    assert told([]) == text
    assert not re.fullmatch(r"[0-9,-]+", told([1002]))


def test_journal_fields() -> None:
    """Each that a record can have, and no other; and what identifies the trail."""
    given = {"verdict", "operation", "reason", "uid", "pid", "tids", *service._details(ALICE, EVERYTHING)}
    source = (PACKAGE / "service.py").read_text() + (PACKAGE / "records.py").read_text()
    for name in ("verdict", "operation", "reason", "uid", "pid", "tids"):
        assert f'"{name}"' in source
    described = section("AUDIT TRAIL").partition("MESSAGE_ID\n: ")[2]
    fields = {name.lower() for name in re.findall(r"QEMU_LAUNCHER_([A-Z]+)", described)}
    assert fields == given
    assert {name.lower() for name in re.findall(r"QEMU_LAUNCHER_([A-Z]+)", PAGE)} == fields
    assert set(re.findall(r"\b[0-9a-f]{32}\b", PAGE)) == {contract.MESSAGE_ID}
    verdicts = set(re.findall(r'tell\(logging\.[A-Z]+, "(\w+)"', source))
    assert verdicts == set(re.findall(r"\b(granted|refused|released|failed)\b", described.partition("OPERATION")[0]))


def test_every_example_of_the_trail_asks_who_wrote_it() -> None:
    """Anybody may send the journal our fields; what journald writes down itself, and systemd's own -u, tells."""
    commands = re.findall(r"^    (journalctl .*)$", section("AUDIT TRAIL"), re.MULTILINE)
    assert len(commands) == 4
    assert all(" -u qemu-launcher-helper" in command or " _UID=0 " in command for command in commands)


def test_numbers() -> None:
    """No number stands in the page's text but these, which are the code's."""
    phrases = [
        f"leaves within {contract.IDLE_SECONDS:.0f} seconds of the last call",
        f"{contract.CALLS_IN_FLIGHT} calls at a time and {contract.CALLS_PER_WINDOW} in "
        f"{contract.WINDOW_SECONDS:.0f} seconds",
        "one of five words",
        f'{contract.INFINITY} is "as much as I may"',
        "of more than 64 characters",  # see the test of its own
        "which is 0 for the first three",
        "exits with status 1,",
        "otherwise with status 0",
    ]
    assert len(contract.POLICIES) == 5
    text = words(re.sub(r"^(    .*|[0-9]+\. |% .*)", "", PAGE, flags=re.MULTILINE))
    for phrase in phrases:
        assert phrase in text
        text = text.replace(phrase, "")
    text = re.sub(r"\*[^*]+\*|\([0-9]\)", "", text)  # pages and files
    assert re.findall(r"(?<![-\w\"])[0-9]+(?![-\w\"])", text) == []


def test_check_is_on_the_path() -> None:
    assert "**qemu-launcher-helper** **--check** [*FILE*]" in section("SYNOPSIS")
    for page in (PAGE, TOML_PAGE, README):
        assert "libexec/qemu-launcher-helper" not in page


@pytest.mark.parametrize("folder", ["polkit/examples", "dbus/examples"])
def test_every_example_is_told_of(folder: str) -> None:
    for path in (ROOT / folder).iterdir():
        assert path.name in PAGE
        assert path.name in README


def test_who_to_tell_of_a_hole() -> None:
    """The page and README, and the address that they point to."""
    assert "debian/control" in section("REPORTING A VULNERABILITY")
    assert re.search(r"^Maintainer: .+<.+@.+>$", (ROOT / "debian/control").read_text(), re.MULTILINE)
    assert "vulnerability" in README


# --- helper.toml ------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    """All that the file may hold, each where it may stand, with its default."""
    entry, file = section("KEYS OF AN ENTRY", TOML_PAGE), section("KEYS OF THE FILE", TOML_PAGE)
    told = set(re.findall(r"^\*\*([a-z_]+)\*\*", entry, re.MULTILINE)) | {"groups"}
    assert told <= set(limits.Limits._fields)
    assert told >= set(limits.Limits._fields) - {"source"}
    assert set(re.findall(r"^\*\*([a-z_]+)\*\*", file, re.MULTILINE)) == set(limits.Settings._fields) - {"entries"}
    assert told >= limits._FORMS.keys() - limits.Settings._field_defaults.keys()
    own = limits.Limits()
    for key, default in {
        "max_vms": own.max_vms,
        "max_priority": own.max_priority,
        "realtime": f'"{own.realtime}"',
        "policies": str(list(contract.POLICIES)).replace("'", '"'),
    }.items():
        assert f"**{key}** ({default})" in entry
    assert (own.policies, own.cpus, own.max_cpus, own.memlock) == (frozenset(contract.POLICIES), None, None, None)
    assert f"**comm** ({str(list(limits.Settings().comm)).replace(chr(39), chr(34))})" in file


def test_ranges_and_sizes() -> None:
    text = words(TOML_PAGE)
    assert f"larger than {limits.MAX_FILE_BYTES >> 10} KiB" in text
    assert limits.HOST_BYTES == 2 << 30
    assert "the larger of 2 GiB and 10 %" in text
    for key, most in {"max_vms": 999, "max_priority": contract.MAX_PRIORITY}.items():
        form = limits._FORMS[key][1]
        assert re.fullmatch(form, str(most))
        assert not re.fullmatch(form, str(most + 1))
        assert f"at most {most}" in text


def toml_examples() -> list[str]:
    """The blocks of the pages, and the example file, that are whole files."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", TOML_PAGE, re.MULTILINE)
    inside = [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks if "[[limits]]" in block]
    inside += [block for block in re.findall(r"```toml\n(.*?)```", README, re.DOTALL) if "[[limits]]" in block]
    return [*inside, (ROOT / "helper/examples/helper.toml").read_text()]


@pytest.mark.parametrize("example", toml_examples())
def test_examples_are_understood(example: str, tmp_path: Path) -> None:
    path = tmp_path / "helper.toml"
    path.write_text(example)
    if path.stat().st_uid:
        pytest.skip("optional: only root can own a file that root has to own")
    path.chmod(0o644)
    assert limits.load(str(path)).entries
