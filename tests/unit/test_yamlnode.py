"""Scalars as YAML 1.2 means them, and what is refused before anybody asks what a definition says."""

import pytest

from qemu_launcher import yamlnode
from qemu_launcher.errors import DefinitionError, Mark
from qemu_launcher.yamlnode import List, Map, Scalar
from unit.reading import argv, read, refusal

HEAD = "launcher: {binary: q}\n"
NO_BREAK = "U+00A0 (no-break space) is no space to YAML\n    use spaces"


# fmt: off
KINDS = {
    "bool": ["true", "false"],
    "null": ["", "~", "null"],
    "int": ["0", "7", "-5", "+5", "-0", "9223372036854775807", "99999999999999999999999"],
    "float": ["1.5", "1.", ".5", "-1e3", "1e+3", ".inf", "-.inf", "+.INF", ".nan", ".NaN"],
    "str": [
        "True", "FALSE", "on", "off", "yes", "no", "y", "n", "Null", "NULL", "010", "007", "0x10", "0o17", "1_000",
        "52:54:00:12:34:56", "01:00.0", "12:30", "2020-01-01", "4G", "1.2.3", "-", "+", ".", "..", "e5", "<<",
        "\u0661",  # an Arabic digit, which Python would take for a number
    ],
}
# fmt: on


@pytest.mark.parametrize("kind", KINDS)
def test_resolve(kind: str) -> None:
    assert {text: yamlnode.resolve(text) for text in KINDS[kind]} == dict.fromkeys(KINDS[kind], kind)


def test_marks_count_from_one_in_characters() -> None:
    document = yamlnode.compose("ä: [x, 'ö', z]\n", "f")
    assert document.root == Map(
        (
            (
                Scalar("ä", "str", Mark("f", 1, 1)),
                List(
                    (
                        Scalar("x", "str", Mark("f", 1, 5)),
                        Scalar("ö", "str", Mark("f", 1, 8)),
                        Scalar("z", "str", Mark("f", 1, 13)),
                    ),
                    Mark("f", 1, 4),
                ),
            ),
        ),
        Mark("f", 1, 1),
    )


def test_byte_order_mark_is_skipped_and_columns_stay() -> None:
    assert refusal(b"\xef\xbb\xbf[]\n").startswith("1:1: a definition has the sections launcher: and qemu:")


def test_a_shared_node_is_one_node() -> None:
    root = yamlnode.compose("[&a [x], *a]", "f").root
    assert isinstance(root, List)
    assert root.items[0] is root.items[1]


