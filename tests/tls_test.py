"""TLS for other hosts: who gets in, who does not and hears why, stalled handshakes, certificates that change."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from tests import certificates
from tests.until import until
from tests.wire_fixture import Served, free_port, request
from vdsm import config, standalone
from vdsm.api import certificates as agents_certificates
from vdsm.client import exits, failures, tls, transport
from vdsm.standalone import ground

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}
ROOT = Path(__file__).resolve().parent.parent


class Secured(Served):
    """An agent on TLS whose files lie in `directory`/tls."""

    def __init__(self, directory: Path, new_loop: Callable[[], asyncio.AbstractEventLoop], **options: object) -> None:
        self.authority = certificates.Authority(directory)
        self.files = directory / "tls"
        self.files.mkdir()
        certificates.install(self.authority, self.files)
        self.tls_port = free_port()
        super().__init__(
            directory, new_loop, tcp_port=0, tls=certificates.settings(self.files, self.tls_port, **options)
        )

    def address(self, scheme: str = "wss", host: str = "localhost") -> str:
        return f"{scheme}://{host}:{self.tls_port}"

    def client(self, credentials: tls.Credentials, scheme: str = "wss") -> transport.Client:
        return transport.connect(self.address(scheme), 10, credentials=credentials)

    def reload(self) -> None:
        """As on SIGHUP."""
        self.loop.call_soon_threadsafe(self.api.reload)

    def connect(self) -> socket.socket:
        """A plain connection to the TLS port."""
        return socket.create_connection(("127.0.0.1", self.tls_port), 10)


Secure = Callable[..., Secured]


@pytest.fixture(params=LOOPS)
def secure(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Secure]:
    """Starts an agent on TLS with the given options of [tls]."""
    with contextlib.ExitStack() as stack:

        def start(**options: object) -> Secured:
            served = Secured(tmp_path, LOOPS[request.param], **options)
            served.start()
            stack.callback(served.stop)
            return served

        yield start


@pytest.fixture(scope="module", params=LOOPS)
def secured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """For tests that leave its files alone."""
    served = Secured(tmp_path_factory.mktemp("tls"), LOOPS[request.param])
    served.start()
    yield served
    served.stop()


@pytest.fixture
def alive(secured: Secured) -> Iterator[None]:
    """Whatever a test does, the listener serves afterwards."""
    yield
    with secured.client(secured.authority.credentials("after")) as client:
        assert client.call("Spec.get_data") == ["hello", 5]


# -- who gets in


@pytest.mark.parametrize("scheme", ["wss", "https"])
def test_a_certificate_of_the_ca_is_the_caller(secured: Secured, scheme: str) -> None:
    credentials = secured.authority.credentials("engine", "engine.example.com", "10.0.0.1")
    with secured.client(credentials, scheme) as client:
        names = ["DNS:engine.example.com", "IP Address:10.0.0.1"]
        assert client.call("Sample.whoami") == ["certificate", "engine", *names]
        assert client.call("Sample.rule") == "ruled"


def test_events_come_over_tls(secured: Secured) -> None:
    with secured.client(secured.authority.credentials("engine"), "https") as client:
        client.subscribe(["job"])
        secured.events.publish("job", "one", {"status": "done"})
        event = client.next_event(10)
        assert event is not None and event["subject"] == "one"


def test_large_texts_go_both_ways(secured: Secured) -> None:
    value = "x" * (3 << 20)
    for scheme in ("wss", "https"):
        with secured.client(secured.authority.credentials("engine"), scheme) as client:
            assert client.call("Sample.echo", {"value": value}) == value


def test_posts_on_one_connection_take_the_short_path_too(secured: Secured) -> None:
    context = tls.client_context(secured.authority.credentials("engine"))
    body = request("Sample.whoami")
    head = b"POST /jsonrpc HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with context.wrap_socket(secured.connect(), server_hostname="localhost") as peer:
        for _ in range(3):
            peer.sendall(head % len(body) + body)
            answer = peer.recv(65536)
            while not answer.endswith(b"}\n"):
                answer += peer.recv(65536)
            assert b'"certificate","engine"' in answer


def test_tls_1_3_is_preferred_and_1_2_will_do(secured: Secured, alive: None) -> None:
    for newest in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
        context = tls.client_context(secured.authority.credentials("engine"))
        context.maximum_version = newest
        with context.wrap_socket(secured.connect(), server_hostname="localhost") as peer:
            assert peer.version() == newest.name.replace("_", ".")


# -- who does not


def _refused(credentials: Callable[[Secured, Path], tls.Credentials], secured: Secured, directory: Path) -> None:
    for scheme in ("wss", "https"):
        with pytest.raises(failures.Denied, match="does not take our certificate"):
            secured.client(credentials(secured, directory), scheme).call("Spec.get_data")


def _of_another_ca(secured: Secured, directory: Path) -> tls.Credentials:
    foreign = certificates.Authority(directory).credentials("stranger")
    return tls.Credentials(foreign.cert, foreign.key, str(secured.authority.ca))


@pytest.mark.parametrize(
    ("credentials", "reason"),
    [
        (_of_another_ca, "unable to get local issuer certificate|self.signed certificate"),
        (lambda secured, _: secured.authority.credentials("old", days=(-10, -1)), "certificate has expired"),
        (lambda secured, _: secured.authority.credentials("early", days=(1, 10)), "certificate is not yet valid"),
    ],
    ids=["another-ca", "expired", "not-yet-valid"],
)
def test_other_certificates_are_refused(
    secured: Secured,
    alive: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    credentials: Callable[[Secured, Path], tls.Credentials],
    reason: str,
) -> None:
    _refused(credentials, secured, tmp_path)
    assert any(record.levelno == logging.WARNING for record in caplog.records)
    until(lambda: re.search(f"handshake with 127.0.0.1 failed: .*({reason})", caplog.text))


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda version: version.name)
def test_no_certificate_is_refused(
    secured: Secured, alive: None, caplog: pytest.LogCaptureFixture, newest: ssl.TLSVersion
) -> None:
    context = ssl.create_default_context(cafile=str(secured.authority.ca))
    context.maximum_version = newest
    assert _answer(secured, context) == b""
    until(lambda: "failed: [SSL: PEER_DID_NOT_RETURN_A_CERTIFICATE]" in caplog.text)


def test_tls_1_1_is_refused(secured: Secured, alive: None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    credentials = secured.authority.credentials("engine")
    context.load_verify_locations(credentials.ca)
    context.load_cert_chain(credentials.cert, credentials.key)
    assert _answer(secured, context) == b""


def _answer(secured: Secured, context: ssl.SSLContext) -> bytes:
    """What comes back for a call over `context`; nothing when the connection is not let in."""
    with contextlib.suppress(OSError), secured.connect() as plain:
        return _post(plain, context, "localhost", "Spec.get_data")
    return b""


def _post(plain: socket.socket, context: ssl.SSLContext, host: str, method: str) -> bytes:
    """Makes one call over TLS: the beginning of the answer."""
    body = request(method)
    head = b"POST /jsonrpc HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with context.wrap_socket(plain, server_hostname=host) as peer:
        peer.sendall(head % len(body) + body)
        answer = peer.recv(65536)
        while answer and not answer.endswith(b"}\n"):
            answer += peer.recv(65536)
        return answer


@pytest.mark.parametrize(
    "said",
    [
        b"POST /jsonrpc HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b'{"jsonrpc":"2.0","method":"Spec.get_data","id":1}\n',
        os.urandom(4096),
        b"\x16\x03\x01\xff\xff" + bytes(70000),
    ],
    ids=["http", "json", "garbage", "hello-of-zeros"],
)
def test_what_is_not_tls_is_cut_off(secured: Secured, alive: None, said: bytes) -> None:
    with secured.connect() as peer, contextlib.suppress(ConnectionError):
        peer.sendall(said)
        while piece := peer.recv(65536):  # the end, or an alert and the end
            assert b"HTTP/" not in piece and b"jsonrpc" not in piece


# -- handshakes


def _hello() -> bytes:
    """The beginning of an honest handshake."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(back, there, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return there.read()


