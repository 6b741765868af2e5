"""Start: drop privilege, put things right, join the bus, serve, leave when idle.

Exit status: 0 after a while without calls, or on SIGTERM; 1 when the bus was lost or something failed, so that systemd
starts the helper again. Nothing is lost by a sudden death: records in /run and `reconcile` see to that.
"""

import asyncio
import logging
import os
import signal
import sys
from typing import Any

from . import limits, privileges
from .bus import DAEMON, SOCKET, SystemBus
from .contract import BUS_NAME, IDLE_SECONDS
from .errors import CallFailed, Refusal
from .operations import Operations
from .service import Service

# How long calls may go on that slipped in while we were leaving. systemd's patience (TimeoutStopSec=) is longer.
_STOP_SECONDS = 20.0


async def serve(socket: str = SOCKET, idle: float = IDLE_SECONDS, acting: Any = Operations) -> int:
    """Serve until idle; return the exit status. The arguments are for tests; `main` passes none."""
    bus = await SystemBus.connect(socket)
    operations = acting(bus)
    await operations.reconcile()
    service = Service(bus, operations, idle)
    bus.on_call = service.receive
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, service.idle.set)
    # 4 is DBUS_NAME_FLAG_DO_NOT_QUEUE, 1 is DBUS_REQUEST_NAME_REPLY_PRIMARY_OWNER.
    if await bus.call(DAEMON, "RequestName", "su", [BUS_NAME, 4], "u") != [1]:
        logging.error("%s has another owner", BUS_NAME)
        return 1
    await asyncio.wait({asyncio.create_task(service.idle.wait()), bus.reading}, return_when="FIRST_COMPLETED")
    if bus.reading.done():
        logging.error("lost the bus: %a", str(bus.reading.exception()))
        return 1
    # Whatever came before the answer to this is ours to serve; what comes after it starts the next helper.
    await bus.daemon("ReleaseName", BUS_NAME, answer="u")
    if service.tasks:
        await asyncio.wait(service.tasks, timeout=_STOP_SECONDS)
    # A scope that ended while we were there could not start us: systemd starts nothing that runs already.
    await operations.reconcile()
    await bus.close()
    return 0


def main() -> int:
    """Run the helper, or with --check just read helper.toml; return the exit status."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    os.umask(0o077)
    try:
        if "--check" in sys.argv:
            limits.load()
            return 0
        privileges.drop()
        return asyncio.run(serve())
    except (Refusal, CallFailed, OSError) as err:
        logging.critical("cannot serve: %a", str(err))
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
