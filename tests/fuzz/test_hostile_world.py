"""The real program in a hostile world: files, arguments, environment, folders, terminals.

Whatever they hold, the answer is a message and an exit status; never a traceback, never a crash, never more memory than
a definition is worth.
"""

import os
import pty
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from unit.reading import ROOT

CORPUS = Path(__file__).with_name("definitions")
MEMORY = 256 << 20  # bytes of address space; Python itself and PyYAML take about 40 MiB of it
GOOD = "launcher: {binary: qemu-system-x86_64}\nqemu: [nographic]\n"
NAME_HINT = "use letters, digits, - and _, beginning with a letter or digit; at most 48"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "vm.yml").write_text(GOOD)
    return {"PYTHONPATH": str(ROOT / "launcher"), "QEMU_LAUNCHER_CONFIG_DIR": str(tmp_path), "PATH": os.environ["PATH"]}


def launch(
    environ: dict[str, str], *words: str | bytes, before: Callable[[], object] = lambda: None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """The program's end, after checking what holds for every end."""

    def prepared() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before()

    done = subprocess.run(
        [sys.executable, "-m", "qemu_launcher", *words],
        env=environ,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
        preexec_fn=prepared,
    )
    assert done.returncode in (0, 1, 2, 3), (done.returncode, done.stderr)
    assert b"Traceback" not in done.stderr
    assert b"Fatal" not in done.stderr
    assert len(done.stderr) < 8000
    assert (done.stderr == b"") <= (done.returncode == 0)
    for line in done.stderr.decode().splitlines():
        assert line.isprintable()
        assert line.startswith(("qemu-launcher: ", "    "))
    return done


# Files

GENERATED = {
    "empty": b"",
    "only-a-mark": b"\xef\xbb\xbf",
    "ten-megabytes": b"# padding\n" * (10 << 20 >> 3),
    "ten-megabytes-in-one-line": b"a" * (10 << 20),
    "deep-flow": b"[" * 100_000,
    "deep-map": b"{a: " * 100_000,
    "deep-block": b"- " * 100_000,
    "deep-keys": b"? " * 100_000,
    "deep-brackets-closed": b"[" * 100_000 + b"]" * 100_000,
    "deep-quotes": b"a: " + b"'\"" * 100_000,
    "deep-indent": b"\n".join(b" " * (depth % 3000) + b"a:" for depth in range(300)),
    "many-anchors": b"launcher: {binary: q}\nqemu:\n" + b"".join(b"- &a%d x\n" % n for n in range(60_000)),
    "many-aliases": b"launcher: {binary: q}\nqemu:\n- &a a\n" + b"- *a\n" * 150_000,
    "many-sections": b"".join(b"s%d: x\n" % n for n in range(90_000)),
    "many-mistakes": b"launcher: {binary: q}\nqemu:\n" + b"- 5\n" * 200_000,
    "many-repeated-keys": b"launcher:\n" + b"  a: b\n" * 140_000 + b"qemu: []\n",
    "long-key": b"a" * 1_000_000 + b": b\n",
    "long-anchor": b"&" + b"a" * 1_000_000 + b" b\n",
    "long-tag": b"!" + b"a" * 1_000_000 + b" b\n",
    "long-number": b"launcher: {binary: q, priority: " + b"9" * 900_000 + b"}\nqemu: []\n",
    "long-option": b"launcher: {binary: q}\nqemu:\n- a: " + b"x" * 900_000 + b"\n",
    "all-bytes": bytes(range(256)) * 100,
    "zeros": b"\0" * 100_000,
    "utf-16": GOOD.encode("utf-16"),
    "utf-32": GOOD.encode("utf-32"),
    "latin-1": "launcher: {binary: größe}\nqemu: []\n".encode("latin-1"),
    "half-a-character": GOOD.encode() + b"# \xf0\x9f",
    "surrogates": b'launcher: {binary: "\\ud800"}\nqemu: []\n',
    "carriage-returns": GOOD.replace("\n", "\r").encode(),
    "lines-of-unicode": GOOD.replace("\n", "\u2028").encode(),
    "billion-laughs": b"a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 25))
    + b"launcher: {binary: q}\nqemu: *a24\n",
    "billion-laughs-in-env": b"a: &a {" + b",".join(b"k%d: v" % n for n in range(50_000)) + b"}\n"
    b"launcher: {binary: q, env: *a}\nqemu: []\n",
    "quadratic-text": b"x: &x '" + b"y" * 100_000 + b"'\nlauncher: {binary: q}\nqemu:\n" + b"- a: *x\n" * 90_000,
    "quadratic-list": b"x: &x [" + b"a," * 60_000 + b"b]\nlauncher: {binary: q}\nqemu:\n" + b"- a: *x\n" * 90_000,
}
STARTABLE = {"lines-of-unicode", "carriage-returns", "billion-laughs-in-env", "many-anchors", "many-aliases"}


@pytest.mark.parametrize("name", GENERATED)
def test_hostile_file_that_is_made(environ: dict[str, str], tmp_path: Path, name: str) -> None:
    (tmp_path / "vm.yml").write_bytes(GENERATED[name])
    done = launch(environ, "command", "vm")
    assert (done.returncode, done.stdout == b"") in [(0, False), (2, True)]
    assert done.returncode == 2 or name in STARTABLE
    assert done.returncode == 0 or done.stderr.startswith(f"qemu-launcher: {tmp_path}/vm.yml".encode())


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: str(path.stem))
def test_hostile_file_of_the_corpus(environ: dict[str, str], tmp_path: Path, path: Path) -> None:
    """Files that begin with `# fine` mean something; all others are refused with file, line and column."""
    (tmp_path / "vm.yml").write_bytes(path.read_bytes())
    done = launch(environ, "command", "--json", "vm")
    if path.read_bytes().startswith(b"# fine"):
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2
        assert done.stderr.startswith(f"qemu-launcher: {tmp_path}/vm.yml:".encode())
        assert done.stderr.split(b":")[2].isdigit()


