"""Start: drop privilege, put things right, join the bus, serve, leave when idle.

Exit status: 0 after a while without calls, or on SIGTERM; 1 when the bus was lost or something failed, so that systemd
starts the helper again. Nothing is lost by a sudden death: records in /run and `reconcile` see to that.
"""

import asyncio
import logging.handlers
import os
import signal
import socket
import sys

from . import bus, contract, cpuset, limits, operations, privileges, records, service, target

# How long calls may go on that slipped in while we were leaving. systemd's patience (TimeoutStopSec=) is longer.
# How long the journal may take to accept a record.
_STOP_SECONDS, _JOURNAL_SECONDS = 20.0, 1.0
_LOG = "/run/systemd/journal/socket" if target.SYSTEMD else "/dev/log"


class Journal(logging.handlers.DatagramHandler):
    """Sends each log record to systemd's journal, one datagram of NAME=VALUE lines; arguments by name become fields.

    The names are ours, and no value has a second line: text from elsewhere is logged through ascii() (%a). A journal
    that others flood holds us up for a moment only: then logging writes to stderr, which systemd reads on its own.
    https://systemd.io/JOURNAL_NATIVE_PROTOCOL/

    Without systemd it goes to syslog, as one line for people, with facility daemon (3): RFC 3164. Where there is none,
    to stderr, which is the bus's.
    """

    def makePickle(self, record: logging.LogRecord) -> bytes:  # noqa: N802  the library's name
        """Return the datagram."""
        if self.address == "/dev/log":
            return f"<{3 * 8 + 8 - record.levelno // 10}>qemu-launcher-helper: {record.getMessage()}".encode()
        fields = {"SYSLOG_IDENTIFIER": "qemu-launcher-helper", "PRIORITY": 8 - record.levelno // 10}
        fields |= record.args if isinstance(record.args, dict) else {"MESSAGE": record.getMessage()}
        return "".join(f"{name}={value}\n" for name, value in fields.items()).encode()


async def serve(path: str = bus.SOCKET, idle: float = contract.IDLE_SECONDS, act: type = operations.Operations) -> int:
    """Serve until idle; return the exit status. The arguments are for tests; `main` passes none."""
    connection = await bus.SystemBus.connect(path)
    serving = service.Service(connection, act(connection), idle)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.idle.set)
    records.reconcile()
    connection.on_call = serving.receive
    # 4 is DBUS_NAME_FLAG_DO_NOT_QUEUE, 1 is DBUS_REQUEST_NAME_REPLY_PRIMARY_OWNER.
    if await connection.call(bus.DAEMON, "RequestName", "su", [contract.BUS_NAME, 4], "u") != [1]:
        raise contract.Failed(f"{contract.BUS_NAME} has another owner")
    idling = asyncio.create_task(serving.idle.wait())
    while not (await asyncio.wait({idling, connection.reading}, timeout=idle, return_when="FIRST_COMPLETED"))[0]:
        with records.logged("looking after VMs"):  # where nobody would start us again, we stay
            records.reconcile()  # a scope that ended could not start us while calls keep us here, be they refused ones
    # Whatever came before the answer to this is ours to serve; what comes after it starts the next helper.
    await connection.daemon("ReleaseName", contract.BUS_NAME, answer="u")
    await asyncio.wait({*serving.tasks, idling}, timeout=_STOP_SECONDS)
    # A scope that ended while we were there could not start us: systemd starts nothing that runs already.
    records.reconcile()
    await connection.close()
    return 0


def main() -> int:
    """Serve, or read helper.toml and say what is wrong with it; return the exit status."""
    logs = [Journal(_LOG, None) if "--serve" in sys.argv and os.access(_LOG, os.F_OK) else logging.StreamHandler()]
    logging.basicConfig(handlers=logs, level=logging.INFO, format="%(message)s")
    socket.setdefaulttimeout(_JOURNAL_SECONDS)
    os.umask(0o077)
    try:
        match sys.argv[1:]:
            case ["--serve"]:
                os.chdir("/")
                if isinstance(cpuset.MECHANISM, cpuset.RawV1):
                    with records.logged("mounting cpusets"):
                        cpuset.MECHANISM.mount(limits.load().cpuset_mount)
                privileges.drop()
                return asyncio.run(serve())
            case ["--check", *path] if len(path) <= 1:
                return limits.check(*path)
    except (contract.Refusal, contract.CallFailed, OSError) as err:
        logging.critical("cannot serve: %a", str(err))
        return 1
    logging.error("The system bus starts this. By hand: qemu-launcher-helper --check [FILE]; qemu-launcher-helper(8)")
    return 2
