"""Claims on CPUs: disjoint, whole cores, a core for the host, within each user's limits, in whatever order."""

import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from qemu_launcher_helper.contract import Conflict, InvalidArguments, LimitExceeded, Refusal, cpulist, parse_cpulist
from qemu_launcher_helper.limits import Cores, Limits, check_cpus, free_for, union
from qemu_launcher_helper.records import Record

# Eight CPUs, four cores of two SMT siblings each, numbered as the lab's host numbers them.
CORES = [frozenset({cpu, cpu + 1}) for cpu in range(0, 8, 2)]
ALICE, BOB = 1000, 1001


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu_launcher_helper.limits.user_name", {ALICE: "alice", BOB: "bob"}.__getitem__)


@dataclass
class Claim:
    record: Record
    others: frozenset[int]


def record(uid: int, vm: str, shielded: str = "", pinned: str = "", **facts: Any) -> Record:
    base = Record(uid, vm, 4711, 1, int(time.time()), f"/{uid}-{vm}.scope", shielded=parse_cpulist(shielded))
    return base._replace(pinned=parse_cpulist(pinned), **facts)


def claim(shielded: str = "", pinned: str = "", others: str = "", uid: int = ALICE, vm: str = "win11") -> Claim:
    return Claim(record(uid, vm, shielded, pinned), parse_cpulist(others))


def check(wanted: Claim, *live: Record, limits: Limits | None = None, cores: Cores = CORES) -> str:
    return cpulist(check_cpus(wanted.record, wanted.others, limits or Limits(), cores, live).shielded)


def test_a_shield_takes_whole_cores() -> None:
    assert check(claim("4,7")) == "4-7"


def test_the_vms_own_earlier_claim_is_no_conflict() -> None:
    assert check(claim("4-7"), record(ALICE, "win11", "2-5")) == "4-7"


def test_conflict_says_whose_since_when_and_what_is_free() -> None:
    held = record(BOB, "work", "4-7", since=int(time.mktime((2026, 11, 22, 20, 14, 0, 0, 0, -1))))
    with pytest.raises(Conflict) as caught:
        check(claim("6"), held)
    assert str(caught.value) == "CPUs 6-7 are held by VM work of bob since 20:14; free for you: 2-3"


@pytest.mark.parametrize("shared", [claim(pinned="5"), claim(others="5")])
def test_shared_cpus_may_not_touch_a_live_shield(shared: Claim) -> None:
    with pytest.raises(Conflict):
        check(shared, record(BOB, "work", "4-5"))


def test_unshielded_pins_may_overlap_each_other() -> None:
    assert check(claim(pinned="5"), record(BOB, "work", pinned="5")) == ""


def test_a_new_shield_over_a_pinned_cpu_is_a_conflict() -> None:
    with pytest.raises(Conflict, match="held by VM work of bob"):
        check(claim("4"), record(BOB, "work", pinned="5"))


def test_one_core_stays_with_the_host() -> None:
    assert check(claim("0-5")) == "0-5"
    with pytest.raises(LimitExceeded, match="CPUs 0-7: at least one whole core must stay with the host"):
        check(claim("0-7"))
    with pytest.raises(LimitExceeded, match="at least one whole core"):
        check(claim("0,2"), record(BOB, "work", "4-7"))


def test_cpus_that_are_not_there() -> None:
    with pytest.raises(InvalidArguments, match="CPUs 8-9 do not exist or are offline"):
        check(claim("7-9"))


def test_a_cpu_cannot_be_shielded_and_shared() -> None:
    # CPU 5 is only reserved as the sibling of 4: it stays empty all the same.
    with pytest.raises(InvalidArguments, match="5 are asked for both"):
        check(claim("4", pinned="5"))


def test_cpus_outside_ones_own() -> None:
    limits = Limits(cpus=frozenset({4, 5, 6}), source="helper.toml, [[limits]] entry 1")
    assert check(claim("4"), limits=limits) == "4-5"
    with pytest.raises(LimitExceeded, match=r"CPUs 7 are not among your 4-6 \(helper.toml, \[\[limits\]\] entry 1\)"):
        check(claim("6"), limits=limits)
    with pytest.raises(LimitExceeded, match="CPUs 0 are not among your "):
        check(claim(others="0"), limits=limits)


