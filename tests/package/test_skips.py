"""The rule of tests/conftest.py: a test that is skipped for want of a tool fails when CI=true, and skips on a desk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from package.contents import ROOT

SAMPLE = """
import pytest

def test_runs():
    pass

def test_lacks_a_tool():
    pytest.skip("no such tool")

def test_has_nothing_to_do_here():
    pytest.skip("optional: only on other machines")
"""


@pytest.mark.parametrize(("ci", "outcome"), [("true", "1 failed, 1 passed, 1 skipped"), ("", "1 passed, 2 skipped")])
def test_skip_is_a_failure_in_ci_only(ci: str, outcome: str, tmp_path: Path) -> None:
    """Run for real, in a folder of its own, with the project's conftest.py."""
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(ROOT / "tests")},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert outcome in run.stdout.splitlines()[-1]
    assert ("no such tool" in run.stdout) == (ci == "true")
