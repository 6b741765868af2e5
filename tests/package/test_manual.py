"""The manual pages as man(1) shows them: each is built without a complaint, and fits a terminal."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from unit.manual import PAGES, ROOT

COLUMNS = 80


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, made by the line that the Makefile has for it."""
    for tool in ("go-md2man", "man"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: make setup")
    place = tmp_path_factory.mktemp("man")
    assert "go-md2man -in $< -out $@" in (ROOT / "Makefile").read_text()
    for name, source in PAGES.items():
        done = subprocess.run(
            ["go-md2man", "-in", source, "-out", place / name], capture_output=True, text=True, check=True
        )
        assert (done.stdout, done.stderr) == ("", ""), "a piece of Markdown that it does not know"
    return place


@pytest.mark.parametrize("name", sorted(PAGES))
def test_shown_without_a_warning(name: str, built: Path) -> None:
    environment = {**os.environ, "MANWIDTH": str(COLUMNS), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["man", "--warnings", "-l", built / name], env=environment, capture_output=True, text=True, check=True
    )
    # Of a line whose long words leave nothing to move; its text is whole.
    warnings = [
        line for line in done.stderr.splitlines() if "cannot adjust line" not in line and "can't break" not in line
    ]
    assert warnings == []
    shown = re.sub(r".\x08", "", done.stdout)
    assert "NAME\n" in shown
    assert f"{name.rpartition('.')[0]} - " in " ".join(shown.split())
    # Nothing of the source's marks is left, but in examples, which are further in.
    text = [line for line in shown.splitlines() if not line.startswith("              ")]
    assert [line for line in text if "**" in line or "`" in line] == []


@pytest.mark.parametrize("name", sorted(PAGES))
def test_fits_a_terminal(name: str, built: Path) -> None:
    """But for examples, which are to be copied as they stand, and those are at most as wide as README."""
    environment = {**os.environ, "MANWIDTH": str(COLUMNS), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["man", "-l", built / name], env=environment, capture_output=True, text=True, check=True)
    lines = re.sub(r".\x08", "", done.stdout).splitlines()
    wide = [line for line in lines if len(line) > COLUMNS]
    assert [line for line in wide if not line.startswith("              ") or len(line) > 14 + 120] == []
