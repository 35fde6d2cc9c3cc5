"""TLS to an agent: both sides show a certificate, and the agent's must name the host that was asked for.

The files come from the caller, else from VDSM_CERT, VDSM_KEY and VDSM_CA, else they are cert.pem, key.pem and ca.pem in
~/.config/vdsm/tls, or in /etc/vdsm/tls where a user has no such directory.
"""

from __future__ import annotations

import os
import ssl
import time

from vdsm.client import failures, stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

USER_DIRECTORY = "~/.config/vdsm/tls"
HOST_DIRECTORY = "/etc/vdsm/tls"


class Credentials:
    """Paths of PEM files: our certificate, its key, and the CAs that may have signed the agent's certificate.

    What is not given is looked for where this module's docstring says.
    """

    def __init__(self, cert: str | None = None, key: str | None = None, ca: str | None = None) -> None:
        self.cert = cert or _default("cert")
        self.key = key or _default("key")
        self.ca = ca or _default("ca")


class TlsStream(stream.Stream):
    """`place` is the host and port, for words about it."""

    def __init__(self, connected: ssl.SSLSocket, place: str) -> None:
        super().__init__(connected)
        self._place = place

    def lost(self, message: str) -> failures.ClientError:
        # In TLS 1.3 we may speak before the agent has looked at our certificate: its refusal takes an answer's place.
        return super().lost(message) if self.heard else _denied(self._place, message)


def open_tls(host: str, port: int, timeout_s: float, credentials: Credentials) -> TlsStream:
    """Raises `NoCertificate`, `CannotConnect`, `Untrusted`, `Denied`."""
    deadline = time.monotonic() + timeout_s
    context = client_context(credentials)
    plain = stream.open_tcp(host, port, timeout_s)
    place = f"{host}:{port}"
    try:
        plain.settimeout(deadline)
        return TlsStream(context.wrap_socket(plain.socket, server_hostname=host), place)
    except ssl.SSLCertVerificationError as error:
        raise failures.Untrusted(f"{place} cannot be trusted: {error.verify_message}") from error
    except (TimeoutError, failures.NoAnswer):
        raise failures.CannotConnect(f"Cannot connect to {place}: the TLS handshake does not end in time") from None
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError) as error:
        raise _denied(place, f"It ended the TLS handshake: {stream.reason(error)}") from error
    except (OSError, ValueError) as error:
        if "ALERT" in (getattr(error, "reason", None) or ""):
            raise _denied(place, stream.reason(error)) from error
        raise failures.CannotConnect(f"Cannot connect to {place}: {stream.reason(error)}") from error
    finally:
        plain.close()  # of no effect once the TLS socket has taken it over


def client_context(credentials: Credentials) -> ssl.SSLContext:
    """Raises `NoCertificate`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the host's name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        load_ca(context, credentials.ca)
        load_certificate(context, credentials.cert, credentials.key)
    except ValueError as error:
        raise failures.NoCertificate(str(error)) from error
    return context


def load_certificate(context: ssl.SSLContext, cert: str, key: str) -> None:
    """Raises ValueError that names the files."""
    for path in (cert, key):
        _check_readable(path)
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise ValueError(f"{cert}, {key}: {error}") from error


def load_ca(context: ssl.SSLContext, ca: str) -> None:
    """Raises ValueError that names the file."""
    _check_readable(ca)
    try:
        context.load_verify_locations(ca)
    except OSError as error:
        raise ValueError(f"{ca}: {error}") from error


def _check_readable(path: str) -> None:
    """The ssl module does not name the file that it cannot read."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib would cost a third of the client's own start-up
            file.read(1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _no_passphrase() -> NoReturn:
    raise ValueError("the key is encrypted: a passphrase is asked for, and nobody may be there to type it")


def _denied(place: str, what: str) -> failures.Denied:
    return failures.Denied(f"{place} most likely does not take our certificate; its log has the reason. {what}")


def _default(name: str) -> str:
    directory = os.path.expanduser(USER_DIRECTORY)  # noqa: PTH111 - as above
    if not os.path.isdir(directory):  # noqa: PTH112
        directory = HOST_DIRECTORY
    return os.environ.get(f"VDSM_{name.upper()}") or f"{directory}/{name}.pem"
