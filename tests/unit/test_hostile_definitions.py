"""Whatever a definition file holds, the answer is a definition or a message; and what it says arrives at QEMU."""

import json
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings, strategies as st

from qemu_launcher import cmdline, definition, keys, ram, yamlnode
from qemu_launcher.definition import VmDefinition
from qemu_launcher.errors import DefinitionError, Mark, printable, render
from qemu_launcher.optionlist import is_name
from qemu_launcher.options import Property, QemuOption
from unit.reading import read

# No deadlines: the machines that run this are slow and shared.
calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

HERE = Mark("win11.yml", 1, 1)
EXAMPLE = """\
launcher:
  binary: qemu-system-x86_64
  env: {QEMU_AUDIO_DRV: pa}
  vcpu_pinning: {0: {0: {0: 2, 1: 6}, 1: {0: 3, 1: 7}}}
  emulator_pinning: [0, 8-9]
  iothread_pinning: {io0: 0-1}
  emulator_scheduler: {policy: rr, priority: 1}
  scheduler: fifo
  priority: 1
  rlimit_memlock: 16G
  shutdown_timeout: infinity
  before_start: [[swtpm, socket, --port, 2321], [a]]
  after_stop: []
qemu:
- name: &n my machine
- machine: [ pc, accel: kvm ]
- nographic
- smp: [ 4, cores: 2, threads: 2 ]
- m: 2G
- object: [ iothread, id: io0 ]
- drive: [ file: "/var/a,b", readonly, id: *n ]
"""
FRAGMENTS = [
    *(
        "launcher:",
        "qemu:",
        "binary:",
        "vcpu_pinning:",
        "emulator_pinning:",
        "iothread_pinning:",
        "emulator_scheduler:",
        "before_start:",
        "socket 0: ",
        "die 1: ",
        "scheduler:",
        "priority:",
        "rlimit_memlock:",
        "env:",
        "fifo",
        "q",
    ),
    *(
        "\n",
        "\n  ",
        "\n- ",
        "- ",
        ": ",
        ", ",
        "[",
        "]",
        "{",
        "}",
        "'",
        '"',
        "&a ",
        "*a",
        "!!str ",
        "!x ",
        "? ",
        "|\n",
        ">",
    ),
    *(
        "---\n",
        "...\n",
        "%YAML 1.2\n",
        "#",
        "~",
        "null",
        "true",
        "0",
        "1",
        "2-3",
        "-1",
        "1.5",
        "16G",
        "\t",
        "\0",
        "\\0",
        "\ufeff",
    ),
    *("ä", "\u2028", "\x85", "\r", "\x1b", "<<: ", "\U0001f600"),
]


def check_refusal(err: DefinitionError) -> None:
    shown = render(err)
    assert shown.startswith("qemu-launcher: win11.yml:")
    assert printable(shown) == shown
    assert len(shown) < 20_000
    assert all(problem.mark is not None and min(problem.mark[1:]) >= 1 for problem in err.problems)


def outcome(data: bytes) -> VmDefinition | None:
    """The definition, or None after checking that the refusal is fit to be shown."""
    try:
        vm = definition.parse(data, Path("win11.yml"), "win11")
    except DefinitionError as err:
        check_refusal(err)
        return None
    assert all("\0" not in word for word in cmdline.qemu_argv(vm))
    ram.guest_ram(vm.options)
    return vm


@calm
@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf")
@example(b"\xff\xfe")
def test_bytes(data: bytes) -> None:
    outcome(data)


@calm
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join))
@example("&a [*a]")
@example("launcher: {binary: q}\nqemu: [? , : , {? a}]")
def test_fragments(text: str) -> None:
    outcome(text.encode())


@calm
@given(st.integers(0, len(EXAMPLE)), st.integers(0, 12), st.sampled_from(FRAGMENTS) | st.text(max_size=4))
def test_a_definition_with_one_change(position: int, removed: int, inserted: str) -> None:
    changed = EXAMPLE[:position] + inserted + EXAMPLE[position + removed :]
    outcome(changed.encode("utf-8", "surrogatepass"))


def test_the_unchanged_one_is_good() -> None:
    vm = outcome(EXAMPLE.encode())
    assert vm is not None
    assert cmdline.qemu_argv(vm)[-1] == "file=/var/a,,b,readonly,id=my machine"


# What stands there arrives

TEXT = st.text(st.characters(blacklist_categories=["Cc", "Cs", "Cn", "Co"], blacklist_characters="\ufeff"), max_size=12)
NAME = TEXT.filter(bool)
ELEMENT = TEXT | st.builds(Property, NAME, TEXT)
OPTION = st.builds(
    QemuOption,
    NAME.filter(is_name),
    st.none() | TEXT | st.lists(ELEMENT, min_size=1, max_size=4).map(tuple),
    st.just(HERE),
)


