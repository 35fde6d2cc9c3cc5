"""`Machines`: all VMs of this host, and what the api and main call.

Threads: one keeps the connection to libvirt, one handles its events, one compares the table with libvirt, one samples
statistics; launches have a bounded pool of their own, and so have disks that grow, for each repository. All verbs are
plain blocking calls from any thread.
"""

import threading
import time
from typing import Any

from vdsm import config, errors, events, hypervisor, logs, periodic, storage
from vdsm.hooks import environment, runner
from vdsm.jobs import registry
from vdsm.virt import (
    differences,
    domainevents,
    domaintype,
    endings,
    growing,
    launch,
    missed,
    power,
    sampling,
    spec,
    states,
    table,
    vm,
    vmhooks,
    vmjobs,
    vmrecord,
)

_log = logs.get("virt")

# How long the agent's start waits for a libvirt that is slow, and its end for one that hangs.
START_GRACE_S = 10.0
STOP_GRACE_S = 5.0
# How long a comparison that misses a domain waits for its event, which alone knows how it ended.
EVENT_GRACE_S = 1.0


Infos = list[dict[str, Any]]


class Machines:
    """All VMs of this host. `jobs` is what VM jobs are registered with, `scripts` runs hook scripts."""

    def __init__(
        self,
        settings: config.Config,
        event_log: events.EventLog,
        libvirt: hypervisor.Hypervisor,
        service: storage.Storage,
        jobs: registry.Registry,
        scripts: runner.Runner,
    ) -> None:
        self._settings = settings
        self._storage = service
        self._libvirt = libvirt
        self._domain_type = domaintype.DomainType(settings.virt.emulator, settings.virt.domain_type)

        def publish(vm_id: str, params: dict[str, Any]) -> object:
            return event_log.publish("vm", vm_id, params)

        self._differences = differences.Differences(publish)
        self._table = table.Table(
            libvirt,
            publish,
            self._differences,
            self._most_vms,
        )
        self._records = vmrecord.VmRecords(service, settings.host.name)
        self._hooks = vmhooks.VmHooks(
            settings, scripts, libvirt, lambda vm_id, params: event_log.publish("hook", vm_id, params)
        )
        self._ends = endings.Endings(self._table, self._records, self._hooks)
        self._growth = growing.Growth(libvirt, self._table, service, self._go_on)
        self._launcher = launch.Launcher(
            settings, libvirt, service, self._records, self._ends, self._domain_type, self._hooks, self._growth
        )
        self._power = power.Power(libvirt, self._table, self._ends, self._records, self._launcher, self._hooks)
        self._watcher = domainevents.Watcher(
            libvirt, self._table, self._ends, self._growth, lambda: self._compare(patience_s=0)
        )
        self._sampler = sampling.Sampler(libvirt, self._table, settings.virt.sample_s, self._growth.sampled)
        self._reconciler = periodic.Periodic("vm comparison", settings.virt.reconcile_s, self._reconcile_if_connected)
        service.set_holder_lookup(self._table.holder)
        self._event_log = event_log
        self._missed = missed.Missed(
            self._table,
            service,
            self._differences,
            publish,
            settings.host.name,
        )
        self._vm_jobs = vmjobs.VmJobs(
            settings,
            self._table,
            service,
            jobs,
            self._domain_type,
            lambda image_id, params: event_log.publish("image", image_id, params),
        )

    def start(self) -> None:
        """Connects to libvirt and finds the VMs that run. Starts nothing and ends nothing.

        When libvirt answers they are known at return; otherwise they are found when it does.
        """
        threading.Thread(target=self.domain_type, name="domain type", daemon=True).start()  # before it is needed
        self._watcher.start()
        self._growth.start()
        self._libvirt.start(self._watcher.on_domain, self._watcher.on_connection)
        if self._libvirt.wait_tried(START_GRACE_S):
            self._table.compared.wait(START_GRACE_S)
        self._missed.start(self._event_log)
        self._reconciler.start()
        self._sampler.start()

    def stop(self) -> None:
        """Lets go of all VMs; they run on, and the next agent finds them."""
        self._launcher.stop()
        self._missed.stop()
        self._sampler.stop()
        self._growth.stop()
        self._reconciler.stop(STOP_GRACE_S)
        self._libvirt.stop()
        self._watcher.stop()
        self._hooks.stop()
        self._records.stop()

    def _most_vms(self) -> int:
        """What jobs' workers (one more concludes) and the children of repositories leave of the registrations."""
        others = self._settings.jobs.workers + 1 + self._storage.most_registrations()
        return max(0, self._settings.sanlock.max_registrations - others)

    # -- verbs --------------------------------------------------------------------------------------------------------

    def create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Reserves the id of a new VM and launches it behind the answer, which says WaitForLaunch.

        `wanted` is a VmSpec in snake_case. A launch that fails leaves the VM Down, with the reason, until it is
        destroyed. Raises `InvalidParameters`, `PathNotAllowed`, `VmExists`, `Overloaded`, `HypervisorUnavailable`.
        """
        parsed = spec.VmSpec.parse(wanted)
        environment.check(parsed.custom_properties)
        if not self._libvirt.connected:
            raise errors.HypervisorUnavailable(reason="no VM can be started now")
        launch.boot_files(parsed, self._settings.virt.boot_dirs)
        reserved = self._table.reserve(parsed)
        info = self._info(reserved)
        self._launcher.launch(reserved)
        return info

    def destroy(self, vm_id: str) -> None:
        """Ends the VM and forgets it; of a Down one, forgets it."""
        self._power.destroy(vm_id)

    def pause(self, vm_id: str) -> dict[str, Any]:
        return self._info(self._power.pause(vm_id))

    def cont(self, vm_id: str) -> dict[str, Any]:
        """Raises `VmLeaseMismatch` when QEMU does not hold the VM's leases; then it stays paused."""
        return self._info(self._power.cont(vm_id))

    def reset(self, vm_id: str) -> dict[str, Any]:
        return self._info(self._power.reset(vm_id))

    def shutdown(
        self,
        vm_id: str,
        *,
        delay_s: float = 0.0,
        message: str = "",
        reboot: bool = False,
        timeout_s: float = power.SHUTDOWN_TIMEOUT_S,
        force: bool = False,
    ) -> dict[str, Any]:
        """Asks the guest, after `delay_s`, to power off or reboot: its agent, then ACPI, each for `timeout_s`.

        Returns at once. A guest that listens to neither is ended or reset with `force`, otherwise it stays up.
        """
        return self._info(
            self._power.shutdown(
                vm_id, delay_s=delay_s, message=message, reboot=reboot, timeout_s=timeout_s, force=force
            )
        )

    def sysprep(self, vm_id: str, lease_repo_id: str | None, options: dict[str, Any]) -> dict[str, Any]:
        """See `vmjobs.VmJobs.sysprep`."""
        return self._vm_jobs.sysprep(vm_id.lower(), lease_repo_id, options)

    def make_template(
        self,
        vm_id: str,
        target_repo_id: str | None,
        lease_repo_id: str | None,
        user_data: Any,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """See `vmjobs.VmJobs.make_template`."""
        return self._vm_jobs.make_template(vm_id.lower(), target_repo_id, lease_repo_id, user_data, options)

    # -- questions ----------------------------------------------------------------------------------------------------

    def get_info(self, vm_id: str) -> dict[str, Any]:
        """What is known of one VM: `vm.Vm.info`, and the path of its console log or None."""
        return self._info(self._table.get(vm_id))

    def get_stats(self, vm_id: str) -> bytes:
        """One VM's statistics, a JSON object in the wire's words."""
        return self._table.get(vm_id).stats

    def all_stats_bytes(self) -> bytes:
        """The statistics of all VMs, a JSON array: each as it was encoded when sampled, or when its state changed."""
        return b"[" + b",".join(known.stats for known in self._table.all()) + b"]"

    def list(self) -> list[dict[str, Any]]:
        """All VMs, as `get_info`; domains of others with "foreign" true and no more than id, name and status."""
        return [self._info(known) for known in self._table.all()] + self._foreign()

    def _foreign(self) -> Infos:
        return [
            {"vm_id": vm_id, "name": other.name, "status": other.status, "foreign": True}
            for vm_id, other in self._table.foreign().items()
        ]

    def domain_type(self) -> str:
        """ "kvm" or "qemu": what guests run under here. The first call may take 2 s."""
        return self._domain_type.get()

    def holder(self, image_id: str) -> str | None:
        """Which VM uses the image, in words."""
        return self._table.holder(image_id)

    def _info(self, known: vm.Vm) -> dict[str, Any]:
        log = str(launch.console_path(self._settings, known.id)) if known.spec.console_log else None
        return {**known.info(), "console_log": log}

    # -- comparing ----------------------------------------------------------------------------------------------------

    def reconcile(self) -> dict[str, Any]:
        """Makes the table agree with libvirt and sanlock, now, and says what it found.

        {when, checked (domains and VMs), unreachable (why libvirt cannot be asked, or None), differences (of this
        comparison), history (of all, as long as they are kept), foreign (as in `list`)}; a difference as in
        `differences`.
        """
        mark, when, unreachable, checked = self._differences.mark(), time.time(), None, 0
        try:
            checked = self._compare(EVENT_GRACE_S)
        except errors.HypervisorUnavailable as error:
            unreachable = str(error)
        return {
            **{"when": when, "checked": checked, "unreachable": unreachable, "foreign": self._foreign()},
            **{"differences": self._differences.since(mark), "history": self._differences.all()},
        }

    def _compare(self, patience_s: float) -> int:
        checked = self._table.compare(found=self._found, gone=self._ends.gone, patience_s=patience_s)
        for known in self._table.all():
            if not known.launching and known.state in states.RUNNING:
                self._check_leases(known)
        self._records.retry(self._table.all())
        self._missed.retry()
        return checked

    def _reconcile_if_connected(self) -> None:
        if self._libvirt.connected:
            self._compare(EVENT_GRACE_S)

    def _found(self, known: vm.Vm) -> None:
        _log.info("found VM %s (%s): %s", known.id, known.spec.name, known.state)
        if known.launching:
            self._launcher.finish(known)
        else:
            self._growth.watch(known)

    def _go_on(self, known: vm.Vm, reason: str) -> None:
        """A VM that stood still goes on; the event of its stop may not have been seen yet."""
        self._table.observe(known)
        self._power.cont(known.id, reason)

    def _check_leases(self, known: vm.Vm) -> None:
        """A QEMU that runs without its leases is a second writer as soon as another host takes them."""
        try:
            missing = known.missing_leases()
        except errors.LeaseDaemonDown as error:
            _log.warning("cannot tell whether VM %s holds its leases: %s", known.id, error)
            return
        if missing and self._table.observe(known) and known.find_pid() is not None:
            had, reason = known.state, f"it ran without its leases: {', '.join(missing)}"
            self._power.kill(known, reason)
            self._differences.record(known.id, had, known.state, reason, "ended")
