"""From other worlds: a definition made of QEMU's command line, or of a VM of libvirt's.

Read command_line for the one and libvirt for the other; both end in a draft that is written, read back, and compared
with the words it was made of before anybody sees it.
"""
