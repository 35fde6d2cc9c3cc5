"""Statistics of the VMs: libvirt is asked in bulk, each VM's document is encoded once per sample.

libvirt answers one domain after the other, each with round trips to its QEMU, so a sample is taken in parallel parts.
A QEMU that hangs blocks one part's call for as long as it hangs; the others of its part are back in the next sample,
since libvirt then leaves the busy one's monitor alone. The busy one's figures that need the monitor stay as they were,
and its statistics say since when. The names are upstream VDSM's where the meaning is the same; values are numbers.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from vdsm import errors, hypervisor, logs, periodic
from vdsm.virt import domxml, table, vm
from vdsm.virt.states import State

_log = logs.get("virt.sampling")

# Parts asked for at once.
PARALLEL = 4
# Calls that hang at once, each on a QEMU that does not answer, before sampling stops: each keeps one of libvirtd's
# workers (20 unless configured).
MAX_STUCK = 8

STOP_GRACE_S = 5.0

# There when libvirt has asked QEMU's monitor, and only then.
_MONITORED = "balloon.rss"

Fields = dict[str, Any]


class Sample(NamedTuple):
    """A VM's last sample: when it was taken, libvirt's fields, and the part of the statistics that it became.

    `monitored_at` and `monitored` are time and fields of the last one for which QEMU's monitor answered, None before.
    """

    at: float
    fields: Fields
    monitored_at: float | None
    monitored: Fields
    document: Fields


class Sampler:
    """`told` gets the fields of each VM whose QEMU has answered; it must not block."""

    def __init__(
        self,
        libvirt: hypervisor.Hypervisor,
        vms: table.Table,
        interval_s: float,
        told: Callable[[vm.Vm, Fields], object],
    ) -> None:
        self._libvirt = libvirt
        self._vms = vms
        self._interval_s = interval_s
        self._told = told
        self._before: dict[str, Sample] = {}
        self._calls: list[threading.Thread] = []
        self._periodic = periodic.Periodic("vm statistics", interval_s, self.sample)

    def start(self) -> None:
        self._periodic.start()

    def stop(self) -> None:
        self._periodic.stop(STOP_GRACE_S)

    def sample(self) -> None:
        """One sample of all VMs. Returns when it is complete, but not later than the next one is due."""
        for known in self._vms.all():
            _grow_up(known)
        if not self._libvirt.connected:
            return
        self._calls = [call for call in self._calls if call.is_alive()]
        if len(self._calls) >= MAX_STUCK:
            _log.error("%s calls for statistics hang; QEMUs do not answer", len(self._calls))
            return
        calls = [
            threading.Thread(target=self._take, args=(part,), name="vm sample", daemon=True) for part in range(PARALLEL)
        ]
        self._calls += calls
        deadline = time.monotonic() + self._interval_s
        for call in calls:
            call.start()
        for call in calls:
            call.join(max(0.0, deadline - time.monotonic()))
        alive = {known.id for known in self._vms.all()}
        self._before = {vm_id: before for vm_id, before in self._before.items() if vm_id in alive}

    def _take(self, part: int) -> None:
        began = time.time()
        try:
            found = self._libvirt.stats(hypervisor.ALL_GROUPS, part, PARALLEL)
        except errors.VdsmError as error:
            _log.warning("no statistics: %s", error)
            return
        now = time.time()
        for vm_id, fields in found.items():
            known, before = self._vms.find(vm_id), self._before.get(vm_id)
            late = before is not None and before.at > began  # this call hung, and others were quicker
            if known is not None and not late:
                taken = self._before[vm_id] = sample(known, fields, now, before)
                known.sampled(taken.document)
                if taken.monitored_at == now:
                    self._told(known, fields)


def _grow_up(known: vm.Vm) -> None:
    """A guest whose agent never came is up after a while."""
    with known.lock:
        if known.state == State.POWERING_UP and known.running_state() == State.UP:
            known.move(State.UP, "no guest agent has shown up")


def sample(known: vm.Vm, fields: Fields, now: float, before: Sample | None) -> Sample:
    """libvirt's flat fields as a part of the VM's statistics. Rates are over the time since `before`."""
    rate = _Rates(fields, now, *((before.fields, before.at) if before is not None else ({}, None)))
    document = {
        "sampleTime": now,
        # Percent of one host CPU.
        "cpuUser": rate.percent("cpu.user"),
        "cpuSys": rate.percent("cpu.system"),
        "cpuUsage": fields.get("cpu.time"),  # ns since the start
        "network": {
            f"net{at}": {"macAddr": mac, "model": known.spec.nics[at].model}
            for at, mac in enumerate(domxml.macs(known.spec))
        },
    }
    answered_at, answered = (before.monitored_at, before.monitored) if before is not None else (None, {})
    if _MONITORED in fields:
        figures = _figures(known, fields, _Rates(fields, now, answered, answered_at))
        return Sample(now, fields, now, fields, {**document, **figures, "staleSince": None})
    # QEMU does not answer: its own figures stay as they were when it last did, or began.
    figures = {name: before.document[name] for name in _QEMUS} if before is not None else _figures(known, fields, rate)
    since = known.booted if answered_at is None else answered_at
    return Sample(now, fields, answered_at, answered, {**document, **figures, "staleSince": since})


def _figures(known: vm.Vm, fields: Fields, rate: "_Rates") -> Fields:
    return {**_memory(known, fields), "disks": _disks(known, fields, rate)}


# What QEMU's monitor tells: the names of `_figures`.
_QEMUS = ("memUsage", "memoryStats", "balloonInfo", "disks")


class _Rates:
    def __init__(self, fields: Fields, now: float, before: Fields, then: float | None) -> None:
        self._fields = fields
        self._before = before
        self._seconds = now - then if then is not None else 0.0

    def per_second(self, name: str) -> float:
        """The counter's growth per second; 0 when there is nothing to compare with."""
        now, before = self._fields.get(name), self._before.get(name)
        if now is None or before is None or now < before or self._seconds <= 0:
            return 0.0
        return float(now - before) / self._seconds

    def percent(self, name: str) -> float:
        """The growth of a counter of nanoseconds, in percent of the time passed."""
        return round(self.per_second(name) / 1e7, 2)

    def mean(self, total: str, count: str) -> int:
        """The mean of what was added to `total` per addition to `count`."""
        added = self.per_second(count)
        return int(self.per_second(total) / added) if added else 0


