"""What holds for every test: on a desk a missing tool skips a test, under CI=true it fails it.

A test that is skipped proves nothing, and a CI machine that lacks a tool would report a green run that tested less. So
with CI=true each skip becomes a failure that names its reason. Exception: a reason that begins with "optional: " says
that the test has nothing to do on this machine, wherever it runs.
"""

import os
import re
from collections.abc import Generator
from typing import Any

import pytest

from attacks.index import NAMED

ALLOWED = "optional: "

# Errors that the tests provoke are not for the desktop of whoever runs them.
os.environ["DBUS_SESSION_BUS_ADDRESS"] = "disabled:"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = _reason(report)
    if not reason.startswith(ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: skipped, which is a failure under CI=true: {reason}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test named after an attack, or by the index of the attacks, is marked: `make attacks` is `pytest -m attack`."""
    for item in items:
        name = getattr(item, "originalname", None) or item.name
        if found := re.match(r"test_(a[0-9]+)_", name):
            item.add_marker(pytest.mark.attack(found[1].upper()))
        elif name in NAMED:
            item.add_marker(pytest.mark.attack("beyond the list"))


# The old kind of wrapper: the pytest of Debian 12, inside its lab, has a pluggy that does not know wrapper=True.


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    """Turn a skip at run time into a failure under CI=true."""
    outcome = yield
    _forbid_skip(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, None]:
    """Turn a skip of a whole module into a failure under CI=true."""
    outcome = yield
    _forbid_skip(outcome.get_result())