@pytest.mark.parametrize(
    ("item", "value"),
    [("!!str 5", "5"), ("!!int 5", "5"), ("!!float 5", "5"), ("!!bool 'true'", "true"), ("! 5", "5"), ("!!str ''", "")],
)
def test_basic_tags(item: str, value: str) -> None:
    assert argv(f"- a: {item}") == ["-a", value]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("- a: !foo 5", "3:6: the tag '!foo' has no meaning here\n    remove it; text needs none"),
        ("- a: !!int x", "3:6: the tag !!int does not fit 'x'"),
        ("- a: !!null x", "3:6: the tag !!null does not fit 'x'"),
        ("- !!set {x: y}", "3:3: the tag 'tag:yaml.org,2002:set' has no meaning here\n    remove it; text needs none"),
        (
            "- a: !!python/object/apply:os.system [id]",
            "3:6: the tag 'tag:yaml.org,2002:python/object/apply:os.system' has no meaning here\n"
            "    remove it; text needs none",
        ),
        ("- {b: 1, b: 2}", "3:10: the key 'b' is given twice, first in line 3\n    remove one of them"),
        ("- ? [a]\n  : b", "3:5: a key must be a single word, not a list"),
        ("- a: *b", "3:6: the alias *b refers to nothing: no &b stands before it\n"
         "    if the text is meant to begin with *, put it in quotes: '*b'"),
        ("- &a [*a]", "3:7: the alias *a refers to itself"),
        ('- a: "x\\0y"', "3:6: text with a NUL or an incomplete character (\\0, \\ud800) cannot be passed on"),
        ("- a: @b", "3:6: this is not YAML: while scanning for the next token, found character that cannot start any "
         "token\n    text that begins with @ must be in quotes"),
        ("- a: b: c", "3:7: this is not YAML: mapping values are not allowed in this context\n"
         "    text that contains ': ' must be in quotes; otherwise, is the indentation right?"),
        ('- a: "b', "4:1: this is not YAML: while scanning a quoted scalar, found unexpected end of stream\n"
         "    it begins in line 3, column 6"),
        ("\t- a", "3:1: a tab is no indentation in YAML\n    use spaces"),
        ("-\tnographic", "3:2: a tab is no indentation in YAML\n    use spaces"),
        ("- a: b\n- \tc: d", "4:3: a tab is no indentation in YAML\n    use spaces"),
        ("\xa0\xa0- a: b", f"3:1: {NO_BREAK}"),
        ("\xa0\xa0- a\n\xa0\xa0- b: c", f"3:1: {NO_BREAK}"),
        ("  -\xa0nographic", f"3:4: {NO_BREAK}"),
        ("  -\xa0a\n  -\xa0b: c", f"3:4: {NO_BREAK}"),
        ("- a\n\xa0- b: c", f"4:1: {NO_BREAK}"),
        ("- a: 64M\xa0", f"3:9: {NO_BREAK}"),
        ("- a: \xa064M", f"3:6: {NO_BREAK}"),
        ("- \u3000a: b", f"3:3: {NO_BREAK.replace('00A0 (no-break', '3000 (ideographic')}"),
    ],
)  # fmt: skip
def test_refused_in_the_qemu_section(items: str, message: str) -> None:
    assert refusal(f"{HEAD}qemu:\n{items}\n") == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "1:1: the definition is empty\n    qemu-launcher.yml(5) has an example"),
        (b"# nothing\n", "1:1: the definition is empty\n    qemu-launcher.yml(5) has an example"),
        (b"---\n", "2:1: the definition is empty\n    qemu-launcher.yml(5) has an example"),
        (b"a: b\n---\nc: d\n", "2:1: a second document starts here\n    a definition is one document: one VM per file"),
        (b"a: b\n---\n", "2:1: a second document starts here\n    a definition is one document: one VM per file"),
        (b"\xff\xfea\0", "1:1: this is UTF-16\n    save the file as UTF-8"),
        (b"a: b\nc: Gr\xfc\xdfe\n", "2:6: the byte 0xfc is not UTF-8\n    save the file as UTF-8"),
        ("ä: b\r\nö: x\0y\n".encode(), "2:5: the control character U+0000 cannot stand in YAML"),
        ("launcher:\n\xa0\xa0binary: q\nqemu: []\n".encode(), f"2:1: {NO_BREAK}"),
        ("launcher:\n  binary: q\n \xa0debug: true\nqemu: []\n".encode(), f"3:2: {NO_BREAK}"),
        (b"a: \x1b[1m\n", "1:4: the control character U+001B cannot stand in YAML"),
    ],
)
def test_refused_files(data: bytes, message: str) -> None:
    assert refusal(data) == message


@pytest.mark.parametrize("item", ["a: 'x\xa0y'", "a: x\xa0y", "a: '\xa0'", "a: |\n    \xa0", '"\xa0": b'])
def test_odd_spaces_in_text_are_text(item: str) -> None:
    assert isinstance(yamlnode.compose(f"- {item}\n", "f").root, List)


@pytest.mark.parametrize(
    "opening", ["[", "{a: ", "- ", "? ", "a:\n "], ids=["flow list", "flow map", "list", "key", "map"]
)
def test_deep_nesting_is_refused_without_recursion(opening: str) -> None:
    with pytest.raises(DefinitionError):
        read(opening * 100_000)


def test_deep_block_nesting_says_where() -> None:
    text = "\n".join(" " * depth + "a:" for depth in range(60))
    assert refusal(text) == f"{yamlnode.MAX_DEPTH + 1}:{yamlnode.MAX_DEPTH + 1}: nested more than 32 levels deep"


def test_depth_that_is_allowed() -> None:
    depth = yamlnode.MAX_DEPTH
    assert isinstance(yamlnode.compose("[" * depth + "]" * depth, "f").root, List)


def test_numbers_written_differently_are_one_key() -> None:
    (problem,) = yamlnode.compose("{0: a, +0: b}", "f").problems
    assert str(problem) == "f:1:8: the key '+0' is given twice, first in line 1"
    assert isinstance(yamlnode.compose("{0: a, '0': b}", "f").root, Map)


def test_an_alias_as_key_is_compared_too() -> None:
    (problem,) = yamlnode.compose("{&k x: 1, *k : 2}", "f").problems
    assert str(problem) == "f:1:2: the key 'x' is given twice, first in line 1"


def test_numbers_too_long_for_python_are_just_out_of_range() -> None:
    node = Scalar("9" * 5000, "int", Mark("f", 1, 1))
    with pytest.raises(DefinitionError, match=r"^f:1:1: n is 9{60}\.\.\., which is out of range$"):
        yamlnode.integer(node, "n", 0, 5)
