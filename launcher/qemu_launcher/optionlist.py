"""The section qemu of a definition, read: a list of options, each with its value, as text or in parts.

What is written is what QEMU gets; refused is what could not be passed on, or would certainly be something else to QEMU.
"""

import re
from itertools import pairwise

from . import yamlnode
from .errors import MOST_PROBLEMS, PROGRAM, DefinitionError, shortened
from .options import IMPLIED, Property, QemuOption
from .yamlnode import List, Map, Node, Scalar, describe, fail

MAX_ARGUMENT_BYTES = (128 << 10) - 1  # MAX_ARG_STRLEN of execve(2), less the final NUL
MAX_OPTIONS_BYTES = 1 << 20  # execve(2) gives arguments and environment a quarter of the stack limit, 2 MiB by default
NO_OPTIONS_HINT = "write qemu: and below it an option in each line, such as - nographic; or qemu: [] for none"
_NO_SPACE = re.compile(r"([a-z][a-z_-]*):([^\s,=]+)")


def read_options(node: Node, problems: list[DefinitionError]) -> tuple[QemuOption, ...]:
    options: list[QemuOption] = []
    room = MAX_OPTIONS_BYTES
    try:
        for item in yamlnode.items(node, "the section qemu", _no_list(node)):
            if len(problems) >= MOST_PROBLEMS:
                break
            try:
                option = _option(item)
            except DefinitionError as err:
                problems.append(err)
                continue
            size = option.size()
            if size > MAX_ARGUMENT_BYTES:
                fail(
                    item,
                    f"-{shortened(option.name)} has a value longer than {MAX_ARGUMENT_BYTES} bytes, the kernel's limit",
                )
            room -= size  # aliases make much out of little, so the file's own size is no bound
            if room < 0:
                fail(item, f"up to here the qemu section comes to more than {MAX_OPTIONS_BYTES >> 20} MiB")
            options.append(option)
    except DefinitionError as err:
        problems.append(err)
    return tuple(options)


def _no_list(node: Node) -> str | None:
    """A hint for the section where it has its options as a map, or as a command line, or none."""
    if isinstance(node, Map):
        return 'begin each option with "- "'
    if isinstance(node, Scalar) and node.kind == "null":
        return NO_OPTIONS_HINT
    if isinstance(node, Scalar) and node.text.startswith(("-", "qemu")):
        return f"a list is what this makes of a command line: {PROGRAM} import -- qemu-system-x86_64 ..."
    return None


def _option(item: Node) -> QemuOption:
    if isinstance(item, Scalar):
        text = yamlnode.string(item, "an option")
        if not is_name(text):
            fail(item, *_no_name(text))
        return QemuOption(text, None, item.mark)
    if not isinstance(item, Map):
        fail(item, f"an option must be a flag or name: value, not {describe(item)}")
    key, value = _single(item, "an option")
    name = yamlnode.string(key, "an option's name")
    if not is_name(name):
        fail(key, *_no_name(name, is_key=True))
    if isinstance(value, Scalar):
        return QemuOption(name, yamlnode.verbatim(value, f"the value of {name}"), key.mark)
    if isinstance(value, Map):
        fail(
            value,
            f"the value of {name} must be text or a list, not {describe(value)}",
            f"write {name}: [name: value, ...]",
        )
    if not value.items:
        fail(value, f"the value of {name} is an empty list", f"for an option without a value write just: - {name}")
    option = QemuOption(name, tuple(_element(element, name) for element in value.items), key.mark)
    if option.bare_name in (*IMPLIED, "drive"):
        _check_spaces(value, name)
    return option


def _check_spaces(elements: List, option: str) -> None:
    """Refuse `accel:kvm` behind the first element, where each has a name: QEMU would take all of it for one."""
    for before, element in pairwise(elements.items):
        found = _NO_SPACE.fullmatch(element.text) if isinstance(element, Scalar) else None
        if found and not (isinstance(before, Scalar) and before.text.endswith(",")):  # a doubled comma is text
            what = f"an element of {option} has no space after its colon: {shortened(found[0])!r}"
            fail(element, what, f"write {shortened(f'{found[1]}: {found[2]}')}")


def is_name(text: str) -> bool:
    """Whether QEMU may have an option of this name: no white space, no colon; of two hyphens it overlooks one."""
    return text.removeprefix("-")[:1] not in ("", "-") and text.split() == [text] and ":" not in text


def _no_name(text: str, *, is_key: bool = False) -> tuple[str, str | None]:
    """Message and hint: mostly a command line's habits. `is_key`: a value stands behind it already."""
    bare = text.lstrip("-").strip()
    name, *behind = re.split(r"\s*[\s:]\s*", bare, maxsplit=1)
    if text.split() == [text] and ":" not in text:
        hint = f"write it without hyphens: {shortened(name)}" if name else None
        return f"no option's name begins with hyphens: {shortened(text)!r}", hint
    what = f"an option's name has no {'colon' if bare.startswith(f'{name}:') else 'space'}: {shortened(text)!r}"
    words = " ".join(behind).split()
    rest = shortened(" ".join(words))
    if not (name and words):
        return what, f"write - {name}" if name else None
    if is_key:
        return what, f"write - {name}: [{rest}: VALUE, ...]" if re.fullmatch(r"[a-z][\w-]*", rest) else None
    if any(word.startswith("-") and word[1:2].isalpha() for word in words):
        return what, f"each option has a line and a dash of its own: - {name}"
    if rest[0] in "{[&*!|>%@`#" or ": " in rest or " #" in rest:  # not text to YAML as it stands
        rest = "'" + rest.replace("'", "''") + "'"
    return what, f"write - {name}: {rest}"


def _element(node: Node, option: str) -> str | Property:
    if isinstance(node, Map):
        key, value = _single(node, f"an element of {option}")
        name = yamlnode.string(key, f"a name in {option}")
        return Property(name, yamlnode.verbatim(value, f"{option}: {name}"))
    return yamlnode.verbatim(node, f"an element of {option}")


def _single(node: Map, what: str) -> tuple[Scalar, Node]:
    if len(node.pairs) != 1:
        second = node.pairs[1][0] if node.pairs else node
        fail(
            second,
            f"{what} is one name: value, not {len(node.pairs)} of them",
            "begin each with a dash of its own" if node.pairs else None,
        )
    return node.pairs[0]
