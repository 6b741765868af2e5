"""Members of an option that virsh has printed, which is a list of properties, or JSON that has no such form. Pure."""

import json
from typing import Any

from ..options import Property
from .drafting import Option


def member(option: Option, name: str) -> str | None:
    """Its value as in a list: `on` for true, digits for a number. None for what is not there, or has members itself."""
    if isinstance(option.value, str):
        found = _json(option.value).get(name)
        if isinstance(found, bool):
            return "on" if found else "off"
        return str(found) if isinstance(found, str | int) else None
    properties = (element for element in option.value or () if isinstance(element, Property))
    return next((element.value for element in properties if element.name == name), None)


def with_member(option: Option, name: str, value: str) -> Option:
    """The same option with another value of a member that it has."""
    if isinstance(option.value, str):
        return option._replace(value=json.dumps(_json(option.value) | {name: value}))
    elements = (Property(name, value) if _is(element, name) else element for element in option.value or ())
    return option._replace(value=tuple(elements))


def without_member(option: Option, name: str) -> Option:
    """The same option, if it has it or not."""
    if isinstance(option.value, str):
        left = {own: value for own, value in _json(option.value).items() if own != name}
        return option._replace(value=json.dumps(left))
    return option._replace(value=tuple(element for element in option.value or () if not _is(element, name)))


def _is(element: str | Property, name: str) -> bool:
    return isinstance(element, Property) and element.name == name


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
