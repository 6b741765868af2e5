"""The options of the `qemu` section as values, and the questions the launcher asks about them.

Only their shape is checked; what an option means is QEMU's business, save for the few that change how the
launcher itself must act. Reading only: `cmdline` is the one place that writes QEMU options.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .errors import Mark


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


def is_on(value: str | None) -> bool:
    """Whether a boolean property is set: QEMU takes these words, and a name without a value, for yes."""
    return value is None or value in ("on", "yes", "true", "y")


def has_vfio(options: Iterable[QemuOption]) -> bool:
    """Whether a device is passed through with VFIO, which locks all of the guest's memory."""
    return any(option.bare_name == "device" and _is_vfio(option) for option in options)


def _is_vfio(device: QemuOption) -> bool:
    if isinstance(device.value, str) and device.value.lstrip().startswith("{"):
        return '"vfio-' in device.value  # QEMU's JSON form; a driver is the only text in it that begins so
    first = True
    for name, value in device.properties():
        driver = name if first and value is None else value if name == "driver" else None
        if driver is not None and driver.startswith("vfio-"):
            return True
        first = False
    return False


def has_mem_lock(options: Iterable[QemuOption]) -> bool:
    """Whether QEMU locks its memory on its own account: `-overcommit mem-lock=on`, or `on-fault` from QEMU 10."""
    return any(
        name == "mem-lock" and (value == "on-fault" or is_on(value))
        for option in options
        if option.bare_name == "overcommit"
        for name, value in option.properties()
    )
