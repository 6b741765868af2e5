"""QEMU's command line -> a definition whose command line is that one again, word for word.

Printed is only what has been read back: the text goes through `definition` and `cmdline`, and must give the same
words. What cannot be expressed, such as a disk image without its option, is refused by its word. Left out is only
what a definition must not have, and that is said on stderr too.
"""

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import cmdline, definition, locking, noqemu, ram, restrictions, stdout
from ..cpulist import format_cpulist
from ..errors import PROGRAM, DefinitionError, LauncherError, Mark, UsageError, printable, shortened
from ..hostdevices import pinned_by
from ..keys import REALTIME_POLICIES
from ..locate import MOST_OF_A_PATH, SUFFIX, SUFFIXES, vm_name
from ..names import VM_NAME
from ..optionlist import is_name
from ..options import QemuOption, smp_numbers, vcpu_limit
from .drafting import Draft, Key, Option, env_key, render, split_value
from .prefixes import Prefix, peel
from .program import check_program
from .qemuoptions import FLAGS, TAKE_VALUE
from .yamltext import LONGEST_KEY

_LSCPU = "lscpu -e=CPU,CORE shows which are siblings"
_NOT_KEPT = "Not kept: {}, which was for all of QEMU."
MOST_EXAMPLES = 16  # vCPUs for which an example of a pinning is still read by anybody
NO_MARK = Mark("", 0, 0)


def import_argv(words: Sequence[str], output: str | None) -> int:
    """Print the definition for the command line `words`, or write it to the new file `output`."""
    check_output(output)
    prefix = peel([_utf8(word) for word in words])
    check_program(prefix.argv)
    draft = draft_of(prefix, is_saved=output is not None)
    # Of the words as they were given, not as we have read them: this is what the check is worth.
    text = written(draft, [word for option in draft.options if not option.left_out for word in option.given])
    for option in draft.options:
        if option.left_out:
            told = option.comments[0][0].lower() + option.comments[0][1:]
            stdout.say_on_stderr(f"{PROGRAM}: {printable(told)}\n")
    deliver(text, output)
    return 0


def draft_of(prefix: Prefix, *, is_saved: bool = False) -> Draft:
    """The definition for a command line as a person writes it. Raises UsageError. `is_saved`: it has its file."""
    program, *words = prefix.argv
    options = tuple(_remarked(option) for option in options_of(words))
    other = (f"{shortened(program)} is not called as QEMU is: it gets QEMU's options.",)
    notes = (
        headline(_guest_name(options), is_saved=is_saved),
        *prefix.notes,
        *(() if noqemu.may_be_qemu(program) else other),
    )
    draft = Draft(prefix.argv[0], options, (), notes)
    keys = [Key("clear_env", ("true",))] if prefix.clear_env else []
    keys += [env_key(prefix.env)] if prefix.env else []
    if prefix.inhibited_by:
        keys.append(Key("inhibit_sleep", ("true",), (f"Of {prefix.inhibited_by}: here against sleep alone.",)))
    return draft._replace(keys=(*keys, *_tuning(draft, prefix)))


def options_of(words: Sequence[str]) -> list[Option]:
    """QEMU's options in `words`, its arguments. Raises UsageError for a word that is none."""
    options: list[Option] = []
    position = 0
    while position < len(words):
        if not _looks_like_option(words[position]):
            raise _no_option(words[position])
        name, following = words[position][1:], words[position + 1 : position + 3]
        if not is_name(name):
            raise _no_name(words[position])
        if len(name) > LONGEST_KEY:
            raise UsageError(f"'-{shortened(name)}' is too long for the name of an option")
        takes = _takes_value(name.removeprefix("-"), following)
        if takes and name.removeprefix("-") in FLAGS and _begins_with_space(following[0]):
            raise _no_option(following[0])
        value = split_value(name, following[0]) if takes else None
        options.append(Option(name, value, given=tuple(words[position : position + 1 + takes])))
        position += 1 + takes
    return options


