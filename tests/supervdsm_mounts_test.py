"""What the root helper takes for an export, and what it takes a mount for. That it mounts: `tests/lab/nfs_test.py`."""

import errno
import os
from pathlib import Path

import pytest
import supervdsm_process as processes

from supervdsm import calls, contract, mounts, settings

OWN = (
    r"36 25 0:40 / /run/m/a\040b rw,nosuid,nodev,noexec,relatime shared:5 - nfs4 nas:/a\040b rw,vers=4.2,rsize=65536,"
    r"acregmin=0,acregmax=0,acdirmin=0,acdirmax=0,soft,nosharecache,proto=tcp,timeo=20,retrans=1,lookupcache=none"
)


@pytest.mark.parametrize("server", ["nas", "nas-1.example.com", "192.0.2.1", "[fe80::1]", "[::]", "a" * 253])
@pytest.mark.parametrize("export", ["/", "/a", "/a b/c", "/\u00fc,hard"])
def test_exports_are_understood(server: str, export: str) -> None:
    assert calls.MountNfs(server, export, "4.2").server == server


@pytest.mark.parametrize(
    ("server", "export", "version"),
    [
        *[(server, "/a", "4.2") for server in ("", "-o", "a-", "a b", "a:b", "a/b", "::1", "[::1", "a\n", "a" * 254)],
        *[("nas", export, "4.2") for export in ("", "a", "/a/", "//", "/a/../b", "/a\n", "/" + "a" * 1024)],
        *[("nas", "/a", version) for version in ("", "4", "4.0", "2", "3,hard", "4.2 ")],
    ],
)
def test_what_is_no_export_is_refused(server: str, export: str, version: str) -> None:
    for lazy in (True, False):
        with pytest.raises(contract.Refused):
            calls.UnmountNfs(server, export, version, lazy=lazy)
    with pytest.raises(contract.Refused):
        calls.MountNfs(server, export, version)


def test_each_export_has_a_place_of_its_own() -> None:
    context = settings.Settings(0, 0, 0, (), "/run/m")
    exports = [
        ("nas", "/a/b", "3"),
        ("nas", "/a/b", "4.2"),
        ("nas", "/a_b", "3"),
        ("nas.a", "/b", "3"),
        ("nas", "/", "3"),
    ]
    places = {mounts._path(calls.MountNfs(*export), context) for export in exports}
    assert len(places) == len(exports)
    assert {place.parent for place in places} == {Path("/run/m")}
    long = mounts._path(calls.MountNfs("n" * 253, "/" + "e" * 1000, "3"), context)
    assert len(long.name) < 120


def test_mounts_are_read_as_the_kernel_writes_them() -> None:
    mount = mounts.parse(OWN)
    assert (mount.path, mount.kind, mount.source) == ("/run/m/a b", "nfs4", "nas:/a b")
    assert {"noexec", "soft", "vers=4.2"} <= mount.options
    mounts._check_own(mount, "nas:/a b", "4.2")


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        *[
            ("soft,", "hard,"),
            ("soft,", "softerr,"),
            ("nosharecache,", ""),
            ("timeo=20", "timeo=600"),
            ("retrans=1", "retrans=2"),
        ],
        *[
            ("lookupcache=none", "local_lock=none"),
            ("acregmin=0", "acregmin=3"),
            ("nosuid,", ""),
            ("vers=4.2", "vers=4.1"),
        ],
        *[("nas:", "other:"), ("nfs4 ", "ext4 ")],
    ],
)
def test_a_mount_that_is_not_its_own_is_refused(
    there: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of NFS is mounted here: what the kernel shows is made up."""
    mount = mounts.parse(OWN.replace(there, instead, 1))
    monkeypatch.setattr(mounts, "_mounts", lambda path: [mount])
    with pytest.raises(contract.Refused, match="unmount it first"):
        mounts.mount_nfs(calls.MountNfs("nas", "/a b", "4.2"), settings.Settings(0, 0, 0, (), str(tmp_path)))


@pytest.mark.parametrize(
    ("number", "links", "outcome"),
    [
        *[(errno.ESTALE, 0, "stale"), (errno.EIO, 0, "unreachable"), (errno.ETIMEDOUT, 0, "unreachable")],
        *[(errno.EACCES, 0, "denied"), (0, 2, "was mounted"), (0, 0, "stale")],
    ],
    ids=lambda value: str(value),
)
def test_a_mount_that_is_there_is_asked_how_it_is(
    number: int, links: int, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary directory does not fail so: the kernel's answers are made up here, and real in the lab."""

    def stat(path: Path) -> os.stat_result:
        if number:
            raise OSError(number, os.strerror(number))
        return os.stat_result((0o40770, 1, 1, links, 0, 0, 0, 0, 0, 0))

    monkeypatch.setattr(Path, "stat", stat)
    assert mounts._look(tmp_path).outcome == outcome


@processes.needs_root
def test_what_was_never_mounted_is_unmounted() -> None:
    with processes.place() as place:
        context = settings.Settings(0, 0, 0, (), str(place / "mounts"))
        for lazy in (True, False):
            assert not mounts.unmount_nfs(calls.UnmountNfs("nas", "/a", "3", lazy=lazy), context).was_mounted
        assert [path.name[0] for path in (place / "mounts").iterdir()] == ["."]  # the lock


@processes.needs_root
def test_mounts_lie_where_only_root_can_write() -> None:
    with processes.place() as place:
        (place / "open").mkdir()
        (place / "open").chmod(0o777)
        users = (processes.AGENT, processes.AGENT_GROUP, processes.STORAGE_GROUP)
        with pytest.raises(settings.SettingsError, match="--mount-dir"):
            settings.resolve(*users, [], str(place / "open" / "mounts"), [])
        assert settings.resolve(*users, [], str(place / "mounts"), []).mount_dir == str(place / "mounts")
