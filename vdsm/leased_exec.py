#!/usr/bin/python3 -I
"""Becomes QEMU once this process owns what QEMU will write. It is the `<emulator>` of our domains.

    leased_exec.py QEMU-ARGUMENTS...

libvirt starts it three ways; the environment says which:

- no VDSM_* variable: libvirt probes what the emulator can do. Execute QEMU at once.
- VDSM_LEASE_PLAN: start of a VM. Register with sanlock, take all leases of the plan for this pid, read the records
  again and compare them with the plan, execute QEMU in this same process. The leases live as long as QEMU does,
  whatever happens to the agent; QEMU never opens an image that it does not own.
- VDSM_LEASE_SOCKET: libguestfs starts its appliance inside a job's worker, with every descriptor closed. Fetch the
  worker's descriptors (sanlock, liveness) over that socket and keep them, so that the job's leases last until the
  appliance is gone.

VDSM_QEMU names the real emulator. A refusal is one line on standard error, `vdsm-error: ` and the error as JSON, and
exit code 1; libvirt hands it on to whoever created the domain.

The plan: {"sanlock_run_dir": path, "wait_s": seconds, "leases": [[lockspace, name, path, offset, shared]...],
"records": [{"slot": [lockspace, name, path, offset], "expect": {field: value...}}...]}.

Runs under the system's interpreter with nothing but the standard library and sanlock. A crash here leaves nothing: no
QEMU has run, and the leases end with the process.
"""

import array
import json
import os
import socket
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120

QEMU = "/usr/bin/qemu-system-x86_64"
# Work in these states claims the entity for a job: nobody may start a VM on it.
CLAIMED = ("queued", "running", "committing")


def main() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VDSM_")}
    qemu = os.environ.get("VDSM_QEMU", QEMU)
    if "VDSM_LEASE_PLAN" in os.environ:
        _take_leases(json.loads(os.environ["VDSM_LEASE_PLAN"]))
    elif "VDSM_LEASE_SOCKET" in os.environ:
        _adopt(os.environ["VDSM_LEASE_SOCKET"])
    os.execve(qemu, [qemu, *sys.argv[1:]], environment)


def _take_leases(plan: dict[str, Any]) -> None:
    os.environ["SANLOCK_RUN_DIR"] = plan["sanlock_run_dir"]
    from vdsm import errors, leases  # a probe or an appliance must not pay for sanlock

    try:
        session = leases.Session()
        session.acquire((leases.Lease(*wanted) for wanted in plan["leases"]), plan["wait_s"])
        for entry in plan["records"]:
            _check(entry)
    except errors.VdsmError as error:
        sys.exit(f"vdsm-error: {json.dumps(error.to_wire())}")
    os.set_inheritable(session.fd, True)


def _check(entry: dict[str, Any]) -> None:
    """The record as it is now, under the leases, against what the start was planned with."""
    from vdsm import errors, record

    slot = record.Slot(*entry["slot"])
    found = record.read(slot)
    work = found.get("work") or {}
    unfinished = (
        work.get("committed") and work["state"] != "done"
    )  # to be rolled forward, over what a guest would write
    if work.get("state") in CLAIMED or unfinished:
        raise errors.ImageBusy(
            image_id=slot.name, job_id=work["job_id"], state=work["state"], host_id=work.get("host_id")
        )
    for field, planned in entry["expect"].items():
        if found.get(field) != planned:
            raise errors.RecordChanged(entity=slot.name, state=f"{field} is {found.get(field)}, planned {planned}")


def _adopt(address: str) -> None:
    """Receives the worker's descriptors; one byte asks for them. They stay open over exec and are never used."""
    room = array.array("i", [-1, -1])
    with socket.socket(socket.AF_UNIX) as worker:
        worker.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        worker.sendall(b"?")
        _, ancillary, _, _ = worker.recvmsg(1, socket.CMSG_SPACE(room.itemsize * len(room)))
    if not ancillary:
        sys.exit("vdsm-error: the job's worker gave no lease descriptor")
    for fd in array.array("i", ancillary[0][2]):
        os.set_inheritable(fd, True)


if __name__ == "__main__":
    main()
