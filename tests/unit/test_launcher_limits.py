"""What the helper says a user may have, and the line of helper.toml that each limit is said to come from."""

import os
from pathlib import Path
from typing import Any

import pytest

from qemu_launcher import administration, limits
from qemu_launcher.errors import UsageError
from qemu_launcher.limits import KEYS, Limits

TOML = "/etc/qemu-launcher/helper.toml"
FACTS: dict[str, Any] = {
    "version": "0.1.0",
    "mechanism": "partition",
    "reason": "The kernel has remote cpuset partitions",
    "limits_source": f"{TOML}, [[limits]] entry 2",
    "cpus": "8-15",
    "max_cpus": 4,
    "max_vms": 8,
    "memlock": 16 << 30,
    "policies": ["fifo", "other"],
    "max_priority": 10,
    "realtime": "shielded",
    "deadline": False,
    "free_cpus": "8-9,12",
}
FILE = """\
comm = ["qemu-system-*"]

[[limits]]
users = ["alice"]
memlock = "48G"

# students
[[limits]]  # the second
groups = ["students"]
cpus = "8-15"
'max_cpus' = 4
memlock="16G"
policies = [
    "other",
    "fifo",
]

[[limits]]
max_vms = 1
"""


def found(**changes: Any) -> Limits:
    return Limits.read(FACTS | changes)


def test_values_are_in_peoples_units() -> None:
    assert found().values() == {
        "cpus": "8-15",
        "max_cpus": "4",
        "max_vms": "8",
        "memlock": "16 GiB",
        "policies": "fifo, other",
        "max_priority": "10",
        "realtime": "on shielded CPUs",
        "deadline": "no",
    }
    assert found(memlock=2**64 - 1).values()["memlock"] == "unlimited"
    assert found(realtime="anywhere").values()["realtime"] == "on any CPU"
    assert found(cpus="").values()["cpus"] == "none"


@pytest.mark.parametrize(
    "change", [{"cpus": "0-"}, {"max_cpus": True}, {"max_vms": -1}, {"policies": "other"}, {"version": None}]
)
def test_what_the_contract_does_not_know_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)) if "cpus" not in change else "CPU"):
        found(**change)


def test_what_a_later_helper_adds_does_no_harm() -> None:
    assert found(colour="green") == found()


def test_each_key_has_its_line() -> None:
    assert limits.origins(found(), FILE) == limits.Origins(
        {
            "cpus": "helper.toml:10",
            "max_cpus": "helper.toml:11",
            "max_vms": "default",
            "memlock": "helper.toml:12",
            "policies": "helper.toml:13",
            "max_priority": "default",
            "realtime": "default",
            "deadline": "default",
        }
    )


def test_first_and_last_entry() -> None:
    first = limits.origins(found(limits_source=f"{TOML}, [[limits]] entry 1", memlock=48 << 30), FILE)
    assert first.of["memlock"] == "helper.toml:5"
    last = limits.origins(found(limits_source=f"{TOML}, [[limits]] entry 3", max_vms=1), FILE)
    assert last.of["max_vms"] == "helper.toml:19"
    assert first.remarks == last.remarks == ()


def test_built_in_defaults_need_no_file() -> None:
    own = found(limits_source="the built-in defaults")
    assert own.file is None
    assert limits.file_of(own) is None
    assert limits.origins(own, None).of == dict.fromkeys(KEYS, "default")


def test_file_that_may_not_be_read_leaves_the_entry() -> None:
    assert limits.origins(found(), None) == limits.Origins(dict.fromkeys(KEYS, "helper.toml, entry 2"))


def test_value_of_the_file_that_is_not_the_helpers_is_told_and_does_not_count() -> None:
    changed = limits.origins(found(), FILE.replace("= 4", "= 6"))
    assert changed.of["max_cpus"] == "changed meanwhile"
    assert changed.of["cpus"] == "helper.toml:10"
    assert changed.remarks == ("helper.toml:11 has been changed meanwhile, to max_cpus = 6: ask again",)


@pytest.mark.parametrize("text", ["", "[[limits]]\nmax_vms = 1\n", "[[limits]\n", "limits = 3\n", "limits = [1, 2]\n"])
def test_entry_that_has_gone_is_told(text: str) -> None:
    gone = limits.origins(found(), text)
    assert gone.of == dict.fromkeys(KEYS, "helper.toml, entry 2")
    assert gone.remarks == ("helper.toml has been changed meanwhile: ask again",)


def test_entries_without_a_line_for_each_key() -> None:
    text = 'limits = [{users = ["alice"]}, {cpus = "8-15", max_cpus = 4}]\n'
    inline = limits.origins(found(), text)
    assert inline.of["cpus"] == inline.of["max_cpus"] == "helper.toml, entry 2"
    assert inline.of["max_vms"] == "default"
    assert inline.remarks == ()


@pytest.mark.parametrize(
    ("key", "text", "told"),
    [
        ("memlock", '"infinity"', 2**64 - 1),
        ("memlock", '"512M"', 512 << 20),
        ("memlock", '"1T"', 1 << 40),
        ("cpus", '"8-11,12-15"', "8-15"),
        ("deadline", "false", False),
        ("realtime", '"anywhere"', "anywhere"),
    ],
)
def test_same_value_in_another_form_is_no_change(key: str, text: str, told: Any) -> None:
    same = limits.origins(
        found(limits_source=f"{TOML}, [[limits]] entry 1", **{key: told}), f"[[limits]]\n{key} = {text}\n"
    )
    assert same == limits.Origins(dict.fromkeys(KEYS, "default") | {key: "helper.toml:2"})


@pytest.mark.parametrize(
    "text", ['memlock = ""', 'memlock = "lots"', "memlock = 5", 'cpus = "x"', "cpus = [1]", "policies = 1"]
)
def test_nonsense_in_the_file_is_a_change(text: str) -> None:
    assert limits.origins(found(limits_source=f"{TOML}, [[limits]] entry 1"), f"[[limits]]\n{text}\n").remarks


def test_file_is_read_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "helper.toml"
    own = found(limits_source=f"{path}, [[limits]] entry 2")
    assert own.file == path
    assert limits.file_of(own) is None
    path.write_text(FILE)
    assert limits.file_of(own) == FILE
    path.write_text("#" * (64 * 1024 + 1))
    assert limits.file_of(own) is None
    path.write_bytes(b"\xff")
    assert limits.file_of(own) is None
    path.unlink()
    os.mkfifo(path)
    assert limits.file_of(own) is None


def test_table() -> None:
    title, rows, facts = administration.limits_table("alice", found(), limits.origins(found(), FILE))
    assert title == f"alice may have, by {TOML}, [[limits]] entry 2:"
    assert rows[0] == ("cpus", "8-15", "helper.toml:10")
    assert [row[0] for row in rows] == list(KEYS)
    assert facts == [("free CPUs", "8-9,12"), ("mechanism", "partition: The kernel has remote cpuset partitions")]


def test_owner_by_name_and_by_number() -> None:
    assert administration._user("root") == administration._user("0") == (0, "root")
    assert administration._user("4000000001") == (4000000001, "uid 4000000001")
    assert administration._user(None)[0] == os.geteuid()


@pytest.mark.parametrize("owner", ["no-such-user", "", "-1", "4294967295", "99999999999", "٣", "a\0b"])
def test_owner_who_does_not_exist(owner: str) -> None:
    with pytest.raises(UsageError) as caught:
        administration._user(owner)
    assert caught.value.message == f"there is no user {owner!r} on this host"
    assert caught.value.exit_status == 2
