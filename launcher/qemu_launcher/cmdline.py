"""A definition -> QEMU's command line, and what it says that matters to the run. Pure: no files, no host.

The only place that writes QEMU options. Text of the user's enters an option as a property's value only through
`double_commas`; what he wrote as whole option text goes to QEMU as it stands.
"""

from string import hexdigits

from .definition import VmDefinition
from .options import Property, QemuOption, has_mem_lock, has_vfio

__all__ = [
    "double_commas",
    "guest_ram",
    "has_mem_lock",
    "has_option",
    "has_vfio",
    "machine_ram",
    "option_argv",
    "qemu_argv",
    "terminal_option",
]

DEFAULT_RAM = 128 << 20  # QEMU's own, on every machine type that a person pins (hw/core/machine.c)
MOST_RAM = 1 << 63
CHARACTER_DEVICES = ("serial", "monitor", "qmp", "qmp-pretty", "parallel", "debugcon", "chardev")  # that may be stdio
SIZE_SUFFIXES = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}  # util/cutils.c, qemu_strtosz


def qemu_argv(definition: VmDefinition) -> list[str]:
    """The definition's own command line, binary first, without anything that the launcher adds for itself."""
    return [definition.binary, *(word for option in definition.options for word in option_argv(option))]


def option_argv(option: QemuOption) -> list[str]:
    """One option as one or two arguments."""
    if option.value is None:
        return [f"-{option.name}"]
    if isinstance(option.value, str):
        return [f"-{option.name}", option.value]
    return [f"-{option.name}", ",".join(_element(element) for element in option.value)]


def _element(element: str | Property) -> str:
    return f"{element.name}={double_commas(element.value)}" if isinstance(element, Property) else element


def double_commas(value: str) -> str:
    """`value` as the value of a property: QEMU's option parser ends it at a single comma."""
    return value.replace(",", ",,")


def has_option(definition: VmDefinition, name: str) -> bool:
    """Whether the option `-name` (given without its dash) is there, in either of QEMU's spellings, `-x` and `--x`."""
    return any(option.bare_name == name for option in definition.options)


def terminal_option(definition: VmDefinition) -> QemuOption | None:
    """An option by which QEMU uses the terminal that it is started in; None if there is none."""
    for option in definition.options:
        if option.bare_name == "nographic" and not has_option(definition, "nodefaults"):
            return option
        backend = option_argv(option)[-1].removeprefix("mon:").partition(",")[0]
        if option.bare_name in CHARACTER_DEVICES and backend == "stdio":
            return option
    return None


def guest_ram(definition: VmDefinition) -> int | None:
    """The guest's RAM in bytes when it starts, None where the options do not tell in a form we understand.

    The machine's own, and what is plugged in from the start (virtio-mem with all that it may grow to): all of it may
    have to be locked.
    """
    if has_option(definition, "readconfig"):
        return None  # it may say anything
    machine, plugged = machine_ram(definition), _plugged_ram(definition)
    if machine is None or plugged is None or machine + plugged >= MOST_RAM:
        return None
    return machine + plugged


def machine_ram(definition: VmDefinition) -> int | None:
    """The machine's own, in bytes, without what is plugged in.

    As QEMU: the last size of all `-m`; without one, the size of the machine's memory-backend; else 128 MiB.
    """
    if any(
        name.startswith("memory.")  # what -m stands for since QEMU 7.1; which of the two wins is not worth knowing
        for option in definition.options
        if option.bare_name in ("machine", "M")
        for name, _ in option.properties()
    ):
        return None
    sizes = [size for option in definition.options if option.bare_name == "m" for size in _sizes(option)]
    if sizes:
        return parse_size(sizes[-1], default_unit="M")
    backend = _last(definition, "machine", "memory-backend") or _last(definition, "M", "memory-backend")
    return DEFAULT_RAM if backend is None else _backend_size(definition, backend)


def _plugged_ram(definition: VmDefinition) -> int | None:
    """Bytes of all memory backends that a -device brings into the guest: pc-dimm, nvdimm, virtio-mem, cxl-type3."""
    backends = set()
    for option in definition.options:
        if option.bare_name == "device" and "memdev" in str(option.value):
            settings = _settings(option)
            if settings is None:
                return None
            backends |= {value for name, value in settings.items() if name.endswith("memdev")}
    sizes = [_backend_size(definition, backend) for backend in backends]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _backend_size(definition: VmDefinition, backend: str | None) -> int | None:
    for option in definition.options:
        if option.bare_name == "object":
            settings = _settings(option)
            if settings is not None and settings.get("id") == backend:
                return parse_size(settings.get("size") or "", default_unit="B")
    return None


def _settings(option: QemuOption) -> dict[str, str | None] | None:
    """The properties of a -device or -object, None for JSON that we cannot read."""
    if not (isinstance(option.value, str) and option.value.lstrip().startswith("{")):
        return dict(option.properties())
    import json  # noqa: PLC0415  few write options so, and `command` is to be quick

    try:
        members = json.loads(option.value)
    except (ValueError, RecursionError):  # single quotes, which QEMU takes, or nothing that it would take
        return None
    return {str(name): str(value) for name, value in members.items()}


def _sizes(option: QemuOption) -> list[str]:
    found = []
    for position, (name, value) in enumerate(option.properties()):
        if value is None and position == 0:
            found.append(name)
        elif name == "size" and value is not None:
            found.append(value)
    return found


def _last(definition: VmDefinition, option_name: str, property_name: str) -> str | None:
    found = [
        value
        for option in definition.options
        if option.bare_name == option_name
        for name, value in option.properties()
        if name == property_name
    ]
    return found[-1] if found else None


def parse_size(text: str, default_unit: str) -> int | None:
    """A size as QEMU takes it (`2G`, `1.5g`, `4096`, `0x1000`) in bytes, None when it is none."""
    if text[:2].lower() == "0x" and len(text) <= 18 and all(digit in hexdigits for digit in text[2:]) and text[2:]:
        return int(text, 16) << SIZE_SUFFIXES[default_unit]
    unit = text[-1:].upper()
    number = text[:-1] if unit in SIZE_SUFFIXES else text
    shift = SIZE_SUFFIXES[unit if unit in SIZE_SUFFIXES else default_unit]
    whole, _dot, fraction = number.partition(".")
    digits = whole + fraction
    if not whole.isdigit() or not digits.isdigit() or not digits.isascii() or len(digits) > 40:
        return None
    size = (int(digits) << shift) // 10 ** len(fraction)
    return size if size < MOST_RAM else None


def shell_command(definition: VmDefinition, *, wrapped: bool) -> str:
    """The command line for a POSIX shell, quoted where it must be; `wrapped`: one option a line, for people."""
    from shlex import join  # noqa: PLC0415  only this form needs it

    words = [[definition.binary], *(option_argv(option) for option in definition.options)]
    return (" \\\n    " if wrapped else " ").join(join(group) for group in words)
