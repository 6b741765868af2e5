"""The corpus as regression tests, and a short run of the fuzzer on each target; the long ones are `make fuzz` (A18).

When a long run finds something, its input lies in build/fuzz/TARGET-crash-*. Put it into corpus/TARGET under a name
that says what it is: from then on it is one of the tests here. What the targets cannot see by
themselves has a test of its own at the end.
"""

import asyncio
import importlib.util
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from fuzz import seeds, targets, wire
from fuzz.targets import TARGETS
from qemu_launcher_helper.bus import Call, SystemBus
from qemu_launcher_helper.contract import Failed, InvalidArguments
from qemu_launcher_helper.limits import load
from unit.alone import alone

ROOT = Path(__file__).resolve().parents[2]
# A fixed number, and no time: a slow machine runs the same test. A few seconds each.
RUNS = {"message": 3000, "arguments": 10000, "limits": 4000}
CORPUS = {target: str(seeds.CORPUS / target) for target in TARGETS}
FILES = [(target, path.name) for target in TARGETS for path in sorted((seeds.CORPUS / target).iterdir())]


@pytest.mark.parametrize(("target", "name"), FILES)
def test_a18_corpus(target: str, name: str) -> None:
    """Every input that is kept, whether a seed or what a fuzzer once found."""
    if target == "limits" and os.geteuid() != 0:
        pytest.skip("helper.toml must belong to root")
    TARGETS[target]((seeds.CORPUS / target / name).read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_are_what_the_script_writes(target: str) -> None:
    for name, data in seeds.SEEDS[target]().items():
        assert (seeds.CORPUS / target / name).read_bytes() == data, f"{name}: run python -m fuzz.seeds"
    assert (seeds.CORPUS / "limits.dict").read_bytes() == seeds.dictionary()


def test_corpus_is_small() -> None:
    """It is in every clone."""
    sizes = [path.stat().st_size for path in seeds.CORPUS.rglob("*") if path.is_file()]
    assert len(sizes) < 100
    assert sum(sizes) < 100 * 1024


def fuzz(
    target: str, folder: Path, *options: str, program: str = "import fuzz.__main__ as it; it.main()"
) -> subprocess.CompletedProcess[str]:
    """Run atheris on a target; its standard output has everything. Skips where there is no atheris.

    What it finds or leaves behind, as libFuzzer ends without a word to Python, is in `folder`.
    """
    if importlib.util.find_spec("atheris") is None:
        pytest.skip(f"atheris is not installed in {sys.prefix}: make setup")
    return subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            target,
            "-print_final_stats=1",
            "-seed=1",
            f"-artifact_prefix={folder}/",
            *options,
        ],
        cwd=ROOT,
        # The order of a set decides which of two new inputs comes first.
        env={**os.environ, "PYTHONPATH": "helper:tests", "PYTHONHASHSEED": "0", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def output(run: subprocess.CompletedProcess[str]) -> str:
    """Return the output of a run that found nothing."""
    assert run.returncode == 0, run.stdout[-6000:]
    return run.stdout


def number(pattern: str, text: str) -> int:
    """Return the last number that `pattern` matches."""
    found: list[str] = re.findall(pattern, text)
    assert found, text[-3000:]
    return int(found[-1])


@pytest.mark.parametrize("target", TARGETS)
def test_a18_short_run(target: str, tmp_path: Path) -> None:
    """The fuzzer finds nothing; and it really ran, and saw the helper's code: the seeds and what it made reach more."""
    if target == "limits" and os.geteuid() != 0:
        pytest.skip("helper.toml must belong to root")
    alone = number(r"INITED +cov: (\d+)", output(fuzz(target, tmp_path, "-runs=1")))
    new = tmp_path / "new"
    new.mkdir()
    out = output(fuzz(target, tmp_path, f"-runs={RUNS[target]}", str(new), CORPUS[target]))
    assert number(r"stat::number_of_executed_units: (\d+)", out) >= RUNS[target]
    assert number(r"INITED +cov: (\d+)", out) > alone > 0
    assert number(r"DONE +cov: \d+ ft: (\d+)", out) > number(r"INITED +cov: \d+ ft: (\d+)", out)
    assert list(new.iterdir())


def test_the_fuzzer_would_notice(tmp_path: Path) -> None:
    """A control: with one promise broken, a run of the same length ends with an input that shows it."""
    # MIN_PID is read at each call, so PID 1 passes; the target knows what the contract's docstring says.
    program = "import fuzz.__main__ as it, qemu_launcher_helper.contract as c; c.MIN_PID = 1; it.main()"
    new = tmp_path / "new"
    new.mkdir()
    run = fuzz("arguments", tmp_path, f"-runs={RUNS['arguments']}", str(new), CORPUS["arguments"], program=program)
    assert run.returncode != 0
    assert "AssertionError" in run.stdout
    [found] = tmp_path.glob("crash-*")
    targets.arguments(found.read_bytes())


# --- found, and repaired ----------------------------------------------------------------------------------------------


async def read(data: bytes) -> BaseException | None:
    """Let the adapter read `data`, and answer every call; return how the connection ended."""
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    bus = SystemBus(reader, targets.Outgoing())  # type: ignore[arg-type]  # no more of a StreamWriter is used

    def refuse(call: Call) -> None:
        bus.reply(call, "s", ["no"], InvalidArguments.wire_name)

    bus.on_call = refuse
    await asyncio.wait({bus.reading})
    return bus.reading.exception()


def test_an_ordinary_call_can_be_answered() -> None:
    """The control of those below."""
    assert isinstance(asyncio.run(read(wire.call("Ping"))), EOFError)


def test_signatures_are_not_kept() -> None:
    """Else any member of the group fills the helper's 128 MiB in a second, with calls that are all refused."""
    letters = "ybnqiuxtds"
    calls = [wire.call("Ping", "y" * 250 + "".join(letters[int(digit)] for digit in f"{n:05}")) for n in range(200)]

    def measure() -> None:
        tracemalloc.start()
        asyncio.run(read(b"".join(calls[:20])))
        before = tracemalloc.get_traced_memory()[0]
        asyncio.run(read(b"".join(calls[20:])))
        after = tracemalloc.get_traced_memory()[0]
        assert after - before < 2 * 2**20, "kept, the 180 would be 8 MiB"

    alone(measure)  # labs may be kept by other threads of this process, and what those hold counts as well


@pytest.mark.parametrize("odd", [wire.call("Ping", serial=0), wire.call("Ping", sender="")], ids=["serial", "sender"])
def test_a_call_that_cannot_be_answered_hurts_itself_only(odd: bytes) -> None:
    """No bus hands on such calls. If one did, the connection would go on until its end all the same."""
    assert isinstance(asyncio.run(read(odd)), EOFError)


@pytest.mark.skipif(os.geteuid() != 0, reason="helper.toml must belong to root")
def test_a_group_with_a_nul_is_refused_by_the_check_too(tmp_path: Path) -> None:
    """It named no group that there can be: looking for it failed at each call, and --check approved of the file."""
    path = tmp_path / "helper.toml"
    path.write_text('[[limits]]\ngroups = ["a\\u0000b"]\n')
    path.chmod(0o644)
    with pytest.raises(Failed):
        load(str(path))
