"""Stands in for pkttyagent(1): writes down how it was started and what it found, registers, and waits for its end.

    pkttyagent.py LOG HOW --notify-fd N --fallback

LOG gets one JSON object a line. HOW: "registers"; "fails" (ends at once, as without polkitd); "hangs" (and never
registers).
"""

import json
import os
import signal
import sys
import termios
import time
from pathlib import Path
from typing import Any


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def main(log: Path, how: str, *arguments: str) -> None:
    def tell(what: str, **more: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps({"what": what, "time": time.monotonic(), **more}) + "\n")

    def end(*_: object) -> None:
        tell("ended")
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    for number in (signal.SIGINT, signal.SIGHUP):  # it is not the terminal that ends it, but its launcher
        signal.signal(number, signal.SIG_IGN)
    with open("/dev/tty", "rb", buffering=0) as tty:  # noqa: PTH123
        local = termios.tcgetattr(tty)[3]
    children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    tell(
        "started",
        arguments=arguments,
        pid=os.getpid(),
        line_by_line=bool(local & termios.ICANON),
        siblings=[state(int(pid)) for pid in children if int(pid) != os.getpid()],
    )
    if how == "fails":
        sys.exit(127)
    if how == "registers":
        tell("registered")
        os.close(int(arguments[1]))
    while True:
        signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
