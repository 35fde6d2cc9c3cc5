"""vdsmd: puts the rooms together and serves.

    python3 -m vdsm.daemon [--config PATH]

Runs as an unprivileged user. The order of start: fork server (it loads the job bodies while the rest starts), storage,
jobs, libvirt, VMs (found again before the first call is answered, if libvirt answers), then the wire. The order of
stop is the reverse; VMs run on, and workers end as "interrupted" when their control channel closes.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.metadata
import os
import signal
import sys
from collections.abc import Callable, Iterator

import uvloop

from supervdsm import client as helper_client
from vdsm import config, events, forkserver, hypervisor, logs, storage, virt
from vdsm.api import certificates, devices, host, job, lease, pools, server, shapes, verb, vm
from vdsm.api import storage as storage_verbs
from vdsm.hooks import runner
from vdsm.host import capabilities, hardware
from vdsm.jobs import pool, registry, worker
from vdsm.storage import devices as disks
from vdsm.storage import targets
from vdsm.virt import machines

log = logs.get("daemon")


class Agent:
    """All services of one host. `start` and `stop` block; the wire is served on an event loop in between."""

    def __init__(self, settings: config.Config) -> None:
        os.environ["SANLOCK_RUN_DIR"] = settings.sanlock.run_dir
        self.settings = settings
        self.events = events.EventLog(settings.wire.event_history)
        self.helper = helper_client.Helper(settings.helper.socket)
        self.forks = forkserver.ForkServer(
            [worker.__name__, *storage.preload(), *virt.preload()], settings.log.level, settings.log.file
        )
        self.pool = pool.Pool(
            self.forks,
            workers=settings.jobs.workers,
            queue=settings.jobs.queue,
            lease_wait_s=settings.storage.lease_wait_s,
        )
        self.jobs = registry.Registry(self.pool, self.events, settings.jobs.autodelete_s)
        self.storage = storage.Storage(settings, self.events, self.forks, self.jobs, self.helper)
        self.disks = disks.Devices(self.events, self.forks, self.helper)
        self.targets = targets.Targets(settings.iscsi, self.disks, self.helper)
        self.hypervisor = hypervisor.Hypervisor(settings.virt.libvirt_uri)
        self.hooks = runner.Runner(settings.hooks)
        self.machines = machines.Machines(settings, self.events, self.hypervisor, self.storage, self.jobs, self.hooks)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Everything but the wire runs inside the block."""
        with contextlib.ExitStack() as started:
            for start, stop in self._services():
                start()
                started.callback(stop)
            yield

    def _services(self) -> list[tuple[Callable[[], object], Callable[[], object]]]:
        return [
            (self.hooks.start, self.hooks.stop),
            (self.forks.start, self.forks.stop),
            (self.storage.start, self.storage.stop),
            (self.disks.start, self.disks.stop),
            (self.pool.start, self.pool.stop),
            (lambda: None, self.hooks.cancel),
            (self.machines.start, self.machines.stop),
        ]

    def sources(self) -> capabilities.Sources:
        """What `Host.getCapabilities` tells of the rooms that the host's room does not see."""
        return capabilities.Sources(
            host_id=self.settings.host.id,
            host_name=self.settings.host.name,
            software_version=_version(),
            repository_formats=storage.FORMATS,
            hardware=lambda: hardware.read(self.helper),
            domain_type=self.machines.domain_type,
            hypervisor_xml=self.hypervisor.capabilities,
            hooks=self.hooks.report,
        )

    def verbs(self, threads: pools.Pools) -> verb.Verbs:
        table = verb.Verbs(threads)
        table.add("Host", host.Host(self.machines, self.sources(), self.hooks), threads.machines)
        table.add("Host", job.Jobs(self.jobs))
        table.add("Host", devices.Devices(self.disks), threads.disks)
        table.add("ISCSIConnection", devices.Targets(self.targets), threads.disks)
        table.add("Job", job.Job(self.jobs))
        table.add("VM", vm.Vm(self.machines), threads.machines)
        table.add("Lease", lease.Leases(self.storage))
        table.add("Host", storage_verbs.RepoStats(self.storage))
        table.add("Storage", storage_verbs.Storage(self.storage, threads.drop))
        return table


def _version() -> str:
    try:
        return importlib.metadata.version("vdsm")
    except importlib.metadata.PackageNotFoundError:
        return "unpackaged"  # run from a source tree


async def serve(agent: Agent) -> None:
    """Serves the wire until SIGTERM or SIGINT. SIGHUP: the certificates are read again."""
    threads = pools.Pools(agent.settings.storage.io_children)
    api = server.Api(agent.settings, agent.verbs(threads), agent.events, shapes.SHAPES)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, api.reload)
    gc.collect()
    gc.freeze()  # 68,000 objects that stay: each full collection would walk them all, and the loop stand for 40 ms
    await api.start()
    log.info("serving")
    try:
        await stopping.wait()
        log.info("stopping")
    finally:
        await api.stop()
        threads.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="vdsmd", description="The host agent.")
    parser.add_argument("--config", help="configuration file (TOML); all defaults without")
    given = parser.parse_args()
    try:
        settings = config.load(given.config)
    except config.ConfigError as error:
        sys.exit(f"vdsmd: {error}")
    logs.setup(settings.log.level, settings.log.file)
    agent = Agent(settings)
    with agent.running():
        try:
            uvloop.run(serve(agent))
        except certificates.CertificateError as error:
            sys.exit(f"vdsmd: {error}")


if __name__ == "__main__":
    main()
