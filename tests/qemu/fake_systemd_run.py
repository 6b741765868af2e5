"""systemd-run(1) as far as `qemu-launcher start` needs it: one service of Type=notify, started, waited for, let go.

The lab has the real one. Here the service gets an environment of its own, its output goes to a file that stands in for
the journal, and what systemd-run was asked for is written down. A file `refuse` beside these makes it fail as systemd
does, with that text.
"""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

DESK = Path(os.environ["FAKE_SYSTEMD"])


def main(argv: list[str]) -> int:
    (DESK / "asked.json").write_text(json.dumps(argv))
    if (DESK / "refuse").exists():
        sys.stderr.write((DESK / "refuse").read_text())
        return 1
    end = argv.index("--")
    given = [word.partition("=")[2] for word in argv[:end] if word.startswith("--setenv=")]
    with (
        tempfile.TemporaryDirectory(prefix="ql-fake-") as place,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear,
    ):
        ear.bind(f"{place}/notify")
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ["PYTHONPATH"],  # of a tree that is not installed
            "XDG_RUNTIME_DIR": os.environ["XDG_RUNTIME_DIR"],
            "NOTIFY_SOCKET": f"{place}/notify",
            "INVOCATION_ID": "0123456789abcdef",
            "ONLY_IN_THE_MANAGER": "yes",
            **dict(pair.split("=", 1) for pair in given),
        }
        with (DESK / "journal").open("ab") as journal:
            service = subprocess.Popen(
                [word.replace("$$", "$") for word in argv[end + 1 :]],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=journal,
                stderr=journal,
                start_new_session=True,
            )
        ended = os.pidfd_open(service.pid)
        while True:
            readable, _, _ = select.select([ear.fileno(), ended], [], [])
            if ear.fileno() in readable:
                if "READY=1" in ear.recv(4096).decode().split("\n"):
                    return 0
            else:
                service.wait()
                sys.stderr.write("Job for the unit failed because the control process exited with error code.\n")
                return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
