"""The half of the system tests' transport that runs inside the lab: pytest hooks that pass each report out.

Loaded by tests/system/conftest.py when it finds itself in the lab with a request waiting. The request is a JSON file
with the node ids to run, in order; the answer is one JSON object a line on a descriptor of its own: `report` with a
report as pytest itself serialises it, `finish` with the node id, `collect-error` with a text. Nothing is written to
that descriptor by anybody else, whatever the tests print.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from lab import hosts

REQUEST_VARIABLE = "QEMU_LAUNCHER_LAB_REQUEST"
REPORT_FD = 3
# For a test that ends the host itself, or watches it from outside: see the fixture `own_lab` in lab/outside.py.
OUTSIDE_MARKER = "outside"
OUTSIDE_MARKER_HELP = f"{OUTSIDE_MARKER}: a system test that is not run inside the lab but has one to itself"


class ReportOut:
    """Selects what was asked for and reports on it."""

    def __init__(self, config: pytest.Config, wanted: list[str]) -> None:
        self.config = config
        self.wanted = {node_id: position for position, node_id in enumerate(wanted)}
        self.began = time.time()

    def send(self, kind: str, content: Any) -> None:
        data = json.dumps({kind: content}).encode() + b"\n"
        while data:
            data = data[os.write(REPORT_FD, data) :]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = sorted((i for i in items if i.nodeid in self.wanted), key=lambda item: self.wanted[item.nodeid])
        items[:] = chosen

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.send("collect-error", f"{report.nodeid}: {report.longrepr}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began = time.time()
        self.send("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            report.sections.append(("journal", _journal(self.began)))
        self.send("report", self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.send("finish", nodeid)


def _journal(since: float) -> str:
    """What the host has said since then, the last of it."""
    if shutil.which("journalctl") is None:
        return "this host has no journal"
    subprocess.run(["journalctl", "--sync"], check=False)
    command = ["journalctl", "--quiet", "--no-pager", f"--since=@{since:.6f}", "--lines=80"]
    return subprocess.run(command, capture_output=True, text=True, check=False, errors="replace").stdout


def pytest_configure(config: pytest.Config) -> None:
    """Starts reporting when somebody outside asked for it; a run by hand is an ordinary one, of this host's tests."""
    for line in (OUTSIDE_MARKER_HELP, hosts.HOSTS_MARKER_HELP):
        config.addinivalue_line("markers", line)
    request = os.environ.get(REQUEST_VARIABLE)
    if request:
        config.pluginmanager.register(ReportOut(config, json.loads(Path(request).read_text())), "lab-report-out")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The same node ids as outside."""
    hosts.parametrise(metafunc)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is for other hosts, and what is not run inside of one."""
    here = hosts.this_host()
    hosts.keep(config, items, lambda i: hosts.host_of(i) == here and i.get_closest_marker(OUTSIDE_MARKER) is None)
