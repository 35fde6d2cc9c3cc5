"""The crash matrix on two hosts of a lab: `tests/crash/shared.py` is what runs in the first of them."""

import concurrent.futures
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import lab, proof
from tests.crash import shared, verbs
from tests.lab import host, nfs
from vdsm.standalone import layout

HERE = "crash"
CLVM = "clvm"
# The LUN of the volume group, and its name for the judge, who is no root.
LUN, DISK = 4, "/dev/tests-disk"
SITE = "/run/tests-site"
EXPORTED = ("main", "other", "fresh", "export")
# sanlock's (seconds). Of version 3 the kernel's connection outlives 180 s of silence, and so must the leases. In the
# other one a busy machine must not cost the leases.
IO_TIMEOUT_S = {"4.2": 4, "3": 22, CLVM: 4}


def verbs_on(ground: str) -> list[str]:
    """All that are run there: an NFS version or `CLVM`."""
    return list(verbs.ON_VOLUMES if ground == CLVM else verbs.MATRIX)


class Site:
    """Both hosts with what the matrix needs: the first one serves, and has no agent but the one that is cut off."""

    def __init__(self, running: lab.Lab) -> None:
        self.one, self.two = running.hosts[:2]
        self.code = layout.Layout(running.directory).code
        self.server = nfs.Server(self.one.luns[2], squash=True)
        self.directory = f"{self.server.path}/{HERE}"

    def start(self) -> None:
        """Returns when the server serves, and the second host's agent."""
        _install(self.code)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            started = [pool.submit(self.one.start_helper), pool.submit(self.two.start_agent)]
            self.server.start()
            for one in started:
                one.result()
        self.one.sh(f"mkdir {SITE}; mount -t hostfs -o {Path(pytest.__file__).parents[1]} none {SITE}")
        own = [f"{self.directory}/{name}" for name in ("", *IO_TIMEOUT_S)]
        exported = [f"{self.directory}/{version}/{name}" for version in IO_TIMEOUT_S for name in EXPORTED]
        make = ["install", "-d", "-o", "vdsm", "-g", "kvm", "-m"]
        self.one.run([*make, "2755", *own])  # root, who mounts, is nobody there, and passes
        self.one.run([*make, "2770", *exported, f"{self.directory}/import"])
        self.one.run(["mount", "--bind", f"{self.directory}/import", "/run/vdsm/import"])
        number = f"$(stat -L -c '0x%t 0x%T' {self.one.luns[LUN].path})"
        self.one.sh(f"mknod {DISK} b {number}; chown vdsm {DISK}")
        source = f"{self.one.address('lan')}:{nfs.EXPORT}/{HERE}/import"
        self.two.run(["mount", "-t", "nfs", "-o", f"vers=4.2,{nfs.OPTIONS}", source, "/run/vdsm/import"])

    def run(self, some: Sequence[str], on: str, within_s: float, **given: Any) -> list[dict[str, Any]]:
        """What `shared` tells of them; at the end "failed" when it did not come to its end."""
        order = shared.Order(
            verbs=tuple(some),
            version="4.2" if on == CLVM else on,
            disk=self.one.luns[LUN].path if on == CLVM else "",
            disk_seen=DISK,
            directory=f"{self.directory}/{on}",
            export=f"{nfs.EXPORT}/{HERE}/{on}",
            server=self.one.address("lan"),
            peer=(self.two.address("ctl"), host.AGENT_PORT),
            io_timeout_s=IO_TIMEOUT_S[on],
            **given,
        )
        argv = ["setpriv", "--reuid", "vdsm", "--regid", "vdsm", "--groups", "kvm", "--"]
        argv += ["/usr/bin/python3", "-P", "-m", "tests.crash.shared"]
        environment = {"PYTHONPATH": f"{self.code}:{SITE}", "PYTHONDONTWRITEBYTECODE": "1"}
        given_order = json.dumps(dataclasses.asdict(order))
        ended = self.one.run(argv, within_s, check=False, given=given_order, environment=environment)
        told: list[dict[str, Any]] = [json.loads(line) for line in ended.out.splitlines() if line.endswith("}")]
        return told if ended.code == 0 else [*told, {"failed": f"ended with {ended.code}: {ended.err[-4000:]}"}]


def _install(code: Path) -> None:
    """The tests, where the hosts have the code: they run as others than their owner."""
    if not (code / "tests" / "crash").exists():
        shutil.copytree(
            proof.ROOT / "tests",
            code / "tests",
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "data", "inside"),
        )
        for path in (code / "tests").rglob("*"):
            path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))