def test_corpus_is_there() -> None:
    assert len(list(CORPUS.iterdir())) >= 40


def test_paths_that_are_no_files(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "folder.yml").mkdir()
    (tmp_path / "loop.yml").symlink_to("loop.yml")
    (tmp_path / "dangling.yml").symlink_to("nowhere")
    (tmp_path / "null.yml").symlink_to("/dev/null")
    (tmp_path / "zero.yml").symlink_to("/dev/zero")
    (tmp_path / "memory.yml").symlink_to("/proc/self/mem")
    os.mkfifo(tmp_path / "fifo.yml")
    for name in ("folder", "loop", "dangling", "null", "zero", "memory", "fifo"):
        for word in (name, f"{tmp_path}/{name}.yml"):
            assert launch(environ, "command", word).returncode == 2, name


def test_file_without_permission(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "vm.yml").chmod(0)
    tmp_path.chmod(0o755)

    def nobody() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)

    if os.geteuid() == 0 and not all(parent.stat().st_mode & 1 for parent in tmp_path.parents):
        environ = {**environ, "QEMU_LAUNCHER_CONFIG_DIR": str(tmp_path)}
    done = launch(environ, "command", "vm", before=nobody)
    assert done.returncode == 2
    assert b"Permission denied" in done.stderr


# Names that are no UTF-8, in folders and arguments


