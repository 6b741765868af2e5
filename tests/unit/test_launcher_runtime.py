"""Locks and records: who holds a VM, and what may be done about it. With real processes and real locks."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from qemu_launcher import runtime
from qemu_launcher.errors import AlreadyRunning, LauncherError
from qemu_launcher.procfs import Process
from qemu_launcher.record import RUNNING, STARTING, Record
from qemu_launcher.runtime import Found

# VMs are found wherever their files are: no real VM of whoever runs this, and no other run of it, has these names.
NAME, OTHER = f"unit-test-{os.getpid()}", f"unit-test-{os.getpid()}-other"
DEFINITION = Path("/etc/qemu-launcher/vms/win11.yml")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "qemu-launcher"


@pytest.fixture
def holder(place: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that holds the lock of win11, as a QEMU does: it has inherited the open file."""
    place.mkdir(mode=0o700)
    lock = os.open(place / f"{NAME}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = subprocess.Popen(["sleep", "1000"], pass_fds=[lock])
    os.close(lock)
    yield process
    process.kill()
    process.wait()


@contextmanager
def child(argv: list[str], *fds: int) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that inherits `fds`, until the context ends."""
    process = subprocess.Popen(argv, pass_fds=fds, stdout=subprocess.PIPE)
    with process:
        try:
            yield process
        finally:
            process.kill()


def written(place: Path, **fields: object) -> None:
    record = replace(Record(definition=str(DEFINITION)), **fields)  # type: ignore[arg-type]  # names are checked at run time
    (place / f"{NAME}.lock").write_bytes(record.encode())


def process_of(child: "subprocess.Popen[bytes]") -> Process:
    process = Process.of(child.pid)
    assert process is not None
    return process


def ended() -> Process:
    child = subprocess.Popen(["true"])
    process = Process(child.pid, 1)
    child.wait()
    return process


def test_claim_writes_who_we_are_and_leaves_nothing(place: Path) -> None:
    with runtime.claimed(NAME, DEFINITION) as (claim, discarded):
        assert discarded is None
        record = Record.decode((place / f"{NAME}.lock").read_bytes())
        assert record is not None
        assert record.launcher == Process.of(os.getpid())
        assert (record.qemu, record.state, record.definition) == (None, STARTING, str(DEFINITION))
        control = claim.listening_socket()
        assert (place / f"{NAME}.sock").is_socket()
        control.close()
        vm = runtime.find(NAME)
        assert vm is not None
        assert vm.is_alive
        assert vm.qemu is None
    assert (place / f"{NAME}.lock").read_bytes() == b""
    assert not (place / f"{NAME}.sock").exists()
    assert runtime.find(NAME) is None


def test_claim_leaves_nothing_of_a_longer_record_behind_its_own(place: Path) -> None:
    """A launcher that was killed has left one: together they would be no record, and nobody would know of this VM."""
    place.mkdir(mode=0o700)
    vcpus = {number: 100_000 + number for number in range(64)}
    written(place, launcher=Process(1, 1), qemu=Process(2, 2), state=RUNNING, vcpus=vcpus, isolation="shield")
    with runtime.claimed(NAME, DEFINITION) as (claim, _):
        assert Record.decode((place / f"{NAME}.lock").read_bytes()) == claim.record


def test_second_claim_of_the_same_name_is_refused_and_another_is_not(place: Path) -> None:
    with runtime.claimed(NAME, DEFINITION):
        with (
            pytest.raises(AlreadyRunning, match=f"^{NAME} is being started already"),
            runtime.claimed(NAME, DEFINITION),
        ):
            pass
        with runtime.claimed(OTHER, DEFINITION):
            assert {vm.name for vm in runtime.find_all()} >= {OTHER, NAME}


def test_running_vm_is_left_alone(place: Path, holder: "subprocess.Popen[bytes]") -> None:
    written(place, qemu=process_of(holder), launcher=ended(), state=RUNNING)
    with pytest.raises(AlreadyRunning, match=f"PID {holder.pid}"), runtime.claimed(NAME, DEFINITION):
        pass
    assert holder.poll() is None


def test_starting_vm_of_a_living_launcher_is_left_alone(place: Path, holder: "subprocess.Popen[bytes]") -> None:
    written(place, qemu=process_of(holder), launcher=Process.of(os.getpid()))
    message = rf"{NAME} is being started already, by the launcher with PID {os.getpid()}$"
    with pytest.raises(AlreadyRunning, match=message), runtime.claimed(NAME, DEFINITION):
        pass
    assert holder.poll() is None


@pytest.mark.parametrize("stale", [False, True], ids=["empty", "of the last run"])
def test_launcher_that_has_the_lock_and_not_yet_written_is_starting_it(place: Path, stale: bool) -> None:
    """Between lock and record it may be held up."""
    place.mkdir(mode=0o700)
    lock = place / f"{NAME}.lock"
    lock.touch()
    if stale:
        written(place, qemu=ended(), launcher=ended(), state=RUNNING)
    script = "import fcntl, sys, time\nfcntl.flock(lock := open(sys.argv[1]), fcntl.LOCK_EX)\nprint('mine', flush=1)\n"
    with child([sys.executable, "-c", f"{script}time.sleep(1000)", str(lock)]) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"mine\n"
        message = rf"^{NAME} is being started already, by the launcher with PID {launcher.pid}$"
        with pytest.raises(AlreadyRunning, match=message), runtime.claimed(NAME, DEFINITION):
            pass


def test_lock_that_becomes_free_meanwhile_is_taken(
    place: Path, holder: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that has cleared its record is about to let go of the lock: that is worth a moment."""
    looked, looks = runtime._holder, []

    def ends_after_two_looks(fd: int, name: str) -> Found | None:
        looks.append(looked(fd, name))
        if len(looks) == 2:
            holder.kill()
            holder.wait()
        return looks[-1]

    monkeypatch.setattr(runtime, "_holder", ends_after_two_looks)
    with runtime.claimed(NAME, DEFINITION) as (_, discarded):
        assert discarded is None


def test_only_who_has_the_lock_is_named(place: Path, holder: "subprocess.Popen[bytes]") -> None:
    """A reader, such as `status`, or another who lost, has the file open too."""
    with (place / f"{NAME}.lock").open() as reader, child(["sleep", "1000"], reader.fileno()):
        named = rf"processes it left behind still hold its lock: {holder.pid} \(sleep\)$"
        with pytest.raises(AlreadyRunning, match=named), runtime.claimed(NAME, DEFINITION):
            pass


def test_vm_that_has_just_ended_is_told_so(place: Path, holder: "subprocess.Popen[bytes]") -> None:
    written(place, qemu=ended(), launcher=process_of(holder), state=RUNNING)
    message = rf"{NAME} has just ended, and its launcher \(PID {holder.pid}\) is about to"
    with pytest.raises(AlreadyRunning, match=message), runtime.claimed(NAME, DEFINITION):
        pass
    assert holder.poll() is None


def test_never_started_vm_is_ended_and_told(place: Path, holder: "subprocess.Popen[bytes]") -> None:
    qemu = process_of(holder)
    written(place, qemu=qemu, launcher=ended())
    with runtime.claimed(NAME, DEFINITION) as (_, discarded):
        assert discarded == qemu
    assert holder.wait() == -signal.SIGTERM


def test_record_of_a_recycled_pid_ends_nobody(place: Path, holder: "subprocess.Popen[bytes]") -> None:
    """The recorded QEMU is dead and its PID is another's, who happens to hold the lock: named, not killed."""
    qemu = process_of(holder)
    written(place, qemu=Process(qemu.pid, qemu.start_time - 1), launcher=ended())
    named = rf"still hold its lock: {holder.pid} \(sleep\)"
    with pytest.raises(AlreadyRunning, match=named), runtime.claimed(NAME, DEFINITION):
        pass
    assert holder.poll() is None


def test_vm_without_its_directory_is_found_by_its_open_file(place: Path, holder: "subprocess.Popen[bytes]") -> None:
    qemu = process_of(holder)
    written(place, qemu=qemu, launcher=ended(), state=RUNNING, vcpus={0: 17})
    (place / f"{NAME}.lock").unlink()
    place.rmdir()
    vm = runtime.find(NAME)
    assert vm is not None
    assert (vm.qemu, vm.socket, dict(vm.record.vcpus)) == (qemu, None, {0: 17})
    with pytest.raises(AlreadyRunning), runtime.claimed(NAME, DEFINITION):
        pass


def test_vm_is_found_by_its_open_file_though_it_closes_others_meanwhile(
    place: Path, holder: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU opens and closes files all the time: one that was listed and is gone hides none of the rest."""
    written(place, qemu=process_of(holder), launcher=ended(), state=RUNNING)
    (place / f"{NAME}.lock").unlink()
    closed, really, looked = Path(f"/proc/{holder.pid}/fd/0"), Path.readlink, []

    def readlink(path: Path) -> Path:
        looked.append(path)
        if path == closed:
            raise FileNotFoundError(path)
        return really(path)

    monkeypatch.setattr(Path, "readlink", readlink)
    with pytest.raises(AlreadyRunning, match=f"PID {holder.pid}"), runtime.claimed(NAME, DEFINITION):
        pass
    assert closed in looked


def test_vm_of_another_runtime_directory_has_its_socket_there(
    place: Path, holder: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Started by a service, say, and asked from a login: the open file says where it is."""
    written(place, qemu=process_of(holder), launcher=ended(), state=RUNNING)
    (place / f"{NAME}.sock").touch()
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "other"))
    vm = runtime.find(NAME)
    assert vm is not None
    assert vm.socket == place / f"{NAME}.sock"
    (place / f"{NAME}.lock").unlink()
    gone = runtime.find(NAME)
    assert gone is not None
    assert gone.socket is None


