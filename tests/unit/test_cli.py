"""Words on the command line and what they mean."""

import tomllib

import pytest

from qemu_launcher import cli
from qemu_launcher.errors import UsageError
from unit.reading import ROOT


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("win11", cli.Run("win11", untuned=False, quiet=False)),
        ("run win11", cli.Run("win11", untuned=False, quiet=False)),
        ("-q win11", cli.Run("win11", untuned=False, quiet=True)),
        ("win11 --quiet", cli.Run("win11", untuned=False, quiet=True)),
        ("--untuned run win11 -q", cli.Run("win11", untuned=True, quiet=True)),
        ("-d win11", cli.Run("win11", untuned=False, quiet=False, debug=True)),
        ("run win11 --debug --untuned", cli.Run("win11", untuned=True, quiet=False, debug=True)),
        ("./a/win11.yml", cli.Run("./a/win11.yml", untuned=False, quiet=False)),
        ("run status", cli.Run("status", untuned=False, quiet=False)),
        ("-- status", cli.Run("status", untuned=False, quiet=False)),
        ("-q -- status", cli.Run("status", untuned=False, quiet=True)),
        ("run -- -x", cli.Run("-x", untuned=False, quiet=False)),
        ("start win11", cli.Start("win11", untuned=False, quiet=False)),
        ("start -q --untuned ./win11.yml", cli.Start("./win11.yml", untuned=True, quiet=True)),
        ("-- start", cli.Run("start", untuned=False, quiet=False)),
        ("command win11", cli.Command("win11", json=False)),
        ("command --json win11", cli.Command("win11", json=True)),
        ("--json command win11", cli.Command("win11", json=True)),
        ("status", cli.Status(None)),
        ("status win11", cli.Status("win11")),
        ("stop win11", cli.Stop("win11")),
        ("kill kill", cli.Kill("kill")),
        ("pause win11", cli.Pause("win11")),
        ("resume ./win11.yml", cli.Resume("./win11.yml")),
        ("list", cli.List(json=False)),
        ("--json list", cli.List(json=True)),
        ("run list", cli.Run("list", untuned=False, quiet=False)),
        ("qmp win11 query-status", cli.Qmp("win11", "query-status", None)),
        ("qmp win11 eject {}", cli.Qmp("win11", "eject", "{}")),
        ("monitor win11", cli.Monitor("win11", None)),
        ("monitor win11 info block -v", cli.Monitor("win11", "info block -v")),
        ("monitor win11 -- info block", cli.Monitor("win11", "info block")),
        ("monitor win11 --help", cli.Monitor("win11", "--help")),
        ("monitor -- win11 x --version", cli.Monitor("win11", "x --version")),
        ("monitor monitor run", cli.Monitor("monitor", "run")),
        ("monitor --help", cli.Help()),
        ("--help monitor win11 x", cli.Help()),
        ("--version monitor win11 x", cli.Version()),
        ("qmp win11 --help", cli.Help()),
        ("run monitor", cli.Run("monitor", untuned=False, quiet=False)),
        ("status --json", cli.Status(None, json=True)),
        ("--json status win11", cli.Status("win11", json=True)),
        ("status --watch win11", cli.Status("win11", watch=True)),
        ("status --all-users --json", cli.Status(None, all_users=True, json=True)),
        ("status --all-users", cli.Status(None, all_users=True)),
        ("--all-users status", cli.Status(None, all_users=True)),
        ("check", cli.Check(None, json=False)),
        ("check win11", cli.Check("win11", json=False)),
        ("check --json", cli.Check(None, json=True)),
        ("check ./a/win11.yml --json", cli.Check("./a/win11.yml", json=True)),
        ("run check", cli.Run("check", untuned=False, quiet=False)),
        ("limits", cli.Limits(json=False, owner=None)),
        ("limits --json", cli.Limits(json=True, owner=None)),
        ("limits --owner bob --json", cli.Limits(json=True, owner="bob")),
        ("--owner bob limits", cli.Limits(json=False, owner="bob")),
        ("--owner=1000 limits", cli.Limits(json=False, owner="1000")),
        ("release win11", cli.Release("win11", owner=None)),
        ("release win11 --owner alice", cli.Release("win11", owner="alice")),
        ("--owner alice release win11", cli.Release("win11", owner="alice")),
        ("release --owner status win11", cli.Release("win11", owner="status")),
        ("--owner release release release", cli.Release("release", owner="release")),
        ("run limits", cli.Run("limits", untuned=False, quiet=False)),
        ("--help", cli.Help()),
        ("-h", cli.Help()),
        ("help", cli.Help()),
        ("help start", cli.Help()),
        ("run help", cli.Run("help", untuned=False, quiet=False)),
        ("run import", cli.Run("import", untuned=False, quiet=False)),
        ("import -- q", cli.Import(None, None, ("q",))),
        ("import -o x -- q -h --version -- import", cli.Import("x", None, ("q", "-h", "--version", "--", "import"))),
        ("--output import import -- -- -o", cli.Import("import", None, ("--", "-o"))),
        ("import --libvirt import", cli.Import(None, "import", ())),
        ("--libvirt=win11 -o x import", cli.Import("x", "win11", ())),
        ("run --help", cli.Help()),
        ("kill win11 -h", cli.Help()),
        ("--version", cli.Version()),
        ("run -- --help", cli.Run("--help", untuned=False, quiet=False)),
    ],
)
def test_meaning(words: str, meaning: cli.Arguments) -> None:
    found = cli.parse_arguments(words.split())
    assert type(found) is type(meaning)
    assert found == meaning


