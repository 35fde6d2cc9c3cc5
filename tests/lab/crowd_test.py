"""A volume group with 2000 volumes: what verbs cost there. Slots and their table: `tests/crowd_test.py`.

Making so many one by one takes hours in such a host. LVM's text and the leases of their locks are written at once, as
they would have come to be.
"""

import statistics
import time
from typing import Any

import pytest

from supervdsm import calls
from tests import lab, proof
from tests.lab import groups, peers

MIB = 1 << 20
REPO = "crowd"
GIVEN = {"repoFormat": "clvm-1.2", "connectionParameters": {"vg": groups.NAME}}
MANY, ROUNDS = 2000, 6
WORSE = 2.0
LUN_MIB = 24 << 10
FIRST_LOCK = 67  # MiB into LVM's volume of leases; one of them for each volume, after the group's own
# LVM's own size for its text has room for half of so much.
LEAST_TEXT = 512 << 10
LOCAL = "--config 'global/use_lvmlockd=1 devices/use_devicesfile=0' --devices {disk}"

# argv: the text, the number of volumes, and where their names go with the places of their leases.
ADD = """\
import re, sys, uuid
path, count, table = sys.argv[1], int(sys.argv[2]), sys.argv[3]
text = open(path).read()
size = int(re.search(r"lvmlock \\{.*?extent_count = (\\d+)", text, re.S)[1])
sample = re.search(r"\\n\\t\\tsample \\{.*?\\n\\t\\t\\}\\n", text, re.S)[0]
used = re.findall(r'extent_count = (\\d+)(?:(?!extent_count).)*?"pv0", (\\d+)', text, re.S)
free = max(int(count) + int(begin) for count, begin in used)
locks = count // 4 + 64
grown = f"segment_count = 2\\\\1extent_count = {size}"
head, tail = text.split("lvmlock {", 1)
tail = re.sub(r"segment_count = 1(.*?)extent_count = \\d+", grown, tail, count=1, flags=re.S)
more = f'segment2 {{\\nstart_extent = {size}\\nextent_count = {locks}\\ntype = "striped"\\nstripe_count = 1\\n'
more += f'stripes = [\\n"pv0", {free}\\n]\\n}}\\n'
end = re.search(r"\\n\\t\\t\\t\\t\\]\\n\\t\\t\\t\\}\\n", tail).end()
tail = tail[:end] + more + tail[end:]
free += locks
made, rows = [], []
for number in range(count):
    letters = uuid.uuid4().hex
    key = "-".join([letters[:6], *(letters[6 + 4 * at:10 + 4 * at] for at in range(5)), letters[26:32]])
    one = sample.replace("sample {", f"{uuid.uuid4()}.{number:08x} {{", 1)
    one = re.sub(r'id = "[^"]*"', f'id = "{key}"', one, count=1)
    offset = (%(first)d + number) << 20
    one = re.sub(r'lock_args = "[^"]*"', f'lock_args = "1.0.0:{offset}"', one)
    one = re.sub(r'"pv0", \\d+', f'"pv0", {free + number}', one)
    made.append(one)
    rows.append(f"{key} {offset}")
whole = (head + "lvmlock {" + tail).replace(sample, sample + "".join(made), 1)
open(path, "w").write(whole)
open(table, "w").write("\\n".join(rows))
print(len(whole))
"""
LEASES = """\
import sys, sanlock
table, group, device = sys.argv[1:]
for line in open(table):
    name, offset = line.split()
    sanlock.write_resource(f"lvm_{group}".encode(), name.encode(), [(device, int(offset))])
"""


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_thousands_of_volumes_make_no_verb_slower() -> None:
    reason = lab.missing()
    if reason:
        pytest.skip(reason)
    with lab.Lab(hosts=1, luns_mib=(LUN_MIB,)) as running, proof.writing("crowded-volume-group", None) as told:
        (one,) = running.hosts
        one.start_agent()
        groups.make(one, groups.NAME, [one.luns[0]])
        peer = peers.Peer(one)
        peer("formatStorageRepository", **GIVEN, options={"ioTimeout": 2})
        before = costs(peer)
        told["volumes"], told["bytes of LVM's text"] = MANY, crowd(one)
        after = costs(peer)
        told["rounds"] = ROUNDS
        ratios = {name: after[name] / before[name] for name in before}
        told |= {f"{name} against the empty one, medians": round(ratio, 2) for name, ratio in ratios.items()}
        assert max(ratios.values()) <= WORSE, ratios


def costs(peer: peers.Peer) -> dict[str, float]:
    """Median seconds of each verb in an image's life."""
    peer("connectStorageRepository", repoId=REPO, **GIVEN)
    peer.joined(REPO)
    taken: dict[str, list[float]] = {}

    def timed(verb: str, **given: Any) -> Any:
        began = time.monotonic()
        answer = peer(verb, **given)
        taken.setdefault(verb, []).append(time.monotonic() - began)
        return answer

    for _ in range(ROUNDS):
        disk = timed("createVirtualDisk", targetRepoId=REPO, size=MIB)["imageId"]
        snapshot = timed("createSnapshot", targetRepoId=REPO, baseVirtualDiskId=disk)["imageId"]
        where = {"repositoryId": REPO, "imageId": disk}
        timed("getImage", **where)
        timed("setImageUserData", **where, userData={"name": "one"})
        timed("resizeVirtualDisk", **where, size=2 * MIB)
        for image in (disk, snapshot):
            timed("removeImage", repositoryId=REPO, imageId=image)
    peer("disconnectStorageRepository", repoId=REPO)
    return {verb: statistics.median(seconds) for verb, seconds in taken.items()}


def crowd(one: lab.Host) -> int:
    """So many volumes more; the length of LVM's text then."""
    groups.start(one, groups.NAME)
    groups.call(one, calls.CreateVolume(groups.NAME, "sample", 4 * MIB))
    text, table, local = "/tmp/text", "/tmp/leases", LOCAL.format(disk=one.luns[0].path)
    one.sh(f"lvm vgcfgbackup {local} -f {text} {groups.NAME}")
    length = int(one.run(["python3", "-", text, str(MANY), table], 120, given=ADD % {"first": FIRST_LOCK + 64}).out)
    one.sh(f"lvm vgcfgrestore {local} --force --yes -f {text} {groups.NAME}", 120)
    groups.call(one, calls.StopVolumeGroup(groups.NAME))
    groups.start(one, groups.NAME)
    locks = f"/dev/mapper/{groups.NAME}-lvmlock"
    assert length > LEAST_TEXT
    assert len(groups.call(one, calls.ListVolumes(groups.NAME, "")).volumes) > MANY
    one.run(["python3", "-", table, groups.NAME, locks], 900, given=LEASES)
    return length
