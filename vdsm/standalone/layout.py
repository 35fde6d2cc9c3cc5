"""Where everything of one stack is: names under its run directory, nothing else."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Layout:
    """Paths of one run directory. Makes nothing; see `ground`."""

    run_dir: Path

    @property
    def state(self) -> Path:
        """What runs here, for whoever has to end it: see `state`."""
        return self.run_dir / "state.json"

    @property
    def code(self) -> Path:
        """The installed code with its dependencies, readable by every user of the stack."""
        return self.run_dir / "code"

    @property
    def launcher(self) -> Path:
        """The `<emulator>` of the domains."""
        return self.code / "vdsm" / "leased_exec.py"

    @property
    def client(self) -> Path:
        """vdsm-client for this stack's agent."""
        return self.run_dir / "bin" / "vdsm-client"

    @property
    def config(self) -> Path:
        return self.run_dir / "etc" / "vdsm.toml"

    @property
    def sockets(self) -> Path:
        return self.run_dir / "sock"

    @property
    def agent_socket(self) -> Path:
        return self.sockets / "vdsmd.sock"

    @property
    def helper_socket(self) -> Path:
        return self.sockets / "svdsm.sock"

    @property
    def sanlock(self) -> Path:
        """SANLOCK_RUN_DIR."""
        return self.run_dir / "sanlock"

    @property
    def sanlock_socket(self) -> Path:
        return self.sanlock / "sanlock.sock"

    @property
    def libvirt(self) -> Path:
        """etc, lib, cache, log and run of the private libvirt; `namespace` says where they are seen."""
        return self.run_dir / "libvirt"

    @property
    def virtlogd_socket(self) -> Path:
        return self.libvirt / "run" / "virtlogd-sock"

    @property
    def libvirt_socket(self) -> Path:
        return self.libvirt / "run" / "libvirt-sock"

    @property
    def libvirt_uri(self) -> str:
        return f"qemu+unix:///system?socket={self.libvirt_socket}"

    @property
    def logs(self) -> Path:
        return self.run_dir / "log"

    @property
    def audit(self) -> Path:
        """One line for each call to the root helper."""
        return self.logs / "audit.log"

    @property
    def private_run(self) -> Path:
        """What the stack's processes see as /run."""
        return self.run_dir / "run"

    @property
    def console(self) -> Path:
        return self.run_dir / "console"

    @property
    def hooks(self) -> Path:
        """`hooks.dir`: a directory for each hook point."""
        return self.run_dir / "hooks"

    @property
    def scratch(self) -> Path:
        return self.run_dir / "tmp"

    @property
    def imports(self) -> Path:
        """`storage.import_dirs`: images put here can be imported."""
        return self.run_dir / "import"

    @property
    def exports(self) -> Path:
        """`storage.export_dirs`: images are exported to here."""
        return self.run_dir / "export"

    @property
    def storage(self) -> Path:
        """`storage.localfs_dirs`: repositories live below."""
        return self.run_dir / "storage"

    @property
    def mounts(self) -> Path:
        """What the root helper mounts."""
        return self.run_dir / "mounts"

    @property
    def boot(self) -> Path:
        """`virt.boot_dirs`: kernels and initial ramdisks of guests."""
        return self.run_dir / "boot"

    def log(self, daemon: str) -> Path:
        return self.logs / f"{daemon}.log"
