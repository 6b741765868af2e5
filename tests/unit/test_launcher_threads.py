"""Who is who among QEMU's threads, from answers as QEMU 7.2 and 10 give them."""

from typing import Any

import pytest

from qemu_launcher.errors import QmpError
from qemu_launcher.threads import has_inner_levels, read_threads


def cpu(index: int, tid: int, **props: int) -> dict[str, Any]:
    return {
        "cpu-index": index,
        "thread-id": tid,
        "qom-path": f"/machine/unattached/device[{index}]",
        "target": "x86_64",
        "props": {name.replace("_", "-"): value for name, value in props.items()},
    }


def places(cpus: list[dict[str, Any]], possible: list[dict[str, Any]] | None = None) -> dict[int, tuple[int, int, int]]:
    return {vcpu.tid: vcpu.place for vcpu in read_threads(cpus, possible, []).vcpus}


def test_outer_thread_id_is_the_tid() -> None:
    assert places([cpu(0, 4711, socket_id=1, core_id=2, thread_id=3)]) == {4711: (1, 2, 3)}


def test_machine_without_inner_levels_keeps_qemus_core_ids() -> None:
    """spapr numbers its cores in steps of the threads: the map means those numbers."""
    assert places([cpu(0, 10, core_id=0), cpu(1, 11, core_id=8)]) == {10: (0, 0, 0), 11: (0, 8, 0)}


def test_single_die_reported_is_no_inner_level() -> None:
    cpus = [cpu(i, 10 + i, socket_id=0, die_id=0, module_id=0, core_id=i, thread_id=0) for i in (0, 3)]
    assert not has_inner_levels(cpus)
    assert places(cpus) == {10: (0, 0, 0), 13: (0, 3, 0)}


def test_cores_count_through_the_dies_of_a_socket() -> None:
    cpus = [
        cpu(s * 8 + d * 4 + c * 2 + t, 100 + s * 8 + d * 4 + c * 2 + t, socket_id=s, die_id=d, core_id=c, thread_id=t)
        for s in (0, 1)
        for d in (0, 1)
        for c in (0, 1)
        for t in (0, 1)
    ]
    assert has_inner_levels(cpus)
    found = places(cpus)
    assert len(set(found.values())) == 16
    assert [found[100 + i] for i in (0, 1, 2, 4, 6, 7, 8, 15)] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 2, 0), (0, 3, 0), (0, 3, 1), (1, 0, 0), (1, 3, 1),
    ]  # fmt: skip


def test_clusters_and_modules_count_too() -> None:
    cpus = [cpu(i, 10 + i, socket_id=0, cluster_id=i // 2, core_id=i % 2) for i in range(4)]
    assert sorted(places(cpus).values()) == [(0, i, 0) for i in range(4)]
    cpus = [cpu(i, 10 + i, socket_id=0, die_id=0, module_id=i, core_id=0) for i in range(4)]
    assert sorted(places(cpus).values()) == [(0, i, 0) for i in range(4)]


def test_gap_of_a_vcpu_that_is_not_plugged_in_shifts_nothing() -> None:
    possible = [
        {"props": cpu(0, 0, socket_id=0, die_id=d, core_id=c, thread_id=0)["props"]} for d in (0, 1) for c in (0, 1)
    ]
    present = [cpu(0, 10, socket_id=0, die_id=0, core_id=0), cpu(3, 13, socket_id=0, die_id=1, core_id=1)]
    assert places(present, possible) == {10: (0, 0, 0), 13: (0, 3, 0)}


def test_vcpus_come_in_the_order_of_their_index() -> None:
    found = read_threads([cpu(1, 11), cpu(0, 10)], None, [{"id": "io0", "thread-id": 7}])
    assert [vcpu.index for vcpu in found.vcpus] == [0, 1]
    assert [(one.id, one.tid) for one in found.iothreads] == [("io0", 7)]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        None,
        [1],
        [{}],
        [{"cpu-index": 0}],
        [{"cpu-index": 0, "thread-id": True}],
        [cpu(0, -1)],
        [{**cpu(0, 1), "props": 3}],
    ],
)
def test_answer_of_another_shape_is_refused(answer: Any) -> None:
    with pytest.raises(QmpError):
        read_threads(answer, None, [])


def test_iothreads_of_another_shape_are_refused() -> None:
    with pytest.raises(QmpError):
        read_threads([], None, [{"id": 3, "thread-id": 4}])
