"""before_start and after_stop as they are written."""

import pytest

from unit.reading import launcher, launcher_refusal, refusal

HINT = "    write before_start: [[program, argument, ...], [program, ...]], each command a list of its own"


def test_commands() -> None:
    vm = launcher("before_start: [[swtpm, socket, --port, 2321], [x, '']]\nafter_stop:\n- [kill, on]\n- - a\n  - b c")
    assert [command.argv for command in vm.before_start] == [("swtpm", "socket", "--port", "2321"), ("x", "")]
    assert [command.argv for command in vm.after_stop] == [("kill", "on"), ("a", "b c")]
    assert vm.after_stop[1].mark[1:] == (6, 5)
    assert not vm.wants_tuning
    assert launcher("before_start: []").before_start == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[swtpm, socket]", f"3:18: a command in before_start must be a list of words, not 'swtpm'\n{HINT}"),
        ("swtpm socket", f"3:17: before_start must be a list of commands, not 'swtpm socket'\n{HINT}"),
        ("[[]]", f"3:18: a command in before_start is an empty list\n{HINT}"),
        ("[{a: b}]", f"3:18: a command in before_start must be a list of words, not a map\n{HINT}"),
        ("[['', b]]", "3:19: the program of a command in before_start is empty"),
        ("[[a, [b]]]", "3:22: a word of a command in before_start must be a single value, not a list"),
        ("[[a, ~]]", "3:22: a word of a command in before_start must be a single value, not nothing (null)\n"
         "    for an empty value write ''"),
    ],
)  # fmt: skip
def test_refused(value: str, message: str) -> None:
    assert launcher_refusal(f"before_start: {value}") == message


def test_aliases_do_not_make_much_out_of_little() -> None:
    text = (
        "x: &x [" + "abcdefg," * 10000 + "]\nlauncher: {binary: q, before_start: [" + "*x," * 20000 + "]}\nqemu: []\n"
    )
    assert "up to here before_start comes to more than 1 MiB" in refusal(text)
