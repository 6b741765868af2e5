"""The launcher's copy of the contract, against the XML that is authoritative."""

from pathlib import Path
from xml.etree import ElementTree

from qemu_launcher import helper_proxy

XML = Path(__file__).resolve().parents[2] / "dbus" / "org.qemulauncher.Helper1.xml"


def test_methods_names_and_path_are_those_of_the_contract() -> None:
    node = ElementTree.parse(XML).getroot()
    (interface,) = node.findall("interface")
    methods = {}
    for method in interface.findall("method"):
        args = [(arg.get("direction"), arg.get("type") or "") for arg in method.findall("arg")]
        methods[method.get("name")] = tuple(
            "".join(kind for direction, kind in args if direction == wanted) for wanted in ("in", "out")
        )
    assert methods == helper_proxy.METHODS
    assert node.get("name") == helper_proxy.OBJECT_PATH
    assert interface.get("name") == helper_proxy.INTERFACE == helper_proxy.BUS_NAME


def test_object_path_of_a_scope_is_systemds() -> None:
    """Every byte but ASCII letters and digits as _xx: sd_bus_path_encode(3)."""
    path = helper_proxy.scope_path(1000, "Win_11-b")
    assert path == "/org/freedesktop/systemd1/unit/qemu_2dlauncher_2d1000_2dWin_5f11_2db_2escope"
