"""A /proc in which a real process has whatever properties a test wants."""

from pathlib import Path


class Facts:
    """A /proc of our own that tells, of a real process, what the test wants told."""

    def __init__(self, root: Path, pid: int) -> None:
        self.root, self.pid = root, pid
        real, mine = Path(f"/proc/{pid}"), root / str(pid)
        (mine / f"task/{pid}").mkdir(parents=True)
        (root / "self").mkdir()
        (mine / f"task/{pid}/stat").write_text((real / f"task/{pid}/stat").read_text())
        self.status = {
            "Name": "qemu-system-x86", "State": "S (sleeping)", "Tgid": str(pid), "PPid": "4242",
            "Uid": "1000\t1000\t1000\t1000", "Gid": "1000\t1000\t1000\t1000", "NSpid": str(pid), "Kthread": "0",
        }  # fmt: skip
        self.write("cgroup", "0::/user.slice/user-1000.slice/session-3.scope\n")
        self.write("uid_map", "         0          0 4294967295\n")
        (root / "self/uid_map").write_text("         0          0 4294967295\n")
        self.say()

    def write(self, name: str, text: str) -> None:
        (self.root / str(self.pid) / name).write_text(text)

    def say(self, **changes: str) -> None:
        self.write("status", "".join(f"{key}:\t{value}\n" for key, value in (self.status | changes).items()))


# What /proc/PID/cgroup can say, and which unit's path that is: helper and launcher each read it for themselves.
UNIT_LINES = [
    ("0::/user.slice/a\n", "/user.slice/a"),
    ("12:cpuset:/\n1:name=systemd:/user.slice/a\n", "/user.slice/a"),
    ("1:name=systemd:/user.slice/a\n0::/\n", "/user.slice/a"),
    ("1:name=systemd:/b\n0::/user.slice/a\n", "/user.slice/a"),
    ("9:name=systemdx:/b\n8:name=x:name=systemd:/b\n", ""),
    ("0::/\n", ""),
    ("", ""),
]
