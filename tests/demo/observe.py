"""What the kernel says about this host and its virtual machines, as JSON. Runs as root in the lab, on a bare Python.

It asks nobody but /proc, /sys and systemd, so that nothing it reports is the launcher's or the helper's own opinion.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup")
POLICIES = {0: "other", 1: "fifo", 2: "rr", 3: "batch", 5: "idle", 6: "deadline"}  # sched(7)
RESET_ON_FORK = 0x40000000


def cpulist(text: str) -> list[int]:
    """`0-3,8` as numbers."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def status_of(folder: Path) -> dict[str, str]:
    """The fields of a /proc status file."""
    lines = (folder / "status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def thread(folder: Path) -> dict[str, Any]:
    """One thread of a virtual machine."""
    tid = int(folder.name)
    policy = os.sched_getscheduler(tid)
    return {
        "tid": tid,
        "name": (folder / "comm").read_text().strip(),
        "cpus": cpulist(status_of(folder)["Cpus_allowed_list"]),
        "policy": POLICIES[policy & ~RESET_ON_FORK],
        "reset_on_fork": bool(policy & RESET_ON_FORK),
        "priority": os.sched_getparam(tid).sched_priority,
    }


def machine(folder: Path) -> dict[str, Any]:
    """One QEMU process."""
    status = status_of(folder)
    limits = (folder / "limits").read_text().splitlines()
    locked = next(line for line in limits if line.startswith("Max locked memory")).split()
    return {
        "pid": int(folder.name),
        "uids": sorted({int(uid) for uid in status["Uid"].split()}),
        "capabilities": int(status["CapEff"], 16) | int(status["CapPrm"], 16),
        "locked_kib": int(status["VmLck"].split()[0]),
        "memlock_limit": locked[3],
        "cgroup": (folder / "cgroup").read_text().strip(),
        "threads": [thread(path) for path in sorted((folder / "task").iterdir(), key=lambda path: int(path.name))],
    }


def isolated() -> list[int]:
    """CPUs that nobody but VMs may use: the kernel's word for it, or without such what no other top group may use."""
    if (CGROUP / "cpuset.cpus.isolated").exists():
        return cpulist((CGROUP / "cpuset.cpus.isolated").read_text())
    online = cpulist(Path("/sys/devices/system/cpu/online").read_text())
    groups = [path.parent for path in CGROUP.glob("*/cgroup.events") if "populated 1" in path.read_text()]
    files = [group / "cpuset.cpus.effective" for group in groups if group.name != "qemu.slice"]
    if not all(file.exists() for file in files):
        return []
    others = {cpu for file in files for cpu in cpulist(file.read_text())}
    return [cpu for cpu in online if cpu not in others]


def main() -> None:
    """Print everything as one line of JSON."""
    machines, others, host_cpus = [], 0, set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            status = status_of(folder)
            if status["Name"].startswith("qemu-system-"):
                machines.append(machine(folder))
            elif "VmSize" in status:  # kernel threads have no memory of their own; some belong to one CPU for ever
                for task in (folder / "task").iterdir():
                    host_cpus.update(cpulist(status_of(task)["Cpus_allowed_list"]))
                    others += 1
        except (FileNotFoundError, ProcessLookupError):
            continue  # gone while we looked
    helper = subprocess.run(
        ["systemctl", "show", "--property=MainPID", "--value", "qemu-launcher-helper.service"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    fresh = subprocess.run(
        ["grep", "Cpus_allowed_list", "/proc/self/status"], stdout=subprocess.PIPE, text=True, check=True
    )
    result = {
        "online": cpulist(Path("/sys/devices/system/cpu/online").read_text()),
        "isolated": isolated(),
        "init_cpus": cpulist(status_of(Path("/proc/1"))["Cpus_allowed_list"]),
        "fresh_cpus": cpulist(fresh.stdout.partition(":")[2]),
        "host_cpus": sorted(host_cpus),
        "host_threads": others,
        "helper_pid": int(helper.stdout or 0),
        "scopes": sorted(path.name for path in CGROUP.rglob("qemu-launcher-*.scope")),
        "machines": machines,
    }
    print(json.dumps(result))  # noqa: T201 - this is its purpose


if __name__ == "__main__":
    main()
