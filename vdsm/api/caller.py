"""Who calls: the connection a request came over, what it may do, and where events for it go."""

import asyncio
import enum
from typing import Protocol


class Role(enum.IntEnum):
    """What a caller may do. A higher role may do all that a lower one may."""

    MONITOR = 1  # look
    OPERATOR = 2  # run virtual machines and jobs
    ADMIN = 3  # storage, the host itself


class Connection(Protocol):
    """A connection that takes frames at any time, not only answers. Used on the event loop alone."""

    async def send(self, frame: bytes) -> None:
        """Writes one frame; waits while the peer reads too slowly. Raises `ConnectionError` when the peer is gone."""


class Caller:
    """One connection's caller; lives as long as the connection (for POST: as one request).

    `name` stands in the log's lines ("unix-3"), `transport` is "unix", "websocket" or "http". `connection` is None
    where events cannot be sent. `waiting` holds the tasks of verbs that only wait (Job.wait): a transport cancels them
    when the peer is gone. Calls that work are never cancelled, whoever asked for them.
    """

    __slots__ = ("connection", "name", "role", "transport", "waiting")

    def __init__(self, name: str, transport: str, role: Role, connection: Connection | None = None) -> None:
        self.name = name
        self.transport = transport
        self.role = role
        self.connection = connection
        self.waiting: set[asyncio.Task[object]] = set()

    def stop_waiting(self) -> None:
        """Ends what only waits for this caller; it is answered with `Stopping` if anybody still reads."""
        for task in self.waiting:
            task.cancel()
