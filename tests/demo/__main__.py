"""`make demo`: the main job for real, told step by step on a plain terminal, each claim checked by the kernel's word.

Boots the lab (a Debian host in a virtual machine), installs the package, logs in as an ordinary user, and lets her
start a virtual machine that is pinned, shielded, locked and real-time. What is printed after `$` was typed in there, by
the user named; what follows is the answer. Exit status 1 if anything is not as claimed.
"""

import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lab
from contract.test_helper_source import MOST_LINES, MOST_LINES_IN_CPUSET, sizes
from demo.guest import FAREWELL, GREETING, boot_sector
from demo.terminal import Terminal, observe, terminal
from package.bench import COMMAND_BUDGET, command_ratio

ROOT = Path(__file__).resolve().parents[2]
DEB = ROOT / "build/qemu-launcher.deb"

PINNED = [4, 5, 6, 7]
GUEST_MIB = 128
HOST_MIB = 4096  # of which the helper leaves 2 GiB to the host
CALLS = "/run/calls"
CALL_BUDGET = 4
EXPOSURE_BUDGET = 1.6
DEFINITION = f"""\
launcher:
  binary: qemu-system-x86_64
  vcpu_pinning: {PINNED}      # virtual CPU i on the i-th of these, alone
  scheduler: fifo
  priority: 1
  rlimit_memlock: auto             # guest RAM and 1 GiB
qemu:
  - name: [demo, debug-threads: on]
  - machine: q35
  - accel: [tcg, tb-size: 32]      # this host is emulated itself, so no KVM; its code buffer would be 1 GiB
  - smp: [4, sockets: 1, cores: 2, threads: 2]
  - m: {GUEST_MIB}M
  - overcommit: [mem-lock: on]
  - drive: [file: guest.img, format: raw, if: virtio]
  - nographic
"""
# Writes down each call to the helper, as the bus carries it; ready when it has seen a call of our own.
WATCH_CALLS = f"""
systemd-run --quiet --unit=watch --property=StandardOutput=truncate:{CALLS} busctl monitor --json=short \\
    --match="type='method_call',interface='org.qemulauncher.Helper1'" --match="type='method_call',member='GetId'"
until grep -q GetId {CALLS}; do
    busctl call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus GetId >/dev/null
    sleep 0.2
done
"""


class Story:
    """What is printed, and how many of its claims held."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.held = 0
        self.failed: list[str] = []
        self._chapter = 0

    def chapter(self, title: str) -> None:
        """A numbered heading, with the time since the beginning."""
        self._chapter += 1
        line = f"{self._chapter}. {title}"
        self.say(f"\n{line}{f'[{time.monotonic() - self.begun:.0f} s]':>{max(88 - len(line), 1)}}\n{'-' * 88}")

    def say(self, text: str) -> None:
        """Text of our own."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def quote(self, text: str) -> None:
        """Somebody else's text, set in."""
        for line in text.rstrip().splitlines():
            self.say(f"    {line}".rstrip())

    def typed(self, user: str, command: str) -> None:
        """A command line as it was typed inside."""
        self.say(f"  {user}$ {command}")

    def claim(self, holds: bool, text: str, seen: object) -> None:
        """One claim, with what was seen."""
        if holds:
            self.held += 1
        else:
            self.failed.append(text)
        self.say(f"  {'ok  ' if holds else 'NOT '} {text}: {seen}")


def cpus(numbers: Iterable[int]) -> str:
    """`4-7` for people."""
    text: list[str] = []
    ordered = sorted(numbers)
    for number in ordered:
        if number - 1 not in ordered:
            text.append(str(number))
        elif number + 1 not in ordered:
            text[-1] += f"-{number}"
    return ",".join(text) or "none"


def cpu_map(facts: dict[str, Any]) -> str:
    """Each CPU of the host as one letter: H where host tasks may run, V where only a virtual CPU does."""
    virtual = {thread["cpus"][0] for one in facts["machines"] for thread in one["threads"] if len(thread["cpus"]) == 1}
    letters = []
    for cpu in facts["online"]:
        host, guest = cpu in facts["host_cpus"], cpu in virtual and cpu in facts["isolated"]
        letters.append({(True, False): "H", (False, True): "V", (True, True): "!"}.get((host, guest), "."))
    return " ".join(letters)


def show_command(story: Story, vm: lab.Vm, user: str, command: str, *, check: bool = True) -> lab.Finished:
    """Type a command inside, and show it with its answer."""
    story.typed(user, command)
    done = vm.run(command, user=user, check=check)
    story.quote(done.stdout + done.stderr)
    return done


def host_as_before(story: Story, facts: dict[str, Any]) -> None:
    """The claims about a host without a virtual machine."""
    story.claim(facts["isolated"] == [], "no CPU is isolated (cpuset.cpus.isolated)", cpus(facts["isolated"]))
    story.claim(facts["init_cpus"] == facts["online"], "PID 1 may run on all CPUs", cpus(facts["init_cpus"]))
    story.claim(facts["fresh_cpus"] == facts["online"], "so may a new process", cpus(facts["fresh_cpus"]))
    story.claim(facts["scopes"] == [], "no scope of a virtual machine", facts["scopes"] or "none")