def test_socket_beside_another_lock_is_not_believed(
    place: Path, holder: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The directory is somebody's who made a file of this name in it: not the one that QEMU has open."""
    written(place, qemu=process_of(holder), launcher=ended(), state=RUNNING)
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "other"))
    place.chmod(0o755)
    vm = runtime.find(NAME)
    assert vm is not None
    assert vm.socket is None


def test_dead_vms_are_not_found(place: Path) -> None:
    place.mkdir(mode=0o700)
    written(place, qemu=ended(), launcher=ended(), state=RUNNING)
    assert runtime.find(NAME) is None
    with runtime.claimed(NAME, DEFINITION):
        pass


RACER = (
    "import sys, pathlib\nfrom qemu_launcher import runtime, errors\n"
    "try:\n  with runtime.claimed(sys.argv[1], pathlib.Path('/x')):\n"
    "    print('won', flush=True); sys.stdin.read()\n"
    "except errors.AlreadyRunning:\n  print('lost', flush=True)\n"
)


def racing(places: list[Path]) -> list[bytes]:
    """How as many starts of one VM end, each with its own runtime directory."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, NAME],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": "launcher", "XDG_RUNTIME_DIR": str(place)},
        )
        for place in places
    ]
    words = []
    for racer in racers:
        assert racer.stdout is not None
        words.append(racer.stdout.readline().strip())
    for racer in racers:
        racer.communicate()
    return sorted(words)


def test_claims_race_and_one_wins(tmp_path: Path) -> None:
    assert racing([tmp_path] * 4) == [b"lost"] * 3 + [b"won"]


def test_claims_race_in_several_places_and_no_two_win(tmp_path: Path) -> None:
    places = [tmp_path / str(number) for number in range(4)]
    for one in places:
        one.mkdir()
    assert racing(places)[:3] == [b"lost"] * 3


def test_who_looks_elsewhere_is_seen_from_there(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two starts with different runtime directories each looks for the other's record when its own is written."""
    (tmp_path / "other").mkdir()
    really, words = runtime._in_processes, []

    def while_another_starts() -> Iterator[Found]:
        words.extend(racing([tmp_path / "other"]))
        return really()

    monkeypatch.setattr(runtime, "_in_processes", while_another_starts)
    with runtime.claimed(NAME, DEFINITION):
        assert words == [b"lost"]


