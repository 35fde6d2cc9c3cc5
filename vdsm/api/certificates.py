"""The certificate files of [tls], and the TLS context made of them: read again when they have changed.

A change counts once the files rest: the same at two looks in a row, so that certificate and key that are replaced one
after the other are read together. What cannot be used leaves the context before in force.
"""

import contextlib
import ssl
import time
from pathlib import Path

from vdsm import config
from vdsm.client import tls

_Stamp = tuple[int, int, int, int] | None


class CertificateError(Exception):
    """The files cannot be used; the text names the file and what is wrong."""


class Certificates:
    """All methods block for a moment; one thread at a time."""

    def __init__(self, settings: config.Tls) -> None:
        self._settings = settings
        self._seen: list[_Stamp] = []  # at the last look
        self._tried: list[_Stamp] = []  # when they were last read
        self.context: ssl.SSLContext
        self.expires = 0.0  # when our certificate does, in seconds since 1970

    def load(self) -> str:
        """For the start. What of the certificate no client would take, empty when nothing; raises `CertificateError`.

        A host whose certificate has expired must still start: its VMs and its Unix socket do not depend on it.
        """
        self._seen = self._tried = self._stamps()
        self.context = _context(self._settings)
        try:
            self.expires = _expires(self._settings)
        except CertificateError as error:
            return str(error)
        return ""

    def refresh(self, now: bool = False) -> bool:
        """Reads files that have changed, or with `now` any; whether it did. Raises `CertificateError` once for each
        change. `context` is another object then, never the old one changed: what resumes or is under way keeps its."""
        stamps = self._stamps()
        settled, self._seen = stamps == self._seen, stamps
        if not now and (not settled or stamps == self._tried):
            return False
        self._tried = stamps
        context = _context(self._settings)
        self.expires = _expires(self._settings)
        self.context = context
        return True

    def _stamps(self) -> list[_Stamp]:
        return [_stamp(Path(path)) for path in (self._settings.cert, self._settings.key, self._settings.ca)]


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _context(settings: config.Tls) -> ssl.SSLContext:
    """For connections of peers that show a certificate of the CA."""
    context = _with_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), settings)
    _load_ca(context, settings)
    context.verify_mode = ssl.CERT_REQUIRED
    # A resumed session is believed without another look at the peer's certificate. So no tickets; what TLS 1.2 keeps
    # on our side cannot be turned off from Python, and ends with the context.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    return context


def _with_certificate(context: ssl.SSLContext, settings: config.Tls) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        tls.load_certificate(context, settings.cert, settings.key)
    except ValueError as error:
        raise CertificateError(str(error)) from error
    if Path(settings.key).stat().st_mode & 0o007:
        raise CertificateError(f"{settings.key}: the key is open to every user of this host; chmod o= it")
    return context


def _load_ca(context: ssl.SSLContext, settings: config.Tls) -> None:
    try:
        tls.load_ca(context, settings.ca)
    except ValueError as error:
        raise CertificateError(str(error)) from error


def _expires(settings: config.Tls) -> float:
    """When our certificate ends, found by a handshake in memory with a client that trusts the CA alone.

    Raises `CertificateError` when such a client would refuse it: expired, of another CA, not for servers.
    """
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_context = _with_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), settings)
    server = server_context.wrap_bio(there, back, server_side=True)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False  # by which names we are called is not known here
    _load_ca(client_context, settings)
    client = client_context.wrap_bio(back, there)
    try:
        for side in (client, server, client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", "") or str(error)
        raise CertificateError(f"{settings.cert}: clients that trust {settings.ca} would refuse it: {why}") from error
    certificate = client.getpeercert()
    assert certificate is not None
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
