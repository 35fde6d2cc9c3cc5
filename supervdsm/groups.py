"""Volume groups that this host has to do with: the devices of each, found once and remembered.

    /run/supervdsm/groups/NAME        JSON: the names of its devices
    /run/supervdsm/groups/NAME.lock   held while a call starts, stops or extends it
    /run/udev/rules.d/61-supervdsm-NAME.rules   whose its devices are, where udev makes them

A group is looked for on all disks that the helper's settings allow. Once it is found, commands about it look at its own
devices alone, so that no other disk, frozen or not, has a say; when another host has added one, LVM misses it, and the
group is looked for again. A crash leaves files that the next start replaces.
"""

import contextlib
import fcntl
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from supervdsm import blockdevices, contract, lvm, settings
from supervdsm.calls import volumes as volume_calls

PLACE = Path("/run/supervdsm/groups")
RULES = Path("/run/udev/rules.d")
_MISSING = "is missing PV"
_TWIN = re.compile(r"Not using device (\S+) for PV")


@contextlib.contextmanager
def held(group: str) -> Iterator[None]:
    """One call at a time starts, stops or extends the group on this host."""
    PLACE.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (PLACE / f"{group}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find(group: str, context: settings.Settings) -> list[str]:
    """The devices of `group`. Raises `Failed` when it is not there, `Refused` when two groups have this name."""
    disks = blockdevices.allowed(context)
    names = blockdevices.by_number(disks)
    rows = _disks_of(group, disks) if disks else []
    if not rows:
        raise contract.Failed(f"no disk that this host may use has a volume group {group}")
    if len({row["vg_uuid"] for row in rows}) > 1:
        raise contract.Refused(f"there are several volume groups with the name {group}")
    return [names[number] for number in blockdevices.by_number([row["pv_name"] for row in rows])]


def _disks_of(group: str, disks: Sequence[str]) -> list[dict[str, str]]:
    """Without locks: the group need not be started, and which disks are whose is read from each disk alone.

    Of two disks with one id, as a copy that an array has made, LVM takes one. Later it would see that one alone, and
    not know of the other: so it is refused here."""
    fields = lvm.form(["pv_name", "vg_uuid"])
    done = lvm.run("pvs", *fields, "--nolocking", "--select", f"vg_name={group}", devices=disks)
    if done.code != 0:
        raise contract.Failed(f"pvs: {done.reason}")
    rows = lvm.rows(done)
    if rows and (twins := _TWIN.findall(done.err)):
        raise contract.Refused(f"disks are there twice, and which one is meant is not known: {', '.join(twins)}")
    return rows


def missing(group: str, context: settings.Settings) -> int:
    """How many disks of a started group this host does not see."""
    (row,) = report(group, "vgs", ["vg_missing_pv_count"], group, context=context)
    return int(row["vg_missing_pv_count"])


def remember(group: str, devices: Sequence[str], context: settings.Settings) -> None:
    """From now on commands about `group` look at these devices."""
    PLACE.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(PLACE / group, json.dumps(list(devices)))
    RULES.mkdir(parents=True, exist_ok=True)
    ours = f'SUBSYSTEM=="block", ENV{{DM_VG_NAME}}=="{group}", ENV{{DM_LV_NAME}}!="{volume_calls.LOCK_VOLUME}"'
    rule = f'{ours}, OWNER="{context.uid}", GROUP="{context.storage_gid}", MODE="0660"\n'
    _write(_rules(group), rule)
    _reload_rules()


def forget(group: str) -> None:
    for path in (PLACE / group, _rules(group)):
        path.unlink(missing_ok=True)
    _reload_rules()


def is_remembered(group: str) -> bool:
    return (PLACE / group).exists()


def devices(group: str) -> list[str]:
    """Raises `Failed` for a group that is not started on this host."""
    try:
        found: list[str] = json.loads((PLACE / group).read_text())
    except FileNotFoundError as error:
        raise contract.Failed(f"volume group {group} is not started on this host") from error
    return found


def run(group: str, command: str, *arguments: str, context: settings.Settings) -> lvm.Result:
    """Runs an LVM command about a started group. Raises `Failed` for one that is not."""
    done = lvm.run(command, *arguments, devices=devices(group))
    if _MISSING in done.err:
        remember(group, find(group, context), context)
        done = lvm.run(command, *arguments, devices=devices(group))
    return done


def change(group: str, command: str, *arguments: str, context: settings.Settings) -> None:
    """As `run`; raises `Failed` with LVM's reason when it fails."""
    done = run(group, command, *arguments, context=context)
    if done.code != 0:
        raise contract.Failed(f"{command}: {done.reason}")


def report(
    group: str, command: str, fields: Sequence[str], *arguments: str, context: settings.Settings
) -> list[dict[str, str]]:
    """The rows of `vgs`, `lvs` or `pvs` about a started group. Raises `Failed`.

    Read without the group's lock: metadata on a disk is the old or the new one at any moment. Readers with a lock would
    keep writers waiting, who ask again each second, and find the next reader there when many hosts look now and then.
    """
    done = run(group, command, "--nolocking", *lvm.form(fields), *arguments, context=context)
    if done.code != 0:
        raise contract.Failed(f"{command}: {done.reason}")
    return lvm.rows(done)


def _rules(group: str) -> Path:
    return RULES / f"61-supervdsm-{group}.rules"


def _reload_rules() -> None:
    if lvm.udev_runs():
        subprocess.run(["/usr/bin/udevadm", "control", "--reload"], check=False, env=lvm.environment())


def _write(path: Path, text: str) -> None:
    """Whole or not at all. In /run: nothing of it outlives the host."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text)
    new.chmod(0o644)
    new.rename(path)
