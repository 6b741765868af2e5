"""What an auditor counts on before reading a line of the helper: its size, its imports, what it never does."""

import ast
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "helper/qemu_launcher_helper"
SOURCES = sorted(PACKAGE.rglob("*.py"))
START = ROOT / "helper/qemu-launcher-helper"
# Lines of code that the helper may have; and those in cpuset/, together: as many for each of these.
MOST_LINES, MOST_LINES_EACH = 1000, 150
MECHANISMS, OTHERS = ("partition.py", "pool.py", "v1.py"), ("raw.py",)
MOST_LINES_IN_CPUSET = MOST_LINES_EACH * len(MECHANISMS + OTHERS)
CLAIM = (
    f"at most {MOST_LINES} lines of code, and {MOST_LINES_IN_CPUSET} that shield ({MOST_LINES_EACH} for each of three "
    "mechanisms, and for hosts without systemd; its start script, 8, is not counted)"
)
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def lines_of_code(path: Path) -> int:
    """Lines with code on them: neither blank, nor comment, nor docstring."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node) is not None:
            documentation.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in NO_CODE:
                code.update(range(token.start[0], token.end[0] + 1))
    return len(code - documentation)


def sizes() -> tuple[int, int]:
    """The helper's lines of code: those outside of cpuset/, and those in it."""
    lines = {name(path): lines_of_code(path) for path in SOURCES}
    within = sum(size for file, size in lines.items() if file.startswith("cpuset/"))
    return sum(lines.values()) - within, within


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports from elsewhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def test_the_count_itself(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    head = '"""Two\nlines."""\n\n# comment\nx = 1  # one\n\n'
    sample.write_text(head + 'def f():\n    """D."""\n    return (\n        2\n    )\n')
    assert lines_of_code(sample) == 5


def test_size() -> None:
    outside, within = sizes()
    assert outside <= MOST_LINES
    assert within <= MOST_LINES_IN_CPUSET


def test_readme_says_what_is_counted() -> None:
    """The same numbers, and what they are for is there."""
    assert CLAIM in (ROOT / "README.md").read_text()
    assert {f"cpuset/{file}" for file in MECHANISMS + OTHERS} <= {name(path) for path in SOURCES}
    assert (len(MECHANISMS), lines_of_code(START)) == (3, 8)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports(path: Path) -> None:
    allowed = set(sys.stdlib_module_names)
    allowed |= {"bus.py": {"dbus_next"}, "privileges.py": {"prctl"}}.get(name(path), set())
    assert imported(path) <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_starts_no_program_and_loads_no_code(path: Path) -> None:
    programs = {"subprocess", "multiprocessing", "pty", "ctypes", "socketserver", "http", "urllib"}
    loaders = {"importlib", "runpy", "pickle", "shelve", "marshal", "code"}
    # mount(2) is in no module of Python's. test_mounting_is_all_that_ctypes_is_for
    but = {"cpuset/raw.py": {"ctypes"}}.get(name(path), set())
    assert imported(path).isdisjoint((programs | loaders) - but)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__", "input"), name(path)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            forbidden = ("system", "popen", "environ", "getenv", "fork", "forkpty", "startfile")
            assert node.attr not in forbidden, name(path)
            assert not node.attr.startswith(("exec", "spawn", "posix_spawn")), name(path)


def test_mounting_is_all_that_ctypes_is_for() -> None:
    """It is imported where it is used, in a block that hosts with systemd or with cpusets do not come to."""
    source = (PACKAGE / "cpuset/raw.py").read_text()
    [mounts] = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == "mount"]
    assert source.count("ctypes") == source.count("CDLL(") == 1
    within = ast.get_source_segment(source, mounts) or ""
    assert "from ctypes import CDLL, get_errno" in within
    assert "CDLL(None, use_errno=True).mount(" in within
    run = [sys.executable, "-c", "import sys, qemu_launcher_helper.__main__; print('ctypes' in sys.modules)"]
    assert subprocess.check_output(run, cwd=ROOT / "helper", text=True) == "False\n"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_assert_validates_nothing(path: Path) -> None:
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_says_why_it_exists(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), name(path)


def test_sys_exit_only_at_the_top() -> None:
    for path in SOURCES:
        if path.name != "__main__.py":
            assert "SystemExit" not in path.read_text()
            assert "sys.exit" not in path.read_text()