def test_refused_claim_leaves_no_record_and_the_socket_of_who_runs(
    place: Path, holder: "subprocess.Popen[bytes]"
) -> None:
    written(place, qemu=process_of(holder), launcher=ended(), state=RUNNING)
    (place / f"{NAME}.lock").unlink()
    (place / f"{NAME}.sock").touch()
    with pytest.raises(AlreadyRunning), runtime.claimed(NAME, DEFINITION):
        pass
    assert (place / f"{NAME}.lock").read_bytes() == b""
    assert (place / f"{NAME}.sock").exists()


@pytest.mark.parametrize("asked_from", [".", "third"])
def test_never_started_vm_hides_no_other(
    place: Path, holder: "subprocess.Popen[bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_from: str
) -> None:
    """It is ended, and then there is still the one that runs elsewhere."""
    written(place, qemu=process_of(holder), launcher=ended())
    elsewhere = tmp_path / "other" / "qemu-launcher"
    elsewhere.mkdir(parents=True, mode=0o700)
    (tmp_path / "third").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / asked_from))
    with (elsewhere / f"{NAME}.lock").open("x") as lock, child(["sleep", "1000"], lock.fileno()) as runs:
        written(elsewhere, qemu=process_of(runs), launcher=ended(), state=RUNNING)
        with pytest.raises(AlreadyRunning, match=f"PID {runs.pid}"), runtime.claimed(NAME, DEFINITION):
            pass
        assert runs.poll() is None


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770])
def test_directory_that_others_may_enter_is_refused(place: Path, mode: int) -> None:
    place.mkdir()
    place.chmod(mode)
    with (
        pytest.raises(LauncherError, match="is not yours, or others may enter it"),
        runtime.claimed(NAME, DEFINITION),
    ):
        pass
    assert list(place.iterdir()) == []


