"""A VM of libvirt's -> a definition: virsh's command line for it, less what only libvirtd can provide, and its tuning.

libvirt's own means are left out (its monitor, its key, its pause at the start), what it passes as descriptors is
replaced, and what it says about CPUs and locked memory becomes keys. A comment says what has to be chosen. Nothing of
libvirt's is changed.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from .. import cmdline, definition
from ..cpulist import format_cpulist
from ..errors import DefinitionError, LauncherError
from ..options import Property
from . import (
    domainaliases,
    domaindevices,
    domainkeys,
    domainlosses,
    domainmemory,
    domainmoment,
    domainremarks,
    domainshown,
    domainthrottling,
    domainxml,
    virsh,
)
from .command_line import check_output, deliver, headline, kept, options_of, written
from .domainxml import Tuning
from .drafting import Draft, Option, env_key
from .prefixes import peel

_JSON_OPTIONS = {"device": "driver", "object": "qom-type", "netdev": "type", "blockdev": "driver", "audiodev": "driver"}
# QEMU takes a path for a name there, and in nothing else that libvirt writes as JSON.
_NESTED = ("audiodev", "blockdev")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
LEFT_OUT = (
    "Left out, because they are libvirt's own means: -S, -no-shutdown, its monitor and the key for its secrets. "
    "qemu-launcher has a monitor of its own."
)


def import_domain(source: str, output: str | None) -> int:
    """Print the definition for `source`, a VM's name in libvirt or a file with its XML; or write it to `output`."""
    check_output(output)
    is_file = "/" in source or source.endswith(".xml")
    text = _file(source) if is_file else virsh.domain_xml(source)
    root = domainxml.parse(text, source if is_file else f"the XML of {source}")
    found = domainxml.tuning(root)  # before virsh is asked for more: these mistakes are the cheaper ones
    draft = _draft(root, found, virsh.command_line(domainshown.prepared(root)), is_saved=output is not None)
    deliver(written(draft, [word for option in kept(draft) for word in cmdline.option_argv(option)]), output)
    return 0


def _file(path: str) -> str:
    data = definition.read(Path(path))
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as err:
        raise DefinitionError(f"{path} is not UTF-8", "virsh dumpxml writes UTF-8: save it as that") from err


def _draft(root: Element, found: Tuning, line: str, *, is_saved: bool = False) -> Draft:
    from shlex import split  # noqa: PLC0415  as in cmdline

    try:
        prefix = peel(split(line))
        options = [_readable(option) for option in options_of(prefix.argv[1:])]
    except (ValueError, LauncherError) as err:
        raise LauncherError(f"the command line that virsh printed cannot be read: {err}") from err
    options = [option for option in options if not _is_libvirts(option)]
    options = [_with_plugged(option, found) for option in options]
    options = list(domainmoment.lasting(options, root))
    options = domaindevices.without_default_boot(options, root)
    options = list(domainaliases.renamed(options, domaindevices.ids_shown(root)))
    options = list(domainmemory.in_no_folder(options, found.huge_pages, found.device_pages))
    options, unthrottled = domainthrottling.throttled(options, root)
    # virsh prints more variables for libvirtd's sake: PATH, HOME and XDG folders in libvirt's own state.
    env = tuple((domainmoment.environment(root) | domainxml.environment(root)).items())
    notes = [headline(root.findtext("name"), is_saved=is_saved), LEFT_OUT]
    options += [_placed(new, options) for new in domaindevices.replacements(root)]
    options.sort(key=lambda option: option.bare_name == "set")  # which is for what stands before it
    options = list(domainremarks.remarked(options, root))
    if root.findtext("on_reboot") == "destroy" and all(option.bare_name != "no-reboot" for option in options):
        options.append(Option("no-reboot", None))
    draft = Draft(prefix.argv[0], tuple(options))
    memory = domainkeys.memory_keys(found, kept(draft))
    unused = ("hard_limit",) if found.memory_limit is not None and not memory else ()
    if lost := (*domainlosses.not_carried(root), *unthrottled, *unused):
        notes.append(f"Not carried over from libvirt: {', '.join(lost)}.")
    keys = [env_key(env)] if env else []
    return draft._replace(keys=(*keys, *domainkeys.thread_keys(found), *memory), notes=tuple(notes))


