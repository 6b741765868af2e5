"""Which steps of the helper's the crash points are tried at, tests/system/faults.py."""

from hypothesis import given, strategies as st

from system.faults import LONGEST_TURN, MOST_TURNS, tellable


def test_a_loop_is_its_first_a_middle_and_its_last_turn() -> None:
    names = ["mkdir", *["raise", "write"] * 9, "rmdir"]
    assert tellable(names) == [0, 1, 2, 9, 10, 17, 18, 19]


def test_a_loop_of_few_turns_is_all_of_them() -> None:
    names = ["raise", "write"] * MOST_TURNS
    assert tellable(names) == [*range(len(names))]


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(min_value=1, max_value=LONGEST_TURN))
def test_nothing_that_can_be_told_apart_is_left_out(names: list[str], length: int) -> None:
    kept = tellable(names)
    assert kept == sorted(set(kept))
    assert {names[at] for at in kept} == set(names)
    loop = [f"step {number}" for number in range(length)] * 100
    assert len(tellable(loop)) == 3 * length
