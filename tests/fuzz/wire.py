"""Messages as bytes, made without the library that is to be tested.

Only what the tests need: strings and numbers in header fields, bodies given as bytes.
https://dbus.freedesktop.org/doc/dbus-specification.html#message-protocol-messages
"""

import struct

from qemu_launcher_helper.contract import BUS_NAME, MAX_MESSAGE_BYTES, OBJECT_PATH

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL, DESTINATION, SENDER, SIGNATURE = range(1, 9)
_TYPES = {PATH: "o", REPLY_SERIAL: "u", SIGNATURE: "g"}  # all others: "s"
_FIXED = 16
Field = tuple[int, str | int]


def string(text: str, order: str = "<") -> bytes:
    """Marshal a value of type s or o; it has to begin at a multiple of four."""
    data = text.encode()
    return struct.pack(order + "I", len(data)) + data + b"\0"


def signature(text: str) -> bytes:
    """Marshal a value of type g."""
    return bytes([len(text)]) + text.encode() + b"\0"


def raw_field(code: int, form: str, value: bytes) -> bytes:
    """One header field, aligned for a `value` that begins at a multiple of four when `form` has one or five letters."""
    return bytes([code]) + signature(form) + value


def message(
    kind: int,
    fields: list[Field],
    body: bytes = b"",
    order: str = "<",
    serial: int = 9,
    flags: int = 0,
    more: bytes = b"",
) -> bytes:
    """Marshal a whole message; `more` is one more header field, as `raw_field` makes it."""
    data = b""
    for code, value in fields:
        form = _TYPES.get(code, "s")
        if isinstance(value, int):
            raw = struct.pack(order + "I", value)
        else:
            raw = signature(value) if form == "g" else string(value, order)
        data += bytes(-len(data) % 8) + raw_field(code, form, raw)
    if more:
        data += bytes(-len(data) % 8) + more
    start = b"l" if order == "<" else b"B"
    fixed = start + bytes([kind, flags, 1]) + struct.pack(order + "III", len(body), serial, len(data))
    return fixed + data + bytes(-len(data) % 8) + body


def call(
    member: str,
    form: str = "",
    body: bytes = b"",
    sender: str = ":1.9",
    order: str = "<",
    serial: int = 9,
    flags: int = 0,
) -> bytes:
    """Marshal a method call to the helper, as the bus hands it on."""
    fields: list[Field] = [(PATH, OBJECT_PATH), (INTERFACE, BUS_NAME), (MEMBER, member), (DESTINATION, BUS_NAME)]
    fields += [(SIGNATURE, form)] if form else []
    return message(CALL, [*fields, (SENDER, sender)], body, order, serial, flags)


def split(data: bytes, fill: int) -> tuple[list[bytes], bytes]:
    """Split a stream into whole messages and what is left, by the lengths in their headers alone.

    The last message is filled up with zeros when it lacks no more than `fill` bytes: else hardly any stream that a
    fuzzer makes would have a whole one.
    """
    whole: list[bytes] = []
    while len(data) >= _FIXED and data[:1] in (b"l", b"B"):
        order = "<" if data[:1] == b"l" else ">"
        (body,), (fields,) = struct.unpack_from(order + "I", data, 4), struct.unpack_from(order + "I", data, 12)
        length = _FIXED + fields + -fields % 8 + body
        if length - len(data) > fill:
            break
        whole.append(data[:length].ljust(length, b"\0"))
        data = data[length:]
    return whole, data


def is_too_large(frame: bytes) -> bool:
    """Tell whether the helper has to drop this message unread."""
    return len(frame) - _FIXED > MAX_MESSAGE_BYTES
