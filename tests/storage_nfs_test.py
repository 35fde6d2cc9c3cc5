"""nfs-3.4 without a server: its parameters, its watchdog, and how late a write may arrive. With one: `tests/lab`."""

from pathlib import Path
from typing import Any

import pytest

from tests import storage_fixture
from vdsm import config, errors, events
from vdsm.storage import connected, formats, lockspaces
from vdsm.storage.formats import nfs

world, service = storage_fixture.world, storage_fixture.service
Service = storage_fixture.Service

FORMAT = "nfs-3.4"
GIVEN = {"connection": "nas.example.com:/exports/a"}

# Seen with kernel 6.1.
MOUNTSTATS = """\
device proc mounted on /proc with fstype proc
device 10.66.1.1:/data mounted on /run/m/three with fstype nfs statvers=1.1
\topts:\trw,vers=3,rsize=65536,soft,nolock,nosharecache,proto=tcp,nconnect=1,timeo=20,retrans=1,sec=sys
\tage:\t4
device 10.66.1.1:/a\\040b mounted on /mnt/a\\040b with fstype nfs4 statvers=1.1
\topts:\trw,vers=4.2,rsize=65536,hard,proto=tcp,timeo=600,retrans=2,sec=sys
\tage:\t1
\tnfsv4:\tbm0=0xfdffbfff,bm1=0x40fdbe3e,bm2=0x60803,acl=0x3,sessions,pnfs=not configured,lease_time=90,lease_expired=0
device tmpfs mounted on /run with fstype tmpfs
"""


def described(parameters: dict[str, Any]) -> dict[str, Any]:
    return formats.describe(FORMAT, parameters, "repo", 1, config.Storage())


@pytest.mark.parametrize(
    ("parameters", "server", "export", "version"),
    [
        (GIVEN, "nas.example.com", "/exports/a", "4.2"),
        ({**GIVEN, "protocol_version": "3"}, "nas.example.com", "/exports/a", "3"),
        ({"connection": "[fe80::1]:/"}, "[fe80::1]", "/", "4.2"),
    ],
)
def test_parameters_are_understood(parameters: dict[str, Any], server: str, export: str, version: str) -> None:
    found = described(parameters)
    assert (found["server"], found["export"], found["version"]) == (server, export, version)


@pytest.mark.parametrize(
    "parameters",
    [
        *[{}, {"connection": 7}, {"connection": "nas"}, {"connection": "/a"}, {"connection": "nas:a"}],
        *[{"connection": "nas:/a/../b"}, {"connection": "-o hard:/a"}, {"connection": "nas:/a,hard\n"}],
        *[{**GIVEN, "protocol_version": version} for version in ("4", "4.0", 3, None)],
        {**GIVEN, "options": "hard"},
    ],
    ids=str,
)
def test_other_parameters_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidParameters):
        described(parameters)


def test_no_watchdog_no_shared_repository(service: Service) -> None:
    """The sanlock of the tests has none (trap 5). Nothing was mounted: there is no root helper here that could."""
    assert not lockspaces.has_watchdog()
    run_dir = service.settings.sanlock.run_dir
    for unsafe, refusal in ((False, errors.NoWatchdog), (True, AssertionError)):
        settings = config.Config(sanlock=config.Sanlock(run_dir=run_dir, unsafe_no_watchdog=unsafe))
        connections = connected.Connections(settings, events.EventLog(), service.server, storage_fixture.Root())
        with pytest.raises(refusal, match="MountNfs" if unsafe else "watchdog"):  # which it would ask root for
            connections.connect("x", FORMAT, GIVEN)
        connections.stop()


def test_mounts_are_read_as_the_kernel_writes_them() -> None:
    three, four = nfs.nfs_mounts(MOUNTSTATS)
    assert (three.path, three.source, three.lease_s) == ("/run/m/three", "10.66.1.1:/data", None)
    assert "soft" in three.options
    assert (four.path, four.source, four.lease_s) == ("/mnt/a b", "10.66.1.1:/a b", 90)
    assert "hard" in four.options
    assert nfs.nfs_mounts(Path("/proc/self/mountstats").read_text()) == []


@pytest.mark.parametrize(
    ("lease_s", "enough_s"),
    [(None, 22), (10, 1), (90, 7), (91, 7), (120, 12), (3600, 592)],
    ids=["version 3", "a short lease", "the usual lease", "not a multiple", "a long lease", "an hour"],
)
def test_leases_outlive_what_may_arrive_late(lease_s: int | None, enough_s: int) -> None:
    """The first io_timeout, in seconds, with which another host waits long enough."""
    late_s = nfs._late_s(nfs.Mounted("/run/m", "nas:/a", frozenset(), lease_s))
    assert late_s <= nfs.takeover_s(enough_s)
    assert enough_s == 1 or late_s > nfs.takeover_s(enough_s - 1)


def test_place_where_nothing_is_mounted_is_no_repository(tmp_path: Path) -> None:
    """An export that somebody has unmounted: what is written there would be this host's alone."""
    repo = formats.open({**described(GIVEN), "place": str(tmp_path)})
    for touch in (repo.header, lambda: repo.format_(10)):
        with pytest.raises(errors.NotARepository, match="not mounted"):
            touch()
    assert list(tmp_path.iterdir()) == []