def quoted(text: str) -> str:
    """`text` as a double-quoted scalar; JSON's escapes are YAML's too."""
    return json.dumps(text, ensure_ascii=False)


def written(option: QemuOption) -> str:
    if option.value is None:
        return quoted(option.name)
    if isinstance(option.value, str):
        return f"{quoted(option.name)}: {quoted(option.value)}"
    elements = (
        f"{quoted(element.name)}: {quoted(element.value)}" if isinstance(element, Property) else quoted(element)
        for element in option.value
    )
    return f"{quoted(option.name)}: [{', '.join(elements)}]"


@calm
@given(st.lists(OPTION.filter(lambda option: option.bare_name != "daemonize"), max_size=5))
def test_options_arrive(options: list[QemuOption]) -> None:
    text = "launcher: {binary: q}\nqemu:" + ("".join(f"\n- {written(option)}" for option in options) or " []")
    found = [option._replace(mark=HERE) for option in read(text).options]
    assert found == options


@calm
@given(TEXT.filter(lambda text: "=" not in text), TEXT)
def test_a_comma_in_a_value_stays_in_it(name: str, value: str) -> None:
    """What QEMU's parser takes apart again is what was written, for names that are names."""
    option = QemuOption("a", (Property(name.replace(",", ""), value), "end"), HERE)
    flat = QemuOption("a", cmdline.option_argv(option)[1], HERE)
    assert list(flat.properties()) == [(name.replace(",", ""), value), ("end", None)]


PLAIN = st.from_regex(r"[A-Za-z0-9._/+=][A-Za-z0-9._/+=:@%~!*&-]{0,15}", fullmatch=True)


@calm
@given(PLAIN.filter(lambda text: not text.endswith(":") and text not in ("null", "~")))
@example("52:54:00:12:34:56")
@example("010")
@example("1_000")
@example("true")
def test_unquoted_values_arrive_verbatim(value: str) -> None:
    vm = read(f"launcher: {{binary: q}}\nqemu:\n- a: {value}\n- b:\n  - {value}\n  - c: {value}\n")
    assert [cmdline.option_argv(option)[1] for option in vm.options] == [value, f"{value},c={value}"]
    flag = yamlnode.resolve(value) == "str" and ":" not in value
    assert (outcome(f"launcher: {{binary: q}}\nqemu:\n- {value}\n".encode()) is not None) == flag


# Definitions that are nearly right: known keys with any values, and near misses of both

WORDS = [
    "true",
    "false",
    "~",
    "0",
    "1",
    "-1",
    "99",
    "100",
    "4294967295",
    "1e3",
    ".inf",
    "16G",
    "2-4",
    "7-4",
    "0,2",
    "''",
]
WORDS += ["fifo", "rr", "deadline", "shield", "affinity", "infinity", "continue", "auto", "q", "'a,b'", '"\\t"', "*a"]
NAMES = [*keys.KEY_NAMES, "priorty", "Binary", "qemu", "launcher", "<<", "0", "~", "policy", "io"]
NAMES += [
    "m",
    "smp",
    "device",
    "object",
    "name",
    "daemonize",
    "preconfig",
    "runas",
    "run-with",
    "readconfig",
    "iothread",
]
VALUE = st.recursive(
    st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(st.sampled_from([*NAMES, *WORDS[3:8]]), inner), max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=6,
)
PAIR = st.tuples(st.sampled_from(NAMES), VALUE)


@calm
@given(
    st.lists(PAIR, max_size=5),
    st.lists(
        PAIR.map(lambda pair: f"- {pair[0]}: {pair[1]}") | st.sampled_from(NAMES).map(lambda name: f"- {name}"),
        max_size=4,
    ),
    st.lists(PAIR, max_size=1),
    st.sampled_from(["", "  binary: q\n"]),
)
def test_nearly_a_definition(
    pairs: list[tuple[str, str]], items: list[str], others: list[tuple[str, str]], binary: str
) -> None:
    lines = "".join(f"  {key}: {value}\n" for key, value in pairs)
    more = "".join(f"{key}: {value}\n" for key, value in others)
    text = f"x: &a [1]\nlauncher:\n{binary}{lines}qemu:\n" + "".join(f"{item}\n" for item in items) + more
    vm = outcome(text.encode())
    if vm is not None:
        try:
            definition.validate_tunable(vm)
        except DefinitionError as err:
            check_refusal(err)