def _looks_like_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _takes_value(name: str, following: Sequence[str]) -> bool:
    """Whether the first of the two words that follow -name is its value.

    Where QEMU would take a word for a disk image, we take it for the value of the word before it: it is at least in
    its place.
    """
    if not following or not _looks_like_option(following[0]):
        return bool(following)
    if not is_name(following[0][1:]):
        return name not in FLAGS
    return name in TAKE_VALUE and (len(following) == 1 or _looks_like_option(following[1]))


def _no_option(word: str) -> UsageError:
    if word == "-":
        return UsageError("'-' is no option of QEMU's", "a value stands behind its option")
    what = f"{shortened(word)!r} stands where an option must"
    if _begins_with_space(word):
        hint = "most often a space that follows the \\ at the end of a line: remove it, nothing may follow the \\ there"
        return UsageError(f"{what}, and begins with a space", hint)
    what = f"{what}: QEMU takes it for a disk image"
    if not word:
        return UsageError(what, "most often a variable of the shell's that is empty: leave it out")
    hda, drive = (shlex.quote(shortened(text)) for text in (word, f"file={cmdline.double_commas(word)}"))
    return UsageError(what, f"give it its option, -hda {hda} or -drive {drive}; an option of QEMU begins with -")


def _begins_with_space(word: str) -> bool:
    return word.startswith((" ", "\t"))


def _no_name(word: str) -> UsageError:
    if len(word.split()) > 1:
        what = f"{shortened(word)!r} is one word here, and no option of QEMU's has a space in it"
        return UsageError(what, "leave out the quotes around option and value")
    return UsageError(f"{shortened(word)!r} is no option of QEMU's")


# What needs a choice


def _remarked(option: Option) -> Option:
    name = option.bare_name
    if name == "daemonize" and option.value is not None:
        raise _no_option(option.given[1])
    if name == "daemonize":
        why = f"{PROGRAM} waits for its QEMU; to have the shell back: {PROGRAM} start NAME"
        return option._replace(comments=(f"Left out: -daemonize. {why}",), left_out=True)
    remark = _REMARKS.get(name)
    if name in FLAGS and option.value is not None:
        remark = "QEMU takes this for two things: the option, and a disk image. Better: - hda: IMAGE"
    if name in TAKE_VALUE and option.value is None:
        remark = "Its value is missing: QEMU takes the next word for it, and a word after that for a disk image."
    text = option.value if isinstance(option.value, str) else ",".join(map(str, option.value or ()))
    if name == "name":
        remark = remark or _process_name(option)
    if remark is None and ("/dev/fd/" in text or (name not in ("append", "name") and _has_descriptor(option))):
        remark = "A descriptor of the shell's: QEMU is started without it. Name the file or device instead."
    return option._replace(comments=(remark,)) if remark else option


def _process_name(option: Option) -> str | None:
    """What to say where the helper will not know this QEMU by the name that it gives itself: proc(5), comm."""
    renamed = dict(as_read(option).properties()).get("process")
    _mark, hint = restrictions.helper_refused([as_read(option)], renamed[:15] if renamed else None, is_own=True)
    return f"{hint[0].upper()}{hint[1:]}." if hint else None


_REMARKS = {
    "runas": "Not needed: QEMU runs as you. With root as the caller, see the keys user and group.",
    "preconfig": "Not possible together with tuning: QEMU has no virtual CPUs then.",
    "add-fd": "A descriptor of the shell's: QEMU is started without it. Name the file instead.",
    "readconfig": "With options from a file, rlimit_memlock: auto cannot tell the guest's RAM. Write a size.",
}


def _has_descriptor(option: Option) -> bool:
    return any(name in ("fd", "fds", "vhostfd", "vhostfds", "sock_fd") for name, _value in as_read(option).properties())


def as_read(option: Option) -> QemuOption:
    """The option as `definition` will read it."""
    return QemuOption(option.name, option.value, NO_MARK)


def kept(draft: Draft) -> list[QemuOption]:
    """The options that the definition will have."""
    return [as_read(option) for option in draft.options if not option.left_out]


