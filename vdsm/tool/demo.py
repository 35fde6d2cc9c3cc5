"""The main story, lived on this machine: `make demo`.

Starts a private standalone stack, then does what an admin would do, by calling `vdsm-client` and nothing else: a
repository, an imported Debian guest, a VM that boots, a snapshot, a copy, a sysprepped template and a second VM from
it. Prints each call as it makes it, follows the guests' consoles, and ends with a table of what was done and how long
it took. Leaves nothing running.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vdsm import ids, sizes, standalone
from vdsm.client import failures, transport
from vdsm.tool import guestimage

# The guest says at its login who it is, and what is left of its past; these must differ between two guests.
IDENTITY = re.compile(r"identity (\S+) (\S+)")
OWN = ("machine-id", "host-key", "old-logs")
LAST_WORD = "identity old-logs"
BOOT_DEADLINE_S = 240
JOIN_DEADLINE_S = 30
SHUTDOWN_DEADLINE_S = 120
MEMORY_MIB = 512


class DemoFailed(Exception):
    """A step did not end as it should; the text says which and how."""


class Story:
    """The calls of the demo against one running stack, each timed under the name of its step."""

    def __init__(self, stack: standalone.Stack, image: guestimage.GuestImage, repo_id: str = "main") -> None:
        self.stack = stack
        self.image = image
        self.repo_id = repo_id
        self.steps: list[tuple[str, float]] = []

    def step(self, title: str, action: Callable[[], Any]) -> Any:
        print(f"\n\033[1m== {title}\033[0m" if sys.stdout.isatty() else f"\n== {title}", flush=True)
        started = time.monotonic()
        result = action()
        self.steps.append((title, time.monotonic() - started))
        return result

    # -- talking to the agent ------------------------------------------------------------------------------------

    def call(self, *words: str, wait: bool = False, show: str = "json") -> Any:
        """One `vdsm-client` call, shown as an admin would type it. Returns the parsed answer."""
        options = (["--wait"] if wait else []) + (["-o", show] if show != "json" else [])
        print("$ " + shlex.join(["vdsm-client", *options, *words]), flush=True)
        command = [sys.executable, "-m", "vdsm.client", "-a", str(self.stack.socket_path), *options, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.stdout.strip():
            print(done.stdout.rstrip(), flush=True)
        if done.returncode != 0:
            raise DemoFailed(f"{shlex.join(words)} ended with exit code {done.returncode}")
        return json.loads(done.stdout) if show == "json" and done.stdout.strip() else None

    def status(self, vm_id: str) -> str:
        with transport.connect(str(self.stack.socket_path), timeout_s=10) as client:
            return str(client.call("VM.getStats", {"vmID": vm_id})[0]["status"])

    def until(self, vm_id: str, wanted: str, deadline_s: float) -> None:
        """Follows the VM's events until it is in the state `wanted`."""
        deadline = time.monotonic() + deadline_s
        with transport.connect(str(self.stack.socket_path), timeout_s=10) as client:
            client.subscribe(["vm"])
            while self.status(vm_id) != wanted:
                event = client.next_event(deadline - time.monotonic())
                if event is None:
                    raise DemoFailed(f"VM {vm_id} did not become {wanted} within {deadline_s} s")
                if event["subject"] == vm_id:
                    print(f"event: VM {vm_id} is {event['data']['status']} ({event['data']['reason']})", flush=True)

    def joined(self) -> None:
        """Connecting answers at once; the lockspace joins behind it. Verbs that write come after that."""
        with transport.connect(str(self.stack.socket_path), timeout_s=10) as client:
            client.subscribe(["repository"])
            while self.repository_state(client) != "joined":
                event = client.next_event(JOIN_DEADLINE_S)
                if event is None:
                    raise DemoFailed(f"repository {self.repo_id} did not join its lockspace within {JOIN_DEADLINE_S} s")
                told = event["data"]
                if event["subject"] == self.repo_id and told["change"] == "state":
                    print(f"event: repository {self.repo_id} is {told['state']}", flush=True)

    def repository_state(self, client: transport.Client) -> str:
        known = client.call("Storage.listStorageRepositories")
        return next(str(found["state"]) for found in known if found["repoId"] == self.repo_id)

    def console(self, vm_id: str, until: str, deadline_s: float) -> list[str]:
        """Prints the guest's console as it grows until a line contains `until`; returns all lines."""
        lines = []
        for line in follow(self.stack.place.console / f"{vm_id}.log", deadline_s):
            print(f"  | {line}", flush=True)
            lines.append(line)
            if until in line:
                return lines
        raise DemoFailed(f"the console of VM {vm_id} did not show {until!r} within {deadline_s} s")

    # -- the story -----------------------------------------------------------------------------------------------

    def live(self) -> None:
        self.step("Format and connect a repository", self.repository)
        disk = self.step("Import a Debian guest image", self.import_guest)
        vm_id = ids.new()
        first = self.step("Create a VM from it and watch it boot", lambda: self.boot(vm_id, "first", disk))
        self.step("Pause and continue it", lambda: self.pause_and_continue(vm_id))
        self.step("Stop it from within", lambda: self.stop(vm_id))
        self.step(
            "Snapshot its disk",
            lambda: self.call(
                "Storage",
                "createSnapshot",
                f"targetRepoId={self.repo_id}",
                f"baseVirtualDiskId={disk}",
                "userData.name=before-template",
            ),
        )
        self.step(
            "Copy its disk",
            lambda: self.call("Storage", "copyImage", f"targetRepoId={self.repo_id}", f"imageId={disk}", wait=True),
        )
        template = self.step("Make a sysprepped template", lambda: self.template(vm_id, disk))
        second_id = ids.new()
        second_disk = self.step("Create a disk from the template", lambda: self.from_template(template))
        second = self.step("Boot a second VM from it", lambda: self.boot(second_id, "second", second_disk))
        self.step("Compare the two guests", lambda: compare(first, second))
        self.step("Stop the second VM", lambda: self.stop(second_id))
        self.step("What the agent did", self.listings)
        self.step("Clean up", lambda: self.clean_up([vm_id, second_id]))

    def repository(self) -> None:
        where = f"connectionParameters.path={self.stack.storage_dir}/{self.repo_id}"
        self.call("Storage", "formatStorageRepository", "repoFormat=localfs-1.0", where, "options.ioTimeout=2")
        self.call("Storage", "connectStorageRepository", f"repoId={self.repo_id}", "repoFormat=localfs-1.0", where)
        self.joined()
        self.call("Storage", "listStorageRepositories", show="table:repoId,repoFormat,state,freeBytes")

    def import_guest(self) -> str:
        source = Path(self.stack.import_dir) / "debian.raw"
        subprocess.run(["cp", "--sparse=always", self.image.disk_path, str(source)], check=True)
        source.chmod(0o644)
        image_id = ids.new()
        given = [f"path={source}", "format=raw", f"options.imageId={image_id}"]
        self.call("Storage", "importImage", f"targetRepoId={self.repo_id}", *given, wait=True)
        source.unlink()
        return image_id

    def boot(self, vm_id: str, name: str, disk: str) -> dict[str, str]:
        self.call("VM", "create", f"vmParams={json.dumps(self.spec(vm_id, name, disk))}")
        lines = self.console(vm_id, LAST_WORD, BOOT_DEADLINE_S)
        self.until(vm_id, "Up", BOOT_DEADLINE_S)
        self.call("Host", "getVMList")
        return dict(IDENTITY.findall("\n".join(lines)))

    def spec(self, vm_id: str, name: str, disk: str) -> dict[str, Any]:
        return {
            "vmId": vm_id,
            "name": name,
            "memory": MEMORY_MIB,
            "vcpus": 1,
            "directKernel": {**self.boot_files(), "cmdline": "root=LABEL=root console=ttyS0 quiet"},
            "disks": [{"imageId": disk, "repoId": self.repo_id}],
            "nics": [{"type": "user"}],
            "consoleLog": True,
            "agentChannel": True,
        }

    def boot_files(self) -> dict[str, str]:
        """The guest's kernel and initial ramdisk, where the agent lets VMs boot from."""
        files = {"kernel": self.image.kernel_path, "initrd": self.image.initrd_path}
        for name, path in files.items():
            shutil.copyfile(path, self.stack.place.boot / name)
        return {name: str(self.stack.place.boot / name) for name in files}

    def pause_and_continue(self, vm_id: str) -> None:
        self.call("VM", "pause", f"vmID={vm_id}")
        self.call("VM", "cont", f"vmID={vm_id}")

    def stop(self, vm_id: str) -> None:
        self.call("VM", "shutdown", f"vmID={vm_id}")
        self.until(vm_id, "Down", SHUTDOWN_DEADLINE_S)
        self.call("VM", "destroy", f"vmID={vm_id}")

    def template(self, vm_id: str, disk: str) -> str:
        image_id = ids.new()
        options = json.dumps({"imageIds": {disk: image_id}})
        self.call("VM", "makeTemplate", f"vmID={vm_id}", "userData.name=debian", f"options={options}", wait=True)
        return image_id

    def from_template(self, template: str) -> str:
        answer = self.call(
            "Storage", "createVirtualDisk", f"targetRepoId={self.repo_id}", "size=0", f"baseSnapshotId={template}"
        )
        return str(answer["imageId"])

    def listings(self) -> None:
        self.call("Host", "getJobs", show="table:kind,status,stage,stages,description")
        self.call(
            "Storage",
            "listImages",
            f"repositoryId={self.repo_id}",
            show="table:imageId,kind,status,storedSize,userData",
        )

    def clean_up(self, vm_ids: list[str]) -> None:
        self.call("Host", "getVMList")
        self.call("Storage", "disconnectStorageRepository", f"repoId={self.repo_id}")

    def table(self) -> str:
        width = max(len(title) for title, _ in self.steps)
        rows = [f"{title:<{width}}  {seconds:7.1f} s" for title, seconds in self.steps]
        total = sum(seconds for _, seconds in self.steps)
        return "\n".join([*rows, "-" * (width + 11), f"{'in all':<{width}}  {total:7.1f} s"])


