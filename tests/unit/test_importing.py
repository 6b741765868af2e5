"""`import -- QEMU...`: a command line becomes a definition whose command line is that one again."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, example, given, settings, strategies as st

from qemu_launcher import cmdline, yamlnode
from qemu_launcher.errors import DefinitionError, LauncherError, UsageError
from qemu_launcher.importing import command_line, drafting, prefixes, program, yamltext
from qemu_launcher.importing.qemuoptions import FLAGS, LISTS, TAKE_VALUE
from qemu_launcher.optionlist import is_name
from qemu_launcher.options import Property
from unit.reading import ROOT, read

QEMU = "qemu-system-x86_64"
CASES = json.loads((ROOT / "tests" / "argv_cases.json").read_text(encoding="utf-8"))


def imported(*words: str) -> str:
    """The definition for a command line."""
    prefix = prefixes.peel(words)
    program.check_program(prefix.argv)
    draft = command_line.draft_of(prefix)
    return command_line.written(draft, [word for o in draft.options if not o.left_out for word in o.given])


def qemu_section(*words: str) -> str:
    return imported(QEMU, *words).partition("\nqemu:\n")[2]


# Any text at all, and text in which what matters comes often.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
PIECES = st.sampled_from(
    ["a", "=", ",", ",,", "{", "}", "'", '"', " ", ": ", " #", "-", "\n", "\t", "\\", "~", "0", "file", "é", "\x85"]
)
TEXT = ANY_TEXT | st.lists(PIECES, max_size=12).map("".join) | st.sampled_from(
    ["", "on", "null", "~", "true", "0x10", "1e3", "010", "52:54:00:12:34:56", "*a", "&a", "!x", "%", "@", "`", "? a",
     "- a", "---", "...", ": a", "a: b", "a:", "a #b", "#", "[a]", "{a: b}", "|", ">", "<<", "=", ".inf", "0" * 30]
)  # fmt: skip
NAME = st.sampled_from(sorted(FLAGS | TAKE_VALUE)) | TEXT.filter(lambda text: text[:1] != "-" and is_name(text))
# What is no option's name is refused where QEMU would read one.
WORD = TEXT.filter(lambda text: text[:1] != "-" or text == "-" or is_name(text[1:]))
OPTIONS = st.lists(st.tuples(st.sampled_from(["-", "--"]), NAME, WORD | st.none()), max_size=6)


def looks_mistyped(argv: list[str]) -> bool:
    """Whether a word behind a flag begins with a space, as behind a backslash that was to end the line."""
    return any(flag.lstrip("-") in FLAGS and word.startswith((" ", "\t")) for flag, word in pairwise(argv))


@settings(max_examples=200, deadline=None)
@given(OPTIONS)
@example([("-", "append", "-daemonize")])
@example([("-", "nographic", "disk.img")])
@example([("-", "drive", "file=a,,b,,,if=virtio,")])
@example([("-", "m", None), ("-", "m", "")])
@example([("-", "append", "-x"), ("-", "S", "-")])
def test_argv_comes_back(options: list[tuple[str, str, str | None]]) -> None:
    argv = [QEMU]
    for dash, name, value in options:
        if name.removeprefix("-") != "daemonize":
            argv += [dash + name] if value is None else [dash + name, value]
    assume(not looks_mistyped(argv))
    found = cmdline.qemu_argv(read(imported(*argv)))
    assert [w for w in found if w.strip("-") != "daemonize"] == [w for w in argv if w.strip("-") != "daemonize"]


BEGINNING = TEXT.filter(lambda text: text[:1] != "-")
ELEMENT = BEGINNING | st.tuples(BEGINNING.filter(bool), TEXT).map(lambda pair: Property(*pair))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NAME, st.none() | WORD | st.lists(ELEMENT, min_size=1, max_size=5).map(tuple)), max_size=6))
def test_definition_comes_back(
    options: list[tuple[str, str | tuple[str | Property, ...] | None]],
) -> None:
    """definition -> command -> import -> command: the same words."""
    kept = [drafting.Option(name, value) for name, value in options if name.strip("-") not in ("daemonize", "")]
    definition = read(drafting.render(drafting.Draft(QEMU, tuple(kept))))
    argv = cmdline.qemu_argv(definition)
    assume(not looks_mistyped(argv))
    assert argv[1:] == [w for o in kept for w in cmdline.option_argv(command_line.as_read(o))]
    assert cmdline.qemu_argv(read(imported(*argv))) == argv


@pytest.mark.parametrize("case", [case for case in CASES if "argv" in case], ids=lambda case: str(case["name"]))
def test_conformance_case_comes_back(case: dict[str, list[str]]) -> None:
    argv = [QEMU, *case["argv"]]
    assert cmdline.qemu_argv(read(imported(*argv))) == argv


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_scalars_come_back(text: str) -> None:
    for loader in ("C", ""):
        with pytest.MonkeyPatch.context() as patch:
            if not loader:
                patch.delattr(yaml, "CSafeLoader")
            written = f"- {yamltext.scalar(text)}\n" + (f"- {yamltext.word(text)}: {yamltext.scalar(text)}\n")
            root = yamlnode.compose(yamlnode.decode(written.encode(), "x"), "x").root
            assert isinstance(root, yamlnode.List)
            assert yamlnode.verbatim(root.items[0], "x") == text
            if text:
                ((key, value),) = yamlnode.entries(root.items[1], "x")
                assert (yamlnode.string(key, "x"), yamlnode.verbatim(value, "x")) == (text, text)


@given(ANY_TEXT)
def test_comments_end_where_they_must(text: str) -> None:
    lines = yamltext.comment(text, 2)
    assert all(line.startswith("  # ") for line in lines.splitlines())
    assert lines == "" or yamlnode.decode((lines + "a: b\n").encode(), "x")


def test_readable_form() -> None:
    words = "-nographic -m 2G -smp 4,sockets=1 -drive file=disk.qcow2,if=virtio -vnc :0"
    assert (
        qemu_section(*words.split())
        == """\
  - nographic
  - m: 2G
  - smp:
      - 4
      - sockets: 1
  - drive:
      - file: disk.qcow2
      - if: virtio
  - vnc: ':0'
