"""The launch of a VM, on a thread of its own, each step with its undo.

    plan the disks          storage: paths, chains, leases, what the records say
    ensure the VM's record  storage
    prepare                 kernel paths, console log
    hook scripts            before_vm_start: may change the domain, or veto. They run beside the starts at once, since
                            they may take long: one that hangs is its own VM's trouble
    create                  libvirt starts the launcher, which takes the leases, rereads the records and becomes QEMU,
                            the guest stopped
    compare leases          what the process holds with the plan
    record the start        storage
    mark                    the domain's metadata says that the launch is done
    resume
    hook scripts            after_vm_start: behind, the launch is done

When a step fails nothing is left but the VM's record, and the VM is Down with the reason. When the agent dies on the
way there is either no QEMU, or a stopped one with all its leases and unmarked: the next agent takes it from "compare
leases" on. When libvirt is lost on the way the launch waits for it and goes on the same way.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vdsm import config, errors, hypervisor, logs, storage, undo
from vdsm.hooks import points
from vdsm.virt import domaintype, domxml, endings, growing, plans, spec, states, vm, vmhooks, vmrecord
from vdsm.virt.states import ExitReason, State

_log = logs.get("virt.launch")

LAUNCHER_LINE = re.compile(r"vdsm-error: (?=\{)")
# How often a launch looks whether a lost libvirt is back.
RETURN_POLL_S = 0.5
# How often one that waits for others looks whether its VM is still wanted.
PLACE_POLL_S = 0.5


class _GivenUp(Exception):
    """Somebody destroyed the VM while it was being launched."""


class _AgentStops(Exception):
    """What is there is left as it is: the next agent goes on from it."""


class Launcher:
    def __init__(
        self,
        settings: config.Config,
        libvirt: hypervisor.Hypervisor,
        service: storage.Storage,
        records: vmrecord.VmRecords,
        ends: endings.Endings,
        domain_type: domaintype.DomainType,
        hooks: vmhooks.VmHooks,
        growth: growing.Growth,
    ) -> None:
        self._settings = settings
        self._libvirt = libvirt
        self._storage = service
        self._records = records
        self._ends = ends
        self._domain_type = domain_type
        self._hooks = hooks
        self._growth = growth
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._waiting: dict[str, concurrent.futures.Future[None]] = {}
        # A launch has one of these while it works, and none while its scripts run; there are threads for both.
        self._places = threading.BoundedSemaphore(settings.virt.starts)
        threads = settings.virt.starts + settings.hooks.starts
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="vm launch")

    def stop(self) -> None:
        """Launches that have not begun do not begin; those under way end, or are left to the next agent."""
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def launch(self, known: vm.Vm) -> None:
        """Launches a reserved VM, when a thread is free."""
        self._submit(known, self._start)

    def finish(self, known: vm.Vm) -> None:
        """Takes over a launch that an earlier life of the agent left half way."""
        self._submit(known, self._go_on)

    def give_up(self, known: vm.Vm, timeout_s: float) -> None:
        """Returns once no launch of the VM is under way; its domain may be there. Raises `DeadlinePassed`."""
        known.given_up.set()
        waiting = self._waiting.get(known.id)
        if waiting is not None and waiting.cancel():
            self._forsake(known)
        if not known.launch_done.wait(timeout_s):
            raise errors.DeadlinePassed(what=f"the launch of VM {known.id}", seconds=timeout_s)

    def remove_console_log(self, known: vm.Vm) -> None:
        """With the older parts that virtlogd has put aside; nothing happens when there is none."""
        path = console_path(self._settings, known.id)
        for part in path.parent.glob(f"{path.name}*"):
            part.unlink(missing_ok=True)

    def _submit(self, known: vm.Vm, steps: Callable[[vm.Vm, undo.Stack], None]) -> None:
        with self._lock:
            self._waiting[known.id] = self._pool.submit(self._run, known, steps)

    def _forsake(self, known: vm.Vm) -> None:
        ending = states.Ending(0, ExitReason.DESTROYED_ON_STARTUP, "destroyed while it was being launched")
        self._ends.end(known, ending)
        self._done(known)

    def _done(self, known: vm.Vm) -> None:
        with self._lock:
            self._waiting.pop(known.id, None)
        known.launch_done.set()
        self._ends.settle(known)

    def _run(self, known: vm.Vm, steps: Callable[[vm.Vm, undo.Stack], None]) -> None:
        with logs.about(f"vm {known.id}"):
            try:
                with undo.Stack() as undos:
                    self._attempt(known, steps, undos)
            except _AgentStops:
                return
            except _GivenUp:
                self._forsake(known)
                return
            except errors.VdsmError as error:
                _log.warning("the launch failed: %s", error)
                self._ends.end(known, states.Ending(1, ExitReason.START_FAILED, str(error)), error)
            except Exception as error:  # noqa: BLE001 - the border of the thread: the VM must not stay in the launch
                _log.exception("the launch failed")
                unexpected = errors.Unexpected(reason=type(error).__name__)
                self._ends.end(known, states.Ending(1, ExitReason.START_FAILED, str(unexpected)), unexpected)
            else:
                self._hooks.started(known)
                self._growth.watch(known)
            self._done(known)

    def _attempt(self, known: vm.Vm, steps: Callable[[vm.Vm, undo.Stack], None], undos: undo.Stack) -> None:
        try:
            steps(known, undos)
        except Exception as error:
            if not self._stopping.is_set():
                raise
            undos.clear()
            raise _AgentStops from error

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _start(self, known: vm.Vm, undos: undo.Stack) -> None:
        with contextlib.ExitStack() as kept:
            with self._place(known):
                planned = self._plan(known, undos, kept)
            xml = self._ask_hooks(known, planned)
            with self._place(known):
                self._create(known, xml, undos)
                self._release(known, lambda: self._records.started(known))

    @contextlib.contextmanager
    def _place(self, known: vm.Vm) -> Iterator[None]:
        """One of the places of those that are at work at once, inside the block; waits for it as long as the VM is
        wanted."""
        while not self._places.acquire(timeout=PLACE_POLL_S):
            if self._stopping.is_set():
                raise _AgentStops
            _check_wanted(known)
        try:
            _check_wanted(known)
            yield
        finally:
            self._places.release()

    def _plan(self, known: vm.Vm, undos: undo.Stack, kept: contextlib.ExitStack) -> str:
        """The domain, before scripts see it. Its disks can be opened as long as `kept` is."""
        disks = [self._storage.plan_disk(disk.image_id, disk.repo_id, not disk.read_only) for disk in known.spec.disks]
        kept.enter_context(self._storage.keeping(disks))
        lease_plan = self._plan_leases(known, disks)
        ground = self._prepare(known, undos)
        _check_wanted(known)
        orders = lease_plan.to_launcher(self._settings) if lease_plan is not None else None
        return domxml.build(known.metadata(launched=False), disks, orders, ground)

    def _plan_leases(self, known: vm.Vm, disks: Sequence[storage.DiskPlan]) -> plans.LeasePlan | None:
        """None for a VM that needs no lease: it has no disks and no repository was named for it."""
        repo_id = known.spec.lease_repo_id or (disks[0].repo_id if disks else None)
        if repo_id is None:
            return None
        known.disks = tuple({"repo": disk.repo_name, "image_id": disk.image_id} for disk in disks)
        slot, found = self._records.ensure(known, repo_id)
        lease_plan = plans.combine(slot, found, disks)
        known.lease_repo, known.leases = self._storage.repo_name(repo_id), lease_plan.leases
        return lease_plan

    def _prepare(self, known: vm.Vm, undos: undo.Stack) -> domxml.Ground:
        kernel, initrd = boot_files(known.spec, self._settings.virt.boot_dirs)
        console_log = None
        if known.spec.console_log:
            path = console_path(self._settings, known.id)
            _make_console_log(path)
            undos.push("remove the console log", lambda: self.remove_console_log(known))
            console_log = str(path)
        virt = self._settings.virt
        return domxml.Ground(self._domain_type.get(), virt.launcher, virt.emulator, console_log, kernel, initrd)

    def _ask_hooks(self, known: vm.Vm, planned: str) -> str:
        """The domain as hook scripts want it. Raises `HookFailed`."""
        outcome = self._hooks.before_start(known, planned, lambda: known.given_up.is_set() or self._stopping.is_set())
        _check_wanted(known)  # before the outcome, which tells of scripts that were killed for it
        outcome.check()
        xml = planned if outcome.data is None else outcome.data
        if outcome.launch_flags & points.START_PAUSED:
            known.stays_paused = True
            xml = domxml.with_metadata(xml, known.metadata(launched=False))
        return xml

    def _create(self, known: vm.Vm, xml: str, undos: undo.Stack) -> None:
        try:
            self._libvirt.create_paused(xml, known.id, fresh_nvram=known.spec.firmware == "uefi")
        except errors.HypervisorFailed as error:
            raise launcher_error(error, known) or error from error
        except errors.HypervisorUnavailable:
            if not self._came_about(known):
                raise
        undos.push("destroy the domain", lambda: self._libvirt.destroy(known.id))

    def _release(self, known: vm.Vm, record_start: Callable[[], None]) -> None:
        """From the stopped QEMU to the running guest. Every part may be done twice."""
        while True:
            try:
                _check_wanted(known)
                known.check_leases()
                record_start()
                metadata = domxml.metadata_xml(known.metadata(launched=True))
                self._libvirt.set_metadata(known.id, domxml.PREFIX, domxml.NAMESPACE, metadata)
                known.learn(domxml.parse_live(self._libvirt.xml(known.id)))
                known.find_pid()
                _check_wanted(known)
                if not known.stays_paused and self._libvirt.state(known.id).state == "paused":
                    self._libvirt.resume(known.id)
                break
            except errors.HypervisorUnavailable:
                self._await_libvirt()
        with known.lock:
            known.boots()
            known.move(State.PAUSED if known.stays_paused else known.running_state(), "started")

    def _go_on(self, known: vm.Vm, undos: undo.Stack) -> None:
        undos.push("destroy the domain", lambda: self._libvirt.destroy(known.id))
        with self._place(known):
            self._release(known, lambda: self._records.try_started(known))

    # -- how ----------------------------------------------------------------------------------------------------------

    def _await_libvirt(self) -> None:
        """While libvirt is away nothing can be launched or undone: the thread waits, and holds nobody up."""
        _log.warning("libvirt was lost during the launch, waiting for it")
        while not self._libvirt.connected:
            if self._stopping.wait(RETURN_POLL_S):
                raise errors.HypervisorUnavailable(reason="the agent stops")

    def _came_about(self, known: vm.Vm) -> bool:
        """Whether libvirt, lost while it was creating the domain of this very launch, has made it."""
        while True:
            self._await_libvirt()
            try:
                metadata = self._libvirt.metadata(known.id, domxml.NAMESPACE)
            except errors.NoSuchVm:
                return False
            except errors.HypervisorUnavailable:
                continue
            return metadata is not None and domxml.parse_metadata(metadata).created == known.created


def _check_wanted(known: vm.Vm) -> None:
    if known.given_up.is_set():
        raise _GivenUp


def console_path(settings: config.Config, vm_id: str) -> Path:
    return Path(settings.virt.console_dir) / f"{vm_id}.log"


def _make_console_log(path: Path) -> None:
    """Made here, so that it is the agent's own: virtlogd, which writes it, would make it root's alone."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o660)
    os.fchmod(fd, 0o660)  # whatever the umask is
    os.close(fd)


