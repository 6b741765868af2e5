"""The demo is what people see first: all its claims hold. It boots a lab of its own, so it is not run inside of one."""

import re
import subprocess
import sys

import pytest

from lab.booting import check_tools
from lab.errors import MissingTool
from lab.recipe import PROJECT


@pytest.mark.outside
@pytest.mark.hosts("trixie", why="the demo boots Debian 13 itself")
def test_every_claim_of_the_demo_holds(free_slot: None) -> None:
    try:
        check_tools()
    except MissingTool as error:
        pytest.skip(str(error))
    done = subprocess.run(
        ["make", "--no-print-directory", "demo"],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0
    [held] = re.findall(r"^All ([0-9]+) claims held", done.stdout, re.MULTILINE)
    assert int(held) == done.stdout.count("\n  ok  ") >= 30
    assert "NOT " not in done.stdout
