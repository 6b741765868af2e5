"""Write the seeds of the corpus: well-formed inputs and edge cases, from which a fuzzer gets further than from nothing.

`python -m fuzz.seeds` from tests/. The corpus is small on purpose: what a long run finds beyond it is kept only when it
broke something (test_fuzz.py says how). Seeds are named after what they are about.
"""

import struct
from pathlib import Path

from qemu_launcher_helper import limits
from qemu_launcher_helper.contract import METHODS

from . import wire
from .targets import ANYTHING, LAST, MEMBERS, TYPED, WIRE

CORPUS = Path(__file__).parent / "corpus"
# The members that take more than a number and a name.
TALKATIVE = ("SetMemlock", "PinThreads", "SetScheduler")
DAEMON = "org.freedesktop.DBus"


def u32(*numbers: int) -> bytes:
    """Marshal values of type u."""
    return struct.pack(f"<{len(numbers)}I", *numbers)


def padded(data: bytes, to: int = 8) -> bytes:
    """Fill up with zeros to a multiple of `to`."""
    return data + bytes(-len(data) % to)


def array(data: bytes) -> bytes:
    """Marshal an array of type au, or of any whose items need no more alignment than four."""
    return u32(len(data)) + data


def pins(*all_of_them: tuple[int, list[int], bool]) -> bytes:
    """Marshal a value of type a(uaub), at a multiple of eight: its first item begins at the next one."""
    data = b""
    for tid, cpus, shielded in all_of_them:
        data = padded(data) + u32(tid) + array(u32(*cpus)) + u32(shielded)
    return u32(len(data), 0) + data


def bodies() -> dict[str, tuple[str, bytes]]:
    """Well-formed bodies of every member, at and just beyond the limits: name of the seed, member, body."""
    head = u32(4711) + wire.string("win11")  # 4 + 4 + 6 bytes
    at16, name = padded(head), wire.string("win11")
    one = pins((2, [4], True))
    at12 = padded(name, 4) + one[:4] + one[8:]  # its first item needs no filling there
    map_ = at16 + pins((4711, [4], True), (4712, [5, 6], False))
    return {
        "memlock": ("SetMemlock", padded(head) + struct.pack("<Q", 2**33)),
        "memlock-infinity": ("SetMemlock", padded(head) + struct.pack("<Q", 2**64 - 1)),
        "memlock-zero": ("SetMemlock", padded(head) + bytes(8)),
        "memlock-pid-1": ("SetMemlock", u32(1) + padded(head)[4:] + struct.pack("<Q", 1)),
        "memlock-bad-name": ("SetMemlock", u32(4711) + padded(wire.string("../x\n"), 4) + struct.pack("<Q", 1)),
        "pin": ("PinThreads", map_ + array(u32(0, 1))),
        "pin-twice": ("PinThreads", at16 + pins((7, [1], True), (7, [2], True)) + array(b"")),
        "pin-no-cpus": ("PinThreads", at16 + pins((7, [], True)) + array(b"")),
        "pin-cpu-8192": ("PinThreads", at16 + pins((7, [8191, 8192], False)) + array(u32(8192))),
        "pin-nothing": ("PinThreads", at16 + pins() + array(b"")),
        "scheduler-fifo": ("SetScheduler", at16 + array(u32(4711, 4712)) + padded(wire.string("fifo"), 4) + u32(1)),
        "scheduler-other": ("SetScheduler", at16 + array(u32(4711)) + padded(wire.string("other"), 4) + u32(0)),
        "scheduler-100": ("SetScheduler", at16 + array(u32(4711)) + padded(wire.string("rr"), 4) + u32(100)),
        "scheduler-deadline": ("SetScheduler", at16 + array(u32(2)) + padded(wire.string("deadline"), 4) + u32(1)),
        "check-memlock": ("CheckMemlock", padded(name) + struct.pack("<Q", 2**33)),
        "check-pin": ("CheckPins", at12 + array(u32(0, 1))),
        "check-fifo": ("CheckScheduler", at12 + padded(wire.string("fifo"), 4) + u32(1)),
        "release": ("Release", u32(1000) + wire.string("win11")),
        "release-nobody": ("Release", u32(2**32 - 1) + wire.string("win11")),
        "list": ("ListVms", u32(1)),
        "list-bool-7": ("ListVms", u32(7)),
        "limits": ("GetLimits", b""),
        "limits-of": ("GetLimitsOf", u32(2**32 - 2)),
    }


