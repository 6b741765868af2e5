"""Which file a name or a path means, and what is said when there is none."""

from pathlib import Path

import pytest

from qemu_launcher import locate
from qemu_launcher.errors import DefinitionError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three folders as they are searched, all below `tmp_path`; returns the user's."""
    system = (tmp_path / "etc", tmp_path / "local")
    monkeypatch.setattr(locate, "SYSTEM_FOLDERS", system)
    own = tmp_path / "config" / "qemu-launcher"
    for folder in (own, *system):
        folder.mkdir(parents=True)
    return own


def environment(home: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(home.parent)}


def test_order_of_the_folders(home: Path, tmp_path: Path) -> None:
    folders = [home, tmp_path / "etc", tmp_path / "local"]
    for folder in reversed(folders):
        path = folder / "vm.yml"
        path.touch()
        assert locate.find("vm", environment(home)) == ("vm", path)


def test_own_folder_replaces_all(home: Path, tmp_path: Path) -> None:
    (home / "vm.yml").touch()
    (tmp_path / "own").mkdir()
    environ = environment(home) | {"QEMU_LAUNCHER_CONFIG_DIR": str(tmp_path / "own")}
    with pytest.raises(DefinitionError, match=rf"^there is no VM 'vm': no vm\.yml in {tmp_path}/own$"):
        locate.find("vm", environ)
    (tmp_path / "own" / "vm.yml").touch()
    assert locate.find("vm", environ) == ("vm", tmp_path / "own" / "vm.yml")


def test_folders_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    system = (Path("/etc/qemu-launcher/vms"), Path("/usr/local/etc/qemu-launcher"))
    usual = (Path("/home/alice/.config/qemu-launcher"), *system)
    assert locate.folders({}) == usual
    assert locate.folders({"XDG_CONFIG_HOME": ""}) == usual
    assert locate.folders({"XDG_CONFIG_HOME": "relative"}) == usual
    assert locate.folders({"XDG_CONFIG_HOME": "/x"}) == (Path("/x/qemu-launcher"), *system)
    assert locate.folders({"QEMU_LAUNCHER_CONFIG_DIR": "own"}) == (Path("own"),)
    assert locate.folders({"QEMU_LAUNCHER_CONFIG_DIR": ""}) == usual


