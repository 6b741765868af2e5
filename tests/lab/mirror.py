"""Where packages come from: the mirror this machine already uses, as its own apt configuration says.

No mirror is named anywhere in the project. A suite that the machine itself does not use is asked from the same site,
since a Debian mirror carries all of them.
"""

from __future__ import annotations

import shutil
import subprocess

from lab.errors import LabError, MissingTool

# In the order of apt-get's own fields; `$(NAME)` is a stanza field, see apt-get(8), indextargets.
FORMAT = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(CODENAME)|$(REPO_URI)"


def debian_mirrors(targets: str) -> dict[str, str]:
    """Mirror by suite codename, from the output of `apt-get indextargets`; main archive only, first wins."""
    mirrors: dict[str, str] = {}
    for line in targets.splitlines():
        fields = line.split("|")
        if len(fields) != 5:
            continue
        origin, label, component, codename, uri = fields
        if (origin, label, component) == ("Debian", "Debian", "main") and uri.startswith(("http:", "https:", "file:")):
            mirrors.setdefault(codename, uri)
    return mirrors


def mirror_for(suite: str, targets: str) -> str:
    """The mirror to take `suite` from; a machine without any Debian mirror is an error."""
    mirrors = debian_mirrors(targets)
    if suite in mirrors:
        return mirrors[suite]
    if not mirrors:
        raise LabError("apt on this machine knows no Debian mirror (apt-get indextargets); run apt-get update first")
    return next(iter(mirrors.values()))


def host_mirror(suite: str) -> str:
    """The mirror of this machine's own apt configuration for `suite`."""
    if shutil.which("apt-get") is None:
        raise MissingTool("apt-get", "apt")
    command = ["apt-get", "indextargets", "--format", FORMAT, "Created-By: Packages"]
    return mirror_for(suite, subprocess.run(command, check=True, capture_output=True, text=True).stdout)
