"""The TPM of a VM of libvirt's: the host's own, or what to start for an emulated one. Pure."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from ..options import Property
from .domainplaces import attribute, own_alias, safe
from .drafting import Option


def emulated(root: ET.Element, element: ET.Element) -> Option:
    """swtpm is started by libvirt, and keeps what it knows in a folder of libvirt's."""
    version = "1.2" if attribute(element, "backend", "version") == "1.2" else "2"
    uuid = safe((root.findtext("uuid") or "").strip(), "UUID")
    secret = safe(attribute(element, "backend/encryption", "secret"))
    how = "It is encrypted: write what virsh secret-get-value --plain {} prints into a file, and give swtpm"
    key = (f"{how.format(secret)} --key pwdfile=FILE,mode=aes-256-cbc.",) if secret else ()
    two = "--tpm2 " if version == "2" else ""
    return Option(
        "tpmdev",
        None,
        (
            f"Left out: the emulated TPM. Start swtpm socket {two}--tpmstate dir=DIR --ctrl type=unixio,path=DIR/sock "
            "yourself, and add - chardev: [socket, id: tpm, path: DIR/sock], - tpmdev: [emulator, id: tpm0, "
            f"chardev: tpm] and - device: [{_model(root, element)}, tpmdev: tpm0]",
            f"What the TPM knows, keys of the guest's disks too, is in /var/lib/libvirt/swtpm/{uuid}/tpm{version}, or "
            f"if the VM is of your own libvirt, in ~/.config/libvirt/qemu/swtpm/{uuid}/tpm{version}: copy it to DIR.",
            *key,
        ),
        left_out=True,
    )


def of_the_host(root: ET.Element, element: ET.Element) -> Iterator[Option]:
    """virsh itself opens it, and may not be allowed to."""
    path = attribute(element, "backend/device", "path") or "/dev/tpm0"
    why = "You must be allowed to write to it, and nothing else may have it open."
    ident = own_alias(element) or "tpm0"
    yield Option("tpmdev", ("passthrough", Property("id", f"tpm-{ident}"), Property("path", path)), (why,))
    yield Option("device", (_model(root, element), Property("tpmdev", f"tpm-{ident}"), Property("id", ident)))


def _model(root: ET.Element, element: ET.Element) -> str:
    model = safe(element.get("model", ""), "tpm-tis")
    is_arm = attribute(root, "os/type", "arch") == "aarch64"
    return "tpm-tis-device" if is_arm and model == "tpm-tis" else model
