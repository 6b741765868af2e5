"""Claims on CPUs: disjoint, whole cores, a core for the host, within each user's limits, in whatever order."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from qemu_launcher_helper.contract import INFINITY, Conflict, InvalidArguments, LimitExceeded, Refusal
from qemu_launcher_helper.cpuset.cpulist import cpulist, parse_cpulist
from qemu_launcher_helper.limits import Cores, Limits, check_cpus, free_for, grant_memlock, union
from qemu_launcher_helper.records import Record

# Eight CPUs, four cores of two SMT siblings each, numbered as the lab's host numbers them.
CORES = [frozenset({cpu, cpu + 1}) for cpu in range(0, 8, 2)]
USERS = ALICE, BOB, CAROL = 1000, 1001, 1002


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names of users, and a host without isolcpus=."""
    monkeypatch.setattr("qemu_launcher_helper.limits.CPU", tmp_path)
    (tmp_path / "isolated").write_text("\n")
    accounts = {ALICE: ("alice", ALICE), BOB: ("bob", BOB), CAROL: ("carol", CAROL)}
    monkeypatch.setattr("qemu_launcher_helper.limits.account", accounts.__getitem__)
    return tmp_path


@dataclass
class Claim:
    record: Record
    others: frozenset[int]


def record(uid: int, vm: str, shielded: str = "", pinned: str = "", **facts: Any) -> Record:
    base = Record(uid, vm, 4711, 1, f"/{uid}-{vm}.scope", shielded=parse_cpulist(shielded))
    return base._replace(pinned=parse_cpulist(pinned), **facts)


def claim(shielded: str = "", pinned: str = "", others: str = "", uid: int = ALICE, vm: str = "win11") -> Claim:
    return Claim(record(uid, vm, shielded, pinned), parse_cpulist(others))


def check(wanted: Claim, *live: Record, limits: Limits | None = None, cores: Cores = CORES) -> str:
    return cpulist(check_cpus(wanted.record, wanted.others, limits or Limits(), cores, live).shielded)


def test_a_shield_takes_whole_cores() -> None:
    assert check(claim("4,7")) == "4-7"


def test_the_vms_own_earlier_claim_is_no_conflict() -> None:
    assert check(claim("4-7"), record(ALICE, "win11", "2-5")) == "4-7"


def test_conflict_says_whose_and_what_is_free() -> None:
    held = record(BOB, "work", "4-7")
    with pytest.raises(Conflict) as caught:
        check(claim("6"), held)
    assert str(caught.value) == "CPUs 6-7 are held by VM work of bob; free for you: 2-3"


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


def test_cpus_that_the_scheduler_does_not_balance_are_no_place_for_the_host(host: Path) -> None:
    """isolcpus=2-7: a shield on 0-1 would leave all tasks of the host where each stays on the CPU it began on."""
    (host / "isolated").write_text("2-7\n")
    assert check(claim("2-7")) == "2-7"
    assert cpulist(free_for(Limits(), CORES, [])) == "2-7"
    with pytest.raises(LimitExceeded, match="at least one whole core must stay with the host; free for you: 2-7"):
        check(claim("0"))
    (host / "isolated").write_text("1-7\n")
    assert check(claim("2-7")) == "2-7", "half of a core is enough to live on"
    (host / "isolated").write_text("0-7\n")
    assert cpulist(free_for(Limits(), CORES, [])) == ""
    (host / "isolated").write_text("\n")
    assert check(claim("0")) == "0-1"
    assert cpulist(free_for(Limits(), CORES, [claim("4-7").record])) == "2-3"


@given(st.frozensets(st.integers(0, 8191), max_size=40))
def test_cpulist_round_trip(cpus: frozenset[int]) -> None:
    assert parse_cpulist(cpulist(cpus)) == cpus


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1,,2", "8-3", "1-2-3", "+1", "1 2", "²", "0x1"])
def test_cpulist_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="not a cpulist"):
        parse_cpulist(text)


# Mostly what exists, and mostly little: of claims that are refused at once the machine learns nothing.
cpus = st.frozensets(st.integers(0, 7), max_size=2) | st.frozensets(st.integers(0, 9), max_size=5)
few_cpus = st.just(frozenset[int]()) | st.just(frozenset[int]()) | cpus
shields = st.lists(st.sampled_from(CORES), min_size=1, max_size=4).map(union) | cpus
GIB = 2**30
LOCKABLE = 16 * GIB
sizes = st.integers(1, 9).map(lambda number: number * GIB) | st.sampled_from([1, INFINITY])
USER, VM = st.sampled_from(USERS), st.sampled_from("ab")


