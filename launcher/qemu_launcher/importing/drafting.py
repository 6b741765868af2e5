"""A definition as it is being written: what will stand in it, in order, with its comments; and how that is laid out.

The options are in the long form, one `name: value` a line. Pure. What is to be read by `definition` again is
checked by who writes it, see `importing`: the layout itself promises only that texts come back as they were.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..cmdline import double_commas
from ..options import Property
from .qemuoptions import LISTS
from .yamltext import LONGEST_KEY, comment, scalar, word


class Option(NamedTuple):
    """One option of QEMU's, as in options.QemuOption, with what is to be said above it.

    `left_out`: not for this QEMU; only the comments are written. `given`: the words of a command line it was made of.
    """

    name: str
    value: str | tuple[str | Property, ...] | None
    comments: tuple[str, ...] = ()
    left_out: bool = False
    given: tuple[str, ...] = ()

    @property
    def bare_name(self) -> str:
        """The name as QEMU sees it: `-m` and `--m` are the same option."""
        return self.name.removeprefix("-")


class Key(NamedTuple):
    """A key of the launcher section. `lines`: its YAML, the first behind the colon, others below it.

    `only_suggested`: written as a comment, for the reader to decide.
    """

    name: str
    lines: tuple[str, ...]
    comments: tuple[str, ...] = ()
    only_suggested: bool = False


class Draft(NamedTuple):
    binary: str
    options: tuple[Option, ...]
    keys: tuple[Key, ...] = ()
    notes: tuple[str, ...] = ()  # for the top of the file


def split_value(name: str, text: str) -> str | tuple[str | Property, ...]:
    """The value of option `name` in its readable form, if that is joined to exactly `text` again; else `text`."""
    if name.removeprefix("-") not in LISTS or text.lstrip().startswith("{"):
        return text
    elements = tuple(_element(part) for part in _split(text))
    if "" in elements or (len(elements) == 1 and isinstance(elements[0], str)):
        return text
    return elements


def _split(text: str) -> list[str]:
    """Split at single commas, and leave the doubled ones in."""
    return [part.replace("\0", ",,") for part in text.replace(",,", "\0").split(",")]


def _element(text: str) -> str | Property:
    name, equals, value = text.partition("=")
    if not equals or not name or "," in name or len(name) > LONGEST_KEY:
        return text
    plain = value.replace(",,", ",")
    return Property(name, plain) if double_commas(plain) == value else text


def render(draft: Draft) -> str:
    """The whole file. ValueError for text that YAML cannot hold."""
    lines = [comment(note) for note in draft.notes]
    lines += ["\n"] if lines else []
    lines += ["launcher:\n", f"  binary: {word(draft.binary)}\n"]
    for key in draft.keys:
        lines += _key(key)
    lines.append("qemu:\n" if any(not option.left_out for option in draft.options) else "qemu: []\n")
    for option in draft.options:
        lines += [comment(text, 2) for text in option.comments]
        lines += [] if option.left_out else _option(option)
    return "".join(lines)


def _key(key: Key) -> list[str]:
    lines = [comment(text, 2) for text in key.comments]
    mark = "# " if key.only_suggested else ""
    first, *others = key.lines
    lines.append(f"  {mark}{key.name}: {first}\n" if first else f"  {mark}{key.name}:\n")
    return lines + [f"  {mark}  {line}\n" for line in others]


def _option(option: Option) -> list[str]:
    if option.value is None:
        return [f"  - {word(option.name)}\n"]
    if isinstance(option.value, str):
        return [f"  - {word(option.name)}: {scalar(option.value)}\n"]
    return [f"  - {word(option.name)}:\n", *(f"      - {_written(element)}\n" for element in option.value)]


def _written(element: str | Property) -> str:
    if isinstance(element, Property):
        return f"{word(element.name)}: {scalar(element.value)}"
    return scalar(element)


def env_key(pairs: Sequence[tuple[str, str]], comments: tuple[str, ...] = ()) -> Key:
    return Key("env", ("", *(f"{word(name)}: {scalar(value)}" for name, value in pairs)), comments)