def arguments() -> dict[str, bytes]:
    """Each body on the wire; a few for the two ways in which others are made."""

    def first(how: int, member: str) -> bytes:
        return bytes([how * len(MEMBERS) + MEMBERS.index(member)])

    seeds = {name: first(WIRE, member) + body for name, (member, body) in bodies().items()}
    vm = bytes([7, 99, 3, *b"vm1"])  # a PID, and a text that is no policy's name
    seeds["typed-memlock"] = first(TYPED, "SetMemlock") + vm + bytes([255, *struct.pack("<Q", 2**40)])
    seeds["typed-pin"] = first(TYPED, "PinThreads") + vm + bytes([2, 5, 1, 4, 1, 6, 1, 5, 1, 1, 0])
    seeds["typed-scheduler"] = first(TYPED, "SetScheduler") + vm + bytes([2, 5, 6, 3, 9])
    # Of every kind one, as Values.anything numbers them.
    kinds = b"\x08" + b"".join(bytes([kind, 3, 1, 9]) for kind in range(14))
    return seeds | {f"anything-{member}": first(ANYTHING, member) + kinds for member in TALKATIVE}


def messages() -> dict[str, bytes]:
    """Calls as a bus hands them on, answers and signals, and what a careless or hostile one would."""
    call = wire.call
    some = ("memlock", "pin", "scheduler-fifo", "release", "list")  # the others are for the target `arguments`
    seeds = {f"call-{name}": call(bodies()[name][0], METHODS[bodies()[name][0]][0], bodies()[name][1]) for name in some}
    signal: list[wire.Field] = [(wire.PATH, "/"), (wire.INTERFACE, DAEMON), (wire.MEMBER, "NameOwnerChanged")]
    answer: list[wire.Field] = [(wire.REPLY_SERIAL, 1), (wire.SENDER, DAEMON)]
    text = wire.string("x")
    name = padded(wire.string(":1.5"), 4)
    plain = call("Ping")
    return seeds | {
        "big-endian": call("Release", "us", struct.pack(">I", 7) + wire.string("a", ">"), order=">"),
        "two-calls": plain + call("GetLimits") + plain,
        "answer": wire.message(wire.RETURN, [*answer, (wire.SIGNATURE, "s")], text),
        "answer-empty": wire.message(wire.RETURN, [*answer, (wire.SIGNATURE, "s")]),
        "answer-other-type": wire.message(wire.RETURN, [*answer, (wire.SIGNATURE, "u")], u32(1)),
        "answer-short": wire.message(wire.RETURN, [*answer, (wire.SIGNATURE, "s")], u32(400) + b"abc"),
        "answer-twice": 2 * wire.message(wire.RETURN, [*answer, (wire.SIGNATURE, "s")], text),
        "error": wire.message(wire.ERROR, [(wire.ERROR_NAME, "a.b"), *answer, (wire.SIGNATURE, "s")], text),
        "signal": wire.message(
            wire.SIGNAL, [*signal, (wire.SENDER, DAEMON), (wire.SIGNATURE, "sss")], name + name + text
        ),
        "signal-of-others": wire.message(wire.SIGNAL, [*signal, (wire.SENDER, ":1.5"), (wire.SIGNATURE, "s")], text),
        "no-sender": wire.message(wire.CALL, [(wire.PATH, "/"), (wire.MEMBER, "Ping")]),
        "two-senders": wire.message(
            wire.CALL, [(wire.PATH, "/"), (wire.MEMBER, "A"), (wire.SENDER, ":1.0"), (wire.SENDER, ":1.5")]
        ),
        "no-reply-wanted": call("Ping", flags=1),
        "serial-0": call("Ping", serial=0),
        "kind-0": wire.message(0, [(wire.PATH, "/"), (wire.MEMBER, "Ping"), (wire.SENDER, ":1.5")]),
        "field-unknown": wire.message(
            wire.CALL,
            [(wire.PATH, "/"), (wire.MEMBER, "A"), (wire.SENDER, ":1.5")],
            more=wire.raw_field(42, "u", u32(7)),
        ),
        "field-nested": wire.message(
            wire.CALL,
            [(wire.PATH, "/"), (wire.MEMBER, "A"), (wire.SENDER, ":1.5")],
            more=wire.raw_field(9, "v", 300 * b"\x01v\0"),
        ),
        "sender-number": wire.message(
            wire.CALL, [(wire.PATH, "/"), (wire.MEMBER, "A")], more=wire.raw_field(7, "u", u32(7))
        ),
        "sender-no-name": wire.message(wire.CALL, [(wire.PATH, "/"), (wire.MEMBER, "A"), (wire.SENDER, "")]),
        "newlines": wire.message(wire.CALL, [(wire.PATH, "/a\n"), (wire.MEMBER, "A\n"), (wire.SENDER, ":1.5\n")]),
        "body-nested-variants": call("A", "v", 400 * b"\x01v\0"),
        "body-nested-arrays": call("A", "a" * 32 + "y", 32 * u32(4)),
        "body-dict": call("A", "a{sv}", u32(16, 0) + text + wire.signature("u") + bytes(3) + u32(7)),
        "body-dict-unhashable": call("A", "a{vs}", u32(16, 0) + wire.signature("u") + b"\0" + u32(7) + text),
        "body-endless": call("A", "as", u32(2**31)),
        "body-no-utf-8": call("A", "s", u32(2) + b"\xff\xfe\0"),
        "body-numbers": call("A", "ynqiuxtdbh", bytes(range(48))),
        "signature-open": call("A", "(", b"xxxx"),
        "signature-unknown": call("A", "z", b"xxxx"),
        "too-large": wire.message(wire.CALL, [(wire.SENDER, ":1.5")])[:4] + u32(65537, 9) + bytes(4) + b"x",
        "no-message": b"x" * 20,
        "nothing": b"",
        "half-a-header": LAST[:9],
    }


