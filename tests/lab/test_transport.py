"""How system tests travel: pytest as it runs inside, here, and its reports read as they are out here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab import hosts
from lab.errors import LabError, MissingTool
from lab.inside import REPORT_FD, REQUEST_VARIABLE
from lab.outside import (
    REMOTE,
    RESERVED_KEY,
    SLOW,
    SYSTEM,
    WORTH_A_LAB,
    SystemRun,
    _results,
    release_reserved,
    seconds,
    shared_out,
)
from lab.recipe import PROJECT

CONFTEST = "from lab.inside import pytest_configure\n"
TESTS = """
import os
import pytest

@pytest.mark.parametrize("value", ["a b", "c/d[e]", "\\u00fc"])
def test_value(value):
    assert value

def test_fails():
    print("some output")
    os.write(1, b"straight to the descriptor")
    assert {"a": 1} == {"a": 2}

def test_skips():
    pytest.skip("for a reason")

@pytest.mark.xfail(reason="known")
def test_known():
    assert False

@pytest.fixture
def late():
    yield
    raise ValueError("at the end")

def test_late(late):
    pass

def test_ends_everything():
    os._exit(3)

@pytest.mark.outside
def test_unwanted():
    raise SystemExit("must not run")
"""


def events_of(folder: Path, wanted: list[str]) -> list[dict[str, Any]]:
    """What pytest inside says when asked for the tests `wanted`."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(TESTS)
    (folder / "request").write_text(json.dumps(wanted))
    reading, writing = os.pipe()
    environment = {**os.environ, REQUEST_VARIABLE: str(folder / "request"), "PYTHONPATH": str(PROJECT / "tests")}
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider --rootdir=. --strict-markers . {REPORT_FD}>&{writing}"
    with subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=environment, pass_fds=(writing,), stdout=subprocess.DEVNULL
    ):
        os.close(writing)
        with os.fdopen(reading) as lines:
            return [json.loads(line) for line in lines]


@pytest.fixture
def run(request: pytest.FixtureRequest) -> SystemRun:
    return SystemRun(request.config, hosts.HOSTS["trixie"], [], threading.Semaphore())


def feed(run: SystemRun, events: list[dict[str, Any]]) -> None:
    for event in [*events, None]:
        run.events.put(event)


def outcomes(run: SystemRun, name: str) -> list[tuple[str, str]]:
    return [(report.when or "", report.outcome) for report in run.reports_of(f"test_it.py::{name}")]


PASSED = [("setup", "passed"), ("call", "passed"), ("teardown", "passed")]


def test_exactly_the_wanted_tests_run_in_their_order(tmp_path: Path) -> None:
    wanted = ["test_it.py::test_skips", "test_it.py::test_value[\\xfc]", "test_it.py::test_value[c/d[e]]"]
    finished = [event["finish"] for event in events_of(tmp_path, wanted) if "finish" in event]
    assert finished == wanted


def test_reports_come_out_as_they_were(tmp_path: Path, run: SystemRun) -> None:
    names = ["test_value[a b]", "test_fails", "test_skips", "test_known", "test_late"]
    feed(run, events_of(tmp_path, [f"test_it.py::{name}" for name in names]))
    assert outcomes(run, "test_value[a b]") == PASSED
    assert outcomes(run, "test_late") == [*PASSED[:2], ("teardown", "failed")]
    failure = run.reports_of("test_it.py::test_fails")[1]
    assert "Differing items" in failure.longreprtext
    assert failure.capstdout == "some output\nstraight to the descriptor"
    skip = run.reports_of("test_it.py::test_skips")[1]
    assert isinstance(skip.longrepr, tuple)
    assert skip.longrepr[2] == "Skipped: for a reason"
    assert run.reports_of("test_it.py::test_known")[1].wasxfail == "known"
    assert run.complaint == ""