def test_odd_words_are_kept() -> None:
    assert cli.parse_arguments(["a b\udcff\n"]) == cli.Run("a b\udcff\n", untuned=False, quiet=False)
    assert cli.parse_arguments([""]) == cli.Run("", untuned=False, quiet=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the name of a VM is missing"),
        ("run", "the name of a VM is missing"),
        ("command --json", "the name of a VM is missing"),
        ("-q", "the name of a VM is missing"),
        ("stop", "the name of a VM is missing"),
        ("pause", "the name of a VM is missing"),
        ("resume -q", "-q is an option of run and start, not of resume"),
        ("qmp", "the name of a VM is missing"),
        ("qmp win11", "the QMP command is missing"),
        ("qmp win11 eject {} {}", "unrecognized arguments: {}"),
        ("monitor", "the name of a VM is missing"),
        ("monitor -q win11 x", "-q is an option of run and start, not of monitor"),
        ("monitor --foo win11 x", "there is no option --foo"),
        ("list win11", "list takes no NAME, and here is 'win11'"),
        ("status a b", "unrecognized arguments: b"),
        ("--foo win11", "there is no option --foo"),
        ("-x win11", "there is no option -x"),
        ("command -q win11", "-q is an option of run and start, not of command"),
        ("-q status", "-q is an option of run and start, not of status"),
        ("stop win11 --quiet", "--quiet is an option of run and start, not of stop"),
        ("--untuned kill win11", "--untuned is an option of run and start, not of kill"),
        ("status --json --watch", "--watch and --json do not go together"),
        ("status --watch --all-users", "--watch and --all-users do not go together"),
        ("list --watch", "--watch is an option of status, not of list"),
        ("stop --json", "--json is an option of list, status, command, limits and check, not of stop"),
        ("--json win11", "--json is an option of list, status, command, limits and check, not of run"),
        ("--json=yes run win11", "--json is an option of list, status, command, limits and check, not of run"),
        ("check a b", "unrecognized arguments: b"),
        ("check -q a", "-q is an option of run and start, not of check"),
        ("release", "the name of a VM is missing"),
        ("release --owner bob", "the name of a VM is missing"),
        ("release win11 --owner", "argument --owner: expected one argument"),
        ("status win11 --all-users", "--all-users shows the VMs of all users, and takes no NAME"),
        ("--all-users win11", "--all-users is an option of status, not of run"),
        ("release win11 --all-users", "--all-users is an option of status, not of release"),
        ("--owner bob stop win11", "--owner is an option of limits and release, not of stop"),
        ("--owner bob win11", "--owner is an option of limits and release, not of run"),
        ("limits win11", "limits takes no NAME, and here is 'win11'"),
        ("limits win11 win12", "limits takes no NAME, and here is 'win11'"),
        ("limits --all-users", "--all-users is an option of status, not of limits"),
        ("import", "QEMU's command line is missing: write it after import --, as for a shell"),
        ("import --", "QEMU's command line is missing: write it after import --, as for a shell"),
        ("import qemu -- x", "'qemu' stands before --: write import -- and then QEMU's command line"),
        ("import --libvirt x -- q", "import takes either --libvirt or, after --, QEMU's command line"),
        ("import --libvirt", "argument --libvirt: expected one argument"),
        ("import -q -- x", "-q is an option of run and start, not of import"),
        ("run -o x y", "-o is an option of import, not of run"),
        ("status -- -q x", "unrecognized arguments: x"),
        ("--quiet=yes win11", "--quiet takes no value, and here is 'yes'"),
        ("list --json=1", "--json takes no value, and here is '1'"),
        ("--help=1", "--help takes no value, and here is '1'"),
        ("run -h=1", "-h takes no value, and here is '1'"),
        ("list -- win11", "list takes no NAME, and here is 'win11'"),
    ],
)
def test_refused(words: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        cli.parse_arguments(words.split())
    assert caught.value.message == message
    assert caught.value.hint == "qemu-launcher --help shows what can be said"
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("words", "stray"),
    [
        ("import -m 2G", "-m"),
        ("import qemu -m 2G", "qemu"),
        ("import -o x.yml qemu -d int", "qemu"),
        ("import -S", "-S"),
        ("import -q", "-q"),
    ],
)
def test_import_without_two_hyphens(words: str, stray: str) -> None:
    with pytest.raises(UsageError) as caught:
        cli.parse_arguments(words.split())
    assert caught.value.message == f"import does not know {stray!r}"
    assert caught.value.hint == f"write -- before QEMU's command line: qemu-launcher import -- {stray} ..."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("import ./win10.sh", "'./win10.sh' is a script, and not QEMU"),
        ("import win11.xml", "'win11.xml' is XML by its name, and not QEMU"),
        ("import -o x.yml win11.yml", "'win11.yml' is a definition by its name, and not QEMU"),
        ("import bash -c qemu", "'bash' is a shell, and not QEMU"),
    ],
)
def test_import_of_what_two_hyphens_would_not_help(words: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        cli.parse_arguments(words.split())
    assert caught.value.message == message
    assert "write -- before" not in (caught.value.hint or "")


NO_SLIP = "qemu-launcher --help shows what can be said"


@pytest.mark.parametrize(
    ("words", "name", "hint"),
    [
        ("startt first", "startt", "did you mean start?"),
        ("--untuned stat first", "stat", "did you mean start?"),
        ("stattus --json", "stattus", "did you mean status?"),
        ("relase first --owner bob", "relase", "did you mean release?"),
        ("--owner bob relase", "relase", "did you mean release?"),
        ("impotr -o x.yml", "impotr", "did you mean import?"),
        ("first stop", "first", "the command comes first: qemu-launcher stop first"),
        ("first second", "first", NO_SLIP),
        ("win11 win12", "win11", NO_SLIP),
    ],
)
def test_mistyped_commands(words: str, name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        cli.parse_arguments(words.split())
    assert (caught.value.message, caught.value.hint) == (f"there is no command {name!r}", hint)


@pytest.mark.parametrize(
    ("words", "option", "hint"),
    [
        ("--jsn list", "--jsn", "did you mean --json?"),
        ("list --JSON", "--JSON", "did you mean --json?"),
        ("run --untune win11", "--untune", "did you mean --untuned?"),
        ("limits --user bob", "--user", NO_SLIP),
        ("import --libvrit win11", "--libvrit", "did you mean --libvirt?"),
    ],
)
def test_mistyped_options(words: str, option: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        cli.parse_arguments(words.split())
    assert (caught.value.message, caught.value.hint) == (f"there is no option {option}", hint)


@pytest.mark.parametrize("words", ["startt", "startt -q", "-- startt first"])
def test_one_word_is_a_vm(words: str) -> None:
    """Whether there is one is looked up later, and what is near then."""
    if "--" in words:
        with pytest.raises(UsageError, match="unrecognized arguments: first"):
            cli.parse_arguments(words.split())
    else:
        assert cli.parse_arguments(words.split()) == cli.Run("startt", untuned=False, quiet="-q" in words)


def test_help_fits_a_terminal_and_names_every_command() -> None:
    lines = cli.HELP.splitlines()
    assert max(map(len, lines)) <= 80
    section = lines[lines.index("Start and end:") : lines.index("Options:")]
    assert tuple(line.split()[0] for line in section if line.startswith("  ")) == cli.COMMANDS


def test_help_names_every_option_and_whose_it_is() -> None:
    lines = cli.HELP.partition("Options:\n")[2].splitlines()
    for option, commands in cli.OPTIONS.items():
        (line,) = [line for line in lines[: lines.index("")] if option in line.split()]
        assert f" {', '.join(commands)}: " in line


def test_version_is_the_distribution_s() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == cli.VERSION
