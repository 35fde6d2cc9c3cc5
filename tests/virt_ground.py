"""What tests of virtual machines stand on: a private libvirtd and sanlock, real slots, an agent's `Machines` without
the rest of the agent. A test module that wants it says

    ground, host = virt_ground.ground, virt_ground.host

Guests have no operating system: 64 MiB, a BIOS, and boot sectors that do one thing.
"""

import contextlib
import dataclasses
import grp
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sanlock

from tests import sanlock_fixture
from tests.slot_storage import SlotStorage
from tests.until import until
from vdsm import config, events, hypervisor, ids, leases, standalone
from vdsm.hooks import runner
from vdsm.standalone import daemons
from vdsm.virt import machines, qemu

GREETING = b"vdsm"
# Writes the greeting to the serial port, then waits for the power button and powers off, as an ACPI guest does.
OBEDIENT = (
    b"".join(bytes([0xBA, 0xF8, 0x03, 0xB0, letter, 0xEE]) for letter in GREETING)  # mov dx,3f8h; mov al,..; out
    + bytes.fromhex("ba0206 b80001 ef")  # PM1 enable: the power button
    + bytes.fromhex("ba0006 ed f6c401 74fa")  # PM1 status: until it was pressed
    + bytes.fromhex("ba0406 b80020 ef f4 ebfd")  # PM1 control: sleep type 0, sleep enable
)
POWERS_OFF = bytes.fromhex("ba0406 b80020 ef f4 ebfd")
# Never ends: nothing wakes a CPU that stopped with interrupts off.
DEAF = bytes.fromhex("fa f4 ebfd")


OUR_THREADS = ("vm ", "libvirt", "domain type")


def boot_sector(code: bytes) -> bytes:
    return code.ljust(510, b"\0") + b"\x55\xaa"


def release_by_force(lease: leases.Lease, pid: int | None) -> None:
    """Takes a lease from a process that believes it holds it."""
    sanlock.release(lease.lockspace.encode(), lease.name.encode(), lease.place, pid=pid)


class Ground:
    """The daemons and the repository, for the whole session."""

    def __init__(self, stack: standalone.Stack) -> None:
        self.stack = stack
        found = stack.settings
        # The probe has tests of its own; statistics are sampled and the table compared when a test says so.
        settings = dataclasses.replace(found.virt, domain_type="qemu", sample_s=3600.0, reconcile_s=3600.0)
        self.settings = dataclasses.replace(found, virt=settings)
        self.storage = SlotStorage.create(stack.storage_dir / "slots", grp.getgrnam("kvm").gr_gid)

    def virsh(self, *words: str) -> str:
        command = ["virsh", "-c", self.settings.virt.libvirt_uri, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    def domains(self) -> set[str]:
        return set(self.virsh("list", "--uuid", "--all").split())

    def stop_libvirtd(self) -> None:
        """As a crash does."""
        os.kill(int((self.stack.place.libvirt / "run" / "libvirtd.pid").read_text()), signal.SIGKILL)
        self.stack._running["libvirtd"].wait()

    def start_libvirtd(self) -> None:
        self.stack._start(daemons.libvirtd(self.stack.place))


class Host:
    """One life of an agent on the ground, or several: `restart`."""

    def __init__(self, ground: Ground, settings: config.Config) -> None:
        self.ground = ground
        self.settings = settings
        self.storage = ground.storage
        self.seen: list[events.Event] = []
        self.libvirt: Any = None
        self.machines: Any = None

    def start(self, libvirt: hypervisor.Hypervisor | None = None) -> None:
        """The VMs that run are known at return, if libvirt answers."""
        log = events.EventLog()
        log.subscribe(self.seen.append)
        self.libvirt = libvirt or hypervisor.Hypervisor(self.settings.virt.libvirt_uri)
        scripts = runner.Runner(self.settings.hooks)
        self.machines = machines.Machines(self.settings, log, self.libvirt, self.storage, None, scripts)
        self.machines.start()

    def stop(self) -> None:
        self.machines.stop()

    def restart(self) -> None:
        self.stop()
        self.start()

    def create(self, **wanted: Any) -> str:
        vm_id = wanted.setdefault("vm_id", ids.new())
        self.machines.create({"memory_mib": 64, "agent_channel": False, **wanted})
        return str(vm_id)

    def disks(self, *images: str) -> list[dict[str, Any]]:
        return [{"image_id": image_id} for image_id in images]

    def started(self, **wanted: Any) -> str:
        vm_id = self.create(**wanted)
        self.wait(vm_id, "Up")
        return vm_id

    def refused(self, **wanted: Any) -> dict[str, Any]:
        """The info of a VM whose start must fail."""
        return self.wait(self.create(**wanted), "Down")

    def info(self, vm_id: str) -> dict[str, Any]:
        return dict(self.machines.get_info(vm_id))

    def wait(self, vm_id: str, status: str, timeout_s: float = 40.0) -> dict[str, Any]:
        def there() -> bool:
            now = self.info(vm_id)
            assert now["status"] in (status, "Down") or now["status"] != "Down"
            assert now["status"] == status or now["status"] != "Down", now
            return bool(now["status"] == status)

        until(there, timeout_s)
        return self.info(vm_id)

    def moves(self, vm_id: str) -> list[str]:
        """The states of a VM as they were published."""
        return [
            str(event.params["status"])
            for event in self.seen
            if event.subject == vm_id and event.params["change"] in ("created", "state")
        ]

    def held(self, vm_id: str) -> set[tuple[str, bool]]:
        """(name, shared) of what the VM's QEMU holds."""
        pid = qemu.find(vm_id)
        assert pid is not None
        return {(name, shared) for _, name, shared in leases.held_by(pid)}

    def clean_up(self) -> None:
        self.storage.before.clear()
        for known in self.machines.list():
            if known["foreign"]:
                self.ground.virsh("destroy", known["vm_id"])
            else:
                self.machines.destroy(known["vm_id"])
        self.stop()
        assert self.ground.domains() == set()
        until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith(OUR_THREADS)])


@pytest.fixture
def host(ground: Ground) -> Iterator[Host]:
    """A started agent; the VMs and foreign domains that a test leaves are ended."""
    started = Host(ground, ground.settings)
    started.start()
    yield started
    started.clean_up()


_shared: list[Ground] = []


@pytest.fixture(scope="session")
def ground() -> Iterator[Ground]:
    """One for all modules that use it. Each has this fixture; the first to be made makes the ground, and goes last."""
    if os.geteuid() != 0:
        pytest.skip("the standalone stack needs root")
    with contextlib.ExitStack() as undo:
        if not _shared:
            stack = undo.enter_context(standalone.Stack(agent=False))
            sanlock_fixture.use(Path(stack.settings.sanlock.run_dir))
            _shared.append(Ground(stack))
            undo.callback(_shared[0].storage.leave)
        sanlock_fixture.use(Path(_shared[0].settings.sanlock.run_dir))  # other modules have daemons of their own
        yield _shared[0]
