"""The ways of keeping CPUs for a VM. One so far: partition.py; where the kernel lacks it, nothing can be shielded.

A mechanism writes cgroup files of scopes that the records name, and no others. Every method may raise OSError; the
caller then withdraws.
"""
