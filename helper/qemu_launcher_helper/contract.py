"""What exists on the wire, and every limit that does not depend on the user. Plain data.

dbus/org.qemulauncher.Helper1.xml is authoritative; tests/contract compares this table with it, with the launcher's
own copy, with polkit's actions and with the bus policy.
"""

import re

VERSION = "0.1.0"
BUS_NAME = INTERFACE = "org.qemulauncher.Helper1"
OBJECT_PATH = "/org/qemulauncher/Helper1"

SET_MEMLOCK = "org.qemulauncher.set-memlock"
PIN_THREADS = "org.qemulauncher.pin-threads"
SET_SCHEDULER = "org.qemulauncher.set-scheduler"
MANAGE_OTHERS = "org.qemulauncher.manage-others"

# By member: signature of the arguments, signature of the answer, polkit action (None: needs none), and the method of
# operations.Operation that serves it. MANAGE_OTHERS is asked only about requests that reach beyond one's own VMs.
METHODS = {
    "SetMemlock": ("ust", "t", SET_MEMLOCK, "set_memlock"),
    "PinThreads": ("usa(uaub)au", "", PIN_THREADS, "pin_threads"),
    "SetScheduler": ("usausu", "", SET_SCHEDULER, "set_scheduler"),
    "Release": ("us", "", MANAGE_OTHERS, "release"),
    "ListVms": ("b", "a(susutss)", MANAGE_OTHERS, "list_vms"),
    "GetLimits": ("", "a{sv}", None, "get_limits"),
}

# "As much as I may have", or "no limit": what RLIM_INFINITY is in 64 bits, setrlimit(2).
INFINITY = 2**64 - 1

# A VM name becomes part of a unit name, a file name, log lines and polkit details: it can do no harm in any of them.
VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")

# The unit in which systemd keeps a VM's processes: uid and name of the VM.
SCOPE = "qemu-launcher-{}-{}.scope"

# sched(7). SCHED_DEADLINE is not among them: its admission control is global, one user could starve the host.
POLICIES = ("other", "batch", "idle", "fifo", "rr")
REALTIME_POLICIES = ("fifo", "rr")
# sched(7): the kernel's range of static priorities for fifo and rr; what a user may have is in limits.py.
MAX_PRIORITY = 99

# PID 1 is nobody's VM; PID_MAX_LIMIT, proc_pid_sys_kernel(5): 2^22 on 64-bit systems.
MIN_PID, MAX_PID = 2, 2**22
# Threads in one request: QEMU 10's largest machine has 4096 vCPUs, but no host of ours has more than 1024 CPUs to pin
# them to; 1024 pins make a message of 17 KiB.
MAX_TIDS = 1024
# Highest CPU number + 1: NR_CPUS of x86-64 with MAXSMP.
MAX_CPUS = 8192
# A user's VMs may not be more than this, whatever helper.toml says; the records are read at every call.
MAX_VMS = 1024

# Largest message that is parsed at all; see bus.py. The largest sensible PinThreads fits three times.
MAX_MESSAGE_BYTES = 64 * 1024
# One launch makes four calls, one after the other. What is more than this is a mistake or an attack.
CALLS_IN_FLIGHT = 4
CALLS_PER_WINDOW = 60
WINDOW_SECONDS = 20.0
# Calls of one user that wait for his one password dialog, and dialogs on the whole host: at 128 unanswered ones the
# bus would stop delivering our own calls (max_replies_per_connection, dbus-daemon(1)).
DIALOG_QUEUE = 8
MAX_DIALOGS = 8
# A person types a password; polkit's own agents give up after about this long.
DIALOG_SECONDS = 300.0
# Any other call of ours. 25 s is what every D-Bus library waits by default (dbus_connection_send_with_reply).
CALL_SECONDS = 25.0
# A systemd job of ours moves one process into a scope: milliseconds, unless the host is in deep trouble.
JOB_SECONDS = 60.0
# Long enough to serve a whole launch with one process, short enough that nothing of root's stays around.
IDLE_SECONDS = 15.0
