"""The definition format, held to the cases observed from the original tool and decided by this project."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qemu_launcher import cmdline
from qemu_launcher.errors import DefinitionError
from unit.reading import ROOT, read

CASES_FILE = ROOT / "tests" / "argv_cases.json"
SHARED_FILE = ROOT.parent / "shared" / "conformance" / "argv_cases.json"
NUMBER_OF_CASES = 116
CASES: list[dict[str, Any]] = json.loads(CASES_FILE.read_text(encoding="utf-8"))


def outcome(case: dict[str, Any]) -> list[str] | bool:
    """What `command --json` would print less the binary, or True for a refusal that says where."""
    try:
        return cmdline.qemu_argv(read(case["yaml"]))[1:]
    except DefinitionError as err:
        return all(problem.mark is not None and problem.mark.line >= 1 for problem in err.problems)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
def test_case(case: dict[str, Any]) -> None:
    assert outcome(case) == case.get("argv", case.get("error"))


def test_pyyaml_without_libyaml_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser in Python is what a PyYAML built without libyaml has."""
    monkeypatch.delattr(yaml, "CSafeLoader")
    assert [case["name"] for case in CASES if outcome(case) != case.get("argv", case.get("error"))] == []


def test_all_cases_ran() -> None:
    assert len(CASES) == NUMBER_OF_CASES
    assert len({case["name"] for case in CASES}) == NUMBER_OF_CASES
    assert all(("argv" in case) != ("error" in case) for case in CASES)


def test_cases_are_the_shared_ones() -> None:
    if not SHARED_FILE.is_file():
        pytest.skip("optional: the project's shared conformance cases are not beside this checkout")
    assert json.loads(Path(SHARED_FILE).read_text(encoding="utf-8")) == CASES
