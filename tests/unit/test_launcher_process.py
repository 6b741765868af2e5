"""QEMU's process, where the real one cannot give the answer wanted: the kernel refuses root no further process."""

import errno
import os
import signal

import pytest

from qemu_launcher.errors import QemuFailed
from qemu_launcher.process import Command, forked
from unit.alone import alone, descriptors

QEMU = Command(argv=("qemu",), env={}, working_directory=None, inherited=(), soft_memlock=None)


@pytest.mark.parametrize(("number", "helps"), [(errno.EAGAIN, True), (errno.ENOMEM, False)])
def test_no_more_processes(monkeypatch: pytest.MonkeyPatch, number: int, helps: bool) -> None:
    def refuse() -> int:
        raise OSError(number, os.strerror(number))

    def held() -> tuple[set[str], set[signal.Signals | int]]:
        return descriptors(), signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def act() -> None:
        monkeypatch.setattr(os, "fork", refuse)
        before = held()
        with pytest.raises(QemuFailed) as caught:
            forked(QEMU)
        assert held() == before
        assert caught.value.message == f"cannot make a process for QEMU: {os.strerror(number)}"
        assert ("ulimit -u, or TasksMax=" in (caught.value.hint or "")) == helps

    alone(act)
