"""Multipath maps, by multipathd, and what is on a disk, by blkid and LVM."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supervdsm import calls, contract, settings, tools
from supervdsm.calls import targets

BLOCK = Path("/sys/block")
# LVM looks at this disk alone, takes no lock, changes nothing, and leaves no file about it.
_LVM = "global { use_lvmlockd=0 locking_type=1 } devices { use_devicesfile=0 } backup { backup=0 archive=0 }"
_PV_FIELDS = "pv_uuid,dev_size,vg_name,vg_uuid,vg_tags"
_NOTHING, _AMBIVALENT = 2, 8  # exit codes of blkid --probe


def get_maps(call: calls.GetMaps, context: settings.Settings) -> calls.Maps:
    """No maps, and why, when multipathd does not answer."""
    done = tools.run(["multipathd", "show", "maps", "json"])
    try:
        document = json.loads(done.stdout)
        return calls.Maps([_map(one) for one in document["maps"]], None)
    except (ValueError, LookupError, TypeError):
        return calls.Maps([], f"multipathd: {tools.said(done)}")


def resize_map(call: calls.ResizeMap, context: settings.Settings) -> calls.MapChanged:
    done = tools.run(["multipathd", "resize", "map", call.wwid])
    if done.returncode != 0 or done.stdout.strip() != "ok":
        raise contract.Failed(f"multipathd does not resize {call.wwid}: {tools.said(done)}")
    return calls.MapChanged(call.wwid)


def remove_map(call: calls.RemoveMap, context: settings.Settings) -> calls.MapChanged:
    """The kernel refuses while somebody has the map open."""
    done = tools.run(["multipath", "-f", call.wwid])
    if done.returncode != 0:
        raise contract.Failed(f"map {call.wwid} cannot be removed: {tools.said(done)}")
    return calls.MapChanged(call.wwid)


def read_content(call: calls.ReadContent, context: settings.Settings) -> calls.Content:
    if not (BLOCK / call.disk).exists():
        raise contract.Refused(f"there is no disk {call.disk}")
    path = f"/dev/{call.disk}"
    done = tools.run(["blkid", "--probe", "--output", "export", path])
    if done.returncode not in (0, _NOTHING, _AMBIVALENT) or (done.returncode == _NOTHING and done.stderr.strip()):
        raise contract.Failed(f"{path} cannot be read: {tools.said(done)}")
    found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    signature = "several" if done.returncode == _AMBIVALENT else found.get("TYPE")
    volume = _physical_volume(path) if signature == "LVM2_member" else {}
    with contextlib.suppress(ValueError):
        volume = {**volume, "pv_bytes": int(volume.get("pv_bytes", ""))}
    return calls.Content(
        signature=signature,
        partitions=found.get("PTTYPE"),
        pv_uuid=volume.get("pv_uuid"),
        pv_bytes=volume.get("pv_bytes"),
        vg_name=volume.get("vg_name"),
        vg_uuid=volume.get("vg_uuid"),
        vg_tags=volume.get("vg_tags", []),
    )


def _physical_volume(path: str) -> dict[str, Any]:
    """Without a group when it belongs to none. A group with other devices is told of too, though they are not seen."""
    command = ["lvm", "pvs", "--readonly", "--config", _LVM, "--devices", path, "--options", _PV_FIELDS]
    done = tools.run([*command, "--units", "b", "--nosuffix", "--reportformat", "json"])
    try:
        (row,) = json.loads(done.stdout)["report"][0]["pv"]
    except (ValueError, LookupError) as error:
        raise contract.Failed(f"LVM does not read {path}: {tools.said(done)}") from error
    told = {"pv_uuid": row["pv_uuid"], "pv_bytes": row["dev_size"]}
    told |= {name: row[name] for name in ("vg_name", "vg_uuid")}
    return {name: value for name, value in told.items() if value} | {"vg_tags": row["vg_tags"].split(",")}


def _map(told: Mapping[str, Any]) -> targets.Map:
    paths = [path for group in told["path_groups"] for path in group["paths"]]
    return targets.Map(
        wwid=str(told["uuid"]),
        name=str(told["name"]),
        disk=str(told["sysfs"]),
        queueing=_queueing(str(told["queueing"]), str(told["features"])),
        paths=[targets.MapPath(str(path["dev"]), str(path["dm_st"]), str(path["chk_st"])) for path in paths],
    )


def _queueing(worded: str, features: str) -> str:
    """Where multipathd is not configured ("-") the map's own feature decides, which knows no end."""
    return "on" if worded == "-" and "queue_if_no_path" in features else worded
