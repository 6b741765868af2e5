"""What the unit tests share."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import settings

# An example that this machine had no time for tells nothing.
settings.register_profile("unit", settings.default, deadline=None)
settings.load_profile("unit")


@pytest.fixture
def tid() -> Iterator[int]:
    """A thread of this process, which stands for a vCPU."""
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go_on.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert begun.wait(30)
        assert thread.native_id is not None
        yield thread.native_id
    finally:
        go_on.set()
        thread.join()
