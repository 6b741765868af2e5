"""Ask polkit whether a caller may do something. Anything but a clear yes is a no, and so is no polkit at all.

The subject is the caller's bus name, which the bus vouches for and never gives to anybody else; never a PID. The
question is asked without interaction first, which never waits on a person; only if polkit would want a password, and
the caller said that he is ready for that, does the call wait for the one dialog its user may have open.

https://www.freedesktop.org/software/polkit/docs/latest/eggdbus-interface-org.freedesktop.PolicyKit1.Authority.html
"""

import asyncio
import itertools
import logging
from collections import Counter, defaultdict

from .arguments import Caller
from .bus import SystemBus, Variant
from .contract import CALL_SECONDS, DIALOG_QUEUE, DIALOG_SECONDS, MAX_DIALOGS
from .errors import CallFailed, LimitExceeded

POLKIT = ("org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority", "org.freedesktop.PolicyKit1.Authority")
_ALLOW_USER_INTERACTION = 1


class Authority:
    """polkit, seen from here, and the users who are being asked for a password."""

    def __init__(self, bus: SystemBus, dialog_seconds: float = DIALOG_SECONDS) -> None:
        self._bus, self._dialog_seconds = bus, dialog_seconds
        self._numbers = itertools.count()
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._asked: Counter[int] = Counter()  # per uid: the dialog that is open, and calls that wait for their turn

    async def check(self, caller: Caller, action: str, details: dict[str, str], dialog: str = "") -> tuple[bool, bool]:
        """Return (yes, a password might make it a yes). No person is asked, unless under the name `dialog`.

        Never raises for what polkit answers, or does not: that is (False, False).
        """
        flags, seconds = (_ALLOW_USER_INTERACTION, self._dialog_seconds) if dialog else (0, CALL_SECONDS)
        body = [["system-bus-name", {"name": Variant("s", caller.sender)}], action, details, flags, dialog]
        try:
            answer = await self._bus.call(POLKIT, "CheckAuthorization", "(sa{sv})sa{ss}us", body, "(bba{ss})", seconds)
        except CallFailed as err:
            logging.warning("polkit gave no answer: %a", str(err))
            return False, False
        match answer:
            case [[granted, challenge, _]]:
                return granted is True, challenge is True
        return False, False

    async def dialog(self, caller: Caller, action: str, details: dict[str, str]) -> bool:
        """Let polkit ask a person; return whether that led to a yes. One dialog per user at a time.

        Takes up to `dialog_seconds`, and as long for each call queued before: the attacker's time, verify everything
        again afterwards. Ends early when the caller leaves the bus. Raises LimitExceeded when too many wait already.
        """
        uid = caller.uid
        if self._asked[uid] > DIALOG_QUEUE or (uid not in self._asked and len(self._asked) >= MAX_DIALOGS):
            raise LimitExceeded("Too many calls wait for a password already")
        self._asked[uid] += 1
        try:
            async with self._turns[uid]:
                return await self._ask_person(caller, action, details)
        finally:
            self._asked -= Counter([uid])  # which also forgets a user who has none left

    async def _ask_person(self, caller: Caller, action: str, details: dict[str, str]) -> bool:
        name = f"qemu-launcher-{next(self._numbers)}"
        asking = asyncio.create_task(self.check(caller, action, details, name))
        leaving = asyncio.create_task(self._bus.until_gone(caller.sender))
        try:
            await asyncio.wait({asking, leaving}, timeout=self._dialog_seconds, return_when="FIRST_COMPLETED")
            return asking.done() and asking.result()[0]
        finally:
            if not asking.done():
                self._bus.tell(POLKIT, "CancelCheckAuthorization", name)
            asking.cancel()
            leaving.cancel()
            await asyncio.gather(asking, leaving, return_exceptions=True)
