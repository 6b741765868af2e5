"""/dev/kvm, and the input devices that QEMU reads itself.

Pure judgement over a Tree. Fixes are made for one user, and prefer the line for udev that opens one device to the group
that opens all of them.
"""

from collections.abc import Iterator

from .finding import Finding, Severity
from .tree import READ, WRITE, Tree

KVM = "/dev/kvm"
_FLAGS = {"vmx": "kvm_intel", "svm": "kvm_amd"}
INPUT_RULES = "/etc/udev/rules.d/70-qemu-evdev.rules"


def kvm(tree: Tree, wanted: str | None, user: str) -> Iterator[Finding]:
    """`wanted`: "needed", "preferred" (there is something to fall back to), or None: then nothing is said."""
    if wanted is None:
        return
    severity: Severity = "error" if wanted == "needed" else "warning"
    instead = "" if wanted == "needed" else ": QEMU will fall back to emulation, which is many times slower"
    module = _module(tree)
    if not tree.exists(KVM):
        yield Finding(severity, "kvm", f"there is no {KVM}{instead}", _how_to_have_kvm(tree, module))
    elif tree.names("/sys/class/misc") and not tree.exists("/sys/class/misc/kvm"):
        # systemd-tmpfiles and kmod make the node at boot, whether a driver is behind it or not.
        yield Finding(severity, "kvm", f"nothing is behind {KVM}{instead}", _how_to_have_kvm(tree, module))
    elif not tree.may(KVM, READ | WRITE):
        group = tree.group_of(KVM)
        fix = join_group(group, user) if group else f"sudo setfacl -m u:{user}:rw {KVM} (until the next boot)"
        yield Finding(severity, "kvm", f"{KVM} is not yours to read and write{instead}", fix)
    else:
        yield Finding("ok", "kvm", f"{KVM} is yours to use")


def _module(tree: Tree) -> str | None:
    """The module for this CPU, None if it cannot virtualise, or does not say."""
    for line in (tree.text("/proc/cpuinfo") or "").splitlines():
        name, _, flags = line.partition(":")
        if name.strip() == "flags":
            return next((module for flag, module in _FLAGS.items() if flag in flags.split()), None)
    return None


def _how_to_have_kvm(tree: Tree, module: str | None) -> str:
    if module is not None:
        return f"sudo modprobe {module}; if that fails, virtualisation is switched off in the firmware (VT-x, SVM)"
    if "flags" in (tree.text("/proc/cpuinfo") or ""):
        return (
            "the CPU shows neither vmx nor svm: switch virtualisation on in the firmware (VT-x, SVM), or, if this host "
            "is itself a virtual machine, nested virtualisation where it runs; or use accel: tcg"
        )
    return "load the kernel's KVM module, or use accel: tcg"


def evdev(tree: Tree, nodes: list[str], user: str) -> Iterator[Finding]:
    """QEMU opens them for reading and writing (the LEDs are written)."""
    for node in nodes:
        real = tree.target(node)
        name = node if real == node else f"{node} ({real})"
        if not tree.exists(node):
            there = [f"/dev/input/by-id/{entry}" for entry in tree.names("/dev/input/by-id") if "event" in entry]
            fix = f"plug it in, or use another: {', '.join(there)}" if there else "ls -l /dev/input/by-id shows what is"
            yield Finding("error", "evdev", f"there is no input device {node}", fix)
        elif not tree.may(node, READ | WRITE):
            yield Finding(
                "error", "evdev", f"the input device {name} is not yours to read and write", _open(tree, real, user)
            )
        else:
            yield Finding("ok", "evdev", f"the input device {name} is yours to use")


def _open(tree: Tree, node: str, user: str) -> str:
    event = node.rpartition("/")[2]
    label = tree.text(f"/sys/class/input/{event}/device/name")
    # In a rule, a quote ends the value, and these two make it a pattern.
    which = f'ATTRS{{name}}=="{label}"' if label and not set(label) & set("\"'*?[\\") else 'KERNEL=="event*"'
    rule = f'SUBSYSTEM=="input", {which}, OWNER="{user}"'
    words = [udev_line(rule, INPUT_RULES, "input")]
    if (group := tree.group_of(node)) is not None:
        words.append(f"or all input devices, and so all that is typed here: {join_group(group, user)}")
    return "\n".join(words)


def join_group(group: str, user: str) -> str:
    """How to put the user into a group."""
    return f"sudo usermod -aG {group} {user}, then log out and in"


def udev_line(rule: str, file: str, subsystem: str) -> str:
    """How to make a udev rule hold, now and after the next boot."""
    return (
        f"echo '{rule}' | sudo tee -a {file}; sudo udevadm control --reload; "
        f"sudo udevadm trigger --subsystem-match={subsystem}"
    )
