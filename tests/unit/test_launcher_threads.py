"""Who is who among QEMU's threads, from answers as QEMU 7.2 and 10 give them."""

from typing import Any

import pytest

from qemu_launcher.errors import QmpError
from qemu_launcher.places import LEVELS, Place
from qemu_launcher.threads import Threads, read_threads


def cpu(index: int, tid: int, **props: int) -> dict[str, Any]:
    return {
        "cpu-index": index,
        "thread-id": tid,
        "qom-path": f"/machine/unattached/device[{index}]",
        "target": "x86_64",
        "props": {name.replace("_", "-"): value for name, value in props.items()},
    }


def slot(count: int = 1, plugged: bool = False, **props: int) -> dict[str, Any]:
    """An entry of query-hotpluggable-cpus."""
    entry = {"type": "qemu64-x86_64-cpu", "vcpus-count": count, "props": cpu(0, 0, **props)["props"]}
    return {**entry, "qom-path": "/machine/unattached/device[0]"} if plugged else entry


def place(text: str) -> Place:
    """`socket 0 die 1 core 0 thread 0`."""
    words = text.split()
    return tuple(zip(words[::2], map(int, words[1::2]), strict=True))


def places(cpus: list[dict[str, Any]], possible: list[dict[str, Any]] | None = None) -> dict[int, tuple[int, int, int]]:
    """Socket, core, thread of each TID."""
    vcpus = read_threads(cpus, possible, []).vcpus
    return {vcpu.tid: (vcpu.ids.socket, vcpu.core, vcpu.ids.thread) for vcpu in vcpus}


def test_outer_thread_id_is_the_tid() -> None:
    assert places([cpu(0, 4711, socket_id=1, core_id=2, thread_id=3)]) == {4711: (1, 2, 3)}


def test_machine_without_inner_levels_keeps_qemus_core_ids() -> None:
    """spapr numbers its cores in steps of the threads: the map means those numbers."""
    assert places([cpu(0, 10, core_id=0), cpu(1, 11, core_id=8)]) == {10: (0, 0, 0), 11: (0, 8, 0)}


def test_single_die_reported_is_no_inner_level() -> None:
    cpus = [cpu(i, 10 + i, socket_id=0, die_id=0, module_id=0, core_id=i, thread_id=0) for i in (0, 3)]
    assert places(cpus) == {10: (0, 0, 0), 13: (0, 3, 0)}


def test_cores_count_through_the_dies_of_a_socket() -> None:
    cpus = [
        cpu(s * 8 + d * 4 + c * 2 + t, 100 + s * 8 + d * 4 + c * 2 + t, socket_id=s, die_id=d, core_id=c, thread_id=t)
        for s in (0, 1)
        for d in (0, 1)
        for c in (0, 1)
        for t in (0, 1)
    ]
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
    possible = [slot(socket_id=0, die_id=d, core_id=c, thread_id=0) for d in (0, 1) for c in (0, 1)]
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


# Places


def tids_at(found: Threads, text: str) -> list[int]:
    return [vcpu.tid for vcpu in found.at(place(text))]


def test_core_counts_through_the_levels_that_are_left_out() -> None:
    """Two sockets of two dies of two clusters of two cores of two threads; TID is a number of these digits."""
    cpus = [
        cpu(i, 100000 + int(f"{i:05b}"), socket_id=i >> 4 & 1, die_id=i >> 3 & 1, cluster_id=i >> 2 & 1,
            core_id=i >> 1 & 1, thread_id=i & 1)
        for i in range(32)
    ]  # fmt: skip
    found = read_threads(cpus, None, [])
    assert tids_at(found, "socket 1 core 0 thread 0") == [110000]
    assert tids_at(found, "socket 1 core 7 thread 1") == [111111]
    assert tids_at(found, "socket 1 core 5 thread 0") == [111010]
    assert tids_at(found, "socket 1 core 8 thread 0") == []
    assert tids_at(found, "socket 0 die 1 core 3 thread 0") == [101110]
    assert tids_at(found, "socket 0 die 1 core 4 thread 0") == []
    assert tids_at(found, "socket 0 die 1 cluster 0 core 1 thread 1") == [101011]
    assert tids_at(found, "socket 0 cluster 1 core 2 thread 0") == [101100], "cluster 1 of both dies"
    assert tids_at(found, "socket 0 die 1 cluster 1 core 0 thread 0") == [101100]
    assert str(found.at(place("socket 0 die 1 core 3 thread 0"))[0]) == (
        "vCPU 14 (socket 0, core 7, thread 0; core 1, die 1, cluster 1)"
    )


