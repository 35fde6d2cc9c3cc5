"""Who calls: the connection a request came over, what it may do, and where events for it go."""

import asyncio
import enum
from dataclasses import dataclass
from typing import Any, Literal, Protocol


class Role(enum.IntEnum):
    """What a caller may do. A higher role may do all that a lower one may."""

    MONITOR = 1  # look
    OPERATOR = 2  # run virtual machines and jobs
    ADMIN = 3  # storage, the host itself


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is behind a connection, as far as the transport has proof of it.

    kind "user": a user of this host, known by the kernel; `name` is the uid.
    kind "certificate": the holder of a certificate that our CA has signed; `name` is its subject's common name (the
    first of `names` where it has none), `names` are its other names as "DNS:host" or "URI:..."
    kind "loopback": some process of this host; nothing more is known.
    """

    kind: Literal["user", "certificate", "loopback"]
    name: str = ""
    names: tuple[str, ...] = ()

    @classmethod
    def of_certificate(cls, certificate: dict[str, Any]) -> "Identity":
        """Of what `getpeercert` gives. A CA may have signed any text: what cannot be printed does not get into logs."""
        names = tuple(_printable(f"{kind}:{value}") for kind, value in certificate.get("subjectAltName", ()))
        subject = [pair for parts in certificate.get("subject", ()) for pair in parts]
        common = [_printable(value) for key, value in subject if key == "commonName"]
        return cls("certificate", [*common, *names, ""][0], names)

    def __str__(self) -> str:
        others = f" ({', '.join(self.names)})" if self.names else ""
        return f"{self.kind} {self.name}{others}".strip()


LOOPBACK = Identity("loopback")


def _printable(text: object) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


class Connection(Protocol):
    """A connection that takes frames at any time, not only answers. Used on the event loop alone."""

    async def send(self, frame: bytes) -> None:
        """Writes one frame; waits while the peer reads too slowly. Raises `ConnectionError` when the peer is gone."""


class Caller:
    """One connection's caller; lives as long as the connection (for POST: as one request).

    `name` stands in the log's lines ("unix-3"), `transport` is "unix", "websocket" or "http", `identity` is who it is.
    `role` is what it may do: today every transport lets in admins only, whoever they are. `connection` is None
    where events cannot be sent. `waiting` holds the tasks of verbs that only wait (Job.wait): a transport cancels them
    when the peer is gone. Calls that work are never cancelled, whoever asked for them.
    """

    __slots__ = ("connection", "identity", "name", "role", "transport", "waiting")

    def __init__(
        self,
        name: str,
        transport: str,
        role: Role,
        connection: Connection | None = None,
        identity: Identity = LOOPBACK,
    ) -> None:
        self.name = name
        self.transport = transport
        self.role = role
        self.identity = identity
        self.connection = connection
        self.waiting: set[asyncio.Task[object]] = set()

    def stop_waiting(self) -> None:
        """Ends what only waits for this caller; it is answered with `Stopping` if anybody still reads."""
        for task in self.waiting:
            task.cancel()
