"""The connections of one NBD node: as many as the server allows and the load asks for, made again
when they are lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from ..engine.kernel import BaseDriver, Cancelled, Shared, Task
from ..errors import PeerError
from ..wire import nbd_const as c
from ..wire.nbd_negotiation import Agreement, Negotiation
from .nbd_connect import Address, Security, establish
from .nbd_link import Link, Trip
from .nbd_unflushed import Unflushed

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
"""Seconds between attempts to connect: doubled each time."""
_GRACE_SECONDS = 5.0
"""How long a write that nobody waits for any more may go unanswered before the connection is
dropped.  What the server does with it later cannot be known."""


class Settings:
    """How to reach the server.  Times in seconds."""

    def __init__(
        self,
        address: Address,
        negotiation: Callable[[], Negotiation],
        security: Security | None = None,
        connections: int = 4,
        reconnect_delay: float = 0,
        open_timeout: float = 0,
        timeout: float = 0,
    ) -> None:
        self.address, self.negotiation, self.security = address, negotiation, security
        self.connections = connections
        self.reconnect_delay, self.open_timeout = reconnect_delay, open_timeout
        self.timeout = timeout


class Links:
    """Made by :meth:`open`.

    ``broken`` is set when all connections were lost while writes that had been answered were not
    flushed, and these could not be sent again: whatever server comes next may not have them.
    ``unflushed`` are those that can be; None: nothing is sent again.
    """

    agreed: Agreement

    def __init__(
        self, driver: BaseDriver, settings: Settings, may_lose: Callable[[], bool]
    ) -> None:
        self.driver = driver
        self.settings = settings
        self.links: list[Link] = []
        self.broken: OSError | None = None
        self.unflushed = Unflushed() if settings.reconnect_delay else None
        self._may_lose = may_lose
        self._most = 1
        self._extra: Task[None] | None = None
        self._shared = Shared(driver)
        self._hopeless = False
        self._closed = False

    async def open(self) -> None:
        """Make the first connection.  Raises PeerError."""
        link = await self._until(self.settings.open_timeout)
        self.agreed = link.agreed
        self.links.append(link)
        if self.agreed.flags & c.CAN_MULTI_CONN:
            self._most = max(1, self.settings.connections)

    # -- making connections
    async def _connect(self) -> Link:
        settings = self.settings
        negotiation = settings.negotiation()
        try:
            found = await establish(self.driver, settings.address, negotiation, settings.security)
        except PeerError as error:
            error.peer = error.peer or str(settings.address)
            error.export = error.export or negotiation.export.decode("utf-8", "replace")
            raise
        return Link(self.driver, found, str(settings.address), settings.timeout, self._lost)

    async def _until(self, seconds: float) -> Link:
        """Try to connect, again and again for so long (0: once)."""
        end = self.driver.now() + seconds
        pause = _FIRST_PAUSE
        while True:
            try:
                return await self._connect()
            except OSError:
                if self.driver.now() + pause > end:
                    raise
            await self.driver.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _again(self) -> None:
        """Connect to the server that was lost.  After that was tried for the whole delay in vain,
        each request tries it once."""
        delay = 0 if self._hopeless else self.settings.reconnect_delay
        end = self.driver.now() + delay
        while True:
            try:
                link = await self._until(max(0, end - self.driver.now()))
            except OSError:
                self._hopeless = True
                raise
            await self._same(link)
            if await self._restored(link):
                break
            if self.driver.now() >= end:
                raise link.lost or ConnectionError
        self._hopeless = False
        self.links.append(link)

    async def _restored(self, link: Link) -> bool:
        """Send again what no flush has covered; False when ``link`` was lost meanwhile."""
        if self.unflushed is not None and self.broken is None:
            try:
                await self.unflushed.replay(link)
            except PeerError:
                return False
            except OSError as error:
                self.broken = error
        return link.lost is None

    async def _same(self, link: Link) -> Link:
        """``link``, if the export is what it was; otherwise it is closed and PeerError raised."""
        now, before = link.agreed, self.agreed
        flags = c.READ_ONLY | c.SEND_FLUSH | c.SEND_FUA | c.SEND_TRIM | c.SEND_WRITE_ZEROES
        same = (now.size, now.min_block, now.max_payload, now.flags & flags) == (
            before.size, before.min_block, before.max_payload, before.flags & flags
        )  # fmt: skip
        if not same:
            await link.close()
            raise PeerError(
                "the export is another one since the connection was lost",
                peer=link.peer, export=link.export,
            )  # fmt: skip
        return link

    def _lost(self, link: Link) -> None:
        if link in self.links:
            self.links.remove(link)
        kept = self.unflushed is not None
        if not (self.links or self._closed or kept) and self._may_lose():
            self.broken = link.lost

    async def _pick(self) -> Link:
        """The connection that has the least to do."""
        while not self.links:
            await self._shared.run("connect", self._again)
        best = min(self.links, key=_load)
        if best.load and len(self.links) < self._most and self._extra is None:
            self._extra = self.driver.spawn(self._one_more(), name="nbd-connect")
        return best

    async def _one_more(self) -> None:
        """Another connection beside those that there are; without it things go on as well."""
        try:
            link = await self._same(await self._connect())
            try:
                await self._beside()
            except BaseException:
                await link.close()
                raise
            self.links.append(link)
        except (OSError, Cancelled):
            self._most = len(self.links)
        finally:
            self._extra = None

    async def _beside(self) -> None:
        """See that an older connection goes on: it might be one to a server that is gone, the new
        one to its successor, and then nobody would notice what was lost.  Raises PeerError."""
        block = self.agreed.min_block
        if not self.links or not self.agreed.size:
            raise PeerError("the connection was lost")
        trip = Trip(c.CMD_READ, [0], [block], [memoryview(bytearray(block))])
        self.links[0].submit(trip)
        await trip.done

    # -- requests
    async def carry(self, trip: Trip) -> None:
        """Have ``trip`` answered; it is sent again when the connection is lost meanwhile, as every
        command may be carried out twice, for as long as the settings say."""
        while True:
            link = await self._pick()
            link.submit(trip)
            try:
                await self._answered(link, trip)
            except PeerError:
                if not self.settings.reconnect_delay or self._closed:
                    raise
            else:
                failure = trip.failure
                if failure is None or failure.number != c.ESHUTDOWN or self._closed:
                    return
                # The server is about to go, and said so.
                link.part("the server is shutting down", c.ESHUTDOWN)
                if not self.settings.reconnect_delay:
                    return
            trip.reset()

    async def _answered(self, link: Link, trip: Trip) -> None:
        """Wait for the answer.  A read that is cancelled ends at once, and its buffers are not
        touched any more; a change is waited for, since it may still happen."""
        try:
            await trip.done
        except Cancelled:
            if trip.command == c.CMD_READ:
                link.abandon(trip)
                raise
            timer = self.driver.later(_GRACE_SECONDS, lambda: link.lose("cancelled", c.ESHUTDOWN))
            try:
                while not trip.done.done:
                    with suppress(Cancelled, OSError):
                        await trip.done
            finally:
                timer.cancel()
            raise

    # -- the end
    async def close(self) -> None:
        """Take leave of the server on all connections."""
        self._closed = True
        if self._extra is not None:
            self._extra.cancel()
            with suppress(Cancelled, OSError):
                await self._extra
        links, self.links = self.links, []
        for link in links:
            await link.close()

    def drop(self) -> None:
        """In a forked child."""
        self._closed = True
        for link in self.links:
            link.drop()


def _load(link: Link) -> int:
    return link.load
