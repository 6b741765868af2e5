"""Fixtures of the bus tests: one world for those that leave it as they found it, fresh ones for the others."""

from collections.abc import Iterator

import pytest

from bus.world import CROWD, User, World, missing, world

_FRESH = iter(CROWD)


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def host() -> Iterator[World]:
    """A world with the rule for members, shared by the tests of a module."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with world() as running:
        yield running


@pytest.fixture
def member() -> User:
    """A member of the group, whom no other test has used."""
    return next(_FRESH)


@pytest.fixture
def other() -> User:
    """Another one."""
    return next(_FRESH)


@pytest.fixture
def crowd() -> list[User]:
    """Eight more: as many as may be asked for a password at once."""
    return [next(_FRESH) for _ in range(8)]


@pytest.fixture
def strict_host() -> Iterator[World]:
    """A world in which the rule for members was deleted: everybody has to give a password."""
    with world(member_rule=False) as running:
        yield running
