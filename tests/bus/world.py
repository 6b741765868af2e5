"""A host's bus and polkit, made for a test: real dbus-daemon, real polkitd, our policy files, users of our own.

Everything lives in a private mount namespace, where copies of /etc/passwd, /etc/group, polkit's folders and systemd's
session files lie over the real ones; nothing outside changes. Needs root. Every process is ended by its own PID.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
STOCK_BUS = Path("/usr/share/dbus-1/system.conf")
POLKIT_BUS = Path("/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf")
POLKITD = next((path for path in ("/usr/lib/polkit-1/polkitd", "/usr/libexec/polkitd") if Path(path).exists()), None)
GROUP = 61000  # gid of qemu-launcher here


@dataclass(frozen=True)
class User:
    name: str
    uid: int
    member: bool

    @property
    def groups(self) -> list[int]:
        return [GROUP] if self.member else []


ROOT_USER = User("root", 0, member=False)
ALICE = User("alice", 61001, member=True)
BOB = User("bob", 61002, member=False)
CAROL = User("carol", 61003, member=True)
NOBODY = User("nobody", 65534, member=False)
# One user per test: what a test does to its user's quotas is nobody else's business.
CROWD = [User(f"user{number}", 61100 + number, member=True) for number in range(400)]

# With `trace`: every system call by which the helper could act on a process or on the cgroup tree.
ACTS = (
    "sched_setscheduler,sched_setparam,sched_setattr,sched_setaffinity,setpriority,ioprio_set,prlimit64,setrlimit,"
    "kill,tkill,tgkill,pidfd_send_signal,openat,creat,mkdir,mkdirat,rmdir,unlink,unlinkat,rename,renameat2"
)
# A bus that an administrator has opened to everybody: polkit alone is to decide then.
EVERYBODY = ROOT / "dbus/examples/qemu-launcher-everybody.conf"


def missing() -> str | None:
    """Why the bus tests cannot run here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    if POLKITD is None or shutil.which("dbus-daemon") is None:
        return "needs dbus-daemon and polkitd"
    return None


def as_user(user: User, function: Callable[[], Any]) -> "Child":
    """Run `function` in a forked process of `user`, without privilege, and pickle what it returns."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        status = 1
        try:
            signal.alarm(240)  # no client outlives its test for long
            os.setgroups(user.groups)
            os.setresgid(user.uid or 0, user.uid or 0, user.uid or 0)
            os.setresuid(user.uid, user.uid, user.uid)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(function(), pipe)
            status = 0
        except BaseException:  # noqa: BLE001  the child must never return into pytest
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    return Child(pid, read)


class Child:
    """A forked process and its result."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self._pipe = os.fdopen(pipe, "rb")

    def kill(self) -> None:
        """End it; there is no result."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._pipe.close()

    def result(self) -> Any:
        """Wait for the end; return what the function returned."""
        with self._pipe:
            data = self._pipe.read()
        _, status = os.waitpid(self.pid, 0)
        assert status == 0, "the client process failed; its traceback is above"
        return pickle.loads(data)


def slice_of(user: User) -> str:
    """Where systemd keeps what is the user's."""
    return f"/user.slice/user-{user.uid}.slice"


def cgroup_of(path: str) -> str:
    """What /proc/PID/cgroup says of a process there; polkitd's logind library may look for the older line."""
    return f"0::{path}\n1:name=systemd:{path}\n"


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Poll, in tests only: these things have no event."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


