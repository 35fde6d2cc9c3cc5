"""What libvirt's flat fields become in a VM's statistics."""

import json
from typing import Any

import orjson

from vdsm import ids
from vdsm.virt import sampling, spec, states, vm
from vdsm.virt.states import Ending, ExitReason, State

IMAGE, OTHER = ids.new(), ids.new()
FIELDS: dict[str, Any] = {
    **{"cpu.time": 5_000_000_000, "cpu.user": 3_000_000_000, "cpu.system": 1_000_000_000},
    **{
        "balloon.rss": 90000,
        "balloon.current": 65536,
        "balloon.maximum": 65536,
        "balloon.available": 60000,
        "balloon.unused": 45000,
    },
    **{"block.count": 2, "block.0.name": "vda", "block.0.allocation": 4096, "block.0.physical": 8192},
    **{"block.0.capacity": 1 << 20, "block.0.rd.bytes": 4096, "block.0.rd.reqs": 1, "block.0.rd.times": 1000},
    **{"block.0.wr.bytes": 0, "block.0.wr.reqs": 0, "block.0.wr.times": 0, "block.1.name": "sda"},
}

# Of a QEMU whose monitor somebody else is using, or that does not answer.
BUSY: dict[str, Any] = {"cpu.time": 7, "block.count": 1, "block.0.name": "vda"}


def a_vm() -> vm.Vm:
    disks = [{"image_id": IMAGE}, {"image_id": OTHER, "bus": "scsi"}]
    parsed = spec.VmSpec.parse({"vm_id": ids.new(), "name": "web", "memory_mib": 64, "disks": disks, "nics": [{}]})
    return vm.Vm(parsed, 1000.0, lambda *_: None, states.Condition(State.UP, "test", 1000.0))


FIRST = sampling.sample(a_vm(), FIELDS, 2000.0, None)


def test_the_first_sample_has_no_rates() -> None:
    found = sampling.sample(a_vm(), FIELDS, 2000.0, None).document
    assert (found["cpuUser"], found["cpuSys"], found["cpuUsage"]) == (0.0, 0.0, 5_000_000_000)
    assert found["disks"]["vda"]["readRate"] == 0.0


def test_rates_are_over_the_time_between_two_samples() -> None:
    later = {**FIELDS, "cpu.user": 8_000_000_000, "block.0.rd.bytes": 4096 + 10_240, "block.0.rd.reqs": 5}
    later["block.0.rd.times"] = 1000 + 4000
    found = sampling.sample(a_vm(), later, 2010.0, FIRST).document
    assert (found["cpuUser"], found["cpuSys"]) == (50.0, 0.0)
    assert (found["disks"]["vda"]["readRate"], found["disks"]["vda"]["readLatency"]) == (1024.0, 1000)


def test_a_counter_that_went_back_gives_no_rate() -> None:
    found = sampling.sample(a_vm(), {**FIELDS, "cpu.user": 0}, 2010.0, FIRST).document
    assert found["cpuUser"] == 0.0


def test_disks_are_named_by_their_images() -> None:
    found = sampling.sample(a_vm(), FIELDS, 2000.0, None).document["disks"]
    assert {name: disk["imageID"] for name, disk in found.items()} == {"vda": IMAGE, "sda": OTHER}
    assert (found["vda"]["truesize"], found["vda"]["apparentsize"], found["vda"]["capacity"]) == (4096, 8192, 1 << 20)


def test_memory_is_told_when_the_guest_tells_it() -> None:
    told = sampling.sample(a_vm(), FIELDS, 2000.0, None).document
    silent = sampling.sample(a_vm(), {}, 2000.0, None).document
    assert (told["memUsage"], told["memoryStats"]["mem_free"]) == (25, 45000)
    assert (silent["memUsage"], silent["memoryStats"], silent["balloonInfo"]["balloon_max"]) == (None, {}, 65536)


def test_a_busy_qemu_gives_what_needs_no_monitor() -> None:
    found = sampling.sample(a_vm(), BUSY, 2000.0, None).document
    assert (found["cpuUsage"], found["disks"]["vda"]["readBytes"]) == (7, None)
    json.dumps(found)


def test_figures_of_a_qemu_that_does_not_answer_stay_and_say_since_when() -> None:
    known, old = a_vm(), FIRST
    for now in (2010.0, 2020.0):
        old = sampling.sample(known, {"cpu.user": 3_500_000_000, **BUSY}, now, old)
        assert (old.document["sampleTime"], old.document["staleSince"]) == (now, 2000.0)
        assert old.document["disks"] == FIRST.document["disks"]
        assert old.document["balloonInfo"] == FIRST.document["balloonInfo"]
    assert old.document["cpuUser"] == 0.0, "what needs no monitor is new"
    back = sampling.sample(known, {**FIELDS, "block.0.rd.bytes": 4096 + 30_720}, 2030.0, old)
    assert back.document["staleSince"] is None
    assert back.document["disks"]["vda"]["readRate"] == 1024.0, "over all the time since it answered last"


def test_a_qemu_that_never_answered_is_old_since_its_start() -> None:
    known = a_vm()
    first = sampling.sample(known, BUSY, 2000.0, None)
    assert first.monitored_at is None
    assert sampling.sample(known, BUSY, 2010.0, first).document["staleSince"] == known.booted


def test_the_document_follows_the_state_at_once() -> None:
    known = a_vm()
    known.sampled(sampling.sample(known, FIELDS, 2000.0, None).document)
    up = orjson.loads(known.stats)
    known.move(State.PAUSED, "test")
    paused = orjson.loads(known.stats)
    known.end(Ending(1, ExitReason.LOST_QEMU, "gone"))
    down = orjson.loads(known.stats)
    assert (up["vmId"], up["vmName"], up["status"], up["memUsage"]) == (known.id, "web", "Up", 25)
    assert (paused["status"], paused["memUsage"]) == ("Paused", 25)
    assert (down["status"], down["exitReason"], down["exitMessage"]) == ("Down", 2, "gone")
    assert "memUsage" not in down, "a VM that is down uses nothing"
