"""Text -> YAML that `yamlnode` reads back as that same text: the counterpart of its rules, for what writes definitions.

Scalars are left plain where a person would leave them so, and quoted where they would be read as something else, on
one line whatever is in them. Not PyYAML's emitter: it resolves as YAML 1.1 does, so that `on`, `52:54:00` and `0x10`
would be quoted for a reader who takes them for text anyway, and it folds long lines.

Guarantee: `compose` gives back the text of each scalar, with the kind that was asked for. ValueError for a NUL or a
lone surrogate, which no quoting brings through.
"""

import re

from ..yamlnode import resolve

LONGEST_KEY = 256  # characters; YAML lets a key have 1024, and an escape takes up to ten of them
COMMENT_WIDTH = 100  # columns

# What a plain scalar may be in block context, more narrowly than YAML has it: a first character that begins nothing
# else; then no ": ", no " #", no space at the end. The parsers allow all of it, and tests try what they make of it.
_PLAIN = re.compile(
    r"(?:[A-Za-z0-9_./+=^$(;]|-(?=[A-Za-z0-9]))"
    r"(?:[A-Za-z0-9_./+=@%^~;()$,*!&|?<>\"'\[\]{}\\#-]|:(?=[^ :])|::|[ ](?=[^ #:]))*"
)
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


def scalar(text: str) -> str:
    """`text` where any single value will do: plain `4`, `on` and `true` are read as they are written."""
    return text if _is_plain(text) and resolve(text) != "null" else _quoted(text)


def word(text: str) -> str:
    """`text` where text is wanted, as for a name: a number or a boolean is quoted."""
    return text if _is_plain(text) and resolve(text) == "str" and text[0] != "-" else _quoted(text)


def comment(text: str, indent: int = 0) -> str:
    """`text` as comment lines, which end nowhere but where we end them."""
    import textwrap  # noqa: PLC0415  only who writes a definition needs it

    safe = "".join(character if character.isprintable() else _escaped(character) for character in text)
    lines = textwrap.wrap(safe, COMMENT_WIDTH - indent, break_long_words=False, break_on_hyphens=False)
    return "".join(f"{' ' * indent}# {line}\n" for line in lines)


def _is_plain(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None and not text.endswith((" ", ":"))


def _quoted(text: str) -> str:
    if _UNUSABLE.search(text):
        raise ValueError("NUL and incomplete characters cannot be written in YAML")
    if text.isprintable():  # no line breaks, no control characters, no byte order mark
        return "'" + text.replace("'", "''") + "'"
    body = "".join(
        "\\" + character if character in '"\\' else character if character.isprintable() else _escaped(character)
        for character in text
    )
    return f'"{body}"'


def _escaped(character: str) -> str:
    code = ord(character)
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character)
    return known or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
