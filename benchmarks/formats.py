"""An image's life in each format of repository, against the bare tools on the same storage. In hosts of the lab.

The agent's verbs write records under leases and flush; the bare tools do neither. A host of the lab has one slow
processor: what a ratio says is how much an image costs over its bytes, not how fast storage is.
VDSM_BENCH_FORMAT_MIB changes the size of what is copied (80).
"""

import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import table
from tests import lab
from tests.lab import groups, nfs, peers, sites

FULL_BYTES = int(os.environ.get("VDSM_BENCH_FORMAT_MIB", "80")) << 20
COMMAND = ["/usr/bin/python3", "-P", "-"]
CODE = {"PYTHONPATH": "/run/vdsm/code"}
COUNT = 3  # lives in a round
ROUNDS = 3  # at most: starting programs is slow in such a host
RUN_S = 900.0
GRACE_S = 120.0  # of a server that has just been started, and the client's pauses
# LUNs of the lab: one for local files, one for the server's, two for the group (locks, data).
LOCAL, SERVED, LOCKS, DATA = 0, 2, 3, 4
# Of version 3 the kernel keeps bytes longer: see `formats/nfs.py`. Of 4.2 a slow server that is written to as fast as
# it goes answers sanlock late.
IO_TIMEOUT_S = {"3": 22, "4.2": 10}


class Site(NamedTuple):
    """A repository to measure in, and where the bare tools work on the same storage."""

    title: str
    repo_format: str
    parameters: dict[str, Any]
    io_timeout_s: int
    bare: dict[str, Any]


def rows(rounds: int) -> list[table.Row]:
    reason = lab.missing()
    if reason:
        print(f"-- formats are left out: {reason}", flush=True)
        return []
    with lab.Lab(hosts=2) as running:
        one, two = running.hosts
        one.start_agent()
        sites.own_disk(one, one.luns[LOCAL].path)
        found: list[table.Row] = []
        for make in (_local, _nfs("4.2"), _nfs("3"), _clvm):
            with make(one, two) as site:
                measured = _measure(peers.Peer(one), site, min(rounds, ROUNDS))
                print(table.render(measured), flush=True)  # the whole takes a while
                found += measured
        return found


def _measure(peer: peers.Peer, site: Site, rounds: int) -> list[table.Row]:
    given = {"repoFormat": site.repo_format, "connectionParameters": site.parameters}
    peer("formatStorageRepository", **given, options={"ioTimeout": site.io_timeout_s})
    peer("connectStorageRepository", repoId="bench", **given)
    peer.joined("bench")
    argument = json.dumps({"repo_id": "bench", "count": COUNT, "bytes": FULL_BYTES, "bare": site.bare})
    program = (Path(__file__).parent / "inhost.py").read_text()  # a host need not see where the project lies
    answers = [
        json.loads(peer.host.run([*COMMAND, argument], RUN_S, given=program, environment=CODE).out)
        for _ in range(rounds)
    ]
    peer("disconnectStorageRepository", repoId="bench")
    return [_row(site.title, *names, answers) for names in _compared(site)]


def _compared(site: Site) -> Iterator[tuple[str, str, str, str]]:
    """(verb, what it is called in the answers, the bare tool, and what that is called)."""
    create, remove = ("lvcreate", "lvremove") if "group" in site.bare else ("qemu-img create", "rm")
    yield "createVirtualDisk", "create", create, "create"
    yield "createSnapshot", "snapshot", create, "create"
    yield "removeImage", "remove", remove, "remove"
    size = f"{FULL_BYTES >> 20} MiB"
    yield f"copyImage of {size}", "copy", "qemu-img convert -W -m 16 -t none -T none", "copy"
    yield f"copyImage of {size}", "copy", "dd bs=1M iflag=direct oflag=direct", "dd"


def _row(title: str, verb: str, ours: str, tool: str, theirs: str, answers: list[dict[str, Any]]) -> table.Row:
    mine, other = [answer["ours"][ours] for answer in answers], [answer["bare"][theirs] for answer in answers]
    ratios = [one / two for one, two in zip(mine, other, strict=True)]
    figures = f"{_rate(verb, mine)} / {_rate(verb, other)}"
    return table.Row(f"{title}: {verb}", tool, ratios, None, figures)


def _rate(verb: str, seconds: list[float]) -> str:
    median = statistics.median(seconds)
    return f"{FULL_BYTES / median / (1 << 20):.3g} MiB/s" if "copyImage" in verb else f"{1 / median:.3g} a second"


# -- the sites -------------------------------------------------------------------------------------------------------


@contextmanager
def _local(one: lab.Host, two: lab.Host) -> Iterator[Site]:
    one.run(["mkdir", "/run/vdsm/import/bare"])
    yield Site("localfs", "localfs-1.0", {"path": "/run/vdsm/storage/bench"}, 2, {"directory": "/run/vdsm/import/bare"})


def _nfs(version: str) -> Callable[[lab.Host, lab.Host], Any]:
    @contextmanager
    def made(one: lab.Host, two: lab.Host) -> Iterator[Site]:
        with ExitStack() as stack:
            server = stack.enter_context(nfs.Server(two.luns[SERVED]))
            name = f"bench-{version}"
            two.run(["install", "-d", "-o", "vdsm", "-g", "kvm", "-m", "2770", f"{server.path}/{name}"])
            two.run(["install", "-d", f"{server.path}/bare"])
            bare = stack.enter_context(server.mounted(one, "/run/bare", version))
            one.run(["flock", f"{bare}/bare/lock", "true"], GRACE_S)  # QEMU's locks are granted from then on
            parameters = {"connection": f"{two.address('lan')}:{nfs.EXPORT}/{name}", "protocol_version": version}
            directory = {"directory": f"{bare}/bare"}
            yield Site(f"nfs v{version}", "nfs-3.4", parameters, IO_TIMEOUT_S[version], directory)

    return made


@contextmanager
def _clvm(one: lab.Host, two: lab.Host) -> Iterator[Site]:
    disks = [one.luns[LOCKS], one.luns[DATA]]
    groups.make(one, groups.NAME, disks)
    bare = {"group": groups.NAME, "devices": [disk.path for disk in disks]}
    yield Site("clvm", "clvm-1.2", {"vg": groups.NAME}, 2, bare)
