"""The options of the `qemu` section as values, and the questions the launcher asks about them.

What an option means is QEMU's business, save for the few that change how the launcher itself must act. `optionlist`
reads them, and `cmdline` is the one place that writes them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from .errors import Mark

# The name that the first element has where it is written without one: qemu_*_opts.implied_opt_name of QEMU.
IMPLIED = {
    "device": "driver", "object": "qom-type", "machine": "type", "M": "type", "accel": "accel", "display": "type",
    "chardev": "backend", "audiodev": "driver", "audio": "driver", "blockdev": "driver", "cpu": "model",
    "smp": "cpus", "netdev": "type", "nic": "type", "numa": "type", "m": "size",
}  # fmt: skip
_NEVER_JSON = ("m", "machine", "M")  # qemu_init of QEMU's system/vl.c
_ON = "on"
_LONGEST_NAME = 256  # characters, of one that has others in it. QEMU has none of 100; each is a part of all within it
_JSON_DRIVER = re.compile(r"""["'](?:driver|type)["']\s*:\s*["']([a-z0-9-]+)["']""")
DRIVE_LETTERS = ("hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash")


class Property(NamedTuple):
    """`name: value` inside an option's list form. The value is plain text: commas in it are not doubled yet."""

    name: str
    value: str


class QemuOption(NamedTuple):
    """One item of the `qemu` section.

    `value` is None for a flag, text that goes to QEMU as it stands, or the elements of the list form in their order:
    text as it stands, or a Property.
    """

    name: str
    value: str | tuple[str | Property, ...] | None
    mark: Mark

    @property
    def bare_name(self) -> str:
        """The name as QEMU sees it: `-m` and `--m` are the same option."""
        return self.name.removeprefix("-")

    def size(self) -> int:
        """The length of the value on the command line in bytes, doubled commas left out of account."""
        if self.value is None or isinstance(self.value, str):
            return len((self.value or self.name).encode())
        return sum(len("=".join(e) if isinstance(e, Property) else e) + 1 for e in self.value)

    def properties(self) -> Iterator[tuple[str, str | None]]:
        """What QEMU's option parser makes of the value: (name, value); (text, None) where there is no `=`."""
        elements = (self.value,) if isinstance(self.value, str) else self.value or ()
        for element in elements:
            if isinstance(element, Property):
                yield element.name, element.value
                continue
            for part in _split(element):
                name, equals, value = part.partition("=")
                yield name, value if equals else None


def _split(text: str) -> list[str]:
    """Split at single commas; a doubled comma is a comma in the text (QEMU's get_opt_value)."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def settings(option: QemuOption) -> dict[str, str] | None:
    """The properties of one option by name, however it is written; a nested JSON object's as outer.inner.

    None for JSON that we cannot read.
    """
    if is_json(option) and option.bare_name not in _NEVER_JSON:
        import json  # noqa: PLC0415  few write options so, and `command` is to be quick

        try:
            return dict(_flat(json.loads(str(option.value)), ""))
        except (ValueError, RecursionError):  # single quotes, which QEMU takes, or nothing that it would take
            return None
    found: dict[str, str] = {}
    for position, (name, value) in enumerate(option.properties()):
        if value is not None:
            found[name] = value
        elif position == 0 and option.bare_name in IMPLIED:
            found[IMPLIED[option.bare_name]] = name
        else:  # `-device x,foo` is foo=on, `nofoo` was foo=off
            found[name] = _ON
    return found


def known_settings(option: QemuOption) -> dict[str, str]:
    """The same; none of what we cannot read."""
    return settings(option) or {}


def is_json(option: QemuOption) -> bool:
    """Whether it is written in QEMU's JSON form."""
    return isinstance(option.value, str) and option.value.lstrip().startswith("{")


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in members if len(prefix) <= _LONGEST_NAME else ():
        if isinstance(member, dict | list):
            yield from _flat(member, f"{prefix}{name}.")
        elif isinstance(member, bool):
            yield f"{prefix}{name}", _ON if member else "off"
        elif member is not None:
            yield f"{prefix}{name}", str(member)


def is_on(value: str | None) -> bool:
    """Whether a boolean property is set: QEMU takes these words, and a name without a value, for yes."""
    return value is None or value in ("on", "yes", "true", "y")


def each(options: Iterable[QemuOption], *names: str) -> Iterator[dict[str, str]]:
    """The settings of every option with one of these names, in their order."""
    return map(known_settings, called(options, *names))


def called(options: Iterable[QemuOption], *names: str) -> Iterator[QemuOption]:
    """Every option with one of these names, in their order."""
    return (option for option in options if option.bare_name in names)


def drivers(option: QemuOption) -> list[str]:
    """The drivers, or types, that the option names, also those of block devices below."""
    text = str(option.value)
    found = settings(option)
    if found is None:  # JSON with single quotes
        return _JSON_DRIVER.findall(text)
    below = _JSON_DRIVER.findall(text) if "json:" in text else []  # a file's name can be JSON too
    return below + [value for name, value in found.items() if name.rpartition(".")[2] in ("driver", "type")]


def iothread_ids(options: Sequence[QemuOption]) -> tuple[str, ...] | None:
    """The ids of all iothreads that QEMU will start with; None where the options do not tell."""
    ids = []
    for option in options:
        if option.bare_name == "readconfig":
            return None  # it may say anything
        if option.bare_name != "object":
            continue
        if is_json(option):
            if '"iothread"' in str(option.value):
                return None  # it is asked itself, once it runs
            continue
        properties = list(option.properties())
        if properties[:1] == [("iothread", None)] or ("qom-type", "iothread") in properties:
            ids += [value for name, value in properties if name == "id" and value is not None][-1:]
    return tuple(ids)


def smp_numbers(options: Sequence[QemuOption]) -> dict[str, int] | None:
    """What all -smp say, as QEMU reads them: repeated ones add up, the last wins. None where they do not tell.

    Empty without any: then the number is the machine's own. `-smp 2` is short for `-machine smp.cpus=2`, which counts
    as well.
    """
    numbers: dict[str, int] = {}
    for option in options:
        if option.bare_name == "readconfig":
            return None  # it may say anything
        if option.bare_name == "smp":
            given = list(option.properties())
        elif option.bare_name in ("machine", "M"):
            given = [(name[4:], value or "") for name, value in option.properties() if name.startswith("smp.")]
        else:
            continue
        for position, (name, value) in enumerate(given):
            number = name if value is None else value
            if not (number.isascii() and number.isdigit()) or len(number) > 9 or (value is None and position > 0):
                return None
            numbers["cpus" if value is None else name] = int(number)
    return {name: number for name, number in numbers.items() if number > 0}  # QEMU takes 0 for not given


def vcpu_limit(options: Sequence[QemuOption]) -> int | None:
    """How many vCPUs the guest can ever have, hot-added ones included; None where the options do not tell.

    As hw/core/machine-smp.c: maxcpus, else cpus, else the product of the topology.
    """
    given = smp_numbers(options) or {}
    return given.get("maxcpus") or given.get("cpus") or (prod(given.values()) if given else None)