def _tuning(draft: Draft, prefix: Prefix) -> list[Key]:
    """Pinning and scheduling as far as taskset and chrt make them clear; else as suggestions."""
    options = kept(draft)
    numbers = smp_numbers(options)
    vcpus = 1 if numbers == {} else vcpu_limit(options)
    siblings = _siblings(vcpus, (numbers or {}).get("threads", 1))
    given = ", ".join(prefix.cpus_of)
    is_clear = vcpus is not None and len(prefix.cpus) == vcpus
    if is_clear:
        text = f"Out of {given}, which was for all of QEMU: a CPU of its own for each virtual CPU, in that order."
        told = (text, *siblings, f"{_LSCPU}.") if siblings else (text,)
        pinning = Key("vcpu_pinning", (_in_flow(prefix.cpus),), (" ".join(told),))
    else:
        pinning = suggested_pinning(vcpus, prefix.cpus)
        lost = (_NOT_KEPT.format(given),) if given else ()
        pinning = pinning._replace(comments=(" ".join((*lost, *pinning.comments, *siblings)),))
    return [pinning, *_scheduling(prefix, is_pinned=is_clear), *memlock_key(options)]


def _scheduling(prefix: Prefix, *, is_pinned: bool) -> list[Key]:
    if prefix.policy is None:
        return []
    real_time = prefix.policy in REALTIME_POLICIES
    missing = real_time and not is_pinned
    why = f"Of {prefix.policy_of}, which was for all of QEMU: here for its virtual CPUs alone."
    if missing:
        needed = "Real time needs the pinning above: a shielded CPU for each virtual CPU."
        why = f"{_NOT_KEPT.format(prefix.policy_of)} {needed}"
    keys = [Key("scheduler", (prefix.policy,), (why,), only_suggested=missing)]
    if real_time:
        keys.append(Key("priority", (str(prefix.priority),), only_suggested=missing))
    return keys


def _siblings(vcpus: int | None, threads: int) -> tuple[str, ...]:
    if vcpus is None or not 1 < threads <= vcpus:
        return ()
    others = ", and so on" if vcpus > threads else ""
    first = format_cpulist(range(threads))
    return (f"To the guest, virtual CPUs {first} are siblings{others}: pin them to siblings of the host.",)


def _in_flow(cpus: Iterable[int]) -> str:
    return f"[{', '.join(map(str, cpus))}]"


def suggested_pinning(vcpus: int | None, given: Sequence[int] = ()) -> Key:
    """The key as a comment: which CPUs of the host, its owner must say. `given`: those that all of QEMU had."""
    if vcpus is None or vcpus > MOST_EXAMPLES:
        count = "each virtual CPU" if vcpus is None else f"each of the {vcpus} virtual CPUs"
        return Key(
            "vcpu_pinning", ("[...]",), (f"To pin: a CPU of the host for {count}; {_LSCPU}.",), only_suggested=True
        )
    enough = len(given) > vcpus
    example = _in_flow(given[:vcpus] if enough else range(vcpus, 2 * vcpus))
    count = "the virtual CPU" if vcpus == 1 else f"each of the {vcpus} virtual CPUs"
    text = f"To pin, as an example: {'one of the CPUs given' if enough else 'a CPU of the host'} for {count}; {_LSCPU}."
    return Key("vcpu_pinning", (example,), (text,), only_suggested=True)


def memlock_key(options: Sequence[QemuOption]) -> list[Key]:
    """What the definition would mean by default, said so that it can be changed."""
    cause = pinned_by(options)
    if cause is None and not locking.has_mem_lock(options):
        return []
    if locking.has_mem_lock(options) and not _uses_kvm(options):
        text = "mem-lock without KVM locks more than the guest's memory: this is as much as you may."
        return [Key("rlimit_memlock", ("true",), (text,))]
    twice = locking.is_locked_twice(options)
    how = (
        "VFIO and mem-lock each lock the guest's memory" if twice else f"{cause or 'mem-lock'} locks the guest's memory"
    )
    size = ram.guest_ram(options)
    if not size:
        text = f"{how}, and its size cannot be told from the options. Write {'twice its' if twice else 'a'} size."
        return [Key("rlimit_memlock", ("true",), (text,))]
    times = (locking.lockable(options) or size) / size
    often = "" if times == 1 else " twice" if times == 2 else f" {times:.2g} times"
    once = ("Without mem-lock its RAM once is enough.",) if twice and times == 2 else ()
    return [Key("rlimit_memlock", ("auto",), (f"{how}: its RAM{often} and 1 GiB are allowed.", *once))]


