"""Block devices of this host that can carry a repository, and word of those that come and go.

The kernel's and udev's events only say that something has changed: when they pause, everything is looked at once more
(`scans`), and what is different is published. The kernel's own events come also where no udev runs. Nothing here reads
a disk: that is the root helper's, disk by disk, each with a deadline.

Runs in the agent; methods may be called from any thread.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import re
import select
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyudev

from supervdsm import calls, contract
from supervdsm import client as helper_client
from vdsm import errors, events, forkserver, logs, periodic, roothelper
from vdsm.storage import devicelist, scans, sysblock

_log = logs.get("storage.devices")

# A LUN that comes makes a dozen events, a lost session hundreds: they are one change once nothing was heard for
# QUIET_S, and at the latest after LONGEST_S. Seconds.
QUIET_S = 0.5
LONGEST_S = 3.0
# All is looked at again this often (seconds), events or none: they can be lost.
RESCAN_S = 60.0
# How long (seconds) a caller waits for disks to be read, or asked for their size. Those that take longer go on behind.
WAIT_S = 10.0
# Calls to root at once about disks; each may hang for its deadline.
_THREADS = 8
# A disk that did not answer is not read again before so long (seconds): each try leaves a process behind that hangs.
SPARE_S = 60.0
# How long (seconds) the end of the agent waits for a look that hangs.
STOP_S = 2.0
_SUBSYSTEMS = ("block", "iscsi_session")
_ESCAPED = re.compile(r"\\([0-7]{3})")


class Udev:
    """What udev knows. Without a udev that runs it knows nothing, and the kernel's events still come."""

    def __init__(self) -> None:
        self._context = pyudev.Context()
        self._lock = threading.Lock()  # libudev knows no threads

    def links(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The names under /dev that lead to each of these disks."""
        found = {}
        for name in names:
            with self._lock, contextlib.suppress(pyudev.DeviceNotFoundError):
                found[name] = list(pyudev.Devices.from_name(self._context, "block", name).device_links)
        return found

    def monitors(self) -> list[pyudev.Monitor]:
        """Started, of the kernel's events and of udev's, which come later and after its links are made."""
        context, found = pyudev.Context(), []
        for source in ("kernel", "udev"):
            monitor = pyudev.Monitor.from_netlink(context, source)
            for subsystem in _SUBSYSTEMS:
                monitor.filter_by(subsystem)
            monitor.start()
            found.append(monitor)
        return found


class Watch:
    """A thread that calls `changed` once when events have paused. It ignores what no repository can lie on."""

    def __init__(self, monitors: list[pyudev.Monitor], changed: Callable[[], None]) -> None:
        self._monitors = {monitor.fileno(): monitor for monitor in monitors}
        self._changed = changed
        self._woken, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._run, name="udev", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        os.write(self._waker, b".")
        self._thread.join()
        os.close(self._woken)
        os.close(self._waker)

    def matters(self, monitor: pyudev.Monitor) -> bool:
        """Takes one event: whether it may change what is told of disks."""
        try:
            device = monitor.poll(0)
        except OSError as error:  # more came than the kernel keeps: then certainly something has changed
            _log.info("events of disks were lost: %s", error)
            return True
        return device is not None and sysblock.matters(device.sys_name)

    def _run(self) -> None:
        poller = select.poll()
        for fd in (self._woken, *self._monitors):
            poller.register(fd, select.POLLIN)
        since: float | None = None  # the first event that was not told yet
        while True:
            wait_s = None if since is None else min(QUIET_S, max(0.0, since + LONGEST_S - time.monotonic()))
            ready = [fd for fd, _ in poller.poll(None if wait_s is None else wait_s * 1000)]
            if self._woken in ready:
                return
            if since is not None and (not ready or time.monotonic() >= since + LONGEST_S):
                since = None
                self._changed()
            if any([self.matters(self._monitors[fd]) for fd in ready]) and since is None:
                since = time.monotonic()


class Devices:
    """The disks, as far as they are known now. Publishes events of the topic "device"."""

    def __init__(
        self, log: events.EventLog, server: forkserver.ForkServer, helper: helper_client.Helper, root: Path = Path("/")
    ) -> None:
        self._events = log
        self._helper = helper
        self._root = root
        self._scanner = scans.Scanner(server, root / "sys")
        self._udev = Udev()
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, "disk")
        self._lock = threading.Lock()
        self._reading: dict[str, concurrent.futures.Future[calls.Content | str]] = {}  # by disk
        self._asking: dict[int, concurrent.futures.Future[None]] = {}  # by SCSI host
        self._spared: dict[str, float] = {}  # disks that did not answer, until when
        self._known: dict[str, devicelist.Answer] | None = None  # as last told in events
        self._rescanner = periodic.Periodic("devices", RESCAN_S, self._compare)
        self._watch = Watch(self._udev.monitors(), self._rescanner.poke)

    def start(self) -> None:
        self._watch.start()
        self._rescanner.start()

    def stop(self) -> None:
        """What hangs is left behind."""
        self._watch.stop()
        self._rescanner.stop(STOP_S)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def look_again(self) -> None:
        """Compares soon, and tells of what has changed."""
        self._rescanner.poke()

    def scan(self) -> scans.Scan:
        """What the kernel knows now. Raises `WorkerDied`."""
        return self._scanner.scan()

    def users(self, scan: scans.Scan, disk: sysblock.Disk) -> list[str]:
        """Who has the disk now, as far as the kernel tells."""
        return devicelist.uses(disk, devicelist.Ground(scan, calls.Maps([], None), {}, _mounted(self._root), {}))

    def all(self, kinds: set[str] | None, guids: list[str], *, read: bool, refresh: bool) -> list[devicelist.Answer]:
        """Devices as `devicelist.describe`, of these types and ids (all without).

        `refresh`: new LUNs and sizes are looked for first. `read`: each disk is read to see what it holds. Both wait
        `WAIT_S` at most: a disk that takes longer is unknown, and no other waits for it.
        """
        if refresh:
            self._refresh()
        scan = self.scan()
        ground = self._ground(scan)
        found = [*devicelist.candidates(scan), *map(devicelist.silent, scan.silent)]
        named = [disk for disk in found if not guids or devicelist.name(disk) in guids]
        wanted = [disk for disk in named if kinds is None or devicelist.kind(disk, ground) in kinds]
        contents = self._contents(wanted, ground) if read else {}
        ground = dataclasses.replace(ground, contents={**contents, **scan.silent})
        return [devicelist.describe(disk, ground) for disk in wanted]

    # -- what has changed --------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        scan = self.scan()
        ground = self._ground(scan)
        found = [devicelist.describe(disk, ground) for disk in devicelist.candidates(scan)]
        now = {one["guid"]: one for one in found}
        before, self._known = self._known, now
        if before is None:
            return  # the first look: what is there has not come now
        for name in before.keys() - now.keys():
            if before[name]["name"] not in scan.silent:
                self._publish("gone", before[name])
        for name, one in now.items():
            if name not in before:
                self._publish("appeared", one)
            elif _shown(before[name]) != _shown(one):
                self._publish("changed", one)

    def _publish(self, change: str, told: devicelist.Answer) -> None:
        self._events.publish("device", told["guid"], {"change": change, **_shown(told)})

    # -- what is known -----------------------------------------------------------------------------------------------

    def _ground(self, scan: scans.Scan) -> devicelist.Ground:
        multipath = any(disk.transport == "multipath" for disk in scan.disks.values())
        maps = self._maps() if multipath else calls.Maps([], None)
        return devicelist.Ground(scan, maps, self._udev.links(scan.disks), _mounted(self._root), {})

    def _maps(self) -> calls.Maps:
        """Without the root helper the paths are what the kernel makes of their disks."""
        try:
            return roothelper.call(self._helper, calls.GetMaps())
        except errors.VdsmError as error:
            return calls.Maps([], str(error))

    # -- what may hang -----------------------------------------------------------------------------------------------

    def _contents(self, disks: list[sysblock.Disk], ground: devicelist.Ground) -> dict[str, calls.Content | str]:
        """What the disks hold, for each that says so in time. One without a path is not even asked."""
        found: dict[str, calls.Content | str] = {}
        asked = {}
        for disk in disks:
            if not any(devicelist.paths(disk, ground).values()):
                found[disk.name] = "no path to it carries I/O"
            elif devicelist.is_covered(disk, ground):
                found[disk.name] = "it is in use"
            else:
                asked[disk.name] = self._read(disk.name)
        concurrent.futures.wait(asked.values(), WAIT_S)
        late = f"it does not answer within {WAIT_S:g} s"
        return found | {name: future.result() if future.done() else late for name, future in asked.items()}

    def _read(self, disk: str) -> "concurrent.futures.Future[calls.Content | str]":
        """One reader for each disk, however many ask."""
        with self._lock:
            reading = self._reading.get(disk)
            if reading is None or reading.done():
                reading = self._reading[disk] = self._threads.submit(self._read_one, disk)
            return reading

    def _read_one(self, disk: str) -> calls.Content | str:
        if self._spared.get(disk, 0.0) > time.monotonic():
            return "it has not answered lately"
        try:
            return self._helper.call(calls.ReadContent(disk))
        except contract.DeadlinePassed as error:
            self._spared[disk] = time.monotonic() + SPARE_S
            return error.reason
        except contract.HelperError as error:
            return error.reason

    def _refresh(self) -> None:
        """Has every SCSI host look for new LUNs and sizes, and maps follow."""
        scan = self.scan()
        hosts = {session.host for session in scan.sessions if session.state == "LOGGED_IN"}
        fibre = [disk.address for disk in scan.disks.values() if disk.transport == "fc"]
        hosts |= {int(address.partition(":")[0]) for address in fibre if address is not None}
        concurrent.futures.wait([self._ask(host) for host in hosts], WAIT_S)
        self._resize_maps()

    def _ask(self, host: int) -> "concurrent.futures.Future[None]":
        with self._lock:
            asking = self._asking.get(host)
            if asking is None or asking.done():
                asking = self._asking[host] = self._threads.submit(self._quietly, calls.RescanHost(host))
            return asking

    def _resize_maps(self) -> None:
        """A map whose paths all have another size than it has gets theirs."""
        scan = self.scan()
        for disk in scan.disks.values():
            if disk.transport == "multipath":
                sizes = {scan.disks[path].size_bytes for path in disk.slaves if path in scan.disks}
                if len(sizes) == 1 and sizes != {disk.size_bytes}:
                    self._quietly(calls.ResizeMap(devicelist.name(disk)))

    def _quietly(self, request: contract.Call[Any]) -> None:
        """What cannot be done is logged: the list tells what is."""
        try:
            roothelper.call(self._helper, request)
        except errors.VdsmError as error:
            _log.warning("%s", error)


def _shown(told: devicelist.Answer) -> dict[str, Any]:
    """What an event says of a device, and what makes one when it is different."""
    states = {path["physdev"]: path["state"] for path in told["pathstatus"]}
    return {"name": told["name"], "capacity": told["capacity"], "devtype": told["devtype"], "paths": states}


def _mounted(root: Path) -> dict[str, str]:
    """Mount points by device number, as this process sees them."""
    lines = (root / "proc/self/mountinfo").read_text().splitlines()
    fields = [line.split() for line in lines]
    return {parts[2]: _ESCAPED.sub(lambda found: chr(int(found[1], 8)), parts[4]) for parts in fields}