def files() -> dict[str, bytes]:
    """helper.toml: one with every key, and what almost is one."""
    entry = "[[limits]]\n"
    full = (
        'comm = ["qemu-*"]\nservices = ["my-vm.service"]\n[[limits]]\nusers = ["alice"]\ngroups = ["students"]\n'
        'cpus = "8-11,15"\nmax_cpus = 4\nmax_vms = 2\nmemlock = "16G"\npolicies = ["other", "fifo"]\nmax_priority = 5\n'
        'realtime = "anywhere"\ndeadline = false\n[[limits]]\nmemlock = "infinity"\n'
    )
    texts = {
        "full": full,
        "dotted": 'limits = [{users = ["a"], max_vms = 3}, {cpus = "0"}]\n',
        "two-for-everybody": entry + entry,
        "limits-a-table": "[limits]\nmax_vms = 1\n",
        "key-twice": entry + "max_vms = 1\nmax_vms = 2\n",
        "key-of-the-class": entry + 'source = "x"\n',
        "bool": entry + "max_vms = true\n",
        "float": entry + "max_vms = 1.0\n",
        "not-a-number": entry + "max_cpus = nan\n",
        "hexadecimal": entry + "max_cpus = 0x10\n",
        "long-number": entry + "max_cpus = " + "9" * 5000 + "\n",
        "long-hexadecimal": entry + "max_cpus = 0x" + "f" * 5000 + "\n",
        "date": entry + "max_cpus = 2026-11-25T13:00:00.5+01:00\n",
        "backwards": entry + 'cpus = "8-3"\n',
        "many-cpus": entry + 'cpus = "0-9999"\n',
        "largest-memlock": entry + 'memlock = "999999T"\n',
        "deadline": entry + "deadline = true\n",
        "newline-in-value": entry + 'realtime = "shielded\\n"\n',
        "strings": entry + "users = ['a', \"\\u00e4\\U0001F600\", '''b''', \"\"\"c\\\n d\"\"\"]\n",
        "control": 'comm = ["\\u001b[31m\\u202e"]\n',
        "nul": entry + 'groups = ["a\\u0000b"]\n',
        "deep": "x = " + "[" * 2000,
        "deep-tables": "x = " + "{a=" * 1500,
        "dots": "a" + ".a" * 1500 + " = 1\n",
        "nothing": "",
    }
    return {name: text.encode() for name, text in texts.items()} | {
        "latin-1": b'comm = ["\xff"]\n',
        "bom": b"\xef\xbb\xbf",
    }


SEEDS = {"message": messages, "arguments": arguments, "limits": files}


def dictionary() -> bytes:
    """The words of helper.toml, which a fuzzer would hardly spell by chance."""
    words = [
        *limits._FORMS,
        "[[limits]]",
        "limits",
        "infinity",
        "16G",
        "shielded",
        "anywhere",
        "fifo",
        " = ",
        '["',
        '"]',
        "'''",
    ]
    escaped = (word.replace("\\", "\\\\").replace('"', '\\"') for word in words)
    return "".join(f'"{word}"\n' for word in escaped).encode()


def main() -> None:
    """Write them; leave alone what else is in the corpus."""
    for target, make in SEEDS.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in make().items():
            (CORPUS / target / name).write_bytes(data)
    (CORPUS / "limits.dict").write_bytes(dictionary())


if __name__ == "__main__":
    main()
