"""The index of the attacks is true: each attack has a test, and each test that it names exists."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
INDEX = (Path(__file__).parent / "README.md").read_text()
ATTACKS = [f"A{number}" for number in range(1, 23)]


def functions() -> dict[str, Path]:
    """Every test function, by name, and its file."""
    found = {}
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = path
    return found


def files(attack: str) -> set[str]:
    """The files that the index names for an attack."""
    [row] = re.findall(rf"^\| {attack} \|.*\| ([^|]+) \|$", INDEX, re.MULTILINE)
    names = set(re.findall(r"test_[a-z0-9_*]+\.py", row))
    return {path.name for path in TESTS.rglob("test_*.py") if any(path.match(name) for name in names)}


@pytest.mark.parametrize("attack", ATTACKS)
def test_each_attack_has_a_test_where_the_index_says(attack: str) -> None:
    named = {path.name for name, path in functions().items() if name.startswith(f"test_{attack.lower()}_")}
    marked = {path.name for path in TESTS.rglob("test_*.py") if f'attack("{attack}")' in path.read_text()}
    assert named | marked
    assert named | marked <= files(attack), "the index names every file"


def test_each_test_and_file_that_the_index_names_exists() -> None:
    names = {
        name for name in re.findall(r"\btest_[a-z0-9_]+\b(?![.*])", INDEX) if not re.fullmatch(r"test_a\d+_", name)
    }
    assert names - functions().keys() == set()
    for name in re.findall(r"test_[a-z0-9_]+\.py", INDEX):
        assert list(TESTS.rglob(name)), name
