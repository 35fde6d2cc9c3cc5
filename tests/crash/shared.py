"""The matrix on two hosts of a lab: one host's agent is cut off, and the other host's, which is there all the time,
checks and fixes through its wire.

    python3 -P -m tests.crash.shared <ORDER      in the first host, as the agent's user; the JSON of an `Order`

The first host is also the server, and the judge reads what is there: what a client has not sent is in nobody's
repository. Only deaths are injected. It says in lines of JSON first which cases the verb has, then what came of each.
"""

import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from supervdsm import calls
from supervdsm import client as helper_client
from tests.crash import groups, hosts, matrix, places, scenes, selection, tracing, worlds
from tests.until import until
from vdsm import config, errors
from vdsm.client import channels, failures, stream, transport

REPEATS = "tests/lab/crash_test.py"
# The volume group, and which of the repositories is in it.
GROUP, IN_GROUP = "crash", "main"
CALL_S, JOB_S, JOIN_S = 120.0, 120.0, 400.0


@dataclasses.dataclass(frozen=True)
class Order:
    """What to run: of each of the `verbs`, in an order of `seed`'s, `each` of the cases that are not `done`. After
    `seconds`, from when both hosts are ready, nothing further begins. `named`: just these cases.

    `directory` is exported as `export`, with a directory for each repository; `peer` is where the other host's agent
    takes calls. With a `disk`, the repository `main` is in a volume group on it; `disk_seen` is the disk as the judge
    may open it.
    """

    verbs: tuple[str, ...]
    version: str
    directory: str
    export: str
    server: str
    peer: tuple[str, int]
    io_timeout_s: int
    disk: str = ""
    disk_seen: str = ""
    config: str = "/run/vdsm/etc/vdsm.toml"
    each: int = 1_000_000
    seed: int = 0
    done: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    seconds: float = 1e9


class World(worlds.World):
    """`directory` is in the server itself; the agent has each repository by a mount of its own."""

    def __init__(self, order: Order) -> None:  # nothing is made: see `join`
        self._order = order
        self._config = config.load(order.config)
        self.directory = Path(order.directory)
        self.run_dir = Path(self._config.sanlock.run_dir)
        self.import_dir = Path(self._config.storage.import_dirs[0])  # the other host has it too
        self.export_dir = self.directory / scenes.EXPORT
        self.host_name = self._config.host.name
        self.io_timeout_s = order.io_timeout_s

    def settings(self, tmp_dir: Path) -> config.Config:
        storage = dataclasses.replace(self._config.storage, export_dirs=(str(self.export_dir),), io_deadline_s=60.0)
        return dataclasses.replace(self._config, paths=config.Paths(tmp_dir=str(tmp_dir)), storage=storage)

    def helper(self) -> helper_client.Helper:
        return helper_client.Helper(self._config.helper.socket)

    def connection(self, name: str) -> tuple[str, dict[str, Any]]:
        where = f"{self._order.server}:{self._order.export}/{name}"
        return "nfs-3.4", {"connection": where, "protocol_version": self._order.version}

    def seen(self, *names: str) -> dict[str, str]:
        return {self._mount(name) if name in matrix.CALLED else str(self.directory / name): name for name in names}

    def _mount(self, name: str) -> str:
        """Where the repository's mount is whenever there is one."""
        given = (self._order.server, f"{self._order.export}/{name}", self._order.version)
        path = self.helper().call(calls.MountNfs(*given)).path
        if name == scenes.FRESH:
            self.helper().call(calls.UnmountNfs(*given, lazy=False))
        return path

    def join(self, agent: hosts.Agent, other: "Other") -> None:
        """Both hosts have both repositories, which are made where there are none."""
        for name in scenes.PLACES:
            self.make(agent, name)
            other.connect(name, *self.connection(name))
        with agent.running(within_s=JOIN_S):
            other.joined()

    def make(self, agent: hosts.Agent, name: str) -> None:
        """Unless it is there."""
        if not (self.directory / name / "repository").exists():
            agent.storage.format_storage_repository(*self.connection(name), self.options())

    def options(self) -> dict[str, Any]:
        return {"ioTimeout": self.io_timeout_s}


class GroupWorld(World):
    """`main` is in a volume group, `other` is not: work leads from each to the other."""

    def __init__(self, order: Order) -> None:
        super().__init__(order)
        self._made = self.directory / "made"
        scratch = self.directory / "scratch"
        scratch.mkdir(exist_ok=True)
        self._group = groups.Group(order.disk_seen, scratch, self._made)
        self._helper_pid = _listener(self._config.helper.socket)

    def connection(self, name: str) -> tuple[str, dict[str, Any]]:
        return ("clvm-1.2", {"vg": GROUP}) if name == IN_GROUP else super().connection(name)

    def seen(self, *names: str) -> dict[str, str]:
        return {**super().seen(*(name for name in names if name != IN_GROUP)), f"/dev/{GROUP}": IN_GROUP}

    def make(self, agent: hosts.Agent, name: str) -> None:
        if name != IN_GROUP:
            super().make(agent, name)
        elif not self._made.exists():
            where = {"vg": GROUP, "devices": [self._order.disk], "overwrite": [self._order.disk]}
            agent.storage.format_storage_repository("clvm-1.2", where, self.options())
            self._group.keep(self._made)

    def place(self, name: str) -> places.Place:
        return self._group if name == IN_GROUP else super().place(name)

    @contextlib.contextmanager
    def data(self, repo: str, name: str, below: Sequence[str]) -> Iterator[Path]:
        if repo != IN_GROUP:
            with super().data(repo, name, below) as path:
                yield path
            return
        path, *_ = [self.helper().call(calls.ActivateVolume(GROUP, each)).path for each in (name, *below)]
        yield Path(path)
        for each in (name, *below):
            self.helper().call(calls.DeactivateVolume(GROUP, each))

    def sweep(self) -> None:
        for volume in self.helper().call(calls.ListVolumes(GROUP, "")).volumes:
            if volume.active and volume.name != groups.SLOTS:
                assert not self.helper().call(calls.DeactivateVolume(GROUP, volume.name)).in_use, volume

    def settled(self) -> bool:
        """Whether the root helper does nothing."""
        return not Path(f"/proc/{self._helper_pid}/task/{self._helper_pid}/children").read_text()


