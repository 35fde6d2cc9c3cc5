"""When the disks of VMs are looked at, without QEMU and storage: each look a call that a test sees, and lets end.

With both: `virt_growing_test.py`.
"""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.until import until
from vdsm import errors, hypervisor, ids
from vdsm.virt import domxml, growing, spec, states, vm
from vdsm.virt.states import State

BLOCK_DISK = """<disk type='block'><driver name='qemu' type='{format}'/><target dev='{name}'/>{more}
    <alias name='virtio-disk{at}'/></disk>"""


def a_vm(*repos: str) -> vm.Vm:
    """A VM with a growing disk in each of the repositories."""
    wanted = spec.VmSpec.parse({"vm_id": ids.new(), "disks": [{"image_id": ids.new()} for _ in repos]})
    made = vm.Vm(wanted, 1000.0, lambda *_: None, states.Condition(State.UP, "test", 1000.0))
    made.disks = tuple(
        {"repo": repo, "image_id": disk.image_id} for repo, disk in zip(repos, wanted.disks, strict=True)
    )
    made.growing = tuple(domxml.targets(wanted))
    return made


class Surroundings:
    """libvirt, the table and storage for `growing.Growth`."""

    def __init__(self) -> None:
        self.vms: dict[str, vm.Vm] = {}
        self.looks: queue.SimpleQueue[tuple[str, str, int | None]] = queue.SimpleQueue()  # repository, image, written
        self.hangs: dict[str, threading.Event] = {}
        self.fails: list[errors.VdsmError] = []
        self.domain = hypervisor.DomainState("running", "booted")
        self.errors: dict[str, str] = {}
        self.thresholds: dict[str, int] = {}
        self.continued: list[str] = []

    def find(self, vm_id: str) -> vm.Vm | None:
        return self.vms.get(vm_id)

    def state(self, vm_id: str) -> hypervisor.DomainState:
        return self.domain

    def disk_errors(self, vm_id: str) -> dict[str, str]:
        return self.errors

    def written_bytes(self, vm_id: str, disk: str) -> int:
        return 5

    def set_threshold(self, vm_id: str, disk: str, offset: int) -> None:
        self.thresholds[disk] = offset

    def repo_id_of(self, name: str) -> str:
        return name

    def grow_disk(self, repo_id: str, image_id: str, written_bytes: int | None) -> int | None:
        self.looks.put((repo_id, image_id, written_bytes))
        if repo_id in self.hangs:
            assert self.hangs[repo_id].wait(30)
        if self.fails:
            raise self.fails.pop()
        return 77

    def added(self, *repos: str) -> vm.Vm:
        made = a_vm(*repos)
        self.vms[made.id] = made
        return made


@pytest.fixture
def around() -> Surroundings:
    return Surroundings()


@pytest.fixture
def growth(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> Iterator[growing.Growth]:
    monkeypatch.setattr(growing, "FIRST_PAUSE_S", 0.01)  # nobody wants to wait longer
    anything: Any = around
    made = growing.Growth(anything, anything, anything, lambda known, reason: around.continued.append(reason))
    made.start()
    yield made
    for hanging in around.hangs.values():
        hanging.set()
    made.stop()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("vm disks")])


def test_threshold_is_set_where_storage_says(growth: growing.Growth, around: Surroundings) -> None:
    known = around.added("one", "other")
    growth.watch(known)
    until(lambda: around.thresholds == {"vda": 77, "vdb": 77})
    assert {around.looks.get()[0], around.looks.get()[0]} == {"one", "other"} and around.looks.empty()


def test_write_that_passed_the_threshold_counts_though_it_is_not_done(
    growth: growing.Growth, around: Surroundings
) -> None:
    known = around.added("one")
    growth.want(known, "vda", 4000)
    assert around.looks.get(timeout=10) == ("one", known.spec.disks[0].image_id, 4000)


def test_look_that_fails_is_tried_again_and_told_once(growth: growing.Growth, around: Surroundings) -> None:
    known, told = around.added("one"), []
    known._publish = lambda _, params: told.append(params)
    around.fails = [errors.RepositoryFull(repo_id="one") for _ in range(3)]
    growth.want(known, "vda", 4000)
    assert [around.looks.get(timeout=10)[2] for _ in range(4)] == [4000] * 4
    until(lambda: around.thresholds == {"vda": 77})
    assert [(one["change"], one["disk"], one["error"]["data"]["key"]) for one in told] == [
        ("disk", "vda", "repository_full")
    ]