def test_place_of_a_skip_is_translated(run: SystemRun) -> None:
    report = pytest.TestReport("a::b", ("a", 1, "b"), {}, "skipped", None, "call")
    data = run.config.hook.pytest_report_to_serializable(config=run.config, report=report)
    data["longrepr"] = [f"{REMOTE}/tests/system/test_a.py", 7, "Skipped: no"]
    feed(run, [{"report": data}, {"finish": "a::b"}])
    assert run.reports_of("a::b")[0].longrepr == (f"{PROJECT}/tests/system/test_a.py", 7, "Skipped: no")


def test_end_in_the_middle_leaves_the_rest_without_reports(tmp_path: Path, run: SystemRun) -> None:
    names = ["test_value[a b]", "test_ends_everything", "test_skips"]
    feed(run, events_of(tmp_path, [f"test_it.py::{name}" for name in names]))
    assert outcomes(run, "test_value[a b]") == PASSED
    assert outcomes(run, "test_ends_everything") == []
    assert "ended without reporting" in run.complaint
    assert outcomes(run, "test_skips") == []


def test_collection_error_is_told(tmp_path: Path, run: SystemRun, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_broken.py").write_text("import a_module_nobody_has\n")
    feed(run, events_of(tmp_path, ["test_broken.py::test_any"]))
    assert outcomes(run, "test_any") == []
    assert "a_module_nobody_has" in capsys.readouterr().err


@pytest.mark.parametrize(("ci", "outcome"), [("true", "failed"), ("", "skipped")])
@pytest.mark.parametrize("error", [MissingTool("mmdebstrap", "mmdebstrap"), LabError("no mirror")])
def test_lab_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, error: LabError, ci: str, outcome: str
) -> None:
    """A missing tool skips on a desk and fails in CI; anything else fails everywhere, and is told once in full."""

    def begin(run: SystemRun) -> None:
        raise error

    monkeypatch.setattr(SystemRun, "begin", begin)
    monkeypatch.setenv("CI", ci)
    session = SimpleNamespace(stash=pytest.Stash(), items=[], config=request.config)
    monkeypatch.setattr(hosts, "host_of", lambda _: "trixie")
    item: Any = SimpleNamespace(
        session=session,
        config=request.config,
        nodeid="a::b",
        location=("a", 1, "b"),
        path=SYSTEM / "a",
        keywords={},
        get_closest_marker=lambda _: None,
    )
    session.items.append(item)
    expected = outcome if isinstance(error, MissingTool) else "failed"
    for _ in range(2):
        (report,) = _results(item)
        assert report.outcome == expected
        assert str(error) in str(report.longrepr)


def test_slot_that_was_reserved_is_given_away_once() -> None:
    permits = threading.Semaphore(0)
    session: Any = SimpleNamespace(stash=pytest.Stash())
    session.stash[RESERVED_KEY] = permits
    for _ in range(2):
        release_reserved(session)
    assert [permits.acquire(blocking=False) for _ in range(2)] == [True, False]


def test_what_files_take_is_known_or_guessed() -> None:
    few, many, slow = (SYSTEM / f"test_{name}.py" for name in ("few", "many", "floods"))
    expected = seconds([few, many, many, many, slow, slow])
    assert 3 * expected[few] == expected[many]
    assert expected[slow] == SLOW[slow.name]
    assert {path.name for path in SYSTEM.glob("test_*.py")} >= SLOW.keys(), "all of them exist"


def test_files_are_shared_out_evenly() -> None:
    numbers = {Path(name): number * WORTH_A_LAB for name, number in {"a": 1, "b": 5, "c": 4, "d": 3}.items()}
    shares = shared_out(numbers, 2)
    assert sorted(sum(numbers[path] for path in share) / WORTH_A_LAB for share in shares) == [6, 7]
    assert set().union(*shares) == numbers.keys()
    assert shared_out(numbers, 1) == [numbers.keys()]
    assert len(shared_out(numbers, 9)) == 4


def test_no_lab_is_booted_for_little() -> None:
    files = {Path(name): 0.3 * WORTH_A_LAB for name in "abcde"}
    assert shared_out(files, 2) == [files.keys()]
    assert len(shared_out({**files, Path("f"): 0.6 * WORTH_A_LAB}, 2)) == 2
