"""YAML text -> nodes that remember where they stand, and typed readers over them.

PyYAML resolves scalars as YAML 1.1 does, where `on`, `52:54:00:12:34:56` and `010` are not what they look like, and
its composers recurse, in C without a guard. So only its parser is used, event by event: the tree is built here without
recursion, with the rules of YAML 1.2's core schema, narrowed to what people mean: booleans are `true` and `false`,
null is `~`, `null` or nothing, numbers are decimal; all else is text.

Refused, each with file, line and column: repeated keys, keys that are not scalars, aliases of nothing or of
themselves, tags other than YAML's own basic ones, a second document, NUL and lone surrogates, nesting deeper than
MAX_DEPTH. An alias shares its node, so a small file cannot grow a large tree; who walks the tree counts for himself.

The readers (`boolean`, `integer`, `choice`, ...) take a node and what to call it, so that callers read like a schema.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import yaml
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentStartEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceStartEvent,
)
from yaml.reader import Reader

from .errors import MOST_PROBLEMS, DefinitionError, Mark, did_you_mean, shortened

MAX_DEPTH = 32  # a definition needs six levels; deeper is a mistake or an attack on somebody's stack
EXAMPLE_HINT = "qemu-launcher.yml(5) has an example"

_TAG = "tag:yaml.org,2002:"
_SCALAR_KINDS = ("str", "int", "float", "bool", "null")
_NUMBER = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_ODD_FLOATS = frozenset((".inf", ".Inf", ".INF", ".nan", ".NaN", ".NAN"))
_ODD_SPACE = re.compile(r"[ -]*((?![\0-\x7f])\s)")  # a space that is none to YAML, where indentation or a dash is
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # neither an argument nor a file name can carry these


class Scalar(NamedTuple):
    """A single value. `text` is what stands in the file (quotes and escapes resolved); `kind` how YAML reads it."""

    text: str
    kind: str  # one of _SCALAR_KINDS
    mark: Mark


class List(NamedTuple):
    items: tuple["Node", ...]
    mark: Mark


class Map(NamedTuple):
    pairs: tuple[tuple[Scalar, "Node"], ...]
    mark: Mark


Node = Scalar | List | Map


class Document(NamedTuple):
    root: Node
    aliased: frozenset[Mark]  # where the nodes stand that some alias refers to
    problems: tuple[DefinitionError, ...] = ()  # repeated keys: the first of each counts, so that all else can be told

    def is_shared(self, node: Node) -> bool:
        """Whether an alias refers to `node` or to something in it."""
        pending = [node]
        met: set[int] = set()
        while pending:
            part = pending.pop()
            if part.mark in self.aliased:
                return True
            if id(part) in met or isinstance(part, Scalar):
                continue
            met.add(id(part))
            pending.extend(part.items if isinstance(part, List) else (value for _key, value in part.pairs))
        return False


# Events are Any here: the stubs of PyYAML leave out most of their attributes.


class _Open:
    """A collection whose end has not been read yet."""

    __slots__ = ("anchor", "is_map", "is_repeated", "key", "mark", "nodes", "problems", "seen")

    def __init__(self, event: Any, mark: Mark, problems: list[DefinitionError]) -> None:
        self.is_map = isinstance(event, MappingStartEvent)
        self.anchor: str | None = event.anchor
        self.mark = mark
        self.nodes: list[Any] = []  # of a map: pairs
        self.key: Scalar | None = None  # of a map: read, its value not yet
        self.is_repeated = False  # that key
        self.seen: dict[tuple[str, str], Mark] = {}
        self.problems = problems

    def add(self, node: Node) -> None:
        if not self.is_map:
            self.nodes.append(node)
        elif self.key is not None:
            if not self.is_repeated:
                self.nodes.append((self.key, node))
            self.key = None
        else:
            if not isinstance(node, Scalar):
                fail(node, f"a key must be a single word, not {describe(node)}")
            identity = (node.kind, str(int(node.text)) if _is_short_int(node) else node.text)
            self.is_repeated = identity in self.seen
            first = self.seen.setdefault(identity, node.mark)
            if self.is_repeated and len(self.problems) < MOST_PROBLEMS:
                what = f"the key {shortened(node.text)!r} is given twice, first in line {first.line}"
                self.problems.append(DefinitionError(what, "remove one of them", mark=node.mark))
            self.key = node

    def close(self) -> Node:
        return Map(tuple(self.nodes), self.mark) if self.is_map else List(tuple(self.nodes), self.mark)


class _Composer:
    """Builds the tree of one document from the parser's events."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.root: Node | None = None
        self.stack: list[_Open] = []
        self.anchors: dict[str, Node | None] = {}  # None: not complete yet
        self.aliased: set[Mark] = set()
        self.documents = 0
        self.problems: list[DefinitionError] = []

    def mark(self, event: Any) -> Mark:
        return Mark(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def feed(self, event: Any) -> None:
        if isinstance(event, ScalarEvent):
            node = Scalar(event.value, self.scalar_kind(event), self.mark(event))
            if _UNUSABLE.search(node.text):
                fail(node, "text with a NUL or an incomplete character (\\0, \\ud800) cannot be passed on")
            if not event.style:  # unquoted
                for at in (0, len(node.text) - 1):
                    if problem := _odd_space(node.text[at:], node.mark._replace(column=node.mark.column + at)):
                        raise problem
            self.finish(node, event.anchor)
        elif isinstance(event, SequenceStartEvent | MappingStartEvent):
            self.open(event)
        elif isinstance(event, CollectionEndEvent):
            done = self.stack.pop()
            self.finish(done.close(), done.anchor)
        elif isinstance(event, AliasEvent):
            self.alias(event)
        elif isinstance(event, DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise DefinitionError(
                    "a second document starts here",
                    "a definition is one document: one VM per file",
                    mark=self.mark(event),
                )

    def open(self, event: Any) -> None:
        mark = self.mark(event)
        if len(self.stack) >= MAX_DEPTH:
            raise DefinitionError(f"nested more than {MAX_DEPTH} levels deep", mark=mark)
        opened = _Open(event, mark, self.problems)
        own = "map" if opened.is_map else "seq"
        if event.tag not in (None, "!", _TAG + own):
            refuse_tag(event.tag, mark)
        if opened.anchor is not None:
            self.anchors[opened.anchor] = None
        self.stack.append(opened)

    def alias(self, event: Any) -> None:
        name = event.anchor
        node = self.anchors.get(name)
        if node is None:
            why = "refers to itself" if name in self.anchors else f"refers to nothing: no &{name} stands before it"
            hint = (
                None if name in self.anchors else f"if the text is meant to begin with *, put it in quotes: '*{name}'"
            )
            raise DefinitionError(f"the alias *{name} {why}", hint, mark=self.mark(event))
        self.aliased.add(node.mark)
        self.finish(node, None)

    def finish(self, node: Node, anchor: str | None) -> None:
        if anchor is not None:
            self.anchors[anchor] = node
        if self.stack:
            self.stack[-1].add(node)
        else:
            self.root = node

    def scalar_kind(self, event: Any) -> str:
        if event.tag is None:
            return resolve(event.value) if event.implicit[0] else "str"
        kind: str = "str" if event.tag == "!" else event.tag.removeprefix(_TAG)
        if kind not in _SCALAR_KINDS:
            refuse_tag(event.tag, self.mark(event))
        found = resolve(event.value)
        if kind not in ("str", found) and (found, kind) != ("int", "float"):
            raise DefinitionError(f"the tag !!{kind} does not fit {shortened(event.value)!r}", mark=self.mark(event))
        return kind


def resolve(text: str) -> str:
    """How an unquoted, untagged scalar is to be read."""
    if text in ("", "~", "null"):
        return "null"
    if text in ("true", "false"):
        return "bool"
    if text[0] in "+-.0123456789":
        if text.removeprefix(text[0] if text[0] in "+-" else "") in _ODD_FLOATS:
            return "float"
        if _NUMBER.fullmatch(text):
            digits = text.lstrip("+-")
            if not digits.isdigit():
                return "float"
            if digits == "0" or digits[0] != "0":  # 010 is eight to some, ten to others, and an address to QEMU: text
                return "int"
    return "str"


def refuse_tag(tag: str, mark: Mark) -> NoReturn:
    raise DefinitionError(f"the tag {shortened(tag)!r} has no meaning here", "remove it; text needs none", mark=mark)


def decode(data: bytes, file: str) -> str:
    """The text of a definition file: UTF-8, with or without a byte order mark. Raises DefinitionError."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DefinitionError("this is UTF-16", "save the file as UTF-8", mark=Mark(file, 1, 1))
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as err:
        before = data[: err.start].decode()
        message = f"the byte 0x{data[err.start]:02x} is not UTF-8"
        raise DefinitionError(message, "save the file as UTF-8", mark=_place(file, before)) from err
    if bad := Reader.NON_PRINTABLE.search(text):
        place = _place(file, text[: bad.start()])
        raise DefinitionError(f"the control character U+{ord(bad[0]):04X} cannot stand in YAML", mark=place)
    return text


def _place(file: str, before: str) -> Mark:
    """Where the text goes on after `before`."""
    lines = (before + ".").splitlines()
    return Mark(file, len(lines), len(lines[-1]))


def compose(text: str, file: str) -> Document:
    """The one document in `text`. Raises DefinitionError; repeated keys are told in it. `file`: its name in marks."""
    composer = _Composer(file)
    # Debian's PyYAML has libyaml; the slower parser in Python gives the same events (tests compare them).
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        for event in yaml.parse(text, Loader=loader):
            composer.feed(event)
    except yaml.YAMLError as err:
        raise _syntax_error(err, text, file) from err
    root = composer.root
    if root is None or (isinstance(root, Scalar) and root.kind == "null"):
        raise DefinitionError(
            "the definition is empty", EXAMPLE_HINT, mark=Mark(file, 1, 1) if root is None else root.mark
        )
    return Document(root, frozenset(composer.aliased), tuple(composer.problems))


def _syntax_error(err: yaml.YAMLError, text: str, file: str) -> DefinitionError:
    mark = getattr(err, "problem_mark", None)
    problem = str(getattr(err, "problem", None) or getattr(err, "reason", None) or "it cannot be read")
    if mark is None:
        return DefinitionError(f"this is not YAML: {problem}", mark=Mark(file, 1, 1))
    here = Mark(file, mark.line + 1, mark.column + 1)
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1] and not line[: mark.column].strip(" -\t"):
        return DefinitionError("a tab is no indentation in YAML", "use spaces", mark=here)
    begin = getattr(err, "context_mark", None)
    for number in (begin.line if begin else mark.line, mark.line):
        odd = _odd_space(lines[number], Mark(file, number + 1, 1)) if number < len(lines) else None
        if odd is not None:
            return odd
    if context := getattr(err, "context", None):
        problem = f"{context}, {problem}"
    at = line[mark.column : mark.column + 1]
    hint = None
    if "cannot start any token" in problem and at:
        hint = f"text that begins with {at} must be in quotes"
    elif "mapping values" in problem:
        hint = "text that contains ': ' must be in quotes; otherwise, is the indentation right?"
    elif begin is not None and begin.line != mark.line:
        hint = f"it begins in line {begin.line + 1}, column {begin.column + 1}"
    return DefinitionError(f"this is not YAML: {problem}", hint, mark=here)


def _odd_space(text: str, mark: Mark) -> DefinitionError | None:
    """What is wrong with `text`, at `mark`, when it begins with a space that web pages have and YAML has not."""
    found = _ODD_SPACE.match(text)
    if found is None:
        return None
    import unicodedata  # noqa: PLC0415  only for this message, and `command` is to be quick

    what = f"U+{ord(found[1]):04X} ({unicodedata.name(found[1], 'a space').lower()}) is no space to YAML"
    return DefinitionError(what, "use spaces", mark=mark._replace(column=mark.column + found.start(1)))


def describe(node: Node) -> str:
    """What stands there, in words for a message."""
    if isinstance(node, List):
        return "a list" if node.items else "an empty list"
    if isinstance(node, Map):
        return "a map" if node.pairs else "an empty map"
    if node.kind == "null":
        return "nothing (null)"
    if node.kind in ("int", "float"):
        return f"the number {shortened(node.text)}"
    return node.text if node.kind == "bool" else repr(shortened(node.text))


def fail(node: Node, message: str, hint: str | None = None) -> NoReturn:
    raise DefinitionError(message, hint, mark=node.mark)


def string(node: Node, what: str) -> str:
    """Text that YAML reads as text: not a number, a boolean or null; not empty."""
    if not isinstance(node, Scalar) or node.kind != "str":
        quotable = isinstance(node, Scalar) and node.kind != "null"
        fail(
            node,
            f"{what} must be text, not {describe(node)}",
            f'write it in quotes: "{node.text}"' if quotable and isinstance(node, Scalar) else None,
        )
    if not node.text:
        fail(node, f"{what} is empty")
    return node.text


def verbatim(node: Node, what: str) -> str:
    """Any scalar but null, as its source text."""
    if not isinstance(node, Scalar) or node.kind == "null":
        hint = "for an empty value write ''" if isinstance(node, Scalar) else None
        fail(node, f"{what} must be a single value, not {describe(node)}", hint)
    return node.text


def boolean(node: Node, what: str) -> bool:
    if not isinstance(node, Scalar) or node.kind != "bool":
        hint = "write true or false, in lower case, without quotes"
        fail(node, f"{what} must be true or false, not {describe(node)}", hint)
    return node.text == "true"


def number(node: Node, what: str) -> int:
    """A decimal whole number."""
    if not isinstance(node, Scalar) or node.kind != "int":
        hint = without_zeros(node) or "write a decimal number, without quotes"
        fail(node, f"{what} must be a whole number, not {describe(node)}", hint)
    if not _is_short_int(node):
        fail(node, f"{what} is {shortened(node.text)}, which is out of range")
    return int(node.text)


def integer(node: Node, what: str, least: int, most: int) -> int:
    """A decimal whole number in least..most."""
    value = number(node, what)
    if not least <= value <= most:
        fail(node, f"{what} is {value}, which is out of range ({least}-{most})")
    return value


def without_zeros(node: Node) -> str | None:
    """A hint for a number with leading zeros, which is text; None for anything else."""
    found = re.fullmatch(r"0+([0-9]{1,19})", node.text) if isinstance(node, Scalar) else None
    return f"without leading zero: {found[1]}" if found else None


def _is_short_int(node: Scalar) -> bool:
    """Whether int() may be asked: 20 characters hold every limit in use, and beyond 4300 digits Python refuses."""
    return node.kind == "int" and len(node.text) <= 20


def choice(node: Node, what: str, choices: Sequence[str]) -> str:
    if not isinstance(node, Scalar) or node.kind != "str" or node.text not in choices:
        text = node.text if isinstance(node, Scalar) else ""
        fail(node, f"{what} must be one of {', '.join(choices)}; not {describe(node)}", did_you_mean(text, choices))
    return node.text


def entries(node: Node, what: str, hint: str | None = None) -> Iterator[tuple[Scalar, Node]]:
    """Those of a map; `hint` is for a node that is none."""
    if not isinstance(node, Map):
        fail(node, f"{what} must be a map (key: value), not {describe(node)}", hint)
    return iter(node.pairs)


def items(node: Node, what: str, hint: str | None = None) -> Sequence[Node]:
    """Those of a list; `hint` is for a node that is none."""
    if not isinstance(node, List):
        fail(node, f"{what} must be a list, not {describe(node)}", hint)
    return node.items


def unknown(key: Scalar, what: str, known: Sequence[str]) -> DefinitionError:
    if key.text == "<<":
        hint: str | None = "merge keys (<<) are no part of YAML 1.2; write the keys out, or use an alias for the whole"
    else:
        hint = did_you_mean(key.text, known) or f"known are {', '.join(known)}"
    return DefinitionError(f"unknown {what} {shortened(key.text)!r}", hint, mark=key.mark)
