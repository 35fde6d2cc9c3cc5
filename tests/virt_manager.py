"""An agent's `Machines` in a process of its own, for tests that kill it.

    python -m tests.virt_manager CONFIG STORAGE-DIR STORAGE-NAME VM-SPEC [STOP-AT]

Creates the VM and writes its state to standard output, one word for each move. STOP-AT names a call to libvirt at which
the launch stands still for ever, after a line with that name. Ends when standard input does, without a word to libvirt.
"""

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from tests.slot_storage import SlotStorage
from vdsm import config, events, hypervisor
from vdsm.hooks import runner
from vdsm.virt import machines


class Halting(hypervisor.Hypervisor):
    def __init__(self, uri: str, call: str) -> None:
        super().__init__(uri)
        setattr(self, call, lambda *_, **__: self._halt(call))

    def _halt(self, call: str) -> Any:
        print(call, flush=True)
        threading.Event().wait()


def main() -> None:
    path, directory, name, wanted, *stop_at = sys.argv[1:]
    settings = config.load(path)
    settings = dataclasses.replace(settings, virt=dataclasses.replace(settings.virt, domain_type="qemu"))
    os.environ["SANLOCK_RUN_DIR"] = settings.sanlock.run_dir
    uri = settings.virt.libvirt_uri
    libvirt = Halting(uri, stop_at[0]) if stop_at else hypervisor.Hypervisor(uri)
    log = events.EventLog()
    log.subscribe(lambda event: print(event.params["status"], flush=True))
    manager = machines.Machines(
        settings,
        log,
        libvirt,
        SlotStorage(Path(directory), name, Path(directory).stat().st_gid),
        None,
        runner.Runner(settings.hooks),
    )
    manager.start()
    manager.create(json.loads(wanted))
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
