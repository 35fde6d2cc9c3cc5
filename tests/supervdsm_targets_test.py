"""What the root helper writes into open-iscsi's files and makes of its answers. Real targets: the lab's tests."""

import os
import subprocess
from pathlib import Path

import pytest

from supervdsm import calls, contract, disks, settings, targets, tools

CONTEXT = settings.Settings(0, 0, 0, ())
# As open-iscsi 2.1.8 makes one.
RECORD = """\
# BEGIN RECORD 2.1.8
node.name = iqn.2026-01.test:a
node.startup = automatic
iface.iscsi_ifacename = default
node.session.auth.authmethod = None
node.session.timeo.replacement_timeout = 120
node.conn[0].address = 192.0.2.1
# END RECORD
"""


def test_settings_and_secret_are_written_into_the_private_file(tmp_path: Path) -> None:
    record = tmp_path / "default"
    record.write_text(RECORD)
    record.chmod(0o644)
    changes = {"node.startup": "manual", "node.session.timeo.replacement_timeout": "5"}
    targets._change(record, changes | targets._credentials("node.session", "joe", "a=b = c#d"))
    assert record.read_text().splitlines() == [
        "# BEGIN RECORD 2.1.8",
        "node.name = iqn.2026-01.test:a",
        "iface.iscsi_ifacename = default",
        "node.conn[0].address = 192.0.2.1",
        "node.startup = manual",
        "node.session.timeo.replacement_timeout = 5",
        "node.session.auth.authmethod = CHAP",
        "node.session.auth.username = joe",
        "node.session.auth.password = a=b = c#d",
        "# END RECORD",
    ]
    assert record.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("user", "password"), [(None, None), ("joe", None), (None, "x")])
def test_without_both_there_is_no_chap(user: str | None, password: str | None) -> None:
    assert targets._credentials("p", user, password) == {"p.auth.authmethod": "None"}


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(24, "refused"), (19, "refused"), (4, "unreachable"), (8, "unreachable"), (21, "absent"), (6, "failed")],
)
def test_exit_codes_have_their_meaning(code: int, outcome: str) -> None:
    answer = targets._answer(subprocess.CompletedProcess([], code, "", "iscsiadm: one\niscsiadm: two\n"))
    assert answer == calls.Answer(outcome, f"iscsiadm: two ({code})", [])


def test_a_portal_is_written_as_open_iscsi_reads_it() -> None:
    assert targets._portal("192.0.2.1", 3260) == "192.0.2.1:3260"
    assert targets._portal("2001:db8::1", 3260) == "[2001:db8::1]:3260"


@pytest.mark.parametrize(
    ("worded", "features", "told"),
    [("off", "0", "off"), ("-", "0", "-"), ("-", "1 queue_if_no_path", "on"), ("5 chk", "1 queue_if_no_path", "5 chk")],
)
def test_a_map_that_queues_by_its_own_feature_is_told(worded: str, features: str, told: str) -> None:
    paths = [{"dev": "sda", "dm_st": "active", "chk_st": "ready"}]
    found = {"name": "a", "uuid": "36001", "sysfs": "dm-0", "queueing": worded, "features": features}
    assert disks._map({**found, "path_groups": [{"paths": paths}]}).queueing == told


def test_an_absent_scsi_host_and_disk_are_refused() -> None:
    with pytest.raises(contract.Refused, match="no SCSI host 4711"):
        targets.rescan_host(calls.RescanHost(4711), CONTEXT)
    with pytest.raises(contract.Refused, match="no disk sdzz"):
        disks.read_content(calls.ReadContent("sdzz"), CONTEXT)


def test_a_host_without_multipathd_has_no_maps_and_says_why() -> None:
    found = disks.get_maps(calls.GetMaps(), CONTEXT)
    assert found.maps == []
    assert found.reason


def test_a_program_that_is_not_there_is_said_so() -> None:
    with pytest.raises(contract.Failed, match="no-such-program is not installed"):
        tools.run(["no-such-program"])


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a mount namespace: run the tests as root")
def test_what_a_discovery_writes_is_seen_by_nobody(tmp_path: Path) -> None:
    place = tmp_path / "send_targets"
    child = os.fork()
    if child == 0:
        targets._hide(place)
        (place / "secret").write_text("s3cret")
        os._exit(0 if list(place.iterdir()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert list(place.iterdir()) == []
