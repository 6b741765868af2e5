"""All exceptions of the helper.

    Exception
    |-- Refusal                 the caller gets `wire_name` and str(error), nothing more
    |   |-- NotAuthorized       polkit, or the caller's identity, says no
    |   |-- TargetRefused       the process or thread is not the caller's to tune
    |   |-- LimitExceeded       more than this user may have
    |   |-- Conflict            somebody else holds it
    |   |-- Unsupported         this host cannot do it
    |   |-- Failed              our fault, or the administrator's; the journal knows more
    |   |-- InvalidArguments    shape or range of a wire value
    |   `-- UnknownMethod       not in the table, so it does not exist
    `-- CallFailed              a D-Bus call of ours failed; never goes on the wire as it is

Texts of refusals are complete sentences for the user without the full stop, made of fixed words, numbers and
validated names; never of anything a client sent unchecked.
"""

from typing import ClassVar


class Refusal(Exception):  # noqa: N818  a refusal is the helper working, not an error of it
    """The caller does not get what he asked for."""

    wire_name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.wire_name = vars(cls).get("wire_name", f"org.qemulauncher.Error.{cls.__name__}")


class NotAuthorized(Refusal):
    """org.qemulauncher.Error.NotAuthorized."""


class TargetRefused(Refusal):
    """org.qemulauncher.Error.TargetRefused."""


class LimitExceeded(Refusal):
    """org.qemulauncher.Error.LimitExceeded."""


class Conflict(Refusal):
    """org.qemulauncher.Error.Conflict."""


class Unsupported(Refusal):
    """org.qemulauncher.Error.Unsupported."""


class Failed(Refusal):
    """org.qemulauncher.Error.Failed."""


class InvalidArguments(Refusal):
    """The bus's own name for this, so that every D-Bus tool knows it."""

    wire_name = "org.freedesktop.DBus.Error.InvalidArgs"


class UnknownMethod(Refusal):
    """The bus's own name for this."""

    wire_name = "org.freedesktop.DBus.Error.UnknownMethod"


class CallFailed(Exception):  # noqa: N818  it names what happened to the call
    """A D-Bus call that the helper made came back as an error, as nonsense, or not at all.

    `name` is the D-Bus error name, or one of our own: "timeout", "lost", "unexpected". `text` may hold foreign words.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name, self.text = name, text
