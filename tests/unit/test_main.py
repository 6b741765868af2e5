"""The program itself, as a process: what it prints, where, and how it ends whatever happens to its output."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_launcher import __main__ as program, cli, definition, stdout
from qemu_launcher.errors import LauncherError
from unit.reading import ROOT

DEFINITION = """\
launcher: {binary: qemu-system-x86_64}
qemu: [name: Größe 漢, machine: [pc, accel: kvm], nographic]
"""
LINE = "qemu-system-x86_64 -name 'Größe 漢' -machine pc,accel=kvm -nographic\n"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment in which the VM `vm` exists, and nothing of this user's."""
    (tmp_path / "vm.yml").write_text(DEFINITION, encoding="utf-8")
    return {"PYTHONPATH": str(ROOT / "launcher"), "QEMU_LAUNCHER_CONFIG_DIR": str(tmp_path), "PATH": os.environ["PATH"]}


def launch(environ: dict[str, str], *words: str | bytes, **options: object) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(  # type: ignore[call-overload,no-any-return]  # options are its own
        [sys.executable, "-m", "qemu_launcher", *words],
        env=environ,
        check=False,
        timeout=60,
        **({"capture_output": True} | options),
    )


def test_command(environ: dict[str, str]) -> None:
    done = launch(environ, "command", "vm")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, LINE, b"")


def test_ctrl_c_before_the_program_can_see_to_it(tmp_path: Path) -> None:
    """While its modules are being imported: no traceback, and the exit status of Ctrl-C."""
    package = tmp_path / "qemu_launcher"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("raise KeyboardInterrupt\n")
    script = (ROOT / "launcher/qemu-launcher").read_text()
    (tmp_path / "script").write_text(script.replace('"/usr/lib/python3/dist-packages"', repr(str(tmp_path))))
    done = subprocess.run([sys.executable, "-I", tmp_path / "script"], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_command_json(environ: dict[str, str]) -> None:
    done = launch(environ, "command", "--json", "vm")
    assert done.returncode == 0
    assert json.loads(done.stdout) == [
        *("qemu-system-x86_64", "-name", "Größe 漢", "-machine", "pc,accel=kvm", "-nographic"),
    ]


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8", "de_DE.ISO-8859-1", "nonsense"])
def test_output_is_utf8_in_every_locale(environ: dict[str, str], locale: str) -> None:
    done = launch(environ | {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "command", "vm")
    assert (done.returncode, done.stdout.decode()) == (0, LINE)


def test_one_option_a_line_on_a_terminal(environ: dict[str, str]) -> None:
    leader, terminal = pty.openpty()
    try:
        done = launch(environ, "command", "vm", capture_output=False, stdout=terminal, stderr=terminal)
        shown = os.read(leader, 4096).decode().replace("\r\n", "\n")
    finally:
        os.close(leader)
        os.close(terminal)
    assert done.returncode == 0
    assert shown == LINE.replace(" -", " \\\n    -")


def test_help_and_version(environ: dict[str, str]) -> None:
    assert launch(environ, "--help").stdout.decode() == cli.HELP
    assert launch(environ, "--version").stdout.decode() == f"qemu-launcher {cli.VERSION}\n"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), 2, "qemu-launcher: the name of a VM is missing\n    qemu-launcher --help shows what can be said\n"),
        (("command", "--yaml", "vm"), 2, "qemu-launcher: there is no option --yaml\n"
         "    qemu-launcher --help shows what can be said\n"),
        (("vmm",), 2, "qemu-launcher: there is no VM 'vmm': no vmm.yml in DIR\n    did you mean vm?\n"),
        (("kil",), 2, "qemu-launcher: there is no VM 'kil': no kil.yml in DIR\n    did you mean kill?\n"),
        (("command", "wrong"), 2, "qemu-launcher: DIR/wrong.yml:2:7: the section qemu must be a list, not 'x'\n"),
        (("run", "wrong"), 2, "qemu-launcher: DIR/wrong.yml:2:7: the section qemu must be a list, not 'x'\n"),
        (("command", b"\xff\x1b[1m"), 2, "qemu-launcher: '\\udcff\\x1b[1m' is no name for a VM\n"
         "    use letters, digits, - and _, beginning with a letter or digit; at most 48\n"),
        ((b"--\xff",), 2, "qemu-launcher: there is no option --\\xff\n"
         "    qemu-launcher --help shows what can be said\n"),
        (("stop", "a b"), 2, "qemu-launcher: 'a b' is no name for a VM\n"
         "    use letters, digits, - and _, beginning with a letter or digit; at most 48\n"),
        (("command", b"/\xff/vm.yml"), 2, "qemu-launcher: cannot read /\\xff/vm.yml: No such file or directory\n"
         "    did you mean vm? with a slash or .yml it is the path of a file\n"),
        (("startt", "vm"), 2, "qemu-launcher: there is no command 'startt'\n    did you mean start?\n"),
    ],
)  # fmt: skip
def test_one_message_and_a_status(
    environ: dict[str, str], tmp_path: Path, words: tuple[str | bytes, ...], status: int, message: str
) -> None:
    (tmp_path / "wrong.yml").write_text("launcher: {binary: q}\nqemu: x\n")
    done = launch(environ, *words)
    assert (done.returncode, done.stdout) == (status, b"")
    assert done.stderr.decode() == message.replace("DIR", str(tmp_path))


