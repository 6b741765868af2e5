"""JSON from the command line, and what may be passed on to a guest that is held."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, strategies as st

from qemu_launcher import passthrough
from qemu_launcher.errors import UsageError

HINT = """in a shell: '{"device": "drive0"}'"""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "line 1, column 1: expecting value: ''"),
        ("{", "line 1, column 2: expecting property name enclosed in double quotes: '{'"),
        ('{"a": 1,}', "line 1, column 9: expecting property name enclosed in double quotes: "),
        ('{"a":\n 1 2}', "line 2, column 4: expecting ',' delimiter: "),
        ("{device: drive0}", "line 1, column 2: expecting property name enclosed in double quotes: "),
        ('{"a": 1} {}', "line 1, column 10: extra data: "),
        ("[1]", "line 1, column 1: an object is wanted, not '[1]'"),
        ("7", "line 1, column 1: an object is wanted, not '7'"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('{"x": [{"b": 1, "b": 1}]}', "the key 'b' is given twice"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": 1e999}', "a number too large: "),
        ('{"a": %s}' % ("9" * 5000), "a number too long, or nesting too deep: "),
        ("[" * 100_000, "a number too long, or nesting too deep: "),
        ('{"a": "\udcff"}', "it is no UTF-8: "),
        ('{"a": "\\ud800"}', "it is no UTF-8: "),
    ],
)
def test_what_is_no_object(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        passthrough.read_arguments(text)
    assert caught.value.message.startswith(f"the arguments are no JSON object: {why}")
    assert caught.value.hint == HINT
    assert len(caught.value.message) < 200


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_any_text_is_an_object_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(passthrough.read_arguments(text), dict)


def test_arguments() -> None:
    assert passthrough.read_arguments(' {"Größe": [1, -2.5, true, null, {"a": ""}]}\n') == {
        "Größe": [1, -2.5, True, None, {"a": ""}]
    }


@pytest.mark.parametrize(
    ("command", "arguments", "question"),
    [
        ("query-status", {}, True),
        ("cont", {}, False),
        ("x-query-status", {}, False),
        ("human-monitor-command", {"command-line": "info status"}, True),
        ("human-monitor-command", {"command-line": "  help"}, True),
        ("human-monitor-command", {"command-line": "? cont"}, True),
        ("human-monitor-command", {"command-line": "c"}, False),
        ("human-monitor-command", {"command-line": "information"}, False),
        ("human-monitor-command", {"command-line": "info/c"}, False),
        ("human-monitor-command", {"command-line": ""}, False),
        ("human-monitor-command", {"command-line": ["info"]}, False),
        ("human-monitor-command", {}, False),
    ],
)
def test_what_is_only_a_question(command: str, arguments: dict[str, Any], question: bool) -> None:
    assert passthrough._is_question(command, arguments) is question
