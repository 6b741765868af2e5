"""The half of the system tests' transport that runs on the developer's machine: a lab or several, a pytest inside each,
their results mapped onto the items that were collected out here.

Before the first test of all (where there is one slot for labs only, before the first system test) the package is built,
a lab booted, the package installed and pytest started inside for exactly the selected tests: it works there while other
tests run out here. Each item then waits for its own reports, which are passed on unchanged, tracebacks and captured
output included. No fixture of a system test is set up out here. When the lab dies, the remaining tests fail with the
tail of its console. A tool that this machine lacks skips them, or fails them when CI=true.

Each host (hosts.py) has labs of its own. As many run at once as there are slots, but for the one that is left to tests
which boot a lab themselves, until these are over; a lab ends when its tests have, and the next one takes its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lab import hosts
from lab.booting import boot, check_tools, description, kept_lab
from lab.errors import LabError, MissingTool
from lab.image import say
from lab.inside import OUTSIDE_MARKER, OUTSIDE_MARKER_HELP, REPORT_FD, REQUEST_VARIABLE
from lab.recipe import PROJECT
from lab.slots import slot_count
from lab.vm import Vm

SYSTEM = PROJECT / "tests" / "system"
DEB_VARIABLE = "QEMU_LAUNCHER_DEB"  # a package that is built already
KEPT_VARIABLE = "QEMU_LAUNCHER_LAB"  # the name of a kept lab to use instead of a fresh one, while writing tests
# Variables of ours that count inside as well.
PASSED_ON = ("CI", "QEMU_LAUNCHER_ROUNDS", "QEMU_LAUNCHER_SEED", "QEMU_LAUNCHER_SHARE")
REMOTE = "/root/qemu-launcher"
INNER_LOG = "/root/system-tests.log"
# What the tests of a file take in a lab, for files where their number says little: seconds, all else as on a machine of
# two cores. A guess for a test of any other file; what is wrong by half makes no lab wait for long.
A_TEST = 15.0
SLOW = {
    "test_access.py": 200.0,
    "test_administrators.py": 250.0,
    "test_attack_greed.py": 350.0,
    "test_crash_deaths.py": 100.0,
    "test_crash_launcher.py": 120.0,
    "test_crash_only.py": 250.0,
    "test_crash_points.py": 900.0,
    "test_crowd.py": 200.0,
    "test_floods.py": 250.0,
    "test_limits.py": 150.0,
    "test_scale.py": 150.0,
}
EVERYTHING = "QEMU_LAUNCHER_ROUNDS" in os.environ
WORTH_A_LAB = 800.0  # what is left to a lab at least, where a host has several: each boots, and installs the package
# Without a report: a single test in there may take minutes, never that many; hours, if it is told to try everything.
SILENCE_SECONDS = 12 * 3600.0 if EVERYTHING else 1800.0
BUILDING = threading.Lock()
SHOWN = " (the console is shown with the first test that failed so)"
WANTED_KEY = pytest.StashKey[frozenset[str] | None]()  # hosts, as hosts.chosen() says
RUNS_KEY = pytest.StashKey[dict[tuple[str, Path], "SystemRun"]]()  # by host and file
RESERVED_KEY = pytest.StashKey[threading.Semaphore]()  # which the permit that was left out goes to


class SystemRun:
    """One run of pytest inside one lab. `permits`: one for each lab that may be there at a time."""

    def __init__(
        self, config: pytest.Config, host: hosts.Host, node_ids: list[str], permits: threading.Semaphore
    ) -> None:
        self.config = config
        self.host = host
        self.node_ids = node_ids
        self.stack = contextlib.ExitStack()
        self.vm: Vm | None = None
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.reports: dict[str, list[pytest.TestReport]] = {}
        self.finished: set[str] = set()
        self.skip = False
        self.complaint = ""  # what to say about tests that never reported
        self.last_words = ""  # the lab's, when pytest inside ended too soon
        self._permits = permits
        self._process: subprocess.Popen[bytes] | None = None
        self._begun, self._over = threading.Event(), threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def begin_soon(self) -> None:
        """Begin, while others go on; `reports_of` waits for it. Whatever goes wrong, every test says so."""
        self._keeper.start()

    def _keep(self) -> None:
        """The lab's QEMU ends with the thread that has started it (PR_SET_PDEATHSIG of prctl(2)): so this one stays."""
        with self._permits, self.stack:
            try:
                if not self._over.is_set():
                    self.begin()
                    self._begun.set()
                    self._read()
            except MissingTool as error:
                self.complaint = f"{error}"
                self.skip = os.environ.get("CI") != "true"
            except Exception as error:  # noqa: BLE001 - every test says so, and the others go on
                self.complaint = f"the lab could not be set up: {error}"
            self._begun.set()

    def begin(self) -> None:
        """Up to the running pytest inside. LabError when something on the way fails; then nothing is left running."""
        check_tools()
        deb = package()
        kept = os.environ.get(KEPT_VARIABLE)
        own = boot(self.host.recipe, self.host.machine)
        self.vm = vm = Vm.attach(kept_lab(kept)) if kept else self.stack.enter_context(own)
        vm.install(deb)
        # In a kept lab an earlier run may have been interrupted out here only.
        vm.run(f"[ ! -e {REMOTE}/pid ] || kill -9 $(cat {REMOTE}/pid); rm -rf {REMOTE}", check=False)
        vm.put(PROJECT / "tests", f"{REMOTE}/tests")
        vm.put(PROJECT / "pyproject.toml", f"{REMOTE}/pyproject.toml")
        vm.run(f"cat >{REMOTE}/request", input=json.dumps(self.node_ids).encode())
        environment = {REQUEST_VARIABLE: f"{REMOTE}/request"}
        environment |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
        files = shlex.join(sorted({node_id.partition("::")[0] for node_id in self.node_ids}))
        # Hypothesis takes seconds to import in there, and no system test uses it.
        inner = f"python3 -m pytest -q -p no:cacheprovider -p no:hypothesispytest -o faulthandler_timeout=900 {files}"
        line = f"cd {REMOTE} && echo $$ >pid && exec env {settings} {inner} {REPORT_FD}>&1 >{INNER_LOG} 2>&1"
        self._process = self.stack.enter_context(
            subprocess.Popen([*vm.ssh("root"), line], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        )
        self.stack.callback(self._process.kill)

    def _read(self) -> None:
        """Pass on what comes, until pytest inside has ended or `give_up`, and a lab's last words."""
        assert self._process is not None
        assert self._process.stdout is not None
        if self._over.is_set():
            self._process.kill()
        left = set(self.node_ids)
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                left.discard(event.get("finish", ""))
                self.events.put(event)
        if left and not self._over.is_set():
            self.last_words = self._say_last_words()
        self.events.put(None)

    def reports_of(self, node_id: str) -> list[pytest.TestReport]:
        """The reports of one test, when it has finished inside; an empty list when it never will: see `complaint`."""
        if self._keeper.is_alive():
            self._begun.wait()
        while node_id not in self.finished and not self.complaint:
            try:
                event = self.events.get(timeout=SILENCE_SECONDS)
            except queue.Empty:
                self.last_words = self._say_last_words()
                self._complain(f"no report from inside the lab for {SILENCE_SECONDS:.0f} s")
                self.give_up()
                break
            if event is None:
                self._complain("pytest inside the lab ended without reporting on this test")
                break
            self._take(event)
        return self.reports.get(node_id, []) if node_id in self.finished else []

    def _take(self, event: dict[str, Any]) -> None:
        if "report" in event:
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=event["report"])
            assert isinstance(report, pytest.TestReport)
            if isinstance(report.longrepr, list):
                path, line, reason = report.longrepr  # of a skip; JSON knows no tuples
                report.longrepr = (path.replace(REMOTE, str(PROJECT), 1), line, reason)
            self.reports.setdefault(report.nodeid, []).append(report)
        elif "finish" in event:
            self.finished.add(event["finish"])
        elif "collect-error" in event:
            say(f"collecting inside the lab failed: {event['collect-error']}")

    def _complain(self, words: str) -> None:
        self.complaint = f"{words}\n{self.last_words}"

    def _say_last_words(self) -> str:
        parts = []
        if self.vm is not None:
            if self.vm.alive:
                with contextlib.suppress(LabError):
                    log = self.vm.run(f"tail -n 100 {INNER_LOG}", check=False, timeout=120.0).stdout
                    parts.append(f"--- pytest inside the lab, last 100 lines ---\n{log}")
            parts.append(self.vm.report())
        return "\n".join(parts)

    def give_up(self) -> None:
        """Ends pytest inside, and with it the lab (a kept one stays); it is gone some time later, see `wait`."""
        self._over.set()
        if self._process is not None:
            self._process.kill()

    def wait(self) -> None:
        """Returns when it is."""
        if self._keeper.is_alive():
            self._keeper.join()


