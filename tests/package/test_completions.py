"""Completion in real shells: installed as the package installs it, found by the shell itself, and typed.

In bash and zsh a key is bound that shows the line as it stands, so what is compared is what a user would have got.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from package.contents import ROOT
from qemu.screen import Screen, executed

READY = "ready> "
SCRIPTS = {
    "bash": ("launcher/completions/qemu-launcher.bash", "share/bash-completion/completions/qemu-launcher"),
    "zsh": ("launcher/completions/_qemu-launcher", "share/zsh/site-functions/_qemu-launcher"),
    "fish": ("launcher/completions/qemu-launcher.fish", "share/fish/vendor_completions.d/qemu-launcher.fish"),
}
# What is typed before the TAB, and the line after it.
LINES = [
    ("qemu-launcher stat", "qemu-launcher status "),
    ("qemu-launcher stop runs", "qemu-launcher stop runs-now "),
    ("qemu-launcher run my-w", "qemu-launcher run my-win11 "),
    ("qemu-launcher my-l", "qemu-launcher my-linux "),
    ("qemu-launcher status --al", "qemu-launcher status --all-users "),
    ("qemu-launcher -q my-w", "qemu-launcher -q my-win11 "),
    ("qemu-launcher limits --owner roo", "qemu-launcher limits --owner root "),
    ("qemu-launcher run ./a-fo", "qemu-launcher run ./a-folder/"),
    ("qemu-launcher run ./a-folder/vm", "qemu-launcher run ./a-folder/vm.yml "),
    ("qemu-launcher import -o a-fo", "qemu-launcher import -o a-folder/"),
    ("qemu-launcher import -- qemu-launch", "qemu-launcher import -- qemu-launcher "),
    ("qemu-launcher stop my-w", "qemu-launcher stop my-w"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the program in bin/, the scripts in share/, two definitions, and a VM that runs: this process."""
    place = tmp_path_factory.mktemp("completion")
    for source, target in SCRIPTS.values():
        (place / target).parent.mkdir(parents=True)
        shutil.copy(ROOT / source, place / target)
    program = place / "bin/qemu-launcher"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT}/launcher exec {sys.executable} -m qemu_launcher "$@"\n')
    program.chmod(0o755)
    (place / "vms").mkdir()
    for name in ("my-win11", "my-linux"):
        (place / f"vms/{name}.yml").touch()
    (place / "work/a-folder").mkdir(parents=True)
    (place / "work/a-folder/vm.yml").touch()
    (place / "run/qemu-launcher").mkdir(parents=True, mode=0o700)
    start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    record = {"launcher": None, "qemu": [os.getpid(), start], "state": "running", "definition": "", "vcpus": []}
    with (place / "run/qemu-launcher/runs-now.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps(record) + "\n")
        lock.flush()
        yield place


def environment(world: Path, shell: str) -> dict[str, str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: make setup")
    return {
        "PATH": f"{world}/bin:/usr/bin:/bin",
        "HOME": str(world),
        "TERM": "xterm",
        "LC_ALL": "C.UTF-8",
        "QEMU_LAUNCHER_CONFIG_DIR": f"{world}/vms",
        "XDG_RUNTIME_DIR": f"{world}/run",
        "XDG_DATA_DIRS": f"{world}/share:/usr/share",
        "XDG_CONFIG_HOME": f"{world}/config",
        "INPUTRC": "/dev/null",
    }


def typed_into(world: Path, shell: str, *argv: str) -> contextlib.AbstractContextManager[Screen]:
    return executed(argv, environment(world, shell), size=(50, 200), cwd=world / "work")


def completed(screen: Screen, typed: str) -> str:
    """The line after TAB. The key that shows it waits its turn behind the completion."""
    screen.type(f"{typed}\t\x18")
    screen.wait("LINE<")
    return screen.wait(">\n")


def test_bash(world: Path) -> None:
    """Loaded by bash-completion when it is first needed, from its usual folder."""
    library = Path("/usr/share/bash-completion/bash_completion")
    if not library.exists():
        pytest.skip("bash-completion is not installed: make setup")
    with typed_into(world, "bash", "bash", "--noprofile", "--norc", "-i") as screen:
        screen.type(f"source {library}\n")
        screen.type(r"""bind -x '"\C-x": printf "LINE<%s>\n" "$READLINE_LINE"; READLINE_LINE='""" + "\n")
        screen.type("bind 'set bell-style none'; bind 'set enable-bracketed-paste off'; PS1=rea; PS1+='dy> '\n")
        screen.wait(READY)
        for typed, line in LINES:
            assert completed(screen, typed) == line


def test_zsh(world: Path) -> None:
    """Loaded by compinit from a folder of fpath."""
    with typed_into(world, "zsh", "zsh", "-f", "-i") as screen:
        screen.type(f"fpath=({world}/share/zsh/site-functions $fpath); autoload -Uz compinit; compinit -D -u\n")
        screen.type("""show() { print -r -- "LINE<$BUFFER>"; BUFFER= }; zle -N show; bindkey '^X' show\n""")
        screen.type("unsetopt prompt_cr prompt_sp list_beep beep; PS1=rea; PS1+='dy> '\n")
        screen.wait(READY)
        for typed, line in LINES:
            assert completed(screen, typed) == line


def fish_offers(world: Path, typed: str) -> list[str]:
    """fish tells what it would offer, with the meanings."""
    done = subprocess.run(
        ["fish", "-c", "complete -C $argv[1]", typed],
        cwd=world / "work",
        env=environment(world, "fish"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_fish(world: Path) -> None:
    """Loaded by fish from its vendor folder."""
    for typed, line in LINES:
        word = line.split(" ")[-2 if line.endswith(" ") else -1]
        expected = [] if typed == line else [word]
        assert [offer.split("\t")[0] for offer in fish_offers(world, typed)] == expected, typed


def test_fish_shows_what_the_words_mean(world: Path) -> None:
    assert fish_offers(world, "qemu-launcher run my-w") == [f"my-win11\t{world}/vms/my-win11.yml"]
    assert fish_offers(world, "qemu-launcher stat")[0].startswith("status\tShow your running VMs")


def test_program_given_by_its_path_is_asked_itself(world: Path) -> None:
    """Not another one of that name; and quotes, a tilde and the empty word are nothing to stumble over."""
    with typed_into(world, "bash", "bash", "--noprofile", "--norc", "-i") as screen:
        screen.type(f"source {world}/{SCRIPTS['bash'][1]}; PATH=/usr/bin:/bin\n")
        screen.type(r"""bind -x '"\C-x": printf "LINE<%s>\n" "$READLINE_LINE"; READLINE_LINE='""" + "\n")
        screen.type("bind 'set bell-style none'; bind 'set enable-bracketed-paste off'; PS1=rea; PS1+='dy> '\n")
        screen.wait(READY)
        for typed, line in (
            ("~/bin/qemu-launcher stat", "~/bin/qemu-launcher status "),
            (f"{world}/bin/qemu-launcher stop ", f"{world}/bin/qemu-launcher stop "),
            ("~/bin/qemu-launcher run '", "~/bin/qemu-launcher run '"),
            ("qemu-launcher stat", "qemu-launcher stat"),
        ):
            found = completed(screen, typed)
            assert found.startswith(line), found


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts_are_sound(world: Path, shell: str) -> None:
    subprocess.run([shell, "-n", ROOT / SCRIPTS[shell][0]], env=environment(world, shell), check=True)
