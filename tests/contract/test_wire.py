"""The wire is written down in several places that agree: XML, both contract tables, polkit, bus policy, unit."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from qemu_launcher import helper_proxy
from qemu_launcher_helper import contract
from qemu_launcher_helper.bus import DAEMON
from qemu_launcher_helper.operations import Operation

ROOT = Path(__file__).parents[2]
XML = ET.parse(ROOT / "dbus/org.qemulauncher.Helper1.xml").getroot()
POLICY = ET.parse(ROOT / "polkit/org.qemulauncher.policy").getroot()
BUS_POLICY = ET.parse(ROOT / "dbus/org.qemulauncher.Helper1.conf").getroot()
RULES = (ROOT / "polkit/50-qemu-launcher.rules").read_text()


def xml_methods() -> dict[str, tuple[str, str]]:
    """Signatures of arguments and answer, by member."""
    methods = {}
    for method in XML.findall("interface/method"):
        types: dict[str, str] = {"in": "", "out": ""}
        for arg in method.findall("arg"):
            types[arg.attrib["direction"]] += arg.attrib["type"]
        methods[method.attrib["name"]] = (types["in"], types["out"])
    return methods


def test_names() -> None:
    assert XML.attrib["name"] == contract.OBJECT_PATH
    assert [interface.attrib["name"] for interface in XML.findall("interface")] == [contract.INTERFACE]
    assert contract.BUS_NAME == contract.INTERFACE


def test_only_methods() -> None:
    """No properties and no signals: nothing else could be parsed, or leak."""
    assert {element.tag for element in XML.iter()} <= {"node", "interface", "method", "arg"} | {
        element.tag for element in XML.iter() if not isinstance(element.tag, str)
    }
    assert "h" not in "".join(signature for pair in xml_methods().values() for signature in pair)


def test_helpers_table() -> None:
    assert {name: method[:2] for name, method in contract.METHODS.items()} == xml_methods()


def test_every_method_has_its_operation() -> None:
    """What is looked up by name is a method of Operation's own, and each of these belongs to a member."""
    named = {method[3] for method in contract.METHODS.values()}
    own = [name for name, member in vars(Operation).items() if callable(member) and not name.startswith("_")]
    assert sorted(named) == sorted(own)


def test_launchers_table() -> None:
    assert xml_methods() == helper_proxy.METHODS


def test_size_of_a_message() -> None:
    """What is larger the helper leaves unanswered: the launcher must know, and say so at once."""
    assert helper_proxy.MAX_MESSAGE_BYTES == contract.MAX_MESSAGE_BYTES


def test_actions_in_the_xml() -> None:
    """The comment above each method names the action that the helper asks about."""
    text = (ROOT / "dbus/org.qemulauncher.Helper1.xml").read_text()
    comments = re.findall(r"<!--((?:(?!-->).)*)-->\s*<method name=\"(\w+)\">", text, re.DOTALL)
    assert [name for _, name in comments] == list(xml_methods()), "each has one"
    for comment, name in comments:
        named = re.findall(r"org\.qemulauncher\.[a-z-]+", comment)
        action = contract.METHODS[name][2]
        assert named == ([action] if action else []), name


def test_polkit_knows_exactly_our_actions() -> None:
    actions = {method[2] for method in contract.METHODS.values() if method[2]}
    assert {action.attrib["id"] for action in POLICY.findall("action")} == actions


@pytest.mark.parametrize("action", POLICY.findall("action"), ids=lambda action: action.attrib["id"])
def test_polkit_defaults(action: ET.Element) -> None:
    others = action.attrib["id"] == contract.MANAGE_OTHERS
    defaults = {element.tag: element.text for element in action.findall("defaults/*")}
    assert defaults == {
        "allow_any": "auth_admin",
        "allow_inactive": "auth_admin",
        "allow_active": "auth_admin" if others else "auth_admin_keep",
    }
    implied = {note.attrib["key"]: set((note.text or "").split()) for note in action.findall("annotate")}
    three = {"org.qemulauncher.set-memlock", "org.qemulauncher.pin-threads", "org.qemulauncher.set-scheduler"}
    assert implied == ({} if others else {"org.freedesktop.policykit.imply": three - {action.attrib["id"]}})


@pytest.mark.parametrize("action", POLICY.findall("action"), ids=lambda action: action.attrib["id"])
def test_messages_name_only_facts_that_the_helper_gives(action: ET.Element) -> None:
    given = {
        "org.qemulauncher.set-memlock": {"user", "vm", "bytes"},
        "org.qemulauncher.pin-threads": {"user", "vm", "cpus"},
        "org.qemulauncher.set-scheduler": {"user", "vm", "policy", "priority"},
        contract.MANAGE_OTHERS: {"user"},
    }
    message = action.findtext("message") or ""
    assert set(re.findall(r"\$\((\w+)\)", message)) <= given[action.attrib["id"]]


def test_the_rule_is_about_the_three_operations() -> None:
    code = "\n".join(line for line in RULES.splitlines() if not line.lstrip().startswith("//"))
    three = {"org.qemulauncher.set-memlock", "org.qemulauncher.pin-threads", "org.qemulauncher.set-scheduler"}
    assert set(re.findall(r"org\.qemulauncher\.[a-z-]+", code)) == three
    assert 'isInGroup("qemu-launcher")' in code


def bus_rules(**who: str) -> list[dict[str, str]]:
    """The rules of the part of the bus policy for `who`, with "rule" for allow or deny."""
    [part] = [part for part in BUS_POLICY.findall("policy") if part.attrib == who]
    return [{"rule": rule.tag, **rule.attrib} for rule in part]


def test_bus_policy_denies_by_default() -> None:
    name = contract.BUS_NAME
    assert bus_rules(context="default") == [
        {"rule": "deny", "own": name},
        {"rule": "deny", "send_destination": name},
    ]


def test_bus_policy_opens_one_interface_to_members() -> None:
    call = {
        "rule": "allow",
        "send_destination": contract.BUS_NAME,
        "send_interface": contract.INTERFACE,
        "send_type": "method_call",
    }
    assert bus_rules(group="qemu-launcher") == [call]
    assert call in bus_rules(user="root")
    assert {"rule": "allow", "own": contract.BUS_NAME} in bus_rules(user="root")


def test_activation() -> None:
    lines = (ROOT / "dbus/org.qemulauncher.Helper1.service").read_text().splitlines()
    unit = (ROOT / "helper/qemu-launcher-helper.service").read_text().splitlines()
    assert f"Name={contract.BUS_NAME}" in lines
    assert "User=root" in lines
    assert "SystemdService=qemu-launcher-helper.service" in lines
    [exec_line] = [line for line in lines if line.startswith("Exec=")]
    assert "ExecStart" + exec_line.removeprefix("Exec") in unit
    assert f"BusName={contract.BUS_NAME}" in unit
    assert "Type=dbus" in unit


def test_error_names() -> None:
    """What the specification of the wire lists, and nothing else, can be an error's name."""
    names = {error.__name__: error.wire_name for error in contract.Refusal.__subclasses__()}
    own = ["NotAuthorized", "TargetRefused", "LimitExceeded", "Conflict", "Unsupported", "Failed"]
    assert names == {name: f"org.qemulauncher.Error.{name}" for name in own} | {
        "InvalidArguments": f"{DAEMON[0]}.Error.InvalidArgs",
        "UnknownMethod": f"{DAEMON[0]}.Error.UnknownMethod",
    }


def test_version() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{contract.VERSION}"' in pyproject