def _memory(known: vm.Vm, fields: Fields) -> dict[str, Any]:
    """Sizes in KiB. What the guest uses is known only to a guest with a balloon driver."""
    total, unused = fields.get("balloon.available"), fields.get("balloon.unused")
    guest = {"mem_total": total, "mem_free": unused, "mem_unused": unused} if total else {}
    return {
        "memUsage": round(100 * (total - unused) / total) if total and unused is not None else None,
        "memoryStats": guest,
        "balloonInfo": {
            "balloon_cur": fields.get("balloon.current"),
            "balloon_max": fields.get("balloon.maximum", known.spec.memory_mib << 10),
        },
    }


def _disks(known: vm.Vm, fields: Fields, rate: _Rates) -> dict[str, dict[str, Any]]:
    images = dict(zip(domxml.targets(known.spec), (disk.image_id for disk in known.spec.disks), strict=True))
    found = {}
    for at in range(fields.get("block.count", 0)):
        name = fields.get(f"block.{at}.name")
        if name in images:
            found[name] = {"imageID": images[name], **_disk(f"block.{at}", fields, rate)}
    return found


def _disk(prefix: str, fields: Fields, rate: _Rates) -> dict[str, Any]:
    return {
        "truesize": fields.get(f"{prefix}.allocation"),
        "apparentsize": fields.get(f"{prefix}.physical"),
        "capacity": fields.get(f"{prefix}.capacity"),
        "readBytes": fields.get(f"{prefix}.rd.bytes"),
        "writtenBytes": fields.get(f"{prefix}.wr.bytes"),
        "readOps": fields.get(f"{prefix}.rd.reqs"),
        "writeOps": fields.get(f"{prefix}.wr.reqs"),
        "readRate": round(rate.per_second(f"{prefix}.rd.bytes"), 1),
        "writeRate": round(rate.per_second(f"{prefix}.wr.bytes"), 1),
        # ns for each operation since the last sample
        "readLatency": rate.mean(f"{prefix}.rd.times", f"{prefix}.rd.reqs"),
        "writeLatency": rate.mean(f"{prefix}.wr.times", f"{prefix}.wr.reqs"),
        "flushLatency": rate.mean(f"{prefix}.fl.times", f"{prefix}.fl.reqs"),
    }
