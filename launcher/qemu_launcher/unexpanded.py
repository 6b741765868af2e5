"""`~` and `$HOME` where no shell has replaced them: a hint for a file that is not there.

Why it exists: whoever writes definitions has written command lines before. Nothing is expanded, since what is written
is what QEMU gets, and nothing is refused, since a folder may be called so.
"""

import re
from collections.abc import Iterable

HINT = "~ and $HOME are the shell's; write the whole path"

_WORD = r"(?:^|[=,:])(?:~[\w.-]*/|\$HOME\b|\$\{HOME\})"


def hint(path: str, otherwise: str | None = None) -> str | None:
    """HINT when `path` begins with what a shell would have replaced; else `otherwise`."""
    return HINT if path.startswith(("~", "$")) else otherwise


def is_among(words: Iterable[str]) -> bool:
    """Whether a path in one of these arguments of QEMU's does: `file=~/disk.img`."""
    return any(re.search(_WORD, word) for word in words)