def test_disk_is_looked_at_again_when_more_was_written_meanwhile(growth: growing.Growth, around: Surroundings) -> None:
    known = around.added("one")
    around.hangs["one"] = threading.Event()
    growth.want(known, "vda", 4000)
    assert around.looks.get(timeout=10)[2] == 4000
    for written in (6000, 9000, 8000):
        growth.want(known, "vda", written)
    around.hangs["one"].set()
    assert around.looks.get(timeout=10)[2] == 9000
    until(lambda: not growth._busy)
    assert around.looks.empty() and growth._looks == {}


def test_repository_that_hangs_keeps_no_disk_of_another_from_growing(
    growth: growing.Growth, around: Surroundings
) -> None:
    around.hangs["stuck"] = threading.Event()
    for _ in range(10):
        growth.watch(around.added("stuck"))
    until(lambda: len(growth._busy) == 10)
    growth.watch(around.added("well"))
    until(lambda: around.thresholds == {"vda": 77})


def test_vm_that_ended_is_looked_at_no_more(growth: growing.Growth, around: Surroundings) -> None:
    known = around.added("one")
    around.fails = [errors.RepositoryFull(repo_id="one") for _ in range(1000)]
    growth.watch(known)
    around.looks.get(timeout=10)
    known.end(states.ending("shutdown", by_guest=True, asked=None))
    until(lambda: not growth._looks and not growth._busy)


@pytest.mark.parametrize(
    ("domain", "failed", "goes_on"),
    [
        pytest.param(("paused", "ioerror"), {"vda": "no_space"}, True, id="full"),
        pytest.param(("paused", "ioerror"), {"vda": "no_space", "vdb": "unspec"}, False, id="another one is broken"),
        pytest.param(("paused", "ioerror"), {"vdb": "no_space"}, False, id="another one is full"),
        pytest.param(("paused", "user"), {"vda": "no_space"}, False, id="paused on request"),
        pytest.param(("running", "booted"), {}, False, id="running"),
    ],
)
def test_vm_goes_on_only_when_it_stood_still_for_want_of_room(
    growth: growing.Growth, around: Surroundings, domain: tuple[str, str], failed: dict[str, str], goes_on: bool
) -> None:
    around.domain, around.errors = hypervisor.DomainState(*domain), failed
    growth.want(around.added("one"), "vda", 4000)
    assert around.looks.get(timeout=10)[2] == (None if goes_on else 4000)
    until(lambda: not growth._busy and not growth._looks)
    assert around.continued == (["disk vda has room again"] if goes_on else [])


RUNNING, STOPPED = {"state.state": 1, "state.reason": 1}, {"state.state": 3, "state.reason": 5}


@pytest.mark.parametrize(
    ("fields", "looks"),
    [
        pytest.param({**RUNNING, "block.0.threshold": 10, "block.0.allocation": 9}, False, id="below its threshold"),
        pytest.param({**RUNNING, "block.0.threshold": 10, "block.0.allocation": 10}, True, id="past its threshold"),
        pytest.param({**RUNNING, "block.0.allocation": 0}, True, id="no threshold"),
        pytest.param({**RUNNING, "block.0.threshold": 10}, False, id="QEMU did not tell"),
        pytest.param({**STOPPED, "block.0.threshold": 10, "block.0.allocation": 9}, True, id="stopped by an error"),
    ],
)
def test_sample_says_where_an_event_was_lost(
    growth: growing.Growth, around: Surroundings, fields: dict[str, Any], looks: bool
) -> None:
    known = around.added("one")
    growth.sampled(known, {"block.count": 1, "block.0.name": "vda", **fields})
    growth.sampled(known, {**RUNNING, "block.count": 1, "block.0.name": "sda", "block.0.allocation": 9})
    assert bool(growth._looks or growth._busy or around.thresholds or not around.looks.empty()) == looks


def test_disks_that_grow_are_qcow2_on_volumes_that_the_guest_writes() -> None:
    disks = [
        BLOCK_DISK.format(format="qcow2", name="vda", at=0, more=""),
        BLOCK_DISK.format(format="raw", name="vdb", at=1, more=""),
        BLOCK_DISK.format(format="qcow2", name="vdc", at=2, more="<readonly/>"),
        BLOCK_DISK.format(format="qcow2", name="vdd", at=3, more="").replace("block", "file"),
    ]
    xml = f"<domain><devices>{''.join(disks)}</devices></domain>"
    assert domxml.parse_live(xml).growing == ("vda",)
    assert domxml.disk_of(xml, "virtio-disk2") == "vdc"
    assert domxml.disk_of(xml, "other") is None and domxml.disk_of("", "other") is None


def test_disk_that_a_script_added_is_not_ours_to_grow() -> None:
    known = a_vm("one")
    known.learn(domxml.Live(agent_connected=False, vnc_port=None, xml="", growing=("vda", "vdz")))
    assert known.growing == ("vda",)
