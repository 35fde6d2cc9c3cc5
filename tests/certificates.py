"""A certificate authority of the tests' own, and what it signs: good, expired, not yet valid, of the wrong name."""

import datetime
import shutil
from pathlib import Path

import trustme

from vdsm import config
from vdsm.client import tls

DAY = datetime.timedelta(days=1)


class Authority:
    """Writes PEM files into `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ca = trustme.CA()
        self.ca = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca)

    def files(self, common_name: str, *names: str, days: tuple[int, int] = (-1, 100)) -> tuple[Path, Path]:
        """(certificate, key) for `names`, valid from and until so many days from now."""
        now = datetime.datetime.now(datetime.UTC)
        issued = self._ca.issue_cert(
            *(names or ("localhost", "127.0.0.1")),
            common_name=common_name,
            not_before=now + days[0] * DAY,
            not_after=now + days[1] * DAY,
        )
        cert, key = self.directory / f"{common_name}.cert.pem", self.directory / f"{common_name}.key.pem"
        issued.cert_chain_pems[0].write_to_path(cert)
        key.touch(mode=0o600)
        issued.private_key_pem.write_to_path(key)
        return cert, key

    def credentials(self, common_name: str, *names: str, days: tuple[int, int] = (-1, 100)) -> tls.Credentials:
        """Of a client that trusts this authority."""
        cert, key = self.files(common_name, *names, days=days)
        return tls.Credentials(str(cert), str(key), str(self.ca))


def install(
    authority: Authority,
    into: Path,
    name: str = "agent",
    *names: str,
    days: tuple[int, int] = (-1, 100),
    owner: str | None = None,
) -> None:
    """Puts cert.pem, key.pem and ca.pem into a directory, as an admin would: each replaced in one step."""
    cert, key = authority.files(name, *names, days=days)
    for source, target in ((cert, "cert.pem"), (key, "key.pem"), (authority.ca, "ca.pem")):
        replace(into / target, source.read_bytes(), owner)


def replace(path: Path, content: bytes, owner: str | None = None) -> None:
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_bytes(content)
    if owner is not None:
        shutil.chown(new, owner)
    new.replace(path)


def settings(directory: Path, port: int, **options: object) -> config.Tls:
    """Of an agent on loopback, whose files `install` has put into `directory`."""
    paths = {name: str(directory / f"{name}.pem") for name in ("cert", "key", "ca")}
    return config.Tls(**paths, address="127.0.0.1", port=port, **options)  # type: ignore[arg-type]  # options of many types
