"""The root side of qemu-launcher: three operations on a caller's own virtual machine, and nothing else.

Read it in this order: contract (what exists), bus and service (how a call comes in, and whether), limits (how much),
operations (what is done), target (to whom, and the acts), records (how everything is taken back).
SECURITY considerations are comments where they bind.
"""
