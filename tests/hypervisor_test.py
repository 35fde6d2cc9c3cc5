"""The connection to libvirt, on libvirt's own test driver; a real libvirtd is the business of the tests of VMs."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

from tests.until import until
from vdsm import errors, hypervisor, ids

DOMAIN = """<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory>65536</memory>
    <os><type>hvm</type></os></domain>"""


class Link:
    """A started connection, with what it told."""

    def __init__(self, uri: str = "test:///default") -> None:
        self.events: queue.SimpleQueue[hypervisor.DomainEvent] = queue.SimpleQueue()
        self.connections: queue.SimpleQueue[tuple[bool, str]] = queue.SimpleQueue()
        self.libvirt = hypervisor.Hypervisor(uri)
        self.libvirt.start(self.events.put, lambda up, reason: self.connections.put((up, reason)))


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    assert made.connections.get(timeout=30) == (True, "connected")
    yield made
    made.libvirt.stop()


@pytest.fixture
def domain(link: Link) -> Iterator[str]:
    """A running domain. The test driver is one for the whole process, and cannot start a domain paused."""
    vm_id = ids.new()
    conn = libvirt.open("test:///default")
    conn.createXML(DOMAIN.format(name=vm_id, uuid=vm_id))
    yield vm_id
    conn.close()
    if vm_id in link.libvirt.domains():
        link.libvirt.destroy(vm_id)


def test_a_domain_goes_through_its_life(link: Link, domain: str) -> None:
    link.libvirt.suspend(domain)
    assert link.libvirt.state(domain) == ("paused", "user")
    assert link.libvirt.domains()[domain].state == "paused"
    link.libvirt.resume(domain)
    assert link.libvirt.state(domain).state == "running"
    link.libvirt.destroy(domain)
    assert domain not in link.libvirt.domains()
    seen = []
    until(lambda: seen.append(link.events.get(timeout=30)) or seen[-1].kind == "stopped")
    kinds = [(event.kind, event.detail) for event in seen if event.vm_id == domain]
    assert kinds[-3:] == [("suspended", "paused"), ("resumed", "unpaused"), ("stopped", "destroyed")]


@pytest.mark.parametrize("call", ["state", "name", "xml", "resume", "suspend", "destroy", "reset"])
def test_an_unknown_domain_is_no_such_vm(link: Link, call: str) -> None:
    with pytest.raises(errors.NoSuchVm):
        getattr(link.libvirt, call)(ids.new())


def test_a_refusal_carries_libvirts_words(link: Link, domain: str) -> None:
    with pytest.raises(errors.HypervisorFailed, match=r"resume.*not paused"):
        link.libvirt.resume(domain)


def test_metadata_is_kept_by_namespace(link: Link, domain: str) -> None:
    assert link.libvirt.metadata(domain, "urn:ours") is None
    link.libvirt.set_metadata(domain, "x", "urn:ours", "<vm>one</vm>")
    link.libvirt.set_metadata(domain, "x", "urn:ours", "<vm>two</vm>")
    assert link.libvirt.metadata(domain, "urn:ours") == "<vm>two</vm>"
    assert link.libvirt.metadata(domain, "urn:theirs") is None


def test_statistics_come_in_disjoint_parts(link: Link, domain: str) -> None:
    parts = [link.libvirt.stats(hypervisor.ALL_GROUPS, part, 3) for part in range(3)]
    assert sorted(vm_id for part in parts for vm_id in part) == sorted(link.libvirt.domains())
    assert link.libvirt.stats(hypervisor.CHEAP_GROUPS)[domain]["state.state"] == libvirt.VIR_DOMAIN_RUNNING


def test_calls_of_many_threads_at_once_all_get_their_answer(link: Link, domain: str) -> None:
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(link.libvirt.name(domain))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [domain] * 20


def test_without_libvirt_every_call_says_why(tmp_path: Any) -> None:
    absent = Link(f"qemu+unix:///system?socket={tmp_path}/absent")
    try:
        until(lambda: _trouble(absent) != "not connected yet")
        assert "absent" in _trouble(absent)
        assert not absent.libvirt.connected
    finally:
        absent.libvirt.stop()


def _trouble(link: Link) -> str:
    with pytest.raises(errors.HypervisorUnavailable) as refused:
        link.libvirt.domains()
    return str(refused.value.facts["reason"])


def test_nothing_runs_after_the_stop() -> None:
    first, second = Link(), Link()
    first.libvirt.stop()
    assert "libvirt events" in [thread.name for thread in threading.enumerate()]
    second.libvirt.stop()
    assert [thread.name for thread in threading.enumerate() if "libvirt" in thread.name] == []
    with pytest.raises(errors.HypervisorUnavailable):
        second.libvirt.domains()