@pytest.mark.parametrize("begun", [0, 100, None], ids=["nothing", "part", "hello"])
def test_a_stalled_handshake_delays_nobody(secure: Secure, begun: int | None) -> None:
    served = secure(handshake_s=600.0)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(served.connect()).sendall(_hello()[:begun])
        with served.client(served.authority.credentials("engine")) as client:
            assert client.call("Spec.get_data") == ["hello", 5]


@pytest.mark.parametrize("begun", [0, 100, None], ids=["nothing", "part", "hello"])
def test_a_stalled_handshake_ends(secure: Secure, caplog: pytest.LogCaptureFixture, begun: int | None) -> None:
    served = secure(handshake_s=0.3)
    began = time.monotonic()
    with served.connect() as peer:
        peer.sendall(_hello()[:begun])
        while peer.recv(65536):
            pass  # the server's own hello, then the end
    assert time.monotonic() - began >= 0.25
    until(lambda: "taking longer than 0.3 seconds" in caplog.text)


def test_handshakes_at_once_are_bounded_and_the_oldest_goes(secure: Secure) -> None:
    served = secure(max_handshakes=5, handshake_s=600.0)
    credentials = served.authority.credentials("engine")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(served.connect())
        flood = [stack.enter_context(served.connect()) for _ in range(50)]
        for gone in [first, *flood[:40]]:
            with contextlib.suppress(ConnectionError):
                assert gone.recv(1) == b""
        with served.client(credentials) as client:
            assert client.call("Spec.get_data") == ["hello", 5]
        flood[-1].settimeout(0.05)
        with pytest.raises(TimeoutError):  # it may still try
            flood[-1].recv(1)