class Claims(RuleBasedStateMachine):
    """Users claim and release at random; the invariants are the promises of limits.py (A10, its pure half).

    Beside that VMs become strays, and the administrator takes cores and SMT siblings off line and puts them back. As
    smt/control does, only the second CPU of a core ever goes alone: which CPUs are siblings, the kernel says of online
    ones only. max_vms is not here, it is operations' to count.
    """

    vms = Bundle("vms")

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[tuple[int, str], Record] = {}
        self.offline = frozenset[int]()
        self.limits = {
            ALICE: Limits(),
            BOB: Limits(cpus=frozenset(range(2, 8)), max_cpus=3, memlock=6 * GIB),
            CAROL: Limits(cpus=frozenset(range(6)), max_cpus=4, memlock=40 * GIB),
        }

    @property
    def cores(self) -> list[frozenset[int]]:
        """As limits.read_cores gives them."""
        return [core - self.offline for core in CORES if core - self.offline]

    def known(self, uid: int, vm: str) -> Record:
        """The VM's record, as operations finds or makes it."""
        return self.live.get((uid, vm)) or Record(uid, vm, 2, 1, "")

    @rule(target=vms, uid=USER, vm=VM, shielded=shields)
    def shield(self, uid: int, vm: str, shielded: frozenset[int]) -> tuple[int, str]:
        return self.ask(uid, vm, shielded, frozenset(), frozenset())

    @rule(target=vms, uid=USER, vm=VM, pinned=cpus, others=few_cpus)
    def pin(self, uid: int, vm: str, pinned: frozenset[int], others: frozenset[int]) -> tuple[int, str]:
        return self.ask(uid, vm, frozenset(), pinned, others)

    @rule(target=vms, uid=USER, vm=VM, shielded=shields, pinned=cpus, others=few_cpus)
    def shield_and_pin(
        self, uid: int, vm: str, shielded: frozenset[int], pinned: frozenset[int], others: frozenset[int]
    ) -> tuple[int, str]:
        return self.ask(uid, vm, shielded, pinned, others)

    def ask(
        self, uid: int, vm: str, shielded: frozenset[int], pinned: frozenset[int], others: frozenset[int]
    ) -> tuple[int, str]:
        """Claim, and see that what came of it is right at this moment; return whose it is."""
        key, own, cores = (uid, vm), self.limits[uid], self.cores
        wanted = self.known(uid, vm)._replace(shielded=shielded, pinned=pinned)
        if wanted.stray:  # operations refuses those
            return key
        whole = union(core for core in cores if core & shielded)
        beside = [record for other, record in self.live.items() if other != key]
        free = free_for(own, cores, beside)
        try:
            granted = check_cpus(wanted, others, own, cores, list(self.live.values()))
        except Refusal:
            # What was offered as free must really have been: only the count, the shared part or a CPU that is not there
            # can be the reason.
            held = whole.union(*(record.cpus for record in beside if record.uid == uid))
            fits = own.max_cpus is None or len(held) <= own.max_cpus
            assert not (whole and whole <= free and fits) or pinned or others or shielded - union(cores)
            return key
        assert granted == wanted._replace(shielded=whole)
        assert shielded <= whole
        self.live[key] = granted
        gone = union(record.shielded for record in self.live.values() if not record.stray)
        assert not whole or any(core.isdisjoint(gone) for core in cores), "no core is left to the host"
        return key

    @rule(target=vms, uid=USER, vm=VM, asked=sizes)
    def lock(self, uid: int, vm: str, asked: int) -> tuple[int, str]:
        own = self.known(uid, vm)
        if not own.stray:
            with suppress(LimitExceeded):
                granted = grant_memlock(asked, own, self.limits[uid], list(self.live.values()), LOCKABLE)
                assert max(1, own.memlock) <= granted <= max(asked, own.memlock)
                self.live[uid, vm] = own._replace(memlock=granted)
        return uid, vm

    @rule(key=consumes(vms))
    def end(self, key: tuple[int, str]) -> None:
        self.live.pop(key, None)

    @rule(key=vms)
    def release(self, key: tuple[int, str]) -> None:
        """What Release leaves of a VM that lives on."""
        if key in self.live:
            self.live[key] = self.live[key]._replace(shielded=frozenset(), pinned=frozenset())

    @rule(key=vms)
    def stray(self, key: tuple[int, str]) -> None:
        if key in self.live:
            self.live[key] = self.live[key]._replace(stray=True)

    @rule(core=st.sampled_from(CORES), how=st.sampled_from(["none", "none", "second", "both"]))
    def come_and_go(self, core: frozenset[int], how: str) -> None:
        gone = {"both": core, "second": frozenset({max(core)}), "none": frozenset[int]()}[how]
        if (self.offline - core) | gone < union(CORES):  # the kernel keeps one
            self.offline = (self.offline - core) | gone
        for key, record in self.live.items():
            if record.shielded and record.shielded <= self.offline:  # the kernel ends a shield without a CPU
                self.live[key] = record._replace(stray=True)

    @invariant()
    def shields_are_disjoint_and_leave_a_core(self) -> None:
        live = [record for record in self.live.values() if not record.stray]
        together = union(record.shielded for record in live)
        for core in CORES:
            # Not even siblings, of which one was off line when the other was claimed, belong to two VMs.
            assert sum(bool(core & record.shielded) for record in live) <= 1
        assert any(core.isdisjoint(together) for core in CORES)
        assert all(record.pinned.isdisjoint(together) for record in live)

    @invariant()
    def limits_hold(self) -> None:
        """Of each user alone, strays included."""
        for uid, own in self.limits.items():
            mine = [record for record in self.live.values() if record.uid == uid]
            held = union(record.cpus for record in mine)
            assert own.max_cpus is None or len(held) <= own.max_cpus
            assert own.cpus is None or held <= own.cpus
            assert sum(record.memlock for record in mine) <= min(own.memlock or LOCKABLE, LOCKABLE)


TestClaims = pytest.mark.attack("A10")(Claims.TestCase)
TestClaims.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
