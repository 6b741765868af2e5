"""The index of the attacks is true: each attack has a test, each test that it names is there and in `make attacks`."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from attacks.index import INDEX, NAMED

TESTS = Path(__file__).resolve().parents[1]
ATTACKS = [f"A{number}" for number in range(1, 23)]


@cache
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
    assert NAMED - functions().keys() == set()
    for name in re.findall(r"test_[a-z0-9_]+\.py", INDEX):
        assert list(TESTS.rglob(name)), name


def test_make_attacks_runs_each_test_that_the_index_names() -> None:
    """Collected as the target does: from its folders, with its marker, for the hosts that are usual."""
    makefile = (TESTS.parent / "Makefile").read_text()
    [line] = re.findall(r"^attacks:.*\n\t\$\(PYTEST\) -m attack (.*)$", makefile, re.MULTILINE)
    folders = tuple(f"{folder}/" for folder in line.split())
    where = {str(functions()[name].relative_to(TESTS.parent)) for name in NAMED}
    assert {path for path in where if not path.startswith(folders)} == set()
    # Nothing else of these folders is read in: that would take ten seconds.
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "attack", *sorted(where)]
    chosen = ("PYTEST_ADDOPTS", "QEMU_LAUNCHER_HOSTS", "QEMU_LAUNCHER_LAB")
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert NAMED - {*re.findall(r"::(test_[a-z0-9_]+)", done.stdout)} == set()