def follow(path: Path, deadline_s: float) -> Iterator[str]:
    """Lines of a growing file, without their control characters, until the deadline."""
    deadline = time.monotonic() + deadline_s
    rest = b""
    while not path.exists():
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
    with path.open("rb") as source:
        while time.monotonic() < deadline:
            chunk = source.read()
            if not chunk:
                time.sleep(0.05)
                continue
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (clean for line in lines if (clean := readable(line)))


def readable(line: bytes) -> str:
    text = line.decode(errors="replace")
    return "".join(char for char in text if char.isprintable()).strip()


def compare(first: dict[str, str], second: dict[str, str]) -> None:
    """Shows both guests' identities side by side; what must be a guest's own must differ."""
    print(f"{'':<12}{'first VM':<54}second VM")
    for name in OWN:
        print(f"{name:<12}{first[name]:<54}{second[name]}")
        if first[name] == second[name]:
            raise DemoFailed(f"the second VM has the first one's {name}")


def last_lines(path: Path, count: int = 30) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])


def main() -> int:
    started = time.monotonic()
    print("Building the guest image (cached after the first time) ...", flush=True)
    image = guestimage.build(guestimage.default_cache())
    print(f"Guest image {image.disk_path}: {sizes.human(Path(image.disk_path).stat().st_size)}")
    print("Starting a private stack: libvirtd, sanlock, supervdsmd, vdsmd ...", flush=True)
    with standalone.Stack() as stack:
        story = Story(stack, image)
        story.steps.append(("Image and stack", time.monotonic() - started))
        try:
            story.live()
        except (DemoFailed, failures.ClientError) as error:
            print(f"\nThe demo failed: {error}\n{last_lines(stack.place.log('vdsmd'))}", file=sys.stderr)
            return 1
        stopping = time.monotonic()
    story.steps.append(("Stop everything", time.monotonic() - stopping))
    print(f"\n{story.table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
