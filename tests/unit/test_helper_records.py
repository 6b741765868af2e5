"""Records survive whole or not at all, and nothing that is no record is believed."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from qemu_launcher_helper import records
from qemu_launcher_helper.contract import INFINITY, LimitExceeded
from qemu_launcher_helper.limits import Limits, grant_memlock
from qemu_launcher_helper.records import Record

GIB = 2**30


@pytest.fixture(autouse=True)
def grants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(records, "GRANTS", tmp_path / "grants")
    return tmp_path / "grants"


FULL = Record(
    1000, "win11", 4711, 99, "/user.slice/user-1000.slice/qemu-launcher-1000-win11.scope",
    memlock=25 * GIB, memlock_before=(8 << 20, 8 << 20), rttime_before=(-1, 200000),
    shielded=frozenset({4, 5}), pinned=frozenset({1}), realtime=(4712, 4713),
)  # fmt: skip


def test_what_is_written_is_read_back() -> None:
    FULL.write()
    FULL._replace(vm="other", stray=True).write()
    assert sorted(records.read_all(), key=lambda record: record.vm) == [
        FULL._replace(vm="other", stray=True),
        FULL,
    ]


def test_no_records_before_the_first() -> None:
    assert list(records.read_all()) == []


def test_only_root_reads_them(grants: Path) -> None:
    FULL.write()
    assert grants.stat().st_mode & 0o077 == 0


def test_removed_is_gone() -> None:
    FULL.write()
    (records.GRANTS / FULL.key).unlink()
    assert list(records.read_all()) == []


FULL_TEXT = json.dumps(FULL._asdict() | {"shielded": [4, 5], "pinned": [1]})


def test_the_format_is_what_the_tests_below_break(grants: Path) -> None:
    FULL.write()
    (records.GRANTS / FULL.key).write_text(FULL_TEXT)
    assert list(records.read_all()) == [FULL]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        "7",
        json.dumps({"uid": 1}),
        FULL_TEXT.replace("[4, 5]", "7"),
        FULL_TEXT[:-1],
    ],
)
def test_what_is_no_record_is_removed_with_a_word_in_the_journal(
    grants: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    FULL.write()
    (grants / "1000-broken").write_text(text)
    assert list(records.read_all()) == [FULL]
    assert "1000-broken" in caplog.text
    assert not (grants / "1000-broken").exists()


def test_a_record_counts_only_under_its_own_name(grants: Path) -> None:
    FULL.write()
    (grants / "1000-win11").rename(grants / "1001-win11")
    assert list(records.read_all()) == []


def test_a_half_written_record_is_removed(grants: Path) -> None:
    FULL.write()
    (grants / "1000-win11").rename(grants / "1000-win11.new")
    assert list(records.read_all()) == []
    assert list(grants.iterdir()) == []


def vm(name: str, gib: int, uid: int = 1000) -> Record:
    return FULL._replace(vm=name, uid=uid, memlock=gib * GIB)


def grant(asked: int, *live: Record, limits: Limits | None = None, lockable: int = 30 * GIB) -> int:
    return grant_memlock(asked, vm("new", 0), limits or Limits(), live, lockable)


def test_memlock_within_the_host() -> None:
    assert grant(25 * GIB) == 25 * GIB
    assert grant(INFINITY) == 30 * GIB
    assert grant(25 * GIB, vm("other", 10, uid=1001)) == 25 * GIB, "what others hold is not taken from one"


def test_memlock_within_the_users_limit() -> None:
    limits = Limits(memlock=16 * GIB)
    assert grant(25 * GIB, limits=limits) == 16 * GIB
    assert grant(25 * GIB, vm("other", 10), limits=limits) == 6 * GIB
    assert grant(25 * GIB, vm("other", 10, uid=1001), limits=limits) == 16 * GIB


def test_memlock_asked_again_counts_once() -> None:
    assert grant(25 * GIB, vm("new", 25)) == 25 * GIB


def test_memlock_all_gone() -> None:
    with pytest.raises(LimitExceeded, match=f"your VMs hold {16 * GIB} bytes of {16 * GIB} bytes"):
        grant(1, vm("other", 16), limits=Limits(memlock=16 * GIB))
    with pytest.raises(LimitExceeded, match=f"your VMs hold {30 * GIB} bytes of {30 * GIB} bytes .this host."):
        grant(1, vm("other", 30), limits=Limits(memlock=40 * GIB))


def test_memlock_infinity_only_where_the_administrator_wrote_it() -> None:
    assert grant(INFINITY, limits=Limits(memlock=INFINITY)) == INFINITY
    assert grant(INFINITY, limits=Limits(memlock=None)) < INFINITY


@given(st.integers(1, INFINITY), st.integers(0, 40), st.one_of(st.none(), st.integers(1, 40)))
def test_memlock_sum_never_exceeds_either_limit(asked: int, held: int, limit: int | None) -> None:
    limits = Limits(memlock=None if limit is None else limit * GIB)
    try:
        granted = grant(asked, vm("other", held), limits=limits)
    except LimitExceeded:
        assert held >= min(30, limit or 30)
    else:
        assert 0 < granted <= asked
        assert granted + held * GIB <= min(30, limit or 30) * GIB
