"""The users of the lab, and their logins: what they do is done in sessions of theirs, as on any host.

A login is made by PAM and logind (`systemd-run -p PAMName=login`), so that what runs in it is in a session scope below
its user's slice, has his groups as the user database has them at that moment, his limits and his XDG_RUNTIME_DIR.
Root, who runs the tests, only looks on: everything a user does goes through `Login.run` or `Login.spawn`.
"""

from __future__ import annotations

import os
import pwd
import select
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple, Self

from system import host

GROUP = "qemu-launcher"
# Files that tests and users share: /root is closed to users, and /tmp would be a private one for services.
DESK = Path("/run/system-tests")


LIMIT = ("prlimit", f"--memlock={8 << 20}")
# elogind makes no session for a process that is in one already, as root's own: it looks at the groups of its hierarchy.
OUT_OF_SESSION = (
    *("env", "-i", "TERM=dumb", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c"),
    "cd /sys/fs/cgroup; for tree in . elogind unified; do [ ! -f $tree/cgroup.procs ] || echo $$ >$tree/cgroup.procs; "
    'done; cd /; exec "$@"',
    "sh",
)


class Finished(NamedTuple):
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


class LoginEnded(Exception):  # noqa: N818  that is what happened
    """The session was stopped while something was asked of it."""


def login_command(user: str, *command: str) -> list[str]:
    """The argument vector that runs `command` in a new login of `user`, with this process's standard streams.

    Its limit on locked memory is the one that systemd gives since version 254; before, it was an eighth of the memory,
    which pam_limits(8) gives again to whoever logs in.
    """
    home = pwd.getpwnam(user).pw_dir
    if not host.has_systemd():
        return [*OUT_OF_SESSION, "su", "--login", user, "--command", shlex.join(["exec", *LIMIT, *command])]
    return [
        *("systemd-run", "--quiet", "--pipe", "--wait", "--collect"),
        *(f"--uid={user}", "--property=PAMName=login"),
        *(f"--working-directory={home}", f"--setenv=HOME={home}"),
        *LIMIT,
        *command,
    ]


def plain_command(user: str, *command: str) -> list[str]:
    """The same for a host without systemd, as where no elogind is: in no session, in the root's group."""
    become = ("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--reset-env", "--pdeathsig=KILL")
    return [*OUT_OF_SESSION, *become, *LIMIT, *command]


def service_command(unit: str, *properties: str, user: str) -> Callable[..., list[str]]:
    """Makes commands that run as `user`, but as the system service `unit` with these properties, in no login."""

    def command(_: str, *words: str) -> list[str]:
        options = [f"--property={one}" for one in (*properties, f"SupplementaryGroups={GROUP}")]
        run = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--unit={unit}", f"--uid={user}"]
        return [*run, *options, *words]

    return command


class Login:
    """One session with a shell in it. A context manager; leaving it ends the session."""

    def __init__(self, user: str, start: Callable[..., list[str]] = login_command) -> None:
        """`start`: makes the whole command, of the user's name and a command."""
        self.user = user
        self._folder = folder_of(user)
        self._errors = (DESK / f"{user}.login").open("ab")
        self._process = subprocess.Popen(
            start(user, "bash", "--noprofile", "--norc"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self.shell = int(self._answer("echo $$"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Log out."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(host.PATIENCE)
        self._errors.close()

    @property
    def is_open(self) -> bool:
        """Whether the session's shell is still there."""
        return self._process.poll() is None and host.is_alive(self.shell)

    def run(self, line: str, *, check: bool = False) -> Finished:
        """Run a shell line to its end."""
        out, err = self._folder / "out", self._folder / "err"
        status = int(self._answer(f"( {line}\n) </dev/null >{out} 2>{err}; echo $?"))
        done = Finished(status, out.read_text(errors="replace"), err.read_text(errors="replace"))
        assert not check or status == 0, f"{self.user}: {line}: {done}"
        return done

    def spawn(self, line: str, log: Path) -> int:
        """Start a shell line that ends in exec, in the background; its PID. Both outputs go to `log`, anew."""
        return int(self._answer(f"( {line}\n) </dev/null >{log} 2>&1 & echo $!"))

    def wait(self, pid: int) -> int:
        """Exit status of what `spawn` started and has ended, as the shell gives it (128+N for a signal)."""
        return int(self._answer(f"wait {pid}; echo $?"))

    def _answer(self, line: str) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(line.encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise LoginEnded(self.user) from error
        return _line(stdout, f"{self.user}: {line}")


def _line(stream: IO[bytes], what: str) -> str:
    """One line, which nothing follows until more is asked for."""
    ready, _, _ = select.select([stream], [], [], host.PATIENCE)
    assert ready, f"no answer to {what}"
    line = stream.readline().decode()
    if not line.endswith("\n"):
        raise LoginEnded(what)
    return line.strip()


class User:
    """A user of the lab, with one login that is opened when it is first needed, and again when it was ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        entry = pwd.getpwnam(name)
        self.uid, self.gid = entry.pw_uid, entry.pw_gid
        self.home = Path(entry.pw_dir)
        self.slice = host.slice_of(self.uid)
        self._login: Login | None = None

    @property
    def login(self) -> Login:
        """The login in which this user works."""
        if self._login is None or not self._login.is_open:
            self.log_out()
            self._login = Login(self.name)
        return self._login

    def log_out(self) -> None:
        """End that login, if there is one."""
        login, self._login = self._login, None
        if login is not None:
            login.close()

    def command(self, *arguments: str) -> Finished:
        """Run `qemu-launcher ARGUMENTS` to its end."""
        return self.login.run(shlex.join(["qemu-launcher", *arguments]))

    def file(self, path: Path, text: str, mode: int = 0o644) -> Path:
        """Write a file of this user's; parents are made."""
        for folder in reversed([path.parent, *path.parent.parents]):
            if not folder.exists():
                folder.mkdir()
                os.chown(folder, self.uid, self.gid)
        path.write_text(text)
        path.chmod(mode)
        os.chown(path, self.uid, self.gid)
        return path


def folder_of(user: str) -> Path:
    """A folder of this user's below DESK."""
    DESK.mkdir(mode=0o755, exist_ok=True)
    folder = DESK / user
    folder.mkdir(exist_ok=True)
    shutil.chown(folder, user)
    return folder


def let_into_group(user: str) -> None:
    """Make `user` a member, as an administrator does; it counts from his next login on."""
    subprocess.run(["usermod", "-aG", GROUP, user], check=True)


def put_out_of_group(user: str) -> None:
    """Undo `let_into_group`."""
    subprocess.run(["gpasswd", "--delete", user, GROUP], check=True, stdout=subprocess.DEVNULL)