def boot_files(wanted: spec.VmSpec, boot_dirs: Sequence[str]) -> tuple[str | None, str | None]:
    """The resolved paths of the kernel and the initial ramdisk, (None, None) without a direct boot.

    Raises `PathNotAllowed` when one is, or leads, outside `boot_dirs`, `InvalidParameters` when it is no file.
    """
    if wanted.direct_kernel is None:
        return None, None
    kernel, initrd = wanted.direct_kernel.kernel, wanted.direct_kernel.initrd
    return _boot_file("kernel", kernel, boot_dirs), initrd and _boot_file("initrd", initrd, boot_dirs)


def _boot_file(field: str, path: str, boot_dirs: Sequence[str]) -> str:
    # By its name first: looking at a path elsewhere could hang on somebody's dead mount.
    if not _below(Path(os.path.normpath(path)), [Path(directory) for directory in boot_dirs]):
        raise errors.PathNotAllowed(path=path, allowed=", ".join(boot_dirs))
    resolved = Path(path).resolve()
    if not _below(resolved, [Path(directory).resolve() for directory in boot_dirs]):
        raise errors.PathNotAllowed(path=path, allowed=", ".join(boot_dirs))
    if not resolved.is_file():
        raise errors.InvalidParameters(parameter=f"direct_kernel.{field}", reason=f"{path} is no file")
    return str(resolved)


def _below(path: Path, directories: Sequence[Path]) -> bool:
    return any(path.is_relative_to(directory) for directory in directories)


def launcher_error(failure: errors.HypervisorFailed, known: vm.Vm) -> errors.VdsmError | None:
    """What the launcher said before it ended, from the words of libvirt, which hands its output on; None: nothing."""
    text = str(failure)
    said = LAUNCHER_LINE.search(text)
    if said is None:
        return None
    try:
        wire, _ = json.JSONDecoder().raw_decode(text, said.end())
    except ValueError:
        return None
    error = errors.VdsmError.from_wire(wire)
    if not isinstance(error, errors.LeaseHeld):
        return error
    held = next((lease.name for lease in known.leases if str(lease) == error.facts["resource"]), None)
    if held == known.id:
        return errors.VmRuns(vm_id=held, holder=error.facts["holder"])
    return error if held is None else errors.ImageInUse(image_id=held, holder=error.facts["holder"])