def while_it_runs(story: Story, facts: dict[str, Any]) -> None:
    """The claims about the running machine."""
    rest = sorted(set(facts["online"]) - set(PINNED))
    (qemu,) = facts["machines"]
    vcpus = [one for one in qemu["threads"] if one["name"].startswith("CPU ")]
    others = [one for one in qemu["threads"] if one not in vcpus]
    story.claim(
        [one["cpus"] for one in vcpus] == [[cpu] for cpu in PINNED],
        "pinned: each vCPU thread may run on exactly its CPU",
        ", ".join(f"{one['name']} on {cpus(one['cpus'])}" for one in vcpus),
    )
    story.claim(facts["isolated"] == PINNED, "shielded: the kernel's isolated CPUs", cpus(facts["isolated"]))
    story.claim(
        not set(facts["host_cpus"]) & set(PINNED),
        f"none of the host's {facts['host_threads']} other user-space threads may run there; they have",
        cpus(facts["host_cpus"]),
    )
    story.claim(facts["init_cpus"] == rest, "not even PID 1", cpus(facts["init_cpus"]))
    story.claim(facts["fresh_cpus"] == rest, "nor a process that was just born", cpus(facts["fresh_cpus"]))
    story.claim(
        all(set(one["cpus"]) <= set(rest) for one in others),
        f"QEMU's own {len(others)} other threads stay with the host",
        cpus({cpu for one in others for cpu in one["cpus"]}),
    )
    story.claim(
        all((one["policy"], one["priority"], one["reset_on_fork"]) == ("fifo", 1, True) for one in vcpus),
        "real-time: each vCPU thread's policy and priority",
        ", ".join(
            sorted({f"{one['policy']}{'|reset-on-fork' * one['reset_on_fork']} {one['priority']}" for one in vcpus})
        ),
    )
    story.claim(
        all(one["policy"] == "other" for one in others), "and no other thread of QEMU is real-time", "policy other"
    )
    limit = (GUEST_MIB + 1024) * 1024 * 1024
    story.claim(
        qemu["memlock_limit"] == str(limit),
        "locked: QEMU may lock guest RAM and 1 GiB",
        f"{qemu['memlock_limit']} bytes",
    )
    story.claim(
        qemu["locked_kib"] >= GUEST_MIB * 1024,
        f"and has locked more than the guest's {GUEST_MIB} MiB (VmLck)",
        f"{qemu['locked_kib'] / 1024:.0f} MiB",
    )
    story.claim(qemu["uids"] == [1000], "QEMU runs as alice, all of its user IDs", qemu["uids"])
    story.claim(qemu["capabilities"] == 0, "without any capability", f"{qemu['capabilities']:#x}")


