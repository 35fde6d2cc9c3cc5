"""The process that does one call: it touches hardware and storage, and sees nothing of the peer but a checked call."""

import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

from supervdsm import (
    calls,
    contract,
    directories,
    disks,
    hardware,
    lockmanager,
    mounts,
    settings,
    targets,
    volumegroups,
    volumes,
)

log = logging.getLogger("supervdsm.worker")

# The whole list: each call and the function that does it, called in the worker as function(call, settings). It returns
# the call's result or raises a `contract.HelperError` or an `OSError`.
ROOMS: dict[type[contract.Call[Any]], Callable[[Any, settings.Settings], Any]] = {
    calls.GetHardwareInfo: hardware.get_hardware_info,
    calls.PrepareDirectory: directories.prepare_directory,
    calls.MountNfs: mounts.mount_nfs,
    calls.UnmountNfs: mounts.unmount_nfs,
    calls.DiscoverTargets: targets.discover_targets,
    calls.LoginTarget: targets.login_target,
    calls.LogoutTarget: targets.logout_target,
    calls.RescanHost: targets.rescan_host,
    calls.GetMaps: disks.get_maps,
    calls.ResizeMap: disks.resize_map,
    calls.RemoveMap: disks.remove_map,
    calls.ReadContent: disks.read_content,
    calls.GetLockManager: lockmanager.get_lock_manager,
    calls.GetVolumeGroup: volumegroups.get_volume_group,
    calls.MakeVolumeGroup: volumegroups.make_volume_group,
    calls.StartVolumeGroup: volumegroups.start_volume_group,
    calls.StopVolumeGroup: volumegroups.stop_volume_group,
    calls.ExtendVolumeGroup: volumegroups.extend_volume_group,
    calls.EnableGlobalLock: volumegroups.enable_global_lock,
    calls.ListVolumes: volumes.list_volumes,
    calls.CreateVolume: volumes.create_volume,
    calls.ActivateVolume: volumes.activate_volume,
    calls.RefreshVolume: volumes.refresh_volume,
    calls.DeactivateVolume: volumes.deactivate_volume,
    calls.ExtendVolume: volumes.extend_volume,
    calls.RemoveVolume: volumes.remove_volume,
}

# LVM puts signals off while it has suspended a device: so long (seconds) it may take until SIGKILL, which it cannot put
# off, and which would leave the device so. Less than the server's own time to end.
END_S = 1.5
# Seconds after its deadline at which a worker ends by itself, in case its session was killed and cannot end it.
ORPHAN_S = 5


class Worker:
    """A forked process doing `call`, in a process group of its own with all that it starts. The deadline runs."""

    def __init__(self, call: contract.Call[Any], context: settings.Settings, private: int) -> None:
        """`private` is a descriptor that the worker must not keep: the connection to the peer."""
        self._call = call
        self._deadline = time.monotonic() + call.deadline_s
        self._output, output = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(private)
            _work(call, context, output)
        os.close(output)
        _lead_group(self._pid)
        self._pidfd = os.pidfd_open(self._pid)

    def result(self, stop: int) -> Any:
        """The checked result. Raises what the room raised; `DeadlinePassed`, or `Stopped` once `stop` is readable,
        after killing the worker."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        poll.register(stop, select.POLLIN)
        reply = bytearray()
        while True:
            ready = dict(poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000))
            if not ready:
                self._kill()
                raise contract.DeadlinePassed(f"no end after {self._call.deadline_s:g} s")
            if self._output not in ready:
                self._kill()
                raise contract.Stopped("the helper is ending")
            piece = os.read(self._output, 1 << 16)
            if not piece:
                break
            reply += piece
        if not reply:
            raise contract.Failed("the call's process died")
        return contract.decode_reply(self._call, bytes(reply))

    def wait_gone(self, stop: int) -> None:
        """Returns when the process is gone, or once `stop` is readable. A process that sleeps uninterruptibly in its
        storage outlives SIGKILL."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.register(stop, select.POLLIN)
        poll.poll()

    def _kill(self) -> None:
        """Returns when the worker and all that it started are gone, or have been killed."""
        deadline = time.monotonic() + END_S
        os.killpg(self._pid, signal.SIGTERM)
        while not self._all_gone():
            if time.monotonic() > deadline:
                os.killpg(self._pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    def _all_gone(self) -> bool:
        with contextlib.suppress(ChildProcessError):  # it was buried before
            os.waitpid(self._pid, os.WNOHANG)
        try:
            os.killpg(self._pid, 0)
        except ProcessLookupError:
            return True
        return False


def _lead_group(pid: int) -> None:
    """Done by parent and child, as neither knows who comes first."""
    with contextlib.suppress(ProcessLookupError):
        os.setpgid(pid, pid)


def _work(call: contract.Call[Any], context: settings.Settings, output: int) -> NoReturn:
    """In the worker. A named border: whatever a room raises becomes a reply."""
    try:
        _lead_group(os.getpid())
        for number in (signal.SIGTERM, signal.SIGINT):  # ignored by the session, but not by programs that a room runs
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(int(call.deadline_s) + ORPHAN_S)
        reply = _reply(call, context)
        with open(output, "wb") as pipe:
            pipe.write(reply)
    finally:
        os._exit(0)


def _reply(call: contract.Call[Any], context: settings.Settings) -> bytes:
    try:
        return contract.encode_result(call, ROOMS[type(call)](call, context))
    except contract.HelperError as error:
        return contract.encode_error(error)
    except OSError as error:
        return contract.encode_error(contract.Failed(error.strerror or str(error)))
    except Exception as error:
        log.exception("%s failed", type(call).__name__)
        return contract.encode_error(contract.Failed(f"unexpected {type(error).__name__}, see the helper's log"))
