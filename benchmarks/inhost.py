"""Runs in a host of the lab, beside its agent: an image's life through the wire, and the same by the bare tools.

One argument, a JSON object: {repo_id, count, bytes, bare}. `bare` says where the bare tools work: {directory} of a file
system, or {group, devices} of a volume group. Prints {ours, bare}, the median seconds of {create, snapshot, remove,
copy}; bare has no snapshot, but `dd` beside `copy`.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervdsm import lvm
from vdsm.client import transport

AGENT = "/run/vdsm/sock/vdsmd.sock"
IMPORTS = Path("/run/vdsm/import")
DEADLINE_S = 300.0
MIB = 1 << 20
DISK_BYTES = 64 * MIB  # virtual; nothing is written to it

Times = dict[str, list[float]]


class Ours:
    """Verbs of the agent."""

    def __init__(self, client: transport.Client, repo_id: str) -> None:
        self._client = client
        self._repo_id = repo_id

    def create(self) -> str:
        return self._image("createVirtualDisk", targetRepoId=self._repo_id, size=DISK_BYTES)

    def snapshot(self, disk: str) -> str:
        return self._image("createSnapshot", targetRepoId=self._repo_id, baseVirtualDiskId=disk)

    def copy(self, image: str) -> str:
        return self._image("copyImage", targetRepoId=self._repo_id, imageId=image)

    def full(self, source: Path) -> str:
        """An image with all the bytes of `source`."""
        return self._image("importImage", targetRepoId=self._repo_id, path=str(source), format="raw")

    def remove(self, image: str) -> None:
        self._client.call("Storage.removeImage", {"repositoryId": self._repo_id, "imageId": image})

    def _image(self, verb: str, **given: Any) -> str:
        answer = self._client.call(f"Storage.{verb}", given)
        if answer["jobId"] is not None:
            info = self._client.call("Job.wait", {"jobId": answer["jobId"], "timeout": DEADLINE_S})
            assert info["status"] == "done", info
        return str(answer["imageId"])


class Files:
    """qemu-img, dd and rm in a directory."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)

    def create(self, name: str, size_bytes: int) -> str:
        path = self._directory / name
        run("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size_bytes))
        return str(path)

    def room(self, name: str, size_bytes: int) -> str:
        """Where so many raw bytes can be written."""
        path = self._directory / name
        path.touch()
        return str(path)

    def remove(self, path: str) -> None:
        run("rm", path)


class Volumes:
    """lvcreate and lvremove, shared by the group's lock manager as the agent's volumes are."""

    def __init__(self, group: str, devices: list[str]) -> None:
        self._group = group
        self._devices = devices

    def create(self, name: str, size_bytes: int) -> str:
        return self.room(name, 4 * MIB)

    def room(self, name: str, size_bytes: int) -> str:
        how = ["--yes", "--activate", "sy", "--zero", "n", "--wipesignatures", "n", "--size", f"{size_bytes}b"]
        lvm.change("lvcreate", *how, "--name", name, self._group, devices=self._devices)
        return f"/dev/{self._group}/{name}"

    def remove(self, path: str) -> None:
        lvm.change("lvremove", "--yes", path.removeprefix("/dev/"), devices=self._devices)


def main() -> None:
    given = json.loads(sys.argv[1])
    with transport.connect(AGENT, DEADLINE_S) as client:
        ours = measure_ours(Ours(client, given["repo_id"]), given["count"], given["bytes"])
    bare = measure_bare(tools(given["bare"]), given["count"], given["bytes"])
    print(json.dumps({"ours": medians(ours), "bare": medians(bare)}))


def tools(where: dict[str, Any]) -> Files | Volumes:
    return Files(where["directory"]) if "directory" in where else Volumes(where["group"], where["devices"])


def measure_ours(ours: Ours, count: int, full_bytes: int) -> Times:
    times: Times = defaultdict(list)
    for _ in range(count):
        disk = timed(times["create"], ours.create)
        snapshot = timed(times["snapshot"], lambda disk=disk: ours.snapshot(disk))
        timed(times["remove"], lambda disk=disk: ours.remove(disk))
        ours.remove(snapshot)
    source = IMPORTS / "full.raw"
    fill(source, full_bytes)
    image = ours.full(source)
    source.unlink()
    copy = timed(times["copy"], lambda: ours.copy(image))
    for known in (copy, image):
        ours.remove(known)
    return times


def measure_bare(bare: Files | Volumes, count: int, full_bytes: int) -> Times:
    times: Times = defaultdict(list)
    for _ in range(count):
        made = timed(times["create"], lambda: bare.create("bare-one", DISK_BYTES))
        timed(times["remove"], lambda made=made: bare.remove(made))
    source = bare.room("bare-source", full_bytes)
    fill(Path(source), full_bytes)
    for name, argv in (("copy", qemu_img), ("dd", dd)):
        target = bare.room("bare-target", full_bytes)
        timed(times[name], lambda argv=argv, target=target: run(*argv(source, target)))
        bare.remove(target)
    bare.remove(source)
    return times


def qemu_img(source: str, target: str) -> list[str]:
    device = ["-n"] if target.startswith("/dev/") else []
    return [
        "qemu-img",
        "convert",
        *device,
        "-f",
        "raw",
        "-O",
        "raw",
        "-W",
        "-m",
        "16",
        "-t",
        "none",
        "-T",
        "none",
        source,
        target,
    ]


def dd(source: str, target: str) -> list[str]:
    return ["dd", f"if={source}", f"of={target}", "bs=1M", "iflag=direct", "oflag=direct", "conv=fsync", "status=none"]


def timed(times: list[float], call: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    answer = call()
    times.append(time.perf_counter() - began)
    return answer


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in times.items()}


def run(*argv: str) -> None:
    subprocess.run(argv, check=True)


def fill(path: Path, size_bytes: int) -> None:
    """No zeros: those would not be copied."""
    block = os.urandom(MIB)
    with path.open("wb") as target:
        for _ in range(size_bytes // MIB):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())


if __name__ == "__main__":
    main()
