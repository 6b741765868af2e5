"""Quotas: counts per user, with a clock of the test's own."""

from contextlib import ExitStack

import pytest

from qemu_launcher_helper.contract import LimitExceeded
from qemu_launcher_helper.service import Quotas, counted


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_four_at_a_time_per_user() -> None:
    quotas = Quotas(Clock())
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(quotas.slot(1000))
        with pytest.raises(LimitExceeded), quotas.slot(1000):
            pass
        with quotas.slot(1001):
            pass
    with quotas.slot(1000):
        pass


def test_a_slot_comes_back_after_an_exception() -> None:
    quotas = Quotas(Clock())
    for _ in range(10):
        with pytest.raises(ZeroDivisionError), quotas.slot(1000):
            raise ZeroDivisionError


def test_sixty_in_twenty_seconds() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    for _ in range(60):
        clock.now += 0.1
        with quotas.slot(1000):
            pass
    for _ in range(100):
        with pytest.raises(LimitExceeded, match="60 in 20 s"), quotas.slot(1000):
            pass
    # Refused calls count for nothing: once the first of the sixty is 20 s old there is room for one.
    clock.now = 1000.1 + 20
    with quotas.slot(1000):
        pass
    with pytest.raises(LimitExceeded), quotas.slot(1000):
        pass


def test_a_call_that_waits_for_a_person_holds_no_slot() -> None:
    quotas = Quotas(Clock())
    with ExitStack() as stack:
        for _ in range(9):
            stack.enter_context(quotas.slot(1000))
            stack.enter_context(counted(quotas.in_flight, 1000, -1))
        for _ in range(4):
            stack.enter_context(quotas.slot(1000))
        with pytest.raises(LimitExceeded), quotas.slot(1000):
            pass