def capabilities_at_rest(story: Story, vm: lab.Vm) -> None:
    """Read the helper's capability sets between two calls; alice wakes it by asking for her limits."""
    ask = "busctl call org.qemulauncher.Helper1 /org/qemulauncher/Helper1 org.qemulauncher.Helper1 GetLimits"
    find = "systemctl show --property=MainPID --value qemu-launcher-helper.service"
    done = vm.run(
        f"{ask} >/dev/null && grep -E '^(Uid|CapPrm|CapEff|CapBnd|NoNewPrivs)' /proc/$({find})/status", user="alice"
    )
    fields = dict(line.split(":", 1) for line in done.stdout.splitlines())
    permitted, effective, bounding = (int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd"))
    story.claim(
        permitted.bit_count() <= 3 and bounding.bit_count() <= 3,
        "the helper may use three capabilities at most",
        f"permitted {permitted:#x}, bounding {bounding:#x}",
    )
    story.claim(effective == 0, "and none is in effect at rest", f"{effective:#x}")


def figures(story: Story, vm: lab.Vm, calls: list[str]) -> None:
    """The figures that the project promises."""
    story.claim(
        0 < len(calls) <= CALL_BUDGET,
        f"calls to the helper per start, at most {CALL_BUDGET} whatever the number of vCPUs",
        f"{len(calls)} ({', '.join(calls)})",
    )
    done = vm.run("systemd-analyze security --no-pager qemu-launcher-helper.service | tail -n 1")
    exposure = re.search(r": ([0-9.]+) ", done.stdout)
    story.claim(
        exposure is not None and float(exposure[1]) <= EXPOSURE_BUDGET,
        f"systemd-analyze security, at most {EXPOSURE_BUDGET}",
        exposure[1] if exposure else done.stdout,
    )
    outside, within = sizes()
    story.claim(
        outside <= MOST_LINES and within <= MOST_LINES_IN_CPUSET,
        f"lines of code that may run as root, at most {MOST_LINES}, and {MOST_LINES_IN_CPUSET} that shield",
        f"{outside} and {within}",
    )
    ratio = min(command_ratio() for _ in range(2))
    story.claim(
        ratio <= COMMAND_BUDGET,
        f"`qemu-launcher command` as a multiple of `python3 -c pass`, at most {COMMAND_BUDGET:.0f}",
        f"{ratio:.1f}",
    )


def tell(story: Story) -> None:
    """The whole story; raises LabError if the host itself fails."""
    story.say("qemu-launcher: a virtual machine pinned, shielded, memory-locked and real-time, and nobody was root")
    story.chapter("A host")
    story.say("  A Debian system in a virtual machine, so that nothing is tuned on yours. It is built once and cached.")
    with lab.boot(machine=lab.Machine(memory_mib=HOST_MIB)) as vm:
        in_the_lab(story, vm)


def in_the_lab(story: Story, vm: lab.Vm) -> None:
    """Everything that happens on the host."""
    vm.install(DEB.resolve())
    show_command(story, vm, "root", "uname -sr; dpkg-query -W qemu-launcher systemd qemu-system-x86; lscpu -e=CPU,CORE")
    vm.run("usermod -aG qemu-launcher alice")
    vm.put(_written("definition.yml", DEFINITION.encode()), "/home/alice/.config/qemu-launcher/demo.yml")
    vm.put(_written("guest.img", boot_sector().ljust(1 << 20, b"\0")), "/home/alice/guest.img")
    vm.run("chown -R alice: /home/alice")

    story.chapter("An ordinary user and her definition")
    show_command(story, vm, "alice", "id; ulimit -Hl; ulimit -Hr")
    show_command(story, vm, "alice", "cat .config/qemu-launcher/demo.yml")
    story.say("  guest.img is a guest of one sector: it says that it runs, and obeys the power button.")

    story.chapter("Before")
    before = observe(vm)
    host_as_before(story, before)

    story.chapter("alice starts it")
    vm.run(WATCH_CALLS)
    story.typed("alice", "qemu-launcher demo")
    with terminal(vm, "alice", "qemu-launcher demo") as screen:
        line = ""
        for line in screen.lines_until(GREETING.strip()):
            story.quote(line)
        if GREETING.strip().decode() not in line:
            story.failed.append("the guest started")
            return
        running(story, vm, screen, before)

    story.chapter("Afterwards")
    after = observe(vm)
    host_as_before(story, after)
    story.claim(after["machines"] == [], "QEMU is gone", len(after["machines"]))


def running(story: Story, vm: lab.Vm, screen: Terminal, before: dict[str, Any]) -> None:
    """From the guest's first words to its last."""
    story.chapter("While it runs")
    shown = show_command(story, vm, "alice", "qemu-launcher status")
    during = observe(vm)
    while_it_runs(story, during)
    rows = re.findall(r"^\s*\d+\s+\d+\s+(\d+)\s+yes\s+fifo .*\b1$", shown.stdout, re.MULTILINE)
    story.claim(rows == [str(cpu) for cpu in PINNED], "`qemu-launcher status` says the same of CPUs", ", ".join(rows))
    width = " ".join(str(cpu) for cpu in during["online"])
    story.say(f"\n  CPU of the host    {width}")
    story.say(f"  before             {cpu_map(before)}\n  now                {cpu_map(during)}")
    story.say("  H: tasks of the host may run here; V: a virtual CPU, and nobody else")

    story.chapter("Nothing of ours runs as root")
    capabilities_at_rest(story, vm)
    vm.run("while systemctl -q is-active qemu-launcher-helper.service; do sleep 1; done", timeout=120)
    idle = observe(vm)
    story.claim(idle["helper_pid"] == 0, "the helper has gone by itself, 15 s after the last call", "no process")
    story.claim(idle["isolated"] == PINNED, "and the shield stands without it", cpus(idle["isolated"]))

    story.chapter("Figures")
    seen = [json.loads(line) for line in vm.run(f"cat {CALLS}").stdout.splitlines()]
    figures(
        story, vm, [one["member"] for one in seen if one["member"] not in ("GetId", "GetLimits")]
    )  # those were ours

    story.chapter("alice stops it")
    show_command(story, vm, "alice", "qemu-launcher stop demo")
    last_words = list(screen.lines_until(b""))
    story.quote("\n".join(last_words))
    status = screen.process.wait()
    story.claim(
        any(FAREWELL.strip().decode() in line for line in last_words), "the guest powered itself off", "its last words"
    )
    story.claim(status == 0, "the launcher ended with QEMU's exit status", status)


def _written(name: str, content: bytes) -> Path:
    folder = ROOT / "build/demo"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path


def main() -> int:
    """0 if everything was as claimed."""
    story = Story()
    try:
        tell(story)
    except lab.LabError as error:
        story.say(f"\n{error}")
        story.failed.append("the demo did not come to its end")
    seconds = time.monotonic() - story.begun
    story.say(f"\n{'=' * 88}")
    if story.failed:
        story.say(f"{len(story.failed)} claims did not hold, {story.held} did ({seconds:.0f} s):")
        for text in story.failed:
            story.say(f"  NOT  {text}")
        return 1
    story.say(f"All {story.held} claims held ({seconds:.0f} s).")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
