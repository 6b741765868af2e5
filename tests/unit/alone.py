"""Counting descriptors, where nobody else opens or closes any.

Why it exists: `make test` runs labs in threads beside the unit tests, and these open sockets and pipes all the time.
"""

import os
import traceback
from collections.abc import Callable


def descriptors() -> set[str]:
    """Those that are open, and the one that the look itself takes."""
    return set(os.listdir("/proc/self/fd"))


def alone(act: Callable[[], None]) -> None:
    """Run it in a child, which has one thread alone; what it raises there is told, and fails the test."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        except BaseException:  # noqa: BLE001 - pytest.fail is one of these, and nothing may leave this child
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "see what it wrote on stderr"