# The command line


def _is_libvirts(option: Option) -> bool:
    if option.bare_name in ("S", "no-shutdown"):
        return True
    own = {Property("id", "masterKey0"), Property("id", "charmonitor"), Property("chardev", "charmonitor")}
    return not own.isdisjoint(_properties(option))


def _readable(option: Option) -> Option:
    """JSON that is no more than names and values, in the form that people write."""
    first = _JSON_OPTIONS.get(option.bare_name)
    if first is None or not isinstance(option.value, str) or not option.value.startswith("{"):
        return option
    try:
        members = json.loads(option.value)
    except (ValueError, RecursionError):
        return option
    kind = members.pop(first, None)
    if not isinstance(kind, str) or not _PLAIN_NAME.fullmatch(kind):
        return option
    try:
        properties = tuple(
            _of_object(members) if option.bare_name == "object" else _flat(members, nests=option.bare_name in _NESTED)
        )
    except ValueError:
        return option
    return option._replace(value=(kind, *properties))


def _flat(members: dict[str, Any], *, nests: bool, path: str = "") -> Iterator[Property]:
    """Members of a JSON object as properties, those of inner ones as `cache.direct` and `server.0` if it `nests`.

    ValueError for what has no such form. How QEMU reads it: util/keyval.c.
    """
    for name, value in members.items():
        if not _PLAIN_NAME.fullmatch(name) or (nests and "." in name):
            raise ValueError(name)
        if isinstance(value, str | int):
            text = ("on" if value else "off") if isinstance(value, bool) else str(value)
            yield Property(path + name, text)
        elif nests and value and isinstance(value, dict | list):
            inner = value if isinstance(value, dict) else {str(index): part for index, part in enumerate(value)}
            yield from _flat(inner, nests=True, path=f"{path}{name}.")
        else:
            raise ValueError(name)


def _of_object(members: dict[str, Any]) -> Iterator[Property]:
    """The same of -object, which is read otherwise: a list of numbers is a name given several times, or as a range.

    qapi/opts-visitor.c. ValueError for inner objects: that reader has none.
    """
    for name, value in members.items():
        if isinstance(value, list) and value and all(type(part) is int and part >= 0 for part in value):
            yield from (Property(name, part) for part in format_cpulist(value).split(","))
        else:
            yield from _flat({name: value}, nests=False)


def _placed(device: Option, others: Sequence[Option]) -> Option:
    """`device` without its place, if that is not there or has been given away: QEMU then finds it another.

    Where the XML does not give every device a place, virsh has placed those it was shown without knowing of this one.
    """
    if not isinstance(device.value, tuple):
        return device
    place = {element for element in _properties(device) if element.name in ("bus", "addr", "port", "multifunction")}
    slot = {element for element in place if element.name != "multifunction"}
    ids = [element.value for other in others for element in _properties(other) if element.name == "id"]
    buses = {"pci.0", "pcie.0", *ids, *(f"{ident}.0" for ident in ids)}  # usb.0 is the bus of usb
    is_there = all(element.value in buses for element in slot if element.name == "bus")
    if not slot or (is_there and not any(slot <= set(_properties(other)) for other in others)):
        return device
    return device._replace(value=tuple(element for element in device.value if element not in place))


def _properties(option: Option) -> list[Property]:
    return [element for element in option.value or () if isinstance(element, Property)]


def _with_plugged(option: Option, found: Tuning) -> Option:
    """-smp with the virtual CPUs too that libvirt plugs in while the guest is still paused."""
    value = option.value
    if option.bare_name != "smp" or not found.plugged or not isinstance(value, tuple):
        return option
    count = len(found.started)
    if found.started == frozenset(range(count)):
        return option._replace(value=(str(count), *value[1:]))
    return option._replace(comments=(_MISSING.format(format_cpulist(found.plugged)),))


_MISSING = (
    "In libvirt these too are there when the guest starts: virtual CPU {}. Here they must be plugged in, by device_add."
)
