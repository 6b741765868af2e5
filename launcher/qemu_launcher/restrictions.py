"""QEMU options that do not go together with the launcher, or not with tuning: each is refused at its place.

Why it exists: most options are none of the launcher's business, and the few that are would else make a start fail at
a point where nobody can tell why. The table in qemu-launcher.yml(5), "QEMU OPTIONS THAT CONCERN THE LAUNCHER", is this
module in words; tests/qemu/test_qemu_options.py tries each of them with a real QEMU.

Only what is written in the definition is seen here. What QEMU reads from a file of the user's (-readconfig) can bring
in two of them, another name and another user; `helper_refused` explains those from what QEMU has become.
"""

from collections.abc import Iterator, Sequence

from . import locking, programs, ram
from .errors import DefinitionError, Mark
from .options import QemuOption, known_settings

_USE_USER = "remove it; to have QEMU run as another user, start it as root with user: in the section launcher:"


def never(options: Sequence[QemuOption]) -> Iterator[DefinitionError]:
    """What cannot be had with the launcher at all."""
    for option in options:
        if option.bare_name == "daemonize":
            yield DefinitionError(
                "-daemonize takes QEMU out of the launcher's hands, which waits for it and ends it in order",
                "remove it; to have it in the background: qemu-launcher start NAME",
                mark=option.mark,
            )
        elif option.bare_name == "m":
            given = known_settings(option)
            for text in (given.get("size", ""), given.get("maxmem", "")):
                if size := ram.without_byte(text):
                    yield DefinitionError(f"-m {text} is no size for QEMU", f"write {size}", mark=option.mark)


def untunable(options: Sequence[QemuOption], *, threads_by_helper: bool) -> Iterator[DefinitionError]:
    """What cannot be had with tuning. `threads_by_helper`: whether the helper must pin or schedule QEMU's threads."""
    for option in options:
        if option.bare_name == "preconfig":
            yield DefinitionError(
                "-preconfig stops QEMU before it has made its vCPUs, so they cannot be tuned before the guest runs",
                "remove it; -S holds the guest too, once its vCPUs are there",
                mark=option.mark,
            )
        elif threads_by_helper and _changes_user(option):
            yield DefinitionError(
                f"-{option.bare_name} makes QEMU another user's, and qemu-launcher-helper tunes only the caller's own "
                "processes",
                _USE_USER,
                mark=option.mark,
            )


def doubtful(options: Sequence[QemuOption]) -> Iterator[str]:
    """Warnings about what QEMU or the kernel takes otherwise than it looks, each with its place."""
    mem_lock = locking.mem_lock_option(options)
    if mem_lock is not None and locking.is_locked_twice(options):
        word = "on-fault" if "on-fault" in str(mem_lock.value) else "on"
        yield (
            f"{mem_lock.mark}: mem-lock={word} locks the guest's RAM, which VFIO locks anyway, and then it counts "
            "twice against rlimit_memlock; leave it out"
        )
    for option in options:
        if not isinstance(option.value, tuple):
            continue
        for element in option.value[:-1]:
            if isinstance(element, str) and _open_commas(element):
                yield (
                    f"{option.mark}: {element!r} in -{option.bare_name} ends in a comma, and elements are joined with "
                    "one: to QEMU two commas are one in the text; remove it"
                )


def helper_refused(options: Sequence[QemuOption], name: str | None, *, is_own: bool) -> tuple[Mark | None, str | None]:
    """Place and hint for a QEMU that the helper did not take for one of the caller's; None where nothing is odd.

    `name`: what the process is called (proc(5), comm), None if it is gone; `is_own`: whether it is the caller's.
    """
    if not is_own:
        return None, _USE_USER.replace("remove it", "it has become another user")
    if name is None or programs.is_a_qemus(name):
        return None, None
    renaming = [option for option in options if option.bare_name == "name" and "process" in dict(option.properties())]
    remedy = "remove process= there" if renaming else "use a binary of such a name, and no process= with -name"
    allowed = "processes called qemu-system-*, qemu-kvm or kvm are tuned, unless comm in qemu-launcher-helper.toml(5)"
    return renaming[-1].mark if renaming else None, f"{allowed} says otherwise: {remedy}"


def _changes_user(option: QemuOption) -> bool:
    if option.bare_name == "runas":
        return True
    return option.bare_name == "run-with" and "user" in dict(option.properties())


def _open_commas(text: str) -> bool:
    """Whether `text` ends in a comma that is none of a pair."""
    return (len(text) - len(text.rstrip(","))) % 2 == 1
