"""The root side of qemu-launcher: three operations on a caller's own virtual machine, and nothing else.

Read it in this order: contract (what exists), bus (how a call comes in), polkit and limits (whether, how much),
operations (the acts), target (who is that process). SECURITY considerations are comments where they bind.
"""