def test_number_of_cpus_counts_all_of_ones_vms_and_strays() -> None:
    limits = Limits(max_cpus=4)
    assert check(claim("4"), record(ALICE, "other", "2-3"), record(BOB, "work", "0-1"), limits=limits) == "4-5"
    with pytest.raises(LimitExceeded, match="would hold 6 CPUs, and may hold 4"):
        check(claim("4-7"), record(ALICE, "other", "2-3"), limits=limits)
    with pytest.raises(LimitExceeded, match="would hold 6 CPUs, and may hold 4"):
        check(claim("4-7"), record(ALICE, "other", "2-3", stray=True), limits=limits)


def test_a_strays_cpus_are_free_for_others() -> None:
    assert check(claim("2"), record(BOB, "work", "2-3", stray=True)) == "2-3"


def test_an_offline_sibling_does_not_make_a_core_half() -> None:
    assert check(claim("2"), cores=[frozenset({0, 1}), frozenset({2})]) == "2"


@given(st.frozensets(st.integers(0, 8191), max_size=40))
def test_cpulist_round_trip(cpus: frozenset[int]) -> None:
    assert parse_cpulist(cpulist(cpus)) == cpus


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1,,2", "8-3", "1-2-3", "+1", "1 2", "²", "0x1"])
def test_cpulist_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="not a cpulist"):
        parse_cpulist(text)


def whole_cores(cpus: frozenset[int]) -> frozenset[int]:
    return union(core for core in CORES if core & cpus)


cpus = st.frozensets(st.integers(0, 9), max_size=5)


class Claims(RuleBasedStateMachine):
    """Two users claim and release at random; the invariants are the promises of limits.py (A10, its pure half)."""

    vms = Bundle("vms")

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[tuple[int, str], Record] = {}
        self.limits = {ALICE: Limits(max_cpus=4), BOB: Limits(cpus=frozenset(range(2, 8)))}

    @rule(target=vms, uid=st.sampled_from([ALICE, BOB]), vm=st.sampled_from("abc"), shielded=cpus, pinned=cpus)
    def claim(self, uid: int, vm: str, shielded: frozenset[int], pinned: frozenset[int]) -> tuple[int, str]:
        wanted = Record(uid, vm, 2, 1, 0, "", shielded=shielded, pinned=pinned)
        free = free_for(self.limits[uid], CORES, [r for r in self.live.values() if r.key != f"{uid}-{vm}"])
        try:
            granted = check_cpus(wanted, frozenset(), self.limits[uid], CORES, list(self.live.values()))
        except Refusal:
            # What was offered as free must really have been: only the count or the shared part can refuse it.
            whole = whole_cores(shielded)
            assert not shielded or not whole <= free or pinned or (uid == ALICE) or shielded - union(CORES)
        else:
            assert granted == wanted._replace(shielded=whole_cores(shielded))
            self.live[uid, vm] = granted
        return uid, vm

    @rule(key=consumes(vms))
    def release(self, key: tuple[int, str]) -> None:
        self.live.pop(key, None)

    @invariant()
    def shields_are_disjoint_whole_and_leave_a_core(self) -> None:
        shields = [record.shielded for record in self.live.values()]
        together = union(shields)
        assert sum(map(len, shields)) == len(together)
        assert together == whole_cores(together)
        assert any(core.isdisjoint(together) for core in CORES)
        for one in self.live.values():
            assert one.pinned.isdisjoint(together)

    @invariant()
    def limits_hold(self) -> None:
        of_alice = union(r.shielded | r.pinned for r in self.live.values() if r.uid == ALICE)
        of_bob = union(r.shielded | r.pinned for r in self.live.values() if r.uid == BOB)
        assert len(of_alice) <= 4
        assert of_bob <= frozenset(range(2, 8))


TestClaims = Claims.TestCase
TestClaims.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
