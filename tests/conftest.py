"""What holds for every test: on a desk a missing tool skips a test, under CI=true it fails it.

A test that is skipped proves nothing, and a CI machine that lacks a tool would report a green run that tested less. So
with CI=true each skip becomes a failure that names its reason. Exception: a reason that begins with "optional: " says
that the test has nothing to do on this machine, wherever it runs.
"""

import os
import re
from collections.abc import Generator

import pytest

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
    """A test named after an attack of the threat model is marked with it: `make attacks` is `pytest -m attack`."""
    for item in items:
        if found := re.match(r"test_(a[0-9]+)_", getattr(item, "originalname", None) or item.name):
            item.add_marker(pytest.mark.attack(found[1].upper()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip at run time into a failure under CI=true."""
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a skip of a whole module into a failure under CI=true."""
    report = yield
    _forbid_skip(report)
    return report
