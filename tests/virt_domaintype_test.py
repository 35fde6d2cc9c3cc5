"""Whether guests run under KVM is found out by running one."""

import os
import time
from pathlib import Path

import pytest

from vdsm.virt import domaintype

QEMU = "/usr/bin/qemu-system-x86_64"

pytestmark = pytest.mark.skipif(not Path(QEMU).exists(), reason="needs QEMU: apt install qemu-system-x86")


def test_a_guest_that_runs_is_seen() -> None:
    """Under TCG, which always works: the probe can say yes."""
    assert domaintype.boots(QEMU, "tcg", 20) is True


def test_an_accelerator_that_qemu_refuses_is_none() -> None:
    assert domaintype.boots(QEMU, "nonsense", 20) is False


@pytest.fixture
def silent(tmp_path: Path) -> str:
    """Stands for a QEMU under a KVM that takes all calls and never runs the guest."""
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    return str(program)


def test_a_guest_that_never_runs_ends_the_probe_in_time(silent: str) -> None:
    before = time.monotonic()
    assert domaintype.boots(silent, "kvm", 0.2) is False
    assert time.monotonic() - before < 60


def test_without_a_running_guest_domains_are_emulated(silent: str) -> None:
    assert domaintype.DomainType(silent).get() == "qemu"


def test_the_answer_is_found_once(silent: str) -> None:
    asked = domaintype.DomainType(silent)
    asked.get()
    Path(silent).unlink()
    assert asked.get() == "qemu"


def test_dev_kvm_alone_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that runs, and runs in time, is; on the machines this was written on it exists, and TCG is faster."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/kvm here that could mislead")
    probe, ran = domaintype.boots, []
    # Looked at, not replaced: two probes may differ on a busy machine.
    monkeypatch.setattr(domaintype, "boots", lambda *given: ran.append(probe(*given)) or ran[-1])
    assert domaintype.DomainType(QEMU).get() == ("kvm" if ran[0] else "qemu")


@pytest.mark.parametrize("configured", ["kvm", "qemu"])
def test_the_configuration_decides_without_a_probe(configured: str) -> None:
    assert domaintype.DomainType("/nowhere", configured).get() == configured
