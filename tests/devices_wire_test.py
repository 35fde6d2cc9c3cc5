"""The verbs of disks and targets on a machine without either: they answer with what is there."""

from pathlib import Path
from typing import Any

import pytest

from vdsm.client import failures, transport

PORTAL = {"id": "me", "connection": "192.0.2.1", "iqn": "iqn.2026-01.test:a"}


def test_disks_are_listed_and_loop_devices_are_none(agent: transport.Client) -> None:
    found = agent.call("Host.getDeviceList")
    names = [disk["name"] for disk in found]
    assert not [name for name in names if name.startswith(("loop", "ram", "zram"))]
    for disk in found:
        blocks = Path("/sys/block", disk["name"], "size").read_text()
        assert disk["capacity"] == int(blocks) * 512
        assert (disk["status"] == "unknown") == (disk["reason"] is not None and not disk["usedBy"])
        assert agent.call("Host.getDeviceList", {"guids": [disk["GUID"]], "refresh": False}) == [disk]


def test_what_is_mounted_is_used_without_a_look_at_it(agent: transport.Client) -> None:
    found = agent.call("Host.getDeviceList", {"checkStatus": False})
    mounted = [line.split()[2] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for disk in found:
        if Path("/sys/block", disk["name"], "dev").read_text().strip() in mounted:
            assert disk["status"] == "used"
            assert disk["usedBy"]


@pytest.mark.parametrize("kind", ["ISCSI", "FCP", "3", 2])
def test_no_disk_here_is_shared(agent: transport.Client, kind: str | int) -> None:
    assert agent.call("Host.getDeviceList", {"storageType": kind}) == []


def test_there_are_no_sessions(agent: transport.Client) -> None:
    assert agent.call("ISCSIConnection.getSessions") == []


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"connection": "san.example.com"}, "connection"),
        ({"connection": "192.0.2.1; reboot"}, "connection"),
        ({"iqn": "iqn.2026-01.test/../../a"}, "iqn"),
        ({"tpgt": 65536}, "tpgt"),
        ({"port": 0}, "port"),
        ({"user": "joe", "password": "two words"}, "password"),
        ({"user": "joe\nnode.startup = automatic", "password": "x"}, "user"),
    ],
    ids=["a name", "a command", "a path", "tag", "port", "a blank in the password", "a second line"],
)
def test_what_cannot_be_a_login_is_refused_by_its_parameter(
    agent: transport.Client, changes: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(failures.ClientError) as caught:
        agent.call("ISCSIConnection.login", {**PORTAL, **changes})
    assert caught.value.data["key"] == "invalid_parameters"
    assert caught.value.data["facts"]["parameter"] == parameter
    assert "two words" not in str(caught.value)
