"""Hook scripts around what happens to VMs.

What runs before something runs in the thread that is about to do it; what runs after a start or an end runs behind,
in a few threads of its own, one point of a VM after the other. So a script that hangs delays its own VM alone, until
its deadline.
"""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

from vdsm import config, errors, hypervisor, logs
from vdsm.hooks import points, runner
from vdsm.virt import hookedxml, vm
from vdsm.virt.states import State

_log = logs.get("virt.hooks")

# Points of different VMs that run behind at once.
THREADS = 8
# How long the agent's stop waits for scripts that clean up after VMs.
STOP_GRACE_S = 5.0

Publish = Callable[[str, dict[str, Any]], object]
"""Takes a VM's id, and the params of an event of topic "hook"."""


class VmHooks:
    def __init__(
        self, settings: config.Config, scripts: runner.Runner, libvirt: hypervisor.Hypervisor, publish: Publish
    ) -> None:
        self._repository_dirs = settings.storage.localfs_dirs
        self._scripts = scripts
        self._libvirt = libvirt
        self._publish = publish
        self._wait_s = 2 * settings.hooks.point_deadline_s
        self._lock = threading.Lock()
        self._behind: dict[vm.Vm, concurrent.futures.Future[None]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="vm hooks")

    def stop(self) -> None:
        """Waits a little for what runs behind. What is left is ended by `runner.Runner.cancel`."""
        with self._lock:
            behind = list(self._behind.values())
        concurrent.futures.wait(behind, STOP_GRACE_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def before_start(self, known: vm.Vm, xml: str, stopped: Callable[[], bool]) -> runner.Outcome:
        """What the scripts make of the planned domain; the caller judges the outcome. `stopped`: end them."""
        known.xml = xml

        def check(edited: str) -> None:
            hookedxml.check(xml, edited, self._repository_dirs)

        return self._run(points.BEFORE_VM_START, known, lambda: xml, check, stopped)

    def before(self, point: points.Point, known: vm.Vm) -> None:
        """Raises `HookFailed` when a script vetoes, and what libvirt says when it is asked for the domain."""
        self._run(point, known, lambda: self._libvirt.xml(known.id), None, lambda: _is_down(known)).check()

    def after(self, point: points.Point, known: vm.Vm) -> None:
        """Here and now; nothing that goes wrong is the caller's concern."""
        self._told(point, known, lambda: self._libvirt.xml(known.id), lambda: _is_down(known))

    def before_end(self, known: vm.Vm) -> None:
        """As `after`, of a VM whose domain is about to be ended."""
        self._told(points.BEFORE_VM_DESTROY, known, lambda: known.xml)

    def started(self, known: vm.Vm) -> None:
        """The VM was started: behind."""
        self._later(points.AFTER_VM_START, known, lambda: _is_down(known))

    def ended(self, known: vm.Vm) -> None:
        """The VM is Down: behind. Scripts are asked when those before its start were, also when the start failed."""
        if known.xml:
            self._later(points.AFTER_VM_DESTROY, known, lambda: False)

    def settle(self, known: vm.Vm) -> None:
        """Returns when nothing of the VM runs behind any more."""
        with self._lock:
            behind = self._behind.get(known)
        if behind is not None and concurrent.futures.wait([behind], self._wait_s).not_done:
            _log.warning("VM %s: its hook scripts still run", known.id)

    # -- how ----------------------------------------------------------------------------------------------------------

    def _later(self, point: points.Point, known: vm.Vm, unwanted: Callable[[], bool]) -> None:
        with self._lock:
            previous = self._behind.get(known)

            def work() -> None:
                if previous is not None:
                    concurrent.futures.wait([previous])  # submitted earlier, so it has a thread: no deadlock
                with logs.about(f"vm {known.id}"):
                    self._told(point, known, lambda: known.xml, unwanted)

            try:
                future = self._pool.submit(work)
            except RuntimeError:
                return  # the agent stops
            self._behind[known] = future
        future.add_done_callback(lambda done: self._forget(known, done))

    def _forget(self, known: vm.Vm, done: concurrent.futures.Future[None]) -> None:
        with self._lock:
            if self._behind.get(known) is done:
                del self._behind[known]

    def _told(
        self,
        point: points.Point,
        known: vm.Vm,
        data: Callable[[], str],
        unwanted: Callable[[], bool] = lambda: False,
    ) -> None:
        try:
            self._run(point, known, data, None, unwanted)
        except errors.VdsmError as error:
            _log.warning("VM %s: %s scripts did not run: %s", known.id, point.name, error)
        except Exception:  # noqa: BLE001 - the border of hooks that may not fail anything
            _log.exception("VM %s: %s scripts did not run", known.id, point.name)

    def _run(
        self,
        point: points.Point,
        known: vm.Vm,
        data: Callable[[], str],
        check: runner.Check | None = None,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> runner.Outcome:
        outcome = self._scripts.run(
            point,
            data,
            vm_id=known.id,
            properties=known.spec.custom_properties,
            check=check,
            unwanted=unwanted,
            launch_flags=points.START_PAUSED if known.stays_paused else 0,
        )
        if outcome.results:
            told = [result.to_dict() for result in outcome.results]
            self._publish(known.id, {"point": point.name, "scripts": told})
        return outcome


def _is_down(known: vm.Vm) -> bool:
    """Scripts about a VM that runs are not wanted any more."""
    return known.state == State.DOWN