def test_folder_full_of_odd_names(environ: dict[str, str], tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name in (
        b"\xff.yml",
        b"a\nb.yml",
        b"\x1b[31m.yml",
        b" .yml",
        b"..yml",
        b"-.yml",
        b"x" * 250 + b".yml",
        b".yml",
    ):
        (Path(os.fsdecode(folder + b"/" + name))).write_bytes(GOOD.encode())
    done = launch(environ, "command", "vmm")
    assert done.returncode == 2
    assert b"did you mean vm?" in done.stderr
    for name in (b"\xff", b"a\nb", b"\x1b[31m", b" ", b".", b"", b"x" * 250):
        assert NAME_HINT.encode() in launch(environ, "command", name).stderr


def test_definition_in_a_folder_that_is_no_utf8(environ: dict[str, str], tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n"))
    folder.mkdir()
    (folder / "vm.yml").write_text(GOOD)
    (folder / "wrong.yml").write_text("x: 1\n")
    assert launch(environ, "command", os.fsencode(folder) + b"/vm.yml").returncode == 0
    assert launch({**environ, "QEMU_LAUNCHER_CONFIG_DIR": str(folder)}, "command", "vm").returncode == 0
    assert b"\\xff" in launch(environ, "command", os.fsencode(folder) + b"/wrong.yml").stderr


COMMANDS = ("run", "stop", "release", "limits")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "word",
    [b"\xff", b"/\xff/\xff.yml", b"", b"/", b"x" * 100_000, b"/" + b"x" * 100_000 + b".yml", b"\x1b[2J", b"-\xff"],
)
def test_odd_argument(environ: dict[str, str], command: str, word: bytes) -> None:
    assert launch(environ, command, word).returncode == 2


@pytest.mark.parametrize("owner", [b"\xff", b"", b"9" * 5000, b"-1", b"x" * 100_000, b"4294967295", b"\xc2\xb2"])
def test_odd_owner(environ: dict[str, str], owner: bytes) -> None:
    assert launch(environ, "limits", "--owner", owner).returncode == 2


def test_command_line_that_is_no_utf8(environ: dict[str, str], tmp_path: Path) -> None:
    for words in ([b"q", b"-name", b"\xff"], [b"\xff"], [b"q", b"-\xff"], [b"q", b"-name", b"a\nb\x1b"], [b""]):
        assert launch(environ, "import", "--", *words).returncode in (0, 2)


def test_list(environ: dict[str, str], tmp_path: Path) -> None:
    """A folder in which each file is wrong in another way, and VMs are still found."""
    for path in CORPUS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.yml"))).write_text(GOOD)
    for words in (("list",), ("list", "--json")):
        done = launch(environ, *words)
        assert done.returncode == 0
        assert done.stdout.decode().count("tab-indent") >= 1


def test_many_arguments(environ: dict[str, str]) -> None:
    assert launch(environ, *["x"] * 10_000).returncode == 2
    assert launch(environ, *["--untuned"] * 300).returncode == 2


# The environment

PLACES = ("XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "HOME", "DBUS_SYSTEM_BUS_ADDRESS")


@pytest.mark.parametrize("variables", [("QEMU_LAUNCHER_CONFIG_DIR",), PLACES], ids=["config", "places"])
@pytest.mark.parametrize("value", ["\udcff", "/\udcff", "", "\n", "/" + "x" * 5000, "relative", "/dev/null", "/proc/1"])
@pytest.mark.parametrize("words", [("command", "vn"), ("status",), ("limits",), ("list",)])
def test_odd_value(environ: dict[str, str], variables: tuple[str, ...], value: str, words: tuple[str, ...]) -> None:
    odd = {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere", **environ}
    del odd["QEMU_LAUNCHER_CONFIG_DIR"]
    done = launch({**odd, **dict.fromkeys(variables, value)}, *words)
    assert done.returncode == {"command": 2, "status": 0, "limits": 1, "list": 0}[words[0]]


def test_without_any_environment(environ: dict[str, str]) -> None:
    done = launch({"PYTHONPATH": environ["PYTHONPATH"]}, "command", "vn")
    assert done.returncode == 2


@pytest.mark.parametrize("locale", ["C", "POSIX", "tr_TR.UTF-8", "nonsense", "\udcff"])
def test_odd_locale(environ: dict[str, str], locale: str) -> None:
    odd = {**environ, "LC_ALL": locale, "LANG": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert launch(odd, "command", "vm").returncode == 0
    assert launch(odd, "command", "größe").returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict", "utf-8:nonsense"])
def test_odd_encoding_of_the_standard_streams(environ: dict[str, str], tmp_path: Path, encoding: str) -> None:
    """The installed program does not even look at it: it is started with python3 -I."""
    (tmp_path / "vm.yml").write_text("launcher: {binary: größe}\nqemu: []\n", encoding="utf-8")
    done = launch({**environ, "PYTHONIOENCODING": encoding}, "command", "vm")
    assert done.stdout.decode() == "'größe'\n"


# The place


@pytest.mark.parametrize(
    ("words", "status"),
    [(("command", "vm"), 0), (("command", "./vm.yml"), 2), (("run", "vm.yml"), 2), (("status",), 0), (("limits",), 1)],
)
def test_working_directory_that_is_gone(
    environ: dict[str, str], tmp_path: Path, words: tuple[str, ...], status: int
) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    odd = {**environ, "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=nowhere"}
    assert launch(odd, *words, cwd=place, before=place.rmdir).returncode == status


@pytest.mark.parametrize("closed", [(0,), (0, 1), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize(("words", "status"), [(("command", "vm"), 0), (("command", "vn"), 2), (("status",), 0)])
def test_closed_standard_descriptors(
    environ: dict[str, str], closed: tuple[int, ...], words: tuple[str, ...], status: int
) -> None:
    argv = [sys.executable, "-m", "qemu_launcher", *words]
    redirections = " ".join(f"{fd}>&-" for fd in closed)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", *argv],
        env=environ,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == (1 if 1 in closed and status == 0 else status)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("columns", ["0", "1", "-1", "nan", "9" * 20, ""])
def test_table_on_a_terminal_of_odd_width(environ: dict[str, str], columns: str) -> None:
    """All the text is there, in rich's table or in plain columns."""
    leader, terminal = pty.openpty()
    code = "from qemu_launcher import table; p = table.page_for_stdout(); p and p.line('wide'); p or print('plain')"
    shown = b""

    def read() -> None:
        nonlocal shown
        while select.select([leader], [], [], 60)[0]:
            try:
                shown += os.read(leader, 4096)
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**environ, "COLUMNS": columns, "TERM": "xterm"}, stdout=terminal
    )
    os.close(terminal)
    reader.start()
    assert process.wait(60) == 0
    reader.join()
    os.close(leader)
    assert shown.strip() in (b"wide", b"plain")
    assert (shown.strip() == b"plain") == (columns in ("0", "1"))