def test_failed_handshakes_do_not_fill_the_log(secured: Secured, alive: None, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(60):
        with secured.connect() as peer, contextlib.suppress(ConnectionError):
            peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
            peer.recv(1)
    assert caplog.text.count("handshake with") <= 40  # 20 a minute; a minute may have begun meanwhile


# -- the client's side


def test_an_agent_of_another_name_is_not_believed(secure: Secure) -> None:
    served = secure()
    certificates.install(served.authority, served.files, "impostor", "other.example.com")
    served.reload()
    credentials = served.authority.credentials("engine")
    until(lambda: _subject(served, check_hostname=False) == "impostor")
    for scheme in ("wss", "https"):
        with pytest.raises(failures.Untrusted, match="not valid for 'localhost'"):
            served.client(credentials, scheme)


def test_an_agent_of_another_ca_is_not_believed(secured: Secured, alive: None, tmp_path: Path) -> None:
    foreign = certificates.Authority(tmp_path)
    with pytest.raises(failures.Untrusted, match=r"self-signed certificate|issuer"):
        secured.client(foreign.credentials("engine"))


@pytest.mark.parametrize("name", ["cert", "key", "ca"])
@pytest.mark.parametrize(
    "content", [None, b"", b"-----BEGIN CERTIFICATE-----\nnonsense\n"], ids=["none", "empty", "bad"]
)
def test_own_files_that_cannot_be_used_are_named(
    secured: Secured, tmp_path: Path, name: str, content: bytes | None
) -> None:
    credentials = secured.authority.credentials("engine")
    path = tmp_path / "file.pem"
    if content is not None:
        path.write_bytes(content)
    setattr(credentials, name, str(path))
    with pytest.raises(failures.NoCertificate, match=r"file\.pem"):
        secured.client(credentials)


def test_a_server_without_tls_is_said(tmp_path: Path) -> None:
    served = Served(tmp_path, asyncio.new_event_loop)
    served.start()
    try:
        credentials = certificates.Authority(tmp_path).credentials("engine")
        with pytest.raises(failures.ClientError) as caught:
            transport.connect(f"localhost:{served.port}", 10, credentials=credentials)
        assert type(caught.value) is failures.CannotConnect
    finally:
        served.stop()


def test_an_agent_that_does_not_shake_hands_is_given_up(tmp_path: Path) -> None:
    credentials = certificates.Authority(tmp_path).credentials("engine")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(failures.CannotConnect, match="in time"):
        transport.connect(f"127.0.0.1:{silent.getsockname()[1]}", 0.3, credentials=credentials)


def test_a_request_that_is_not_taken_ends_at_its_deadline(tmp_path: Path) -> None:
    """The pieces that go out one by one do not begin the time anew."""
    authority = certificates.Authority(tmp_path)
    certificates.install(authority, tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = tls.client_context(authority.credentials("engine"))

        def read_slowly() -> None:
            with contextlib.suppress(OSError), context.wrap_socket(theirs, server_side=True) as peer:
                while not done.wait(0.01) and peer.recv(16384):
                    pass

        done = threading.Event()
        reading = threading.Thread(target=read_slowly)
        reading.start()
        began = time.monotonic()
        with (
            contextlib.closing(tls.TlsStream(client.wrap_socket(ours, server_hostname="localhost"), "peer")) as sending,
            pytest.raises(failures.NoAnswer),
        ):
            sending.send(bytes(64 << 20), time.monotonic() + 0.5)
        assert time.monotonic() - began < 30
        done.set()
        reading.join(10)


CALL = ["Sample", "whoami"]


def test_the_command_speaks_tls(secured: Secured, alive: None, tmp_path: Path) -> None:
    mine = secured.authority.credentials("admin", "admin.example.com")
    options = ["--cert", mine.cert, "--key", mine.key, "--ca", mine.ca]
    place = ["--host", "localhost", "-p", str(secured.tls_port)]
    assert _command([*place, *options, *CALL]) == (exits.OK, "certificate")
    environment = {"VDSM_ADDRESS": f"localhost:{secured.tls_port}"}
    environment |= {"VDSM_CERT": mine.cert, "VDSM_KEY": mine.key, "VDSM_CA": mine.ca}
    assert _command(CALL, **environment) == (exits.OK, "certificate")
    usual = tmp_path / ".config/vdsm/tls"
    usual.mkdir(parents=True)
    for name in ("cert", "key", "ca"):
        (usual / f"{name}.pem").symlink_to(getattr(mine, name))
    assert _command([*place, *CALL], HOME=str(tmp_path)) == (exits.OK, "certificate")
    assert _command(["-p", str(secured.tls_port), *CALL], HOME=str(tmp_path)) == (exits.OK, "certificate")
    assert _command([*place, *CALL], HOME="/nonexistent")[0] == exits.CANNOT_CONNECT
    assert _command([*place, *options[:-1], mine.cert, *CALL])[0] == exits.CANNOT_CONNECT
    foreign = _of_another_ca(secured, tmp_path)
    options = ["--cert", foreign.cert, "--key", foreign.key, "--ca", foreign.ca]
    assert _command([*place, *options, *CALL])[0] == exits.DENIED


def _command(argv: list[str], **environment: str) -> tuple[int, str]:
    """(exit code, the first of the printed list) of vdsm-client."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VDSM_")}
    ran = subprocess.run(
        [sys.executable, "-m", "vdsm.client", *argv],
        env=clean | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    words = ran.stdout.split('"')
    return ran.returncode, words[1] if len(words) > 1 else ran.stdout


# -- certificates that change


def _subject(served: Secured, check_hostname: bool = True) -> str:
    """The common name in the agent's certificate, as a new connection sees it."""
    context = tls.client_context(served.authority.credentials("looking"))
    context.check_hostname = check_hostname
    with context.wrap_socket(served.connect(), server_hostname="localhost") as peer:
        certificate = peer.getpeercert()
    assert certificate is not None
    return {key: value for parts in certificate["subject"] for key, value in parts}["commonName"]


@pytest.mark.parametrize("how", ["noticed", "asked"])
def test_new_certificates_are_for_new_connections(secure: Secure, how: str) -> None:
    served = secure(check_s=0.1 if how == "noticed" else 3600.0)
    credentials = served.authority.credentials("engine")
    with served.client(credentials) as living, served.unix() as watching:
        assert "result" in watching.call("Host.subscribe", {"topics": ["host"]})
        assert _subject(served) == "agent"
        certificates.install(served.authority, served.files, "renewed")
        if how == "asked":
            served.reload()
        event = watching.message()["params"]
        assert (event["topic"], event["subject"]) == ("host", "certificates")
        assert event["data"]["state"] == "loaded" and event["data"]["expires"] > time.time()
        assert _subject(served) == "renewed"
        assert living.call("Spec.get_data") == ["hello", 5]
        with served.client(credentials) as another:
            assert another.call("Spec.get_data") == ["hello", 5]


def test_clients_of_a_ca_that_was_taken_away_stay_out(secure: Secure, tmp_path: Path) -> None:
    served = secure()
    old = served.authority.credentials("engine")
    (tmp_path / "new").mkdir()
    successor = certificates.Authority(tmp_path / "new")
    with served.client(old) as living:
        certificates.install(successor, served.files)
        served.reload()
        until(lambda: _let_in(served, successor.credentials("engine")))
        assert living.call("Sample.whoami")[1] == "engine"
        with pytest.raises(failures.Denied):
            served.client(tls.Credentials(old.cert, old.key, str(successor.ca))).call("Spec.get_data")
        assert living.call("Sample.whoami")[1] == "engine"


def test_no_session_of_before_is_resumed(secure: Secure) -> None:
    """It would be believed without a look at its certificate."""
    served = secure()
    context = tls.client_context(served.authority.credentials("engine"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in 1.3 there are none at all
    with context.wrap_socket(served.connect(), server_hostname="localhost") as peer:
        session = peer.session
    certificates.install(served.authority, served.files, "renewed")
    served.reload()
    until(lambda: _subject(served) == "renewed")
    with context.wrap_socket(served.connect(), server_hostname="localhost", session=session) as peer:
        assert not peer.session_reused


def _let_in(served: Secured, credentials: tls.Credentials) -> bool:
    try:
        with served.client(credentials) as client:
            return bool(client.call("Spec.get_data"))
    except (failures.Denied, failures.Untrusted):
        return False


def _garbage(served: Secured, name: str) -> None:
    certificates.replace(served.files / f"{name}.pem", b"garbage")


def _gone(served: Secured, name: str) -> None:
    (served.files / f"{name}.pem").unlink()


def _of_others(served: Secured, name: str) -> None:
    """A file that is in order but does not belong to the other two."""
    other = served.files.parent / "other"
    other.mkdir()
    certificates.install(certificates.Authority(other), other)
    certificates.replace(served.files / f"{name}.pem", (other / f"{name}.pem").read_bytes())


def _open_key(served: Secured, name: str) -> None:
    _garbage(served, "other")
    (served.files / "key.pem").chmod(0o644)


def _expired(served: Secured, name: str) -> None:
    certificates.install(served.authority, served.files, "late", days=(-10, -1))


@pytest.mark.parametrize("name", ["cert", "key", "ca"])
@pytest.mark.parametrize("spoil", [_garbage, _gone, _of_others], ids=lambda spoil: spoil.__name__.strip("_"))
def test_files_that_cannot_be_used_leave_the_old_in_force(
    secure: Secure, caplog: pytest.LogCaptureFixture, spoil: Callable[[Secured, str], None], name: str
) -> None:
    served = secure(check_s=0.1)
    _spoiled(served, caplog, spoil, name)
    certificates.install(served.authority, served.files, "mended")
    until(lambda: _subject(served) == "mended")


@pytest.mark.parametrize("spoil", [_open_key, _expired], ids=lambda spoil: spoil.__name__.strip("_"))
def test_an_open_key_or_an_expired_certificate_is_not_taken(
    secure: Secure, caplog: pytest.LogCaptureFixture, spoil: Callable[[Secured, str], None]
) -> None:
    _spoiled(secure(check_s=0.1), caplog, spoil, "")


def _spoiled(
    served: Secured, caplog: pytest.LogCaptureFixture, spoil: Callable[[Secured, str], None], name: str
) -> None:
    """Spoils the files, and sees that this is said once in the log and in an event, and that nothing else changes."""
    credentials = served.authority.credentials("engine")
    with served.client(credentials) as living, served.unix() as watching:
        assert "result" in watching.call("Host.subscribe", {"topics": ["host"]})
        spoil(served, name)
        event = watching.message()["params"]
        assert event["data"]["state"] == "refused" and event["data"]["reason"]
        assert _subject(served) == "agent"
        assert living.call("Spec.get_data") == ["hello", 5]
        with served.client(credentials) as another:
            assert another.call("Sample.whoami")[1] == "engine"
    said = [record for record in caplog.records if "new certificates are refused" in record.getMessage()]
    assert [record.levelno for record in said] == [logging.ERROR]


def test_certificate_and_key_replaced_one_after_the_other_are_read_together(tmp_path: Path) -> None:
    """Between the two they do not fit: no time to read them."""
    authority = certificates.Authority(tmp_path)
    certificates.install(authority, tmp_path)
    files = agents_certificates.Certificates(certificates.settings(tmp_path, 1))
    assert files.load() == ""
    first = files.context
    cert, key = authority.files("next")
    certificates.replace(tmp_path / "cert.pem", cert.read_bytes())
    assert not files.refresh()
    certificates.replace(tmp_path / "key.pem", key.read_bytes())
    assert not files.refresh()
    assert files.refresh() and files.context is not first
    assert not files.refresh()


# -- the start


@pytest.mark.parametrize("name", ["cert", "key", "ca"])
def test_an_agent_without_usable_files_does_not_start(tmp_path: Path, name: str) -> None:
    served = Secured(tmp_path, asyncio.new_event_loop)
    (served.files / f"{name}.pem").unlink()
    with pytest.raises(agents_certificates.CertificateError, match=f"{name}.pem: No such file"):
        served.start()
    served.close()
    assert not Path(served.path).exists()


def test_an_agent_whose_certificate_has_expired_starts_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its VMs and its Unix socket do not depend on it."""
    served = Secured(tmp_path, asyncio.new_event_loop, check_s=0.1)
    certificates.install(served.authority, served.files, "late", days=(-10, -1))
    served.start()
    try:
        assert "certificate has expired" in caplog.text
        with pytest.raises(failures.Untrusted, match="expired"):
            served.client(served.authority.credentials("engine"))
        certificates.install(served.authority, served.files, "mended")
        until(lambda: _let_in(served, served.authority.credentials("engine")))
    finally:
        served.stop()


def test_a_tls_port_that_is_taken_leaves_nothing_behind(tmp_path: Path) -> None:
    served = Secured(tmp_path, asyncio.new_event_loop)
    with socket.create_server(("127.0.0.1", served.tls_port)), pytest.raises(OSError):
        served.start()
    served.close()
    assert not Path(served.path).exists()


def test_the_end_waits_for_no_handshake(tmp_path: Path) -> None:
    served = Secured(tmp_path, uvloop.new_event_loop, handshake_s=600.0)
    served.start()
    with served.connect() as stalled, contextlib.suppress(ConnectionError):
        stalled.sendall(b"\x16")
        with served.client(served.authority.credentials("engine")) as client:
            client.call("Spec.get_data")  # so the one before is at the door
        served.stop()
        assert stalled.recv(1) == b""


# -- the whole agent


def test_the_real_agent_serves_tls_and_reads_its_files_again_on_sighup(
    stack: standalone.Stack, agent: transport.Client, authority: certificates.Authority
) -> None:
    address = f"localhost:{stack.settings.tls.port}"
    credentials = authority.credentials("engine")
    agent.subscribe(["host"])
    with transport.connect(address, 30, credentials=credentials) as living:
        known = living.call("Host.getVMList")
        assert living.call("Host.getJobs") == agent.call("Host.getJobs")
        certificates.install(authority, authority.directory, "renewed", owner=ground.USER)
        os.kill(stack.agent_pid, signal.SIGHUP)
        event = agent.next_event(30)
        assert event is not None and event["data"]["state"] == "loaded"
        assert living.call("Host.getVMList") == known
    with transport.connect(address, 30, credentials=credentials) as another:
        assert another.call("Host.getVMList") == known
    foreign = authority.directory / "foreign"
    foreign.mkdir()
    stranger = certificates.Authority(foreign).credentials("stranger")
    with pytest.raises(failures.Denied):
        wrong = tls.Credentials(stranger.cert, stranger.key, str(authority.ca))
        transport.connect(address, 30, credentials=wrong).call("Host.getVMList")


# -- the documentation

GUIDE = ROOT / "docs" / "security.md"


def test_the_documented_commands_make_certificates_that_work(tmp_path: Path) -> None:
    """Everything in the guide's `sh` blocks, as it is written; then an agent and a client use what is there."""
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        subprocess.run(["sh", "-euc", block], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    files = {name: str(tmp_path / path) for name, path in (("cert", "host1/cert.pem"), ("key", "host1/key.pem"))}
    settings = config.Tls(**files, ca=str(tmp_path / "ca/ca.pem"), address="127.0.0.1", port=free_port())
    served = Served(tmp_path, uvloop.new_event_loop, tcp_port=0, tls=settings)
    served.start()
    try:
        for name in ("admin", "host1"):  # hosts call each other with the same certificate
            mine = tls.Credentials(*(str(tmp_path / name / f"{file}.pem") for file in ("cert", "key", "ca")))
            with socket.create_connection(("127.0.0.1", settings.port), 10) as plain:
                answer = _post(plain, tls.client_context(mine), "host1.example.com", "Sample.whoami")
            assert f'"certificate","{name}"'.encode() in answer
    finally:
        served.stop()
