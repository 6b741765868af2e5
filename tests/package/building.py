"""Programs that build packages, or look into them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from package.contents import ROOT


def run(*argv: str | Path, cwd: Path = ROOT) -> str:
    """The output of a program that must succeed."""
    done = subprocess.run(argv, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def need(*tools: str) -> None:
    """Skip the test where one of these is not installed."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}: make setup")