def test_a_file_name_that_is_no_utf8_in_a_message(environ: dict[str, str], tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xe4"
    Path(os.fsdecode(folder)).mkdir()
    Path(os.fsdecode(folder + b"/vm.yml")).write_text("x: 1")
    done = launch(environ, "command", folder + b"/vm.yml")
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"qemu-launcher: {tmp_path}/\\xe4/vm.yml:1:1: ")


def test_an_environment_that_is_no_utf8(environ: dict[str, str]) -> None:
    done = launch({**environ, "QEMU_LAUNCHER_CONFIG_DIR": "/\udcff"}, "command", "vm")
    assert (done.returncode, done.stderr.decode().splitlines()[0]) == (
        (2, "qemu-launcher: there is no VM 'vm': no vm.yml in /\\xff")
    )


def test_closed_stdout(environ: dict[str, str]) -> None:
    done = launch(
        environ, "command", "vm", capture_output=False, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1)
    )
    assert (done.returncode, done.stderr) == (1, b"qemu-launcher: standard output is closed\n")


def test_closed_stderr(environ: dict[str, str]) -> None:
    done = launch(
        environ, "command", "vn", capture_output=False, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2)
    )
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("closed", [(0,), (0, 1), (1, 2), (0, 1, 2)])
def test_nothing_is_opened_in_place_of_what_is_closed(environ: dict[str, str], closed: tuple[int, ...]) -> None:
    """For every command: each may have children, whose own three would go over it. What is open stays as it is."""
    script = (
        "import os, sys\nfrom qemu_launcher import __main__ as program\n"
        "nowhere = os.stat(os.devnull).st_rdev\n"
        "program._act = lambda _: sum((os.fstat(fd).st_rdev == nowhere) << fd for fd in range(3))\n"
        "sys.exit(program.main(['--version']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environ,
        check=False,
        input=b"",
        capture_output=True,
        timeout=60,
        preexec_fn=lambda: os.closerange(closed[0], closed[-1] + 1),
    )
    assert done.returncode == sum(1 << fd for fd in closed)


def test_libvirt_is_given_the_xml_though_stdin_is_closed(environ: dict[str, str], tmp_path: Path) -> None:
    """virsh reads it by the number of a descriptor of ours, which must not be that of its own stdin."""
    (tmp_path / "domain.xml").write_text("<domain type='kvm'><name>vm</name></domain>")
    (tmp_path / "virsh").write_text('#!/bin/sh\ngrep -q "<domain" "$4" && echo qemu-system-x86_64 -nodefaults\n')
    (tmp_path / "virsh").chmod(0o755)
    done = launch(
        environ | {"PATH": f"{tmp_path}:{environ['PATH']}"},
        *("import", "--libvirt", f"{tmp_path}/domain.xml"),
        preexec_fn=lambda: os.close(0),
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"nodefaults" in done.stdout


def test_full_disk(environ: dict[str, str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = launch(environ, "command", "vm", capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (
            (1, b"qemu-launcher: cannot write to standard output: No space left on device\n")
        )
        assert launch(environ, "command", "vn", capture_output=False, stderr=full).returncode == 2


def test_a_reader_that_has_gone(environ: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = launch(environ, "command", "vm", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("json_form", [False, True])
def test_command_imports_little(environ: dict[str, str], json_form: bool) -> None:
    """What only a start needs would cost `command` its time budget, and would run where it cannot be used."""
    words = ["command", "--json", "vm"] if json_form else ["command", "vm"]
    script = f"import sys; from qemu_launcher.__main__ import main; main({words}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], env=environ, check=True, capture_output=True, timeout=60)
    modules = set(done.stderr.decode().split())
    costly = {"asyncio", "dbus_next", "rich", "prctl", "dataclasses", "inspect", "subprocess", "shutil", "difflib"}
    ours = {"session", "status", "helper_proxy", "qmp", "host"}
    assert "qemu_launcher.definition" in modules
    assert modules & (costly | {f"qemu_launcher.{name}" for name in ours}) == set()


# What main makes of what its actions do, without them


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (LauncherError("no", "do"), 1, "qemu-launcher: no\n    do\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(5, "Input/output error", "/some/file"), 1, "qemu-launcher: /some/file: Input/output error\n"),
        (OSError(5, "Input/output error"), 1, "qemu-launcher: input or output failed: Input/output error\n"),
    ],
)
def test_what_actions_raise(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], raised: BaseException, status: int, message: str
) -> None:
    def act(arguments: cli.Arguments) -> int:
        raise raised

    monkeypatch.setattr(program, "_act", act)
    monkeypatch.setattr(stdout, "abandon", lambda stream: None)
    assert program.main(["vm"]) == status
    assert capfd.readouterr().err == message


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vm.yml").touch()
    monkeypatch.setattr(definition, "load", lambda path, name: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        program.main(["command", f"{tmp_path}/vm.yml"])