def _uses_kvm(options: Sequence[QemuOption]) -> bool:
    for option in options:
        if option.bare_name == "enable-kvm":
            return True
        for name, value in option.properties() if option.bare_name in ("accel", "machine", "M") else ():
            if "kvm" in (value or name if name == "accel" or value is None else "").split(":"):
                return True
    return False


def _guest_name(options: Sequence[Option]) -> str | None:
    found = None
    for option in options:
        if option.bare_name == "name" and option.value is not None:
            for position, (name, value) in enumerate(as_read(option).properties()):
                found = value if name == "guest" else name if value is None and position == 0 else found
    return found


def headline(name: str | None, *, is_saved: bool) -> str:
    """What this file is and, if it is not there, where to put it. `name` is the guest's, and may be none for a file."""
    if is_saved:
        return f"Written by {PROGRAM} import."
    stem = name if name is not None and VM_NAME.fullmatch(name) else "NAME"
    return f"Written by {PROGRAM} import. Save it as ~/.config/qemu-launcher/{stem}.yml"


# Out into the world


def written(draft: Draft, argv: Sequence[str]) -> str:
    """The text of the definition, after it has been read back: it gives QEMU exactly `argv` as arguments.

    Raises DefinitionError for what a definition cannot have.
    """
    name = "the definition"
    try:
        text = render(draft)
        found = cmdline.qemu_argv(definition.parse(text.encode(), Path(name), "imported"))
    except (ValueError, DefinitionError) as err:
        what = err.message if isinstance(err, DefinitionError) else str(err)
        hint = err.hint if isinstance(err, DefinitionError) else None
        raise DefinitionError(f"no definition can be made of this: {what}", hint) from err
    if len(text.encode()) > definition.MAX_FILE_BYTES:
        raise DefinitionError(f"the definition would be larger than {definition.MAX_FILE_BYTES >> 20} MiB")
    if found != [draft.binary, *argv]:
        wrong = next((w for w, f in zip([draft.binary, *argv], [*found, ""], strict=False) if w != f), "")
        raise LauncherError(f"the definition would not give back {shortened(wrong)!r}", "this is a bug: please tell us")
    return text


def check_output(output: str | None) -> None:
    """Raises UsageError or DefinitionError for a file that no command would take for a definition."""
    if output is None:
        return
    if not output.endswith(SUFFIX):
        # Path would take nothing for the folder we are in, and forget a final slash.
        folder, name = (output, "") if os.path.isdir(output) else os.path.split(output)  # noqa: PTH112
        stem = name.removesuffix(SUFFIXES[1])
        better = os.path.join(folder, (stem if VM_NAME.fullmatch(stem) else "NAME") + SUFFIX)  # noqa: PTH118
        raise UsageError(
            f"a definition's file ends in {SUFFIX}, and {shortened(output, MOST_OF_A_PATH)!r} does not",
            f"write -o {shlex.quote(better)}",
        )
    vm_name(output)


def deliver(text: str, output: str | None) -> None:
    """Print `text`, or write it to a file that must not be there yet."""
    if output is None:
        stdout.say(text)
        return
    try:
        with open(output, "x", encoding="utf-8") as file:  # noqa: PTH123
            try:
                file.write(text)
                file.flush()
            except OSError:
                Path(output).unlink()  # half a definition is none
                raise
    except FileExistsError as err:
        raise LauncherError(f"{output} is there already and is left alone", "give another name, or remove it") from err
    except (OSError, ValueError) as err:
        why = err.strerror if isinstance(err, OSError) else err
        raise LauncherError(f"cannot write {output!r}: {why}") from err


def _utf8(word: str) -> str:
    """An argument as the UTF-8 text that its bytes are, whatever the locale has made of them. Raises UsageError."""
    try:
        return os.fsencode(word).decode()
    except UnicodeError as err:
        what = f"the argument {shortened(word)!r} is not UTF-8, which a definition must be"
        raise UsageError(what, "if it names a file, rename that") from err
