"""What users are called, by the user database.

Why it exists: a uid may have no entry there, in a container or where the network that has it is down, and nothing that
the launcher does needs one.
"""

import os
import pwd


def name_of(uid: int) -> str | None:
    """The user's name, None where the user database has no such uid."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def own_name() -> str:
    """The name of the user we are, his number if he has none."""
    return name_of(os.geteuid()) or str(os.geteuid())
