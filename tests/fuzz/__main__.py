"""Run atheris, which is libFuzzer for Python, on one target: `python -m fuzz TARGET [libFuzzer's options and folders]`.

`make fuzz` calls it, and test_fuzz.py. What it finds new goes into the first folder.
https://llvm.org/docs/LibFuzzer.html#options
"""

import sys
from pathlib import Path

import atheris

# The fuzzer sees only what is loaded in here. Neither asyncio nor the tests: what they do says nothing about an input.
SEEN = ["qemu_launcher_helper", "dbus_next", "tomllib"]
NOT_SEEN = ["dbus_next._private.marshaller"]  # writes our own messages, and costs as much as all else
with atheris.instrument_imports(include=SEEN, exclude=NOT_SEEN, enable_loader_override=False):
    from fuzz.targets import TARGETS

# Bytes. Nothing of interest takes more, and short inputs are tried faster.
LONGEST = {"message": 2048, "arguments": 512, "limits": 1024}


def main() -> None:
    """Never returns: libFuzzer ends the process."""
    if sys.argv[1:2] == [] or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m fuzz {{{','.join(TARGETS)}}} [OPTION | FOLDER]...")
    target, options = sys.argv[1], sys.argv[2:]
    words = Path(__file__).with_name("corpus") / f"{target}.dict"
    given = [f"-dict={words}"] if words.exists() else []
    atheris.Setup([sys.argv[0], f"-max_len={LONGEST[target]}", "-timeout=60", *given, *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