def kept_host(name: str) -> hosts.Host:
    """Which host a kept lab is; LabError when there is no such lab."""
    return hosts.host_like(*description(kept_lab(name)))


def package() -> Path:
    """The Debian package under test: as the environment says, or built now by `make deb`."""
    named = os.environ.get(DEB_VARIABLE)
    if named:
        path = Path(named).absolute()
    else:
        command = ["make", "-s", "deb"]
        with BUILDING:  # labs that begin at once would all build it
            check_make = subprocess.run(
                command, cwd=PROJECT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
        if check_make.returncode != 0:
            raise LabError(f"make deb failed:\n{check_make.stdout}{check_make.stderr}")
        path = PROJECT / "build" / "qemu-launcher.deb"
    if not path.exists():
        raise LabError(f"there is no package at {path}")
    return path


def is_system_test(item: pytest.Item) -> bool:
    """Whether `item` belongs inside: it lies in tests/system and is not marked as one that stays out."""
    return item.path.is_relative_to(SYSTEM) and item.get_closest_marker(OUTSIDE_MARKER) is None


def pytest_configure(config: pytest.Config) -> None:
    """Registers our markers, and finds out which hosts are wanted."""
    for line in (OUTSIDE_MARKER_HELP, hosts.HOSTS_MARKER_HELP):
        config.addinivalue_line("markers", line)
    kept = os.environ.get(KEPT_VARIABLE)
    try:
        config.stash[WANTED_KEY] = frozenset({kept_host(kept).name}) if kept else hosts.chosen()
    except LabError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes a system test one item for each host."""
    hosts.parametrise(metafunc)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is for hosts that are not wanted.

    Puts the tests that want a lab to themselves behind those that share one, if there is but one slot. Otherwise before
    them: these only wait, for labs that work already.
    """
    wanted = config.stash[WANTED_KEY]
    hosts.keep(config, items, lambda item: not item.path.is_relative_to(SYSTEM) or hosts.is_wanted(item, wanted))
    last = is_system_test if slot_count() > 1 else lambda item: item.get_closest_marker(OUTSIDE_MARKER) is not None
    items.sort(key=last)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins early where another lab may be booted beside those that system tests share."""
    if slot_count() > 1 and not session.config.option.collectonly and any(map(is_system_test, session.items)):
        _runs_of(session)


@pytest.fixture
def free_slot(request: pytest.FixtureRequest) -> None:
    """Ends the lab that tests share, if what follows could not boot one of its own beside it."""
    if slot_count() == 1:
        _end_all(request.session)


@pytest.fixture
def own_lab(free_slot: None, lab_host: str) -> Iterator[Vm]:
    """A lab of its own, with nothing of ours, for a test that watches the host from outside."""
    host = hosts.HOSTS[lab_host]
    try:
        check_tools()
        with boot(host.recipe, host.machine) as vm:
            yield vm
    except MissingTool as error:
        pytest.skip(str(error))


@pytest.fixture
def installed_lab(own_lab: Vm) -> Vm:
    """The same, with the package installed."""
    own_lab.install(package())
    return own_lab


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Runs a system test in the lab; leaves every other test to pytest."""
    if not is_system_test(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    release_reserved(item.session)
    for report in _results(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What an earlier test of another folder left set up for its neighbours is not ours: let it go, as pytest would.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the labs with the session, however that ends."""
    _end_all(session)


def release_reserved(session: pytest.Session) -> None:
    """Let one lab more begin, once: the tests that boot one themselves are over."""
    if (permits := session.stash.get(RESERVED_KEY, None)) is not None:
        permits.release()
        del session.stash[RESERVED_KEY]


def _end_all(session: pytest.Session) -> None:
    runs = set(session.stash.get(RUNS_KEY, {}).values())
    for run in runs:
        run.give_up()
    for run in runs:
        run.wait()


def _runs_of(session: pytest.Session) -> dict[tuple[str, Path], SystemRun]:
    runs = session.stash.get(RUNS_KEY, None)
    if runs is None:
        wanted = [item for item in session.items if is_system_test(item)]
        # One slot stays free for the tests that boot a lab of their own.
        slots = 1 if KEPT_VARIABLE in os.environ else slot_count()
        labs = max(1, slots - 1)
        permits = threading.Semaphore(labs)
        if slots > labs:
            session.stash[RESERVED_KEY] = permits
        runs = session.stash[RUNS_KEY] = {}
        for name, host in hosts.HOSTS.items():
            there = [item for item in wanted if hosts.host_of(item) == name]
            for files in shared_out(seconds(item.path for item in there), labs):
                node_ids = [item.nodeid for item in there if item.path in files]
                run = SystemRun(session.config, host, node_ids, permits)
                runs |= {(name, path): run for path in files}
                run.begin_soon()
    return runs


def seconds(files: Iterable[Path]) -> dict[Path, float]:
    """What each file may take; it is given once for each of its tests."""
    return {path: SLOW.get(path.name, A_TEST * number) for path, number in Counter(files).items()}


def shared_out(lasting: Mapping[Path, float], labs: int) -> list[set[Path]]:
    """Shares files that last so long among at most `labs` labs, the longest first, to the one that has least.

    To fewer, if there is less than WORTH_A_LAB for each; nobody knows how long what tries everything lasts.
    """
    worth = labs if EVERYTHING else max(1, int(sum(lasting.values()) / WORTH_A_LAB))
    shares: list[set[Path]] = [set() for _ in range(min(labs, worth))]
    for path in sorted(lasting, key=lambda path: (-lasting[path], path)):
        min(shares, key=lambda share: sum(lasting[other] for other in share)).add(path)
    return [share for share in shares if share]


def _results(item: pytest.Item) -> Iterator[pytest.TestReport]:
    run = _runs_of(item.session)[hosts.host_of(item), item.path]
    reports = run.reports_of(item.nodeid)
    if reports:
        yield from reports
    elif run.skip:
        yield _report(item, "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {run.complaint}"))
    else:
        yield _report(item, "failed", run.complaint)
        run.complaint = run.complaint.splitlines()[0].removesuffix(SHOWN) + SHOWN


def _report(item: pytest.Item, outcome: Any, words: Any) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), outcome, words, "call")
