"""Start: drop privilege, put things right, join the bus, serve, leave when idle.

Exit status: 0 after a while without calls, or on SIGTERM; 1 when the bus was lost or something failed, so that systemd
starts the helper again. Nothing is lost by a sudden death: records in /run and `reconcile` see to that.
"""

import asyncio
import logging.handlers
import os
import signal
import sys

from . import bus, contract, limits, privileges, service
from .operations import Operations

# How long calls may go on that slipped in while we were leaving. systemd's patience (TimeoutStopSec=) is longer.
_STOP_SECONDS = 20.0


class Journal(logging.handlers.DatagramHandler):
    """Sends each log record to systemd's journal, one datagram of NAME=VALUE lines; arguments by name become fields.

    The names are ours, and no value has a second line: text from elsewhere is logged through ascii() (%a).
    https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
    """

    def makePickle(self, record: logging.LogRecord) -> bytes:  # noqa: N802  what the library has one override
        """Return the datagram."""
        fields = {"SYSLOG_IDENTIFIER": "qemu-launcher-helper", "PRIORITY": 8 - record.levelno // 10}
        fields |= record.args if isinstance(record.args, dict) else {"MESSAGE": record.getMessage()}
        return "".join(f"{name}={value}\n" for name, value in fields.items()).encode()


async def serve(socket: str = bus.SOCKET, idle: float = contract.IDLE_SECONDS, acting: type = Operations) -> int:
    """Serve until idle; return the exit status. The arguments are for tests; `main` passes none."""
    connection = await bus.SystemBus.connect(socket)
    acts = acting(connection)
    serving = service.Service(connection, acts, idle)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.idle.set)
    await acts.reconcile()
    connection.on_call = serving.receive
    # 4 is DBUS_NAME_FLAG_DO_NOT_QUEUE, 1 is DBUS_REQUEST_NAME_REPLY_PRIMARY_OWNER.
    if await connection.call(bus.DAEMON, "RequestName", "su", [contract.BUS_NAME, 4], "u") != [1]:
        raise contract.Failed(f"{contract.BUS_NAME} has another owner")
    await asyncio.wait({asyncio.create_task(serving.idle.wait()), connection.reading}, return_when="FIRST_COMPLETED")
    # Whatever came before the answer to this is ours to serve; what comes after it starts the next helper.
    await connection.daemon("ReleaseName", contract.BUS_NAME, answer="u")
    if serving.tasks:
        await asyncio.wait(serving.tasks, timeout=_STOP_SECONDS)
    # A scope that ended while we were there could not start us: systemd starts nothing that runs already.
    await acts.reconcile()
    await connection.close()
    return 0


def main() -> int:
    """Run the helper, or with --check [FILE] just read helper.toml; return the exit status."""
    check = sys.argv[1:2] == ["--check"]
    logs = [logging.StreamHandler() if check else Journal("/run/systemd/journal/socket", None)]
    logging.basicConfig(handlers=logs, level=logging.INFO, format="%(message)s")
    os.umask(0o077)
    try:
        if check:
            limits.load(*sys.argv[2:3])
            return 0
        privileges.drop()
        return asyncio.run(serve())
    except (contract.Refusal, contract.CallFailed, OSError) as err:
        logging.critical("cannot serve: %a", str(err))
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
