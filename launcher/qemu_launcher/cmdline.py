"""A definition -> QEMU's command line, and what it says that matters to the run. Pure: no files, no host.

The only place that writes the user's options; those of the launcher's own are in `monitors` and `session`. Text of the
user's enters an option as a property's value only through `double_commas`; what he wrote as whole option text goes to
QEMU as it stands.
"""

from .definition import VmDefinition
from .options import Property, QemuOption

CHARACTER_DEVICES = ("serial", "monitor", "qmp", "qmp-pretty", "parallel", "debugcon", "chardev")  # that may be stdio


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


def shell_command(definition: VmDefinition, *, wrapped: bool) -> str:
    """The command line for a POSIX shell, quoted where it must be; `wrapped`: one option a line, for people."""
    from shlex import join  # noqa: PLC0415  only this form needs it

    words = [[definition.binary], *(option_argv(option) for option in definition.options)]
    return (" \\\n    " if wrapped else " ").join(join(group) for group in words)
