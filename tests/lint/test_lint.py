"""The linters, as tests: what `make lint` says is part of `make test`, and of its one closing line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix) / "bin"


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["ruff", "check", "."], id="ruff-check"),
        pytest.param(["ruff", "format", "--check", "."], id="ruff-format"),
        pytest.param(["mypy"], id="mypy-strict"),
        pytest.param(["lint-imports", "--no-logo"], id="import-rules"),
    ],
)
def test_linter_has_nothing_to_say(argv: list[str]) -> None:
    """Each linter, as pyproject.toml configures it, on the whole tree."""
    program = BIN / argv[0]
    if not program.exists():
        pytest.skip(f"{argv[0]} is not installed in {sys.prefix}: make setup")
    run = subprocess.run(
        [str(program), *argv[1:]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "launcher:helper"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


def test_tools_are_listed_once() -> None:
    """The Makefile takes the development tools from pyproject's dev extra and repeats none of their versions."""
    makefile = (ROOT / "Makefile").read_text()
    for tool in ("pytest>", "hypothesis>", "ruff>", "mypy>", "import-linter>"):
        assert tool not in makefile