def test_directory_that_is_a_link_is_refused(place: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    place.symlink_to(elsewhere)
    with pytest.raises(LauncherError, match="is not yours"), runtime.claimed(NAME, DEFINITION):
        pass


def test_lock_that_is_a_link_is_refused(place: Path, tmp_path: Path) -> None:
    place.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (place / f"{NAME}.lock").symlink_to(victim)
    with pytest.raises(LauncherError, match="a symbolic link is in its place"), runtime.claimed(NAME, DEFINITION):
        pass
    assert victim.read_text() == "precious"


def test_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "qemu-launcher").write_text("a file")
    with pytest.raises(LauncherError, match="cannot make"), runtime.claimed(NAME, DEFINITION):
        pass


def test_deep_runtime_directory_has_a_socket_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sun_path holds 108 bytes; the socket is made through its directory."""
    deep = tmp_path.joinpath(*["a" * 60] * 3)
    deep.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with runtime.claimed(NAME, DEFINITION) as (claim, _):
        control = claim.listening_socket()
        with runtime.connected(deep / "qemu-launcher" / f"{NAME}.sock") as client:
            assert control.accept()[0] is not None
            assert client.fileno() >= 0
        control.close()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"{}", b'{"launcher": [1], "qemu": null}', b"\xff"])
def test_what_is_no_record(data: bytes) -> None:
    assert Record.decode(data) is None


@given(
    st.builds(
        Record,
        launcher=st.none() | st.builds(Process, st.integers(1, 1 << 22), st.integers(0, 1 << 60)),
        qemu=st.none() | st.builds(Process, st.integers(1, 1 << 22), st.integers(0, 1 << 60)),
        state=st.sampled_from([STARTING, RUNNING]),
        definition=st.text(st.characters(codec="utf-8")),
        vcpus=st.dictionaries(st.integers(0, 255), st.integers(1, 1 << 22)),
        isolation=st.sampled_from(["", "shield", "cpuset", "affinity"]),
        cpus=st.frozensets(st.integers(0, 8191)),
        boot=st.sampled_from(["", "b1a5c2d4-0000-4000-8000-000000000000"]),
    )
)
def test_records_survive_both_ways(record: Record) -> None:
    assert Record.decode(record.encode()) == record
    assert Record.decode(record.encode().ljust(5000) + b"\n") == record


def test_record_of_a_launcher_that_knew_less() -> None:
    """It goes on running through an upgrade."""
    old = b'{"launcher": [1, 2], "qemu": [3, 4], "state": "running", "definition": "/x.yml", "vcpus": [[0, 5]]}\n'
    expected = Record(Process(1, 2), Process(3, 4), RUNNING, "/x.yml", {0: 5})
    assert Record.decode(old) == expected


def test_shorter_record_written_over_a_longer_one(place: Path) -> None:
    with runtime.claimed(NAME, DEFINITION) as (claim, _):
        claim.update(vcpus={i: 1000 + i for i in range(100)})
        claim.update(vcpus={}, state=RUNNING)
        vm = runtime.find(NAME)
        assert vm is not None
        assert (dict(vm.record.vcpus), vm.record.state) == ({}, RUNNING)


def test_never_started_means_all_of_it() -> None:
    me = Process.of(os.getpid())
    dead = ended()
    assert Found("x", Record(launcher=dead, qemu=me, state=STARTING), None).never_started
    assert not Found("x", Record(launcher=dead, qemu=me, state=RUNNING), None).never_started
    assert not Found("x", Record(launcher=me, qemu=me, state=STARTING), None).never_started
    assert not Found("x", Record(launcher=dead, qemu=dead, state=STARTING), None).never_started