class World:
    """The running host. `folder` is readable by everybody, as the real places are.

    member_rule: with the packaged rule for members. rules, bus_policies: an administrator's own files, in
    /etc/polkit-1/rules.d and /etc/dbus-1/system.d. real: the helper's own operations, not a recording. trace: strace(1)
    writes the helper's ACTS down. users, groups: more accounts, and groups with their members.
    """

    def __init__(
        self,
        folder: Path,
        *,
        member_rule: bool = True,
        real: bool = False,
        trace: bool = False,
        idle: float = 600.0,
        rules: Mapping[str, str] | None = None,
        bus_policies: Sequence[Path] = (),
        users: Sequence[User] = (),
        groups: Mapping[str, Sequence[User]] | None = None,
    ) -> None:
        self.folder = folder
        self.socket = str(folder / "bus")
        self.acts = folder / "acts.jsonl"
        self.log = folder / "helper.log"
        self.toml = folder / "helper.toml"
        self.idle = idle
        self.grants = folder / "run/grants"
        self.cgroups = folder / "cgroups"
        self._member_rule, self._real, self._trace = member_rule, real, trace
        self._rules, self._bus_policies = rules or {}, bus_policies
        self._users, self._groups = [ALICE, BOB, CAROL, *CROWD, *users], groups or {}
        self._stack = ExitStack()
        self.polkitd: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._write_files()
            self._holder = stack.enter_context(
                self._process(["unshare", "-m", "sh", "-ec", self._mounts()], ready=True)
            )
            self.bus = stack.enter_context(
                self._process(
                    self.inside(
                        ["dbus-daemon", f"--config-file={self.folder}/bus.conf", "--nofork", "--print-address=1"]
                    ),
                    ready=True,
                )
            )
            stack.callback(self.stop_polkit)
            self.start_polkit()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def inside(self, command: list[str]) -> list[str]:
        """The same command, in the namespace of this world."""
        return ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--", *command]

    @contextmanager
    def _process(self, command: list[str], *, ready: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """Run `command` until the end of the context; with `ready`, wait for its first line of output."""
        with (self.folder / "daemons.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        try:
            assert process.stdout is not None
            if ready:
                assert process.stdout.readline(), (
                    f"{command} did not start: {(self.folder / 'daemons.log').read_text()}"
                )
            yield process
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def start_polkit(self) -> None:
        """Start polkitd and wait until it owns its name."""
        assert POLKITD is not None
        environment = os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={self.socket}"}
        with (self.folder / "daemons.log").open("ab") as log:
            self.polkitd = subprocess.Popen(self.inside([POLKITD]), env=environment, stdout=log, stderr=log)
        from bus.client import Client

        with Client(self.socket) as client:
            wait_until(
                lambda: client.daemon("NameHasOwner", "s", ["org.freedesktop.PolicyKit1"]).body == [True], "polkitd"
            )

    def stop_polkit(self) -> None:
        """End polkitd; for good, the bus does not know how to start it."""
        if self.polkitd is not None:
            self.polkitd.terminate()
            self.polkitd.wait()
            self.polkitd = None

    def log_in(self, user: User) -> str:
        """Give `user` an active local session, as logind would write it down; return its id."""
        session = f"c{user.uid}"
        facts = (
            f"UID={user.uid}\nUSER={user.name}\nACTIVE=1\nSTATE=active\nREMOTE=0\nTYPE=x11\nCLASS=user\nSEAT=seat0\n"
        )
        self._write(f"systemd-sessions/{session}", facts)
        self._write(
            f"systemd-users/{user.uid}",
            f"NAME={user.name}\nSTATE=active\nDISPLAY={session}\nSESSIONS={session}\nACTIVE_SESSIONS={session}\n",
        )
        self._write(f"cgroup-{user.uid}", cgroup_of(f"{slice_of(user)}/session-{session}.scope"))
        return session

    def run_as(self, user: User, function: Callable[[], Any]) -> Child:
        """as_user(), but the process of somebody who has logged in is in his session, as far as polkitd can see."""
        cgroup = self.folder / f"cgroup-{user.uid}"
        if not cgroup.exists():
            return as_user(user, function)
        gate, opener = os.pipe()

        def when_in_place() -> Any:
            os.read(gate, 1)
            return function()

        child = as_user(user, when_in_place)
        self.place(child.pid, cgroup)
        os.write(opener, b"x")
        os.close(gate)
        os.close(opener)
        return child

    def place(self, pid: int, cgroup: Path) -> None:
        """Put a process where the file `cgroup` says, as far as this world can see."""
        subprocess.run(self.inside(["mount", "--bind", str(cgroup), f"/proc/{pid}/cgroup"]), check=True)

    def recorded(self, user: User | None = None) -> list[dict[str, Any]]:
        """The acts that the helper was about to do, in order; of `user` if given."""
        lines = self.acts.read_text().splitlines() if self.acts.exists() else []
        acts = [json.loads(line) for line in lines]
        return [act for act in acts if user is None or act["uid"] == user.uid]

    def logged(self, user: User | None = None) -> list[str]:
        """The helper's log lines; those about `user` if given."""
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        return [line for line in lines if user is None or f"uid={user.uid} " in line]

    def traced(self) -> list[str]:
        """The system calls so far by which the helper acted, or tried to: on others, or on the cgroup tree."""
        ours = re.compile(r"prlimit64\(0,|openat\([^)]*O_RDONLY|(openat|unlink|rename|mkdir)\w*\((?!.*/sys/fs/cgroup)")
        lines = (self.folder / "strace.log").read_text().splitlines()
        return [call for line in lines if "(" in (call := line.partition(" ")[2].strip()) and not ours.match(call)]

    def daemons_log(self) -> str:
        """What dbus-daemon and polkitd have written."""
        return (self.folder / "daemons.log").read_text()

    def helper_pid(self) -> int:
        """PID of the helper that owns the name now."""
        from bus.client import Client

        with Client(self.socket) as client:
            return int(client.daemon("GetConnectionUnixProcessID", "s", ["org.qemulauncher.Helper1"]).body[0])

    def _write_files(self) -> None:
        passwd = "".join(f"{user.name}:x:{user.uid}:{user.uid}::/nonexistent:/bin/false\n" for user in self._users)
        groups = "".join(f"{user.name}:x:{user.uid}:\n" for user in self._users)
        members = ",".join(user.name for user in self._users if user.member)
        for number, (group, its) in enumerate(self._groups.items(), GROUP + 1000):
            groups += f"{group}:x:{number}:{','.join(user.name for user in its)}\n"
        self._write("passwd", Path("/etc/passwd").read_text() + passwd)
        self._write("group", Path("/etc/group").read_text() + groups + f"qemu-launcher:x:{GROUP}:{members}\n")
        for name in ("actions", "rules", "rules-etc", "services", "run", "cgroups"):
            (self.folder / name).mkdir()
        self._write("strace.log", "")
        self._write("exits", "")
        self._write("osrelease", "6.12.0\n")  # what is kept from acting, and what is not, is the same on every host
        shutil.copy(ROOT / "polkit/org.qemulauncher.policy", self.folder / "actions")
        if self._member_rule:
            shutil.copy(ROOT / "polkit/50-qemu-launcher.rules", self.folder / "rules")
        for name, text in self._rules.items():
            self._write(f"rules-etc/{name}", text)
        self._write("services/org.qemulauncher.Helper1.service", self._activation())
        self._write("bus.conf", self._bus_configuration())
        for name in ("users", "sessions"):
            (self.folder / f"systemd-{name}").mkdir()

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def _mounts(self) -> str:
        over = {
            "/etc/passwd": "passwd",
            "/etc/group": "group",
            "/usr/share/polkit-1/actions": "actions",
            "/usr/share/polkit-1/rules.d": "rules",
            "/etc/polkit-1/rules.d": "rules-etc",
            "/run/systemd/users": "systemd-users",
            "/run/systemd/sessions": "systemd-sessions",
            "/run/qemu-launcher": "run",
        }
        if self._real:  # not otherwise: polkitd looks there too, for sessions
            over["/sys/fs/cgroup"] = "cgroups"
            over["/proc/sys/kernel/osrelease"] = "osrelease"
        binds = "".join(f"mount --bind {self.folder}/{name} {place}\n" for place, name in over.items())
        folders = "/run/systemd/users /run/systemd/sessions /run/qemu-launcher"
        return f"mkdir -p {folders}\n{binds}echo ready\nexec sleep infinity\n"

    def helper_command(self) -> list[str]:
        """What the bus runs to start the helper."""
        strace = [
            str(shutil.which("strace")),
            "-f",
            "-qq",
            "-s",
            "300",
            "-o",
            f"{self.folder}/strace.log",
            "-e",
            f"trace={ACTS}",
        ]
        program = [sys.executable, str(Path(__file__).with_name("helper_under_test.py"))]
        arguments = [str(self.folder), str(self.idle), "real" if self._real else "recording"]
        return [*(strace if self._trace else []), *program, *arguments]

    def _activation(self) -> str:
        return f"[D-BUS Service]\nName=org.qemulauncher.Helper1\nUser=root\nExec={' '.join(self.helper_command())}\n"

    def _bus_configuration(self) -> str:
        """The stock configuration of the system bus, less what would make it the host's own."""
        root = ET.parse(STOCK_BUS).getroot()
        for element in list(root):
            if element.tag not in ("policy", "limit", "auth"):
                root.remove(element)
        for tag, text in {"listen": f"unix:path={self.socket}", "servicedir": f"{self.folder}/services"}.items():
            ET.SubElement(root, tag).text = text
        systemd = ET.SubElement(root, "policy", user="root")
        ET.SubElement(systemd, "allow", own="org.freedesktop.systemd1")
        ET.SubElement(systemd, "allow", send_destination="org.freedesktop.systemd1")
        # As /usr/share/dbus-1/system.conf does: what is in /etc/dbus-1/system.d comes after the packages' files.
        for file in (POLKIT_BUS, ROOT / "dbus/org.qemulauncher.Helper1.conf", *self._bus_policies):
            ET.SubElement(root, "include").text = str(file)
        doctype = '<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "busconfig.dtd">\n'
        return doctype + ET.tostring(root, encoding="unicode")


@contextmanager
def world(**options: Any) -> Iterator[World]:
    """A world in a folder of its own, which is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="qemu-launcher-bus-"))
    folder.chmod(0o755)
    try:
        with World(folder, **options) as host:
            yield host
    finally:
        # A helper that has just lost its bus writes its last words first.
        wait_until(lambda: not _names_in_proc(str(folder)), f"the end of what uses {folder}")
        shutil.rmtree(folder)


def _names_in_proc(word: str) -> list[int]:
    """PIDs of processes with `word` in an argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if any(argument.startswith(word) for argument in path.read_bytes().decode(errors="replace").split("\0")):
                found.append(int(path.parent.name))
    return found
