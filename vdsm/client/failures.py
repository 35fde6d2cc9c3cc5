"""What can go wrong with a call, as the caller sees it.

    ClientError            the agent answered with an error; its code, message and data
      +- CannotConnect     the agent was not reached: nothing was sent
      +- Untrusted         something was reached that cannot prove to be that agent: nothing was sent
      +- NoCertificate     our own certificate, key or CA cannot be read: nothing was sent
      +- Denied            it was reached, but does not let this caller in
      +- NoAnswer          sent, but no answer in time: the work may go on
      +- ConnectionLost    the connection broke: the work may go on
      +- BadAnswer         what came back is no JSON-RPC answer

The ones below `ClientError` are made here, not by the agent: their code is 0 and their key says which they are.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself costs a tenth of a call's time
if TYPE_CHECKING:
    from typing import Any


class ClientError(Exception):
    """A JSON-RPC error: `code`, `message`, `data` ({key, facts, state, hint} from the agent, {} when it has none).

    `request_id` is what the agent's log calls the request; None when nothing was sent.
    """

    def __init__(
        self, code: int, message: str, data: dict[str, Any] | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data or {}
        self.request_id = request_id
        self.near: list[str] = []  # what the caller may have meant, where the command found something

    @classmethod
    def from_wire(cls, error: Any, request_id: str | None = None) -> ClientError:
        """The error that a JSON-RPC error object describes; also of a sloppy one, which must not hide the failure."""
        if not isinstance(error, dict):
            return ClientError(0, f"An error of no known form: {error!r}", request_id=request_id)
        code, data = error.get("code"), error.get("data")
        return ClientError(
            code if isinstance(code, int) else 0,
            str(error.get("message", "unknown error")),
            data if isinstance(data, dict) else {},
            request_id,
        )

    def to_wire(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "data": self.data}

    @property
    def key(self) -> str:
        return str(self.data.get("key", ""))


class Local(ClientError):
    """Made by the client."""

    key_of_class = ""
    hint = ""

    def __init__(self, message: str) -> None:
        super().__init__(0, message, {"key": self.key_of_class, "facts": {}, "state": None, "hint": self.hint})


class CannotConnect(Local):
    """The agent was not reached: nothing was sent."""

    key_of_class = "cannot_connect"
    hint = "Check that vdsmd runs and that the address is right (-a ADDRESS or VDSM_ADDRESS)."


class Untrusted(Local):
    """What was reached cannot prove to be that agent: nothing was sent."""

    key_of_class = "untrusted"
    hint = "The agent's certificate must name the host as it is called here, and be signed by our CA (--ca, VDSM_CA)."


class NoCertificate(Local):
    """Our own certificate, key or CA cannot be read: nothing was sent."""

    key_of_class = "no_certificate"
    hint = "Give --cert, --key and --ca, or VDSM_CERT, VDSM_KEY and VDSM_CA."


class Denied(Local):
    """The agent was reached, but does not let this caller in."""

    key_of_class = "denied"
    hint = "The Unix socket is for root and its group (vdsm); over TLS, for certificates of the agent's CA."


class NoAnswer(Local):
    """No answer came in time."""

    key_of_class = "no_answer"
    hint = "The work may go on. Look at the state before trying again."


class ConnectionLost(Local):
    """The connection broke before the answer."""

    key_of_class = "connection_lost"
    hint = "The work may go on. Look at the state before trying again."


class BadAnswer(Local):
    """What came back is no JSON-RPC answer."""

    key_of_class = "bad_answer"
    hint = "Check that the address is that of a vdsmd."


LOCAL: tuple[type[Local], ...] = (CannotConnect, Denied, NoAnswer, ConnectionLost, BadAnswer)