def _listener(path: str) -> int:
    """The process that listens there."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        return int(struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


class Other:
    """The other host's agent, as an administrator calls it."""

    def __init__(self, world: World, place: tuple[str, int]) -> None:
        self._world = world
        self._place = place
        self._free: collections.deque[transport.Client] = collections.deque()  # connections that nobody uses

    @property
    def storage(self) -> "Other":
        return self

    def connect(self, name: str, repo_format: str, parameters: dict[str, Any]) -> None:
        """Instead of another one of the same name, which an earlier order left."""
        given = {"repoId": name, "repoFormat": repo_format, "connectionParameters": parameters}
        try:
            self._call("connectStorageRepository", **given)
        except failures.ClientError as error:
            if error.key != errors.RepositoryExists.key:
                raise
            self._call("disconnectStorageRepository", repoId=name)
            self._call("connectStorageRepository", **given)

    def joined(self) -> None:
        until(lambda: {repo["state"] for repo in self._call("listStorageRepositories")} == {"joined"}, JOIN_S)

    def check_storage_repository(self, place: str) -> Any:
        return self._call("checkStorageRepository", repositoryId=place)

    def fix_storage_repository(self, place: str, fix: dict[str, Any]) -> dict[str, Any]:
        return {"job_id": self._call("fixStorageRepository", repositoryId=place, fix=fix)["jobId"]}

    def create_virtual_disk(self, place: str, size_bytes: int) -> dict[str, Any]:
        return {"image_id": self._call("createVirtualDisk", targetRepoId=place, size=size_bytes)["imageId"]}

    def remove_image(self, place: str, image_id: str) -> None:
        self._call("removeImage", repositoryId=place, imageId=image_id)

    def ended(self, job_id: str | None) -> None:
        if job_id is None:
            return
        info = self._call("Job.wait", jobId=job_id, timeout=JOB_S)
        if info["status"] != "done":
            raise hosts.Failed(info)

    def later(self) -> None:
        """The agent of the first host is there again, and has looked once."""
        self._world.sweep()

    def _call(self, verb: str, **given: Any) -> Any:
        client = self._free.pop() if self._free else self._connected()
        answer = client.call(verb if "." in verb else f"Storage.{verb}", given)
        self._free.append(client)  # after a failure it is not used again
        return answer

    def _connected(self) -> transport.Client:
        link = stream.Stream(socket.create_connection(tuple(self._place), CALL_S))
        return transport.Client(channels.Lines(link), JOB_S + CALL_S)


@contextlib.contextmanager
def ground(order: Order) -> Iterator[matrix.Ground]:
    world = GroupWorld(order) if order.disk else World(order)
    with tempfile.TemporaryDirectory(prefix="vdsm-crash-") as directory:
        host = hosts.Host(Path(directory), world.seen(*matrix.CALLED), real_tools=False)
        os.environ.update(host.environment())
        host.start()
        kept = world.directory / "kept"
        try:
            other = Other(world, order.peer)
            world.join(hosts.Agent(world, host), other)
            yield matrix.Ground(world, host, kept, other)
        finally:
            host.stop()
            shutil.rmtree(kept, ignore_errors=True)


def chosen(order: Order, cases: list[matrix.Case]) -> list[matrix.Case]:
    """Of what is alike, as the many blocks of a slot that is made, one before any second one."""
    if order.named:
        return [case for case in cases if str(case) in order.named]
    done = set(order.done)
    drawn = random.Random(order.seed).sample(cases, len(cases))
    met: collections.Counter[tuple[str, ...]] = collections.Counter()
    left = []
    for case in sorted(drawn, key=lambda case: str(case) not in done):
        alike = (case.process, case.step.call, case.step.what, case.kind)
        if str(case) not in done:
            left.append((met[alike], case))
        met[alike] += 1
    return [case for _, case in sorted(left, key=lambda one: one[0])][: order.each]


def run(order: Order) -> None:
    began = time.monotonic()

    def tell(**what: Any) -> None:
        print(json.dumps({**what, "seconds": round(time.monotonic() - began, 1)}), flush=True)

    with ground(order) as made:
        tell(ready=True)
        end = time.monotonic() + order.seconds
        for verb in order.verbs:
            if time.monotonic() > end:
                break
            cases = [case for case in made.cases(verb) if not tracing.fails(case.kind)]
            tell(verb=verb, cases={str(case): case.kind for case in cases})
            for case in chosen(order, cases):
                if time.monotonic() > end:
                    break
                selection.run(made, [case], lambda case, wrong: tell(case=str(case), wrong=wrong), REPEATS)


if __name__ == "__main__":
    run(Order(**json.load(sys.stdin)))
