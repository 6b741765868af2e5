"""Registers the marker of the tests that boot the lab; all others here are pure and take no time."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lab: boots the lab, which takes from seconds to minutes")