"""
    )


def test_the_manual_page_has_a_real_example() -> None:
    page = (ROOT / "launcher/man/qemu-launcher.1.md").read_text(encoding="utf-8")
    command, _prints, rest = page.partition("# IMPORT\n\n")[2].replace("prints\n\n", "\0").partition("\0")
    lines = rest.partition("\n\n**")[0].splitlines()
    assert imported(*command.split()[3:]).splitlines() == [line.removeprefix("    ") for line in lines]


@pytest.mark.parametrize(
    ("option", "text", "lines"),
    [
        ("overcommit", "mem-lock=on", ["- overcommit:", "    - mem-lock: on"]),
        ("drive", "file=a,,b", ["- drive:", "    - file: a,b"]),
        ("drive", "file=a,,,if=ide", ["- drive:", "    - file: a,", "    - if: ide"]),
        ("drive", "if=ide,", ["- drive: if=ide,"]),
        ("drive", "if=ide,,", ["- drive:", "    - if: ide,"]),
        ("drive", ",if=ide", ["- drive: ',if=ide'"]),
        ("drive", "=a,if=ide", ["- drive:", "    - =a", "    - if: ide"]),
        ("drive", "a,,b=c,if=ide", ["- drive:", "    - a,,b=c", "    - if: ide"]),
        ("netdev", "user,hostfwd=a,hostfwd=b", ["- netdev:", "    - user", "    - hostfwd: a", "    - hostfwd: b"]),
        ("drive", "file=a=b", ["- drive:", "    - file: a=b"]),
        ("device", '{"driver": "x", "id": "y"}', ['- device: \'{"driver": "x", "id": "y"}\'']),
        ("append", "console=ttyS0,115200 -x", ["- append: console=ttyS0,115200 -x"]),
        ("append", "-x", ["- append: -x"]),
        ("serial", "-", ["- serial: '-'"]),
        ("append", "", ["- append: ''"]),
        ("name", "null", ["- name: 'null'"]),
        ("name", "a: b", ["- name: 'a: b'"]),
        ("name", "it's # 1", ["- name: 'it''s # 1'"]),
        ("name", "a\nb\t\x7f", ['- name: "a\\nb\\t\\x7f"']),
        ("name", "Größe", ["- name: 'Größe'"]),
        ("-m", "2G", ["- '-m': 2G"]),
        ("smp", "4", ["- smp: 4"]),
    ],
)
def test_forms(option: str, text: str, lines: list[str]) -> None:
    assert qemu_section(f"-{option}", text).splitlines() == [f"  {line}" for line in lines]


def test_flags_and_values_as_qemu_tells_them_apart() -> None:
    section = qemu_section("-append", "-S", "-S", "-kernel", "-snapshot", "-newflag", "-newvalue", "x", "-m")
    assert [line for line in section.splitlines() if "#" not in line] == [
        *("  - append: -S", "  - S", "  - kernel: -snapshot", "  - newflag", "  - newvalue: x", "  - m"),
    ]


def test_word_that_no_option_can_be_is_a_value() -> None:
    section = qemu_section("-append", "-x y", "-newvalue", "-x y", "-S")
    assert [line for line in section.splitlines() if "#" not in line] == [
        *("  - append: -x y", "  - newvalue: -x y", "  - S"),
    ]


def test_no_option_is_both() -> None:
    assert not FLAGS & TAKE_VALUE
    assert LISTS <= TAKE_VALUE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([QEMU, "disk.img"], "'disk.img' stands where an option must"),
        ([QEMU, "-m", "2G", "disk.img", "-S"], "'disk.img' stands where an option must"),
        (["strace", "-f", QEMU, "-m", "2G"], "'strace -f' stands before 'qemu-system-x86_64', and is not known here"),
        (["gdb", "--args", "/opt/qemu-kvm", "-S"], "'gdb --args' stands before '/opt/qemu-kvm', and is not known here"),
        (["screen", "-dmS", "win10", QEMU, "-S"], f"'screen -dmS win10' stands before '{QEMU}', and is not known here"),
        (["screen", "-dmS", "a b", "kvm", "-S"], "\"screen -dmS 'a b'\" stands before 'kvm', and is not known here"),
        (["cset", "shield", "-e", "--", "nice", "-5", QEMU], f"'cset shield -e --' stands before '{QEMU}', and is not"),
        (["gamemoderun", "A=b", "taskset", "-c", "1", QEMU], f"'gamemoderun' stands before '{QEMU}', and is not known"),
        ([QEMU, "-daemonize", "disk.img"], "'disk.img' stands where an option must"),
        ([QEMU, ""], "'' stands where an option must"),
        ([QEMU, "-"], "'-' is no option of QEMU's"),
        ([QEMU, "-" + "x" * 300], "is too long for the name of an option"),
        (
            ["runuser", "-u", "kvm", "--", QEMU, "-S"],
            f"'runuser -u kvm --' stands before '{QEMU}', and is not known here",
        ),
        (["nix-shell", "-p", "qemu", "--run", f"{QEMU} -m 2G"], f"'{QEMU} -m 2G' is one word here"),
        (["su", "kvm", "-c", "/usr/bin/kvm -S"], "'su' is a shell, and not QEMU"),
        (["mywrap", "-m", "2G", "--run", f"{QEMU} -S"], f"'{QEMU} -S' is one word here"),
        (["name", f"{QEMU} -S"], f"'{QEMU} -S' is one word here"),
        (["ssh", "host", f"exec {QEMU} -S"], f"'exec {QEMU} -S' is one word here"),
        ([QEMU, "-m 64M"], "'-m 64M' is one word here, and no option of QEMU's has a space in it"),
        ([QEMU, "-S", "-m 64M"], "'-m 64M' is one word here"),
        ([QEMU, "---nographic"], "'---nographic' is no option of QEMU's"),
        ([QEMU, "--"], "'--' is no option of QEMU's"),
        (["sudo", "-u", "bob"], "there is no QEMU in this command line"),
        (["A=b"], "there is no QEMU in this command line"),
        ([f"{QEMU} -m 2G"], f"'{QEMU} -m 2G' is one word here"),
    ],
)
def test_refused_words(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        imported(*words)
    assert message in caught.value.message
    assert caught.value.exit_status == 2


A_SPACE = "most often a space that follows the \\ at the end of a line: remove it, nothing may follow the \\ there"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["-machine", "q35", " "], "' ' stands where an option must, and begins with a space", A_SPACE),
        (["-enable-kvm", " "], "' ' stands where an option must, and begins with a space", A_SPACE),
        (["--mem-prealloc", "\t"], "'\\t' stands where an option must, and begins with a space", A_SPACE),
        (["-machine", "q35", " -m", "1G"], "' -m' stands where an option must, and begins with a space", A_SPACE),
        (
            ["-m", "1G", "my disk.img"],
            "'my disk.img' stands where an option must: QEMU takes it for a disk image",
            "give it its option, -hda 'my disk.img' or -drive 'file=my disk.img'; an option of QEMU begins with -",
        ),
        (
            ["-m", "1G", "a,b.img"],
            "'a,b.img' stands where an option must: QEMU takes it for a disk image",
            "give it its option, -hda a,b.img or -drive file=a,,b.img; an option of QEMU begins with -",
        ),
        (
            ["-m", "1G", ""],
            "'' stands where an option must: QEMU takes it for a disk image",
            "most often a variable of the shell's that is empty: leave it out",
        ),
    ],
)
def test_words_that_a_shell_has_made(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        imported(QEMU, *words)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_values_may_begin_with_a_space() -> None:
    assert read(imported(QEMU, "-append", " ", "-name", " x")).binary == QEMU


def test_a_long_line_of_another_program_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="stands before 'qemu-kvm'"):
        imported("my-emulator", *["-x"] * 200_000, "-name", "qemu-kvm")


def test_cset_has_its_counterpart() -> None:
    with pytest.raises(UsageError) as caught:
        imported("cset", "proc", "-s", "x", "-e", QEMU)
    assert caught.value.hint == "leave it out: vcpu_pinning makes a shield, see qemu-launcher-migration(7)"


@pytest.mark.parametrize("words", [["-name", "test kvm - debian"], ["-append", "root=/dev/vda init=/x kvm -s"]])
def test_a_value_of_a_wrapper_s_may_read_like_qemu(words: list[str]) -> None:
    assert cmdline.qemu_argv(read(imported("mywrap", *words, "-m", "512"))) == ["mywrap", *words, "-m", "512"]


def test_kvm_is_an_accelerator_too() -> None:
    assert read(imported("my-emulator", "-accel", "kvm")).binary == "my-emulator"
    assert "not called as QEMU is" not in imported("kvm", "-S")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([QEMU, "-append", "x" * (128 << 10)], "-append has a value longer than 131071 bytes, the kernel's limit"),
        ([QEMU, *["-append", "x" * (100 << 10)] * 12], "up to here the qemu section comes to more than 1 MiB"),
        (["", "-S"], "binary is empty"),
        (["taskset", "-c", "1,99999999", QEMU], None),
    ],
)
def test_what_a_definition_cannot_have(words: list[str], message: str | None) -> None:
    if message is None:  # such a CPU is no cpulist: said in a note, not in a key
        assert "# vcpu_pinning: [1]" in imported(*words)
        return
    with pytest.raises(DefinitionError) as caught:
        imported(*words)
    assert caught.value.message == f"no definition can be made of this: {message}"


def launcher_section(*words: str) -> str:
    return imported(*words).partition("launcher:\n")[2].partition("qemu:")[0]


def test_prefixes() -> None:
    text = imported("A=1", "B=x y", "sudo", "-u", "bob", "A=2", "nice", "-n", "5", QEMU, "-S")
    assert read(text).env == (("B", "x y"), ("A", "2"))
    assert "# Stood before QEMU, and is not kept: sudo -u bob." in text
    assert "# Stood before QEMU, and is not kept: nice -n 5." in text
    assert read(text).binary == QEMU


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("taskset -c 2,3 Q -smp 2", ["vcpu_pinning: [2, 3]"]),
        ("taskset --cpu-list 2-3 Q -smp 2", ["vcpu_pinning: [2, 3]"]),
        ("taskset 0xc Q -smp 2", ["vcpu_pinning: [2, 3]"]),
        ("taskset c Q -smp 2", ["vcpu_pinning: [2, 3]"]),
        ("taskset -ac 2 Q", ["vcpu_pinning: [2]"]),
        ("taskset -c 3,1,8-10,2 Q -smp 6", ["vcpu_pinning: [3, 1, 8, 9, 10, 2]"]),
        ("taskset -c 3,2,3 Q -smp 2", ["vcpu_pinning: [3, 2]"]),
        ("taskset -c 2,3 Q -smp 4", []),
        ("taskset -c 0-6:2 Q", []),
        ("numactl -C 2 -m 0 Q", ["vcpu_pinning: [2]"]),
        ("numactl --physcpubind=2,4 Q -smp 2", ["vcpu_pinning: [2, 4]"]),
        ("numactl -C 4,2 Q -smp 2", ["vcpu_pinning: [4, 2]"]),
        ("numactl -C all Q", []),
        ("numactl -lC0-1 -c 0 Q -smp 2", ["vcpu_pinning: [0, 1]"]),
        ("numactl --cpubind 0 --membind 0 Q", []),
        ("sudo -Eu root taskset -ac 2 Q", ["vcpu_pinning: [2]"]),
        ("sudo -uroot taskset -c 2 Q", ["vcpu_pinning: [2]"]),
        ("taskset -c Q", []),
        ("taskset -c 2 chrt -f 5 Q", ["vcpu_pinning: [2]", "scheduler: fifo", "priority: 5"]),
        ("chrt 5 taskset -c 2 Q", ["vcpu_pinning: [2]", "scheduler: rr", "priority: 5"]),
        ("chrt --fifo 5 Q", []),
        ("chrt -f 0 Q", []),
        ("chrt -d -T 1 -P 2 0 Q", []),
        ("chrt -b 0 Q", ["scheduler: batch"]),
        ("chrt --idle Q", ["scheduler: idle"]),
        ("env -i Q", ["clear_env: true"]),
        ("systemd-inhibit --what=sleep --who vm Q", ["inhibit_sleep: true"]),
        ("systemd-inhibit Q", ["inhibit_sleep: true"]),
        ("systemd-inhibit --what handle-lid-switch:idle Q", []),
        ("env - A=b Q", ["clear_env: true", "env:", "A: b"]),
        ("env A=b C=d Q", ["env:", "A: b", "C: d"]),
        ("/usr/bin/sudo -E /usr/bin/nice -5 Q", []),
        ("exec -a x nohup setsid -f time ionice -c 3 systemd-run --user --scope -p A=b prlimit --memlock=1 Q", []),
    ],
)
def test_what_prefixes_become(words: str, lines: list[str]) -> None:
    section = launcher_section(*words.replace("Q", QEMU).split())
    assert [line.strip() for line in section.splitlines()[1:] if not line.strip().startswith("#")] == lines


def test_pinning_is_suggested_out_of_the_cpus_that_were_given() -> None:
    text = imported("taskset", "-c", "0-3", QEMU, "-smp", "2")
    assert "To pin, as an example: one of the CPUs given for each of the 2 virtual CPUs;" in flowing(text)
    assert "# vcpu_pinning: [0, 1]\n" in text
    assert "# vcpu_pinning: [9, 1]\n" in imported("taskset", "-c", "9,1,8,0", QEMU, "-smp", "2")
    assert "# vcpu_pinning: [4, 5, 6, 7]\n" in imported("taskset", "-c", "2,3", QEMU, "-smp", "4")


def flowing(text: str) -> str:
    """The comments without their line breaks."""
    return " ".join(text.replace("\n  #", "\n#").replace("\n# ", " ").split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("taskset -c 0-1 Q -smp 2", "# Out of taskset -c 0-1, which was for all of QEMU: a CPU of its own for each "),
        (
            "taskset -c 0-3 Q -smp 2",
            "# Not kept: taskset -c 0-3, which was for all of QEMU. To pin, as an example: one ",
        ),
        ("taskset -c 2 Q -smp 2", "# Not kept: taskset -c 2, which was for all of QEMU. To pin, as an example: a CPU "),
        (
            "taskset -c 0-3 Q -smp 99",
            "# Not kept: taskset -c 0-3, which was for all of QEMU. To pin: a CPU of the host ",
        ),
        ("taskset -c 0-3 numactl -C2 Q", "# Out of taskset -c 0-3, numactl -C2, which was for all of QEMU: a CPU of "),
        ("systemd-inhibit --what=idle:sleep Q", "# Of systemd-inhibit --what=idle:sleep: here against sleep alone."),
        ("taskset -c 2 chrt -r 1 Q", "# Of chrt -r 1, which was for all of QEMU: here for its virtual CPUs alone."),
        ("chrt -r 1 Q -smp 2", "# Not kept: chrt -r 1, which was for all of QEMU. Real time needs the pinning above: "),
    ],
)
def test_what_became_of_a_prefix_is_said_where_it_is(words: str, said: str) -> None:
    text = flowing(imported(*words.replace("Q", QEMU).split()))
    assert said.removeprefix("# ") in text
    assert "Stood before QEMU" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("taskset -c 0-6:2 Q", "taskset -c 0-6:2. It was for all of QEMU; vcpu_pinning is for its virtual CPUs."),
        ("chrt -d -T 1 -P 2 0 Q", "chrt -d -T 1 -P 2 0. It was for all of QEMU; scheduler and priority are for its "),
        (
            "sudo -E Q",
            "sudo -E. QEMU runs as you. What root could open must be yours: /dev/vfio, block devices, input ",
        ),
        (
            "doas Q",
            "qemu-launcher check NAME says which are not, save for tap devices. Pinning, locked memory and real ",
        ),
        ("numactl -N 0 -m 0 Q", "numactl -N 0. For its CPUs see vcpu_pinning and emulator_pinning; lscpu -e=CPU,NODE "),
        (
            "numactl -N 0 -m 0 Q",
            "numactl -m 0. To bind the guest's memory, give QEMU a memory-backend with host-nodes ",
        ),
        ("numactl -C all Q", "numactl -C all. For its CPUs see vcpu_pinning"),
        ("numactl --physcpubind=2 --membind=1 Q", "numactl --membind=1. To bind the guest's memory"),
        ("numactl Q", None),
        ("systemd-inhibit --what=idle Q", "systemd-inhibit --what=idle. The key inhibit_sleep is about sleep."),
        ("env -i -u X Q", "env -u X. See the keys env, clear_env and working_directory."),
        ("env -i Q", None),
        ("env A=b Q", None),
    ],
)
def test_what_is_not_kept_of_a_prefix(words: str, said: str | None) -> None:
    text = flowing(imported(*words.replace("Q", QEMU).split()))
    assert ("Stood before QEMU, and is not kept: " in text) == (said is not None)
    assert said is None or said in text


@pytest.mark.parametrize(
    ("prefix", "smp", "siblings"),
    [
        ("taskset -c 8,20,9,21", "4,sockets=1,cores=2,threads=2", "0-1"),
        ("taskset -c 0-7", "8,sockets=1,cores=2,threads=4", "0-3"),
        ("taskset -c 0-7", "4,threads=2", "0-1"),
        ("", "4,threads=2", "0-1"),
        ("taskset -c 0-3", "4,sockets=4", None),
        ("taskset -c 0-3", "4", None),
        ("taskset -c 0-3", "cores=2", None),
    ],
)
def test_siblings_are_to_be_pinned_to_siblings(prefix: str, smp: str, siblings: str | None) -> None:
    text = flowing(imported(*prefix.split(), QEMU, "-smp", smp))
    said = f"To the guest, virtual CPUs {siblings} are siblings, and so on: pin them to siblings of the host."
    assert (said in text) == (siblings is not None)
    assert "lscpu -e=CPU,CORE shows which are siblings" in text or siblings is None


def test_a_program_that_is_not_called_as_qemu_is() -> None:
    note = "# ls is not called as QEMU is: it gets QEMU's options."
    assert note in imported("ls", "-l").splitlines()
    assert not any("not called" in line for line in imported(QEMU, "-S").splitlines())


def test_real_time_without_pinning_is_only_suggested() -> None:
    text = imported("chrt", "-f", "1", QEMU, "-smp", "2")
    assert "  # scheduler: fifo\n  # priority: 1\n" in text
    assert read(text).scheduler is None


@pytest.mark.parametrize(
    ("words", "comment"),
    [
        ("-smp 4", "# vcpu_pinning: [4, 5, 6, 7]"),
        ("-smp 100", "# To pin: a CPU of the host for each of the 100 virtual CPUs;"),
        ("-smp 2,maxcpus=x", "# To pin: a CPU of the host for each virtual CPU;"),
        ("-device vfio-pci,host=1:0.0", "rlimit_memlock: auto"),
        ("-overcommit mem-lock=on", "rlimit_memlock: true"),
        ("-overcommit mem-lock=on -accel tcg -machine kvm-shadow-mem=1", "rlimit_memlock: true"),
        ("-overcommit mem-lock=on -accel kvm", "rlimit_memlock: auto"),
        ("-overcommit mem-lock=on -accel accel=kvm,dirty-ring-size=1", "rlimit_memlock: auto"),
        ("-overcommit mem-lock=on -machine q35,accel=kvm:tcg", "rlimit_memlock: auto"),
        ("-overcommit mem-lock=on -enable-kvm", "rlimit_memlock: auto"),
        ("-overcommit mem-lock=on -readconfig x -enable-kvm", "and its size cannot be told from the options"),
        ("-overcommit mem-lock=on -enable-kvm -device vfio-pci", "memory: its RAM twice and 1 GiB are allowed."),
        ("-overcommit mem-lock=on -enable-kvm -device vfio-pci", "rlimit_memlock: auto"),
        ("-overcommit mem-lock=on -enable-kvm -device vfio-pci,iommufd=x", "memory: its RAM and 1 GiB are allowed."),
        ("-overcommit mem-lock=on -enable-kvm -device vfio-pci -readconfig x", "Write twice its size."),
        ("-netdev vhost-vdpa,id=n", "# vDPA locks the guest's memory: its RAM and 1 GiB are allowed."),
        ("-netdev vhost-vdpa,id=n -netdev vhost-vdpa,id=m", "its RAM twice and 1 GiB are allowed."),
        ("-hda nvme://0:44:0.0/1 -hdb nvme://0:45:0.0/1 -device vfio-pci", "its RAM 3 times and 1 GiB are allowed."),
        ("-runas nobody", "# Not needed: QEMU runs as you."),
        ("-netdev tap,fds=3:4,id=n", "# A descriptor of the shell's"),
        ("-add-fd fd=3,set=2", "# A descriptor of the shell's"),
        ("-snapshot disk.img", "Better: - hda: IMAGE"),
        ("-name guest=win11", "Save it as ~/.config/qemu-launcher/win11.yml"),
        ("-name win11,process=x", "Save it as ~/.config/qemu-launcher/win11.yml"),
        ("-name ../x", "Save it as ~/.config/qemu-launcher/NAME.yml"),
    ],
)
def test_comments(words: str, comment: str) -> None:
    text = imported(QEMU, *words.split())
    assert comment in text.replace("\n  # ", "\n# ")
    assert cmdline.qemu_argv(read(text)) == [QEMU, *words.split()]


def test_a_process_name_that_the_helper_does_not_know() -> None:
    allowed = (
        "Processes called qemu-system-*, qemu-kvm or kvm are tuned, unless comm in qemu-launcher-helper.toml(5) says "
    )
    assert f"{allowed}otherwise: remove process= there. - name:" in flowing(imported(QEMU, "-name", "a,process=win"))
    assert "Processes called" not in imported(QEMU, "-name", "a,process=", "-name")
    assert "Processes called" not in imported(QEMU, "-name", "win,process=qemu-system-win", "-S")
    assert "Processes called" not in imported(QEMU, "-name", "win", "-append", "process=x")


def test_daemonize_is_left_out_and_said() -> None:
    done = launch("--", QEMU, "-daemonize", "-S")
    assert cmdline.qemu_argv(read(done.stdout)) == [QEMU, "-S"]
    assert "  # Left out: -daemonize." in done.stdout
    assert done.stderr == (
        "qemu-launcher: left out: -daemonize. qemu-launcher waits for its QEMU; to have the shell back: qemu-launcher "
        "start NAME\n"
    )
    assert done.returncode == 0


def launch(*words: str | bytes, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "qemu_launcher", "import", *words],
        env={"PYTHONPATH": str(ROOT / "launcher"), "PATH": os.environ["PATH"]} | environ,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "de_DE.ISO-8859-1"])
def test_as_a_program_in_every_locale(locale: str) -> None:
    done = launch("--", QEMU, "-name", "Größe 漢", LC_ALL=locale, PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert cmdline.qemu_argv(read(done.stdout)) == [QEMU, "-name", "Größe 漢"]


def test_bytes_that_are_no_utf8() -> None:
    done = launch("--", QEMU, "-hda", b"\xff.img")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "qemu-launcher: the argument '\\udcff.img' is not UTF-8, which a definition must be\n"
        "    if it names a file, rename that\n"
    )


def test_half_a_definition_is_not_left_behind(tmp_path: Path) -> None:
    script = f"ulimit -f 0; exec {sys.executable} -m qemu_launcher import -o {tmp_path}/x.yml -- {QEMU}"
    done = subprocess.run(
        ["sh", "-c", script],
        env={"PYTHONPATH": str(ROOT / "launcher"), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"qemu-launcher: cannot write '{tmp_path}/x.yml': File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_there_and_back_with_the_program_itself(tmp_path: Path) -> None:
    argv = [QEMU, "-smp", "2,sockets=1", "-append", "a=b, c", "-drive", "file=a,,b.img,if=virtio", "-S", "-name", "ü\n"]
    assert launch("-o", f"{tmp_path}/x.yml", "--", *argv).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "qemu_launcher", "command", "--json", f"{tmp_path}/x.yml"],
        env={"PYTHONPATH": str(ROOT / "launcher"), "PATH": os.environ["PATH"]},
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout) == argv


@pytest.mark.parametrize("stderr", ["/dev/full", None])
def test_stderr_that_cannot_be_written(stderr: str | None) -> None:
    script = f"exec {sys.executable} -m qemu_launcher import -- {QEMU} -daemonize 2>{stderr or '&-'}"
    done = subprocess.run(
        ["sh", "-c", script],
        env={"PYTHONPATH": str(ROOT / "launcher"), "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert b"# Left out: -daemonize." in done.stdout


def test_output_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yml"
    done = launch("-o", str(path), "--", QEMU, "-S")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    before = path.read_text()
    assert before.startswith("# Written by qemu-launcher import.\n\n")
    assert cmdline.qemu_argv(read(before)) == [QEMU, "-S"]
    done = launch("--output", str(path), "--", QEMU)
    assert done.returncode == 1
    assert done.stderr.startswith(f"qemu-launcher: {path} is there already and is left alone\n")
    assert path.read_text() == before
    done = launch("-o", str(tmp_path / "no" / "x.yml"), "--", QEMU)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("foo", "a definition's file ends in .yml, and '{}' does not\n    write -o {}.yml\n"),
        ("my vm2.yml", "'{}' gives 'my vm2', which is no name for a VM\n    use letters, digits, - and _, beginning "),
        (".yml", "'{}' gives '', which is no name for a VM\n"),
    ],
)
def test_output_that_no_command_takes(tmp_path: Path, name: str, said: str) -> None:
    for words in (("--", QEMU), ("--libvirt", "win11")):
        done = launch("-o", f"{tmp_path}/{name}", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"qemu-launcher: {said.replace('{}', f'{tmp_path}/{name}')}")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "better"),
    [
        ("{}/foo.yaml", "{}/foo.yml"),  # which no name would find
        ("{}", "{}/NAME.yml"),
        ("{}/", "{}/NAME.yml"),
        ("", "NAME.yml"),
        ("{}/.yaml", "{}/NAME.yml"),  # what is hinted at is not to be refused in turn
        ("{}/a b", "{}/NAME.yml"),
        ("{}/no/", "{}/no/NAME.yml"),
    ],
)
def test_output_of_another_ending(tmp_path: Path, output: str, better: str) -> None:
    output, better = output.format(tmp_path), better.format(tmp_path)
    done = launch("-o", output, "--", QEMU)
    assert (done.returncode, done.stdout) == (2, "")
    said = f"qemu-launcher: a definition's file ends in .yml, and {output!r} does not\n    write -o {better}\n"
    assert done.stderr == said
    assert list(tmp_path.iterdir()) == []


HOW_TO_IMPORT_A_SCRIPT = (
    "in a copy of it put 'qemu-launcher import -- ' before the line with QEMU, and run that: it does all else as before"
)
WITHOUT_SHELL = "give the command line that the shell is to run, without the shell and its quotes"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["./win10.sh"], "'./win10.sh' is a script, and not QEMU", HOW_TO_IMPORT_A_SCRIPT),
        (["sudo", "win10.sh", "-S"], "'win10.sh' is a script, and not QEMU", HOW_TO_IMPORT_A_SCRIPT),
        (["sudo", "sh", "-c", f"{QEMU} -m 1G"], "'sh' is a shell, and not QEMU", WITHOUT_SHELL),
        (["/bin/bash", "-xec", f"exec {QEMU}"], "'/bin/bash' is a shell, and not QEMU", WITHOUT_SHELL),
        (["busybox", "sh", "-c", QEMU + " -S"], "'busybox' is a shell, and not QEMU", WITHOUT_SHELL),
        (["bash", "win10"], "'bash' is a shell, and not QEMU", HOW_TO_IMPORT_A_SCRIPT),
        (["zsh"], "'zsh' is a shell, and not QEMU", HOW_TO_IMPORT_A_SCRIPT),
        (
            ["/tmp/win 11.xml"],
            "'/tmp/win 11.xml' is XML by its name, and not QEMU",
            "of a VM of libvirt's: qemu-launcher import --libvirt '/tmp/win 11.xml'",
        ),
        (
            ["win11.yml"],
            "'win11.yml' is a definition by its name, and not QEMU",
            "to start it: qemu-launcher win11.yml; to write it: qemu-launcher import -o win11.yml -- QEMU...",
        ),
        (
            ["./x.yaml", "-S"],
            "'./x.yaml' is a definition by its name, and not QEMU",
            "to start it: qemu-launcher ./x.yaml; to write it: qemu-launcher import -o ./x.yml -- QEMU...",
        ),
    ],
)
def test_what_is_not_qemu(words: list[str], message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        imported(*words)
    assert caught.value.message == message
    assert hint in (None, caught.value.hint)


def test_scripts_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    names = ("win10", QEMU, "qemu-system-x86_64-wrapped", "qemu-kvm", "kvm")
    for name in names:
        (tmp_path / name).write_text("#!/bin/sh\nqemu-system-x86_64 -S\n")
        (tmp_path / name).chmod(0o755)
    for name in names[1:]:
        assert launch("--", f"{tmp_path}/{name}", "-S").returncode == 0
    done = launch("--", "sudo", f"{tmp_path}/win10")
    assert (done.returncode, done.stdout) == (2, "")
    said = f"qemu-launcher: '{tmp_path}/win10' is a script, and not QEMU\n    {HOW_TO_IMPORT_A_SCRIPT}"
    assert done.stderr == f"{said}\n"
    done = launch("--", "win10", "-S", PATH=f"/nowhere:{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    wrapper = (
        "; for one that QEMU's options are given to, write QEMU's name here, and the script's at binary: afterwards"
    )
    assert done.stderr.endswith(f"{HOW_TO_IMPORT_A_SCRIPT}{wrapper}\n")
    done = launch("--", "win10", QEMU, "-S", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert f"'win10' stands before '{QEMU}'" in done.stderr
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "", "no", "no\n"):
        assert launch("--", f"{tmp_path}/{name}", "-S").returncode == 0


def test_a_definition_that_would_be_another_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, wrong in (
        (drafting, "scalar", lambda text: text + "x"),
        (command_line, "split_value", lambda _name, text: text + "x"),
        (command_line, "split_value", lambda _name, text: (text, "")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            with pytest.raises(LauncherError, match="would not give back '1G'"):
                imported(QEMU, "-m", "1G")
