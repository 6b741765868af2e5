"""What can go wrong with the lab, told apart by who has to act on it.

LabError
  MissingTool      this machine lacks a program (install it)
  LabDied          the virtual machine ended or never came up (read the console tail in the message)
  CommandFailed    a command inside ended with a status other than 0 (read its output)
    CommandTimeout it was given up on; it may still run inside
"""

# ruff: noqa: N818  named for what happened, as in the product's own error trees

from __future__ import annotations


class LabError(Exception):
    """The lab cannot do what was asked; the text says why, in full sentences."""


class MissingTool(LabError):
    """A program that the lab needs is not installed on this machine."""

    def __init__(self, tool: str, package: str) -> None:
        super().__init__(f"{tool} is not installed; on Debian: apt-get install {package}")
        self.tool = tool
        self.package = package


class LabDied(LabError):
    """QEMU ended, the guest panicked, or it made no progress for too long. Nothing of it is left running."""


class CommandFailed(LabError):
    """A command inside the lab ended with a status other than 0."""

    def __init__(self, summary: str, status: int, output: str) -> None:
        super().__init__(f"{summary}\n{output}".rstrip())
        self.status = status
        self.output = output


class CommandTimeout(CommandFailed):
    """A command inside the lab took longer than it was allowed; the connection was cut, the command may live on."""
