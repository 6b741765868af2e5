"""A guest of one disk sector that says it runs and obeys the power button: an operating system in 50 bytes of code.

Nested emulation makes booting a real one take minutes. This one is enough to see that a guest executes instructions and
that it can be asked to power down. It writes its greeting to the first serial port, sleeps between timer ticks until
ACPI reports the power button, and powers the machine off.

Registers: ACPI 6.5, section 4.8.3. SeaBIOS puts the PM block of QEMU's pc and q35 at 0x600; both use type 0 for S5.
"""

from pathlib import Path

GREETING = b"guest: running\r\n"
FAREWELL = b"guest: powering off\r\n"

_LOAD = 0x7C00  # where the BIOS puts the boot sector, segment 0


def boot_sector(greeting: bytes = GREETING, farewell: bytes = FAREWELL) -> bytes:
    """512 bytes of 16-bit code; both texts go to COM1 and must fit into about 400 bytes together."""

    def put(text_at: int) -> bytes:
        return (
            b"\xbe" + text_at.to_bytes(2, "little")  # mov si, text
            + b"\xba\xf8\x03"                        # mov dx, COM1
            + b"\xac"                                # next: lodsb
            + b"\x84\xc0"                            # test al, al
            + b"\x74\x03"                            # jz done
            + b"\xee"                                # out dx, al
            + b"\xeb\xf8"                            # jmp next; done:
        )  # fmt: skip

    def code(greeting_at: int, farewell_at: int) -> bytes:
        return (
            b"\x31\xc0\x8e\xd8\xfc"                  # xor ax, ax; mov ds, ax; cld
            + put(greeting_at)
            + b"\xba\x02\x06\xb8\x00\x01\xef"        # mov dx, PM1_EN; mov ax, PWRBTN_EN; out dx, ax
            + b"\xfb\xf4"                            # sleep: sti; hlt (the timer wakes it 18 times a second)
            + b"\xba\x00\x06\xed"                    # mov dx, PM1_STS; in ax, dx
            + b"\xf6\xc4\x01"                        # test ah, PWRBTN_STS
            + b"\x74\xf5"                            # jz sleep
            + put(farewell_at)
            + b"\xba\x04\x06\xb8\x00\x20\xef"        # mov dx, PM1_CNT; mov ax, SLP_EN | S5; out dx, ax
            + b"\xf4\xeb\xfd"                        # hlt; jmp hlt
        )  # fmt: skip

    size = len(code(0, 0))
    greeting_at = _LOAD + size
    farewell_at = greeting_at + len(greeting) + 1
    sector = code(greeting_at, farewell_at) + greeting + b"\0" + farewell + b"\0"
    if len(sector) > 510:
        raise ValueError(f"the texts are too long by {len(sector) - 510} bytes")
    return sector.ljust(510, b"\0") + b"\x55\xaa"


def write(path: Path) -> None:
    """A raw disk image of 1 MiB that boots it."""
    path.write_bytes(boot_sector().ljust(1 << 20, b"\0"))