@pytest.mark.parametrize("argument", ["./vm.yml", "vm.yml", "/a/b/vm.yaml", "../vm.yml", "a/vm"])
def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    (tmp_path / "here" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    argument = argument.replace("/a/b/", f"{tmp_path}/")
    Path(argument).touch()
    assert locate.find(argument, {}) == ("vm", Path(argument))


def test_not_found_names_the_folders_and_what_is_near(home: Path, tmp_path: Path) -> None:
    (home / "win11.yml").touch()
    (tmp_path / "etc" / "a b.yml").touch()
    with pytest.raises(DefinitionError) as caught:
        locate.find("win12", environment(home))
    assert caught.value.message == f"there is no VM 'win12': no win12.yml in {home}, {tmp_path}/etc, {tmp_path}/local"
    assert caught.value.hint == "did you mean win11?"


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("win11.yml", "did you mean win11? with a slash or .yml it is the path of a file"),
        ("./win11", "did you mean win11? with a slash or .yml it is the path of a file"),
        ("/no/such/place/win12.yml", "did you mean win11? with a slash or .yml it is the path of a file"),
        ("./here", "did you mean ./here.yml?"),
        ("./elsewhere.yml", None),
        ("here.yml/x", None),
    ],
)
def test_a_path_that_leads_nowhere(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, hint: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (home / "win11.yml").touch()
    Path("here.yml").touch()
    with pytest.raises(DefinitionError) as caught:
        locate.find(argument, environment(home))
    assert caught.value.message == f"cannot read {argument}: No such file or directory"
    assert caught.value.hint == hint


def test_not_found_may_be_a_command(home: Path) -> None:
    with pytest.raises(DefinitionError) as caught:
        locate.find("stauts", environment(home), ("run", "status"))
    assert caught.value.hint == "did you mean status?"


def test_a_word_is_a_slip_of_a_command_only_if_it_is_near_one(home: Path) -> None:
    """first, of the README, is as near to list as VMs' names may be to each other."""
    with pytest.raises(DefinitionError) as caught:
        locate.find("first", environment(home), ("run", "list", "status"))
    assert caught.value.hint == "its definition is described in qemu-launcher.yml(5)"
    (home / "first2.yml").touch()
    with pytest.raises(DefinitionError) as caught:
        locate.find("first", environment(home), ("run", "list", "status"))
    assert caught.value.hint == "did you mean first2?"


def test_a_vm_called_as_a_command_is_not_there(home: Path) -> None:
    with pytest.raises(DefinitionError) as caught:
        locate.find("status", environment(home), ("run", "status"))
    assert caught.value.hint == "status is a command too: qemu-launcher status"


def test_nothing_near(home: Path) -> None:
    with pytest.raises(DefinitionError) as caught:
        locate.find("x", environment(home))
    assert caught.value.hint == "its definition is described in qemu-launcher.yml(5)"


def test_wrong_ending(home: Path) -> None:
    (home / "vm.yaml").touch()
    with pytest.raises(DefinitionError) as caught:
        locate.find("vm", environment(home))
    assert caught.value.message == f"{home}/vm.yaml is not called vm.yml"
    assert caught.value.hint == f"rename it, or give its path: {home}/vm.yaml"


def test_a_dangling_link_is_found(home: Path) -> None:
    (home / "vm.yml").symlink_to("nowhere")
    assert locate.find("vm", environment(home)) == ("vm", home / "vm.yml")


def test_a_file_where_a_folder_should_be(home: Path, tmp_path: Path) -> None:
    home.rmdir()
    home.touch()
    (tmp_path / "etc" / "vm.yml").touch()
    assert locate.find("vm", environment(home)) == ("vm", tmp_path / "etc" / "vm.yml")


def test_a_folder_that_cannot_be_searched(home: Path) -> None:
    home.rmdir()
    home.symlink_to(home.name)
    with pytest.raises(DefinitionError, match=r"vm.yml: Too many levels of symbolic links$"):
        locate.find("vm", environment(home))


@pytest.mark.parametrize("name", ["a", "A-b_9", "0", "x" * 48])
def test_names(name: str) -> None:
    assert locate.vm_name(name) == name
    assert locate.vm_name(f"/some/where/{name}.yml") == name


@pytest.mark.parametrize("name", ["", "-a", "_a", "a b", "a.b", "ä", "x" * 49, "a\n", "\udcff", "\x1b[1m"])
def test_refused_names(name: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        locate.vm_name(name)
    assert caught.value.message == f"{name!r} is no name for a VM"
    path = f"/some/where/{name}.yml"
    with pytest.raises(DefinitionError) as caught:
        locate.vm_name(path)
    assert caught.value.message == f"{path!r} gives {name!r}, which is no name for a VM"


def test_one_ending_is_taken_off_as_list_does_it() -> None:
    with pytest.raises(DefinitionError, match=r"^'\./vm\.yaml\.yml' gives 'vm\.yaml', which is no name for a VM$"):
        locate.vm_name("./vm.yaml.yml")


def test_a_folder_is_no_path_of_a_definition() -> None:
    with pytest.raises(DefinitionError, match=r"^'vm/' gives '', which is no name for a VM$"):
        locate.find("vm/", {})


def test_told_to_a_shell_by_name_only_where_the_name_finds_this_file(home: Path, tmp_path: Path) -> None:
    own, shadowed, elsewhere = home / "vm.yml", tmp_path / "etc" / "vm.yml", tmp_path / "a b" / "vm.yml"
    elsewhere.parent.mkdir()
    for path in (own, shadowed, elsewhere, home / "other.yaml"):
        path.touch()
    environ = environment(home)
    assert locate.shell_word("vm", own, environ) == "vm"
    assert locate.shell_word("vm", shadowed, environ) == str(shadowed)
    assert locate.shell_word("vm", elsewhere, environ) == f"'{elsewhere}'"
    assert locate.shell_word("other", home / "other.yaml", environ) == str(home / "other.yaml")
    assert locate.shell_word("vm", Path("vm.yml"), environ) == "vm.yml"
    assert locate.shell_word("vm", Path("-x/vm.yml"), environ) == "./-x/vm.yml"
    own.unlink()
    assert locate.shell_word("vm", shadowed, environ) == "vm"
    assert locate.shell_word("vm", home / ".." / ".." / "etc" / "vm.yml", environ) == "vm"


def test_list_of_names(home: Path, tmp_path: Path) -> None:
    for path in (
        home / "b.yml",
        tmp_path / "etc" / "a.yml",
        tmp_path / "etc" / "b.yml",
        home / "c.txt",
        home / "-.yml",
    ):
        path.touch()
    assert locate.names([*locate.folders(environment(home)), tmp_path / "missing"]) == ["a", "b"]