def test_every_vcpu_has_one_place_in_each_form() -> None:
    cpus = [cpu(i, 10 + i, die_id=i >> 2, module_id=i >> 1 & 1, core_id=i & 1) for i in range(8)]
    found = read_threads(cpus, None, [])
    threes = [f"socket 0 core {core} thread 0" for core in range(8)]
    dies = [f"socket 0 die {die} core {core} thread 0" for die in (0, 1) for core in range(4)]
    wholes = [
        f"socket 0 die {die} module {module} core {core} thread 0"
        for die in (0, 1) for module in (0, 1) for core in (0, 1)
    ]  # fmt: skip
    for form in (threes, dies, wholes):
        assert [tids_at(found, one) for one in form] == [[10 + i] for i in range(8)]


def test_level_that_the_machine_does_not_report_is_its_only_member() -> None:
    found = read_threads([cpu(0, 10, core_id=0), cpu(1, 11, core_id=1)], None, [])
    assert tids_at(found, "socket 0 die 0 cluster 0 core 1 thread 0") == [11]
    assert tids_at(found, "drawer 0 book 0 socket 0 core 1 thread 0") == [11]
    assert tids_at(found, "socket 0 die 1 core 1 thread 0") == []
    assert not found.can_be_at(place("socket 0 die 1 core 1 thread 0"))


def test_drawers_and_books_count_only_where_they_are_named() -> None:
    """s390x numbers its cores through the whole machine, and its sockets within their book."""
    cpus = [cpu(i, 10 + i, drawer_id=i >> 1, book_id=0, socket_id=0, core_id=i) for i in range(4)]
    found = read_threads(cpus, None, [])
    assert tids_at(found, "socket 0 core 3 thread 0") == [13]
    assert tids_at(found, "drawer 1 socket 0 core 3 thread 0") == [13]
    assert tids_at(found, "drawer 0 socket 0 core 3 thread 0") == []


def test_threads_of_a_core_that_has_no_numbers_for_them_are_counted() -> None:
    """spapr with threads=2: the core is all that is told, of the vCPUs that are there and of those that may come."""
    cpus = [cpu(2, 12, core_id=2), cpu(0, 10, core_id=0), cpu(1, 11, core_id=0), cpu(3, 13, core_id=2)]
    possible = [slot(2, plugged=True, core_id=0), slot(2, plugged=True, core_id=2), slot(2, core_id=4)]
    found = read_threads(cpus, possible, [])
    assert [tids_at(found, f"socket 0 core {core} thread {t}") for core in (0, 2) for t in (0, 1)] == [
        [10], [11], [12], [13],
    ]  # fmt: skip
    assert found.can_be_at(place("socket 0 core 4 thread 1"))
    assert not found.can_be_at(place("socket 0 core 4 thread 2"))
    assert (found.possible, found.can_grow) == (6, True)


def test_slots_that_wait_for_a_vcpu() -> None:
    possible = [slot(core_id=1), slot(plugged=True, core_id=0)]
    found = read_threads([cpu(0, 10, core_id=0)], possible, [])
    assert (found.possible, found.can_grow) == (2, True)
    assert found.can_be_at(place("socket 0 core 1 thread 0"))
    assert tids_at(found, "socket 0 core 1 thread 0") == []
    assert not read_threads([cpu(0, 10, core_id=0)], None, []).can_grow


def test_levels_are_qemus() -> None:
    assert list(LEVELS) == ["drawer", "book", "socket", "die", "cluster", "module", "core", "thread"]
