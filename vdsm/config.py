"""The agent's configuration: one TOML file, every option with its reason and unit.

A missing file or option means the default below. An unknown section or option, or a value of the wrong type, is an
error at start: a misspelt option must not silently mean its default. Production reads `/etc/vdsm/vdsm.toml`;
the standalone stack writes its own file into its run directory.
"""

import dataclasses
import ipaddress
import tomllib
import typing
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints


class ConfigError(Exception):
    """The file cannot be used; the text names the file, the option and what is wrong."""


@dataclasses.dataclass(frozen=True)
class Host:
    # sanlock's host id in every lockspace, 1 to 250: with 4096-byte sectors a 1 MiB lease holds 250 hosts. Hosts that
    # share a repository need different ids.
    id: int = 1
    # The stable name that sanlock writes beside the host id; other hosts show it as the holder of a lease.
    name: str = "localhost"


@dataclasses.dataclass(frozen=True)
class Paths:
    # Scratch space of jobs and tools (the appliance of libguestfs is cached here). Needs about 1 GiB.
    tmp_dir: str = "/var/tmp/vdsm"


@dataclasses.dataclass(frozen=True)
class Wire:
    # JSON-RPC for local admins, newline-delimited. Empty: off.
    unix_socket: str = "/run/vdsm/vdsmd.sock"
    # Who may connect to it besides root and the agent's own user: the members of this group.
    unix_group: str = "vdsm"
    # Plain HTTP and WebSocket on loopback, for every process of this host. 0: off. Other hosts come in by [tls].
    tcp_port: int = 0
    # The largest request. Room for a batch of large user data; a body is parsed in one piece.
    max_body_bytes: int = 4 << 20
    # Calls in one batch. A batch runs in order on one connection.
    max_batch: int = 100
    # Calls that one connection may have under way; more wait in its socket.
    max_calls_per_connection: int = 64
    # How many past events a subscriber that comes back can still get.
    event_history: int = 10_000


@dataclasses.dataclass(frozen=True)
class Tls:
    # PEM file with our certificate, and intermediate ones behind it. cert, key and ca: all three or none; without them
    # nothing listens. docs/security.md shows how to make them.
    cert: str = ""
    # PEM file with its key, which not every user of this host may be able to read.
    key: str = ""
    # PEM file with the CAs whose certificates callers must show.
    ca: str = ""
    # The IP address to listen on. Empty: all of this host.
    address: str = ""
    # The port to listen on; clients know this one.
    port: int = 54321
    # A handshake takes some round trips. A peer that has not ended it after so long (seconds) is cut off.
    handshake_s: float = 10.0
    # Handshakes under way at once. One more cuts off the oldest: those that stall are old, honest ones are quick.
    max_handshakes: int = 256
    # How often (seconds) the files are looked at for changes.
    check_s: float = 5.0


@dataclasses.dataclass(frozen=True)
class Jobs:
    # Workers at once. A copy is bound by storage, sysprep by a CPU: more than this gains nothing on small hosts.
    workers: int = 4
    # Jobs waiting for a worker. A full queue refuses with a clear error instead of growing.
    queue: int = 100
    # Ended jobs stay listed this long (seconds), so that an engine that was away can read how they ended.
    autodelete_s: int = 3600


@dataclasses.dataclass(frozen=True)
class Storage:
    # importImage reads files under these directories only.
    import_dirs: tuple[str, ...] = ("/var/lib/vdsm/import",)
    # exportImage makes files under these directories only; the agent's user must be able to write there. None: nowhere.
    export_dirs: tuple[str, ...] = ()
    # localfs repositories live under these directories only; the root helper prepares them.
    localfs_dirs: tuple[str, ...] = ("/var/lib/vdsm/storage",)
    # Processes of this host tell each other here which volumes they use. Local; the agent's user makes it.
    volume_use_dir: str = "/run/vdsm/volumes"
    # MiB. The volume of a disk that is stored thin begins with as much room, and grows by as much or more while its VM
    # writes, once half of it is left. That half must outlast an extension, of LVM's 0.2 to 0.4 s and some waiting for
    # other hosts: 512 MiB last a second at 500 MB/s. A VM that is quicker stands still for the rest of it.
    volume_chunk_mib: int = 1024
    # Child processes for one repository's verbs. When all hang, its verbs are refused; nobody else notices.
    io_children: int = 4
    # How long (seconds) one verb may wait for a repository.
    io_deadline_s: float = 30.0
    # The same (seconds) for one that changes volumes: some six commands of LVM, each of which waits its turn with other
    # hosts by asking again each second, and takes 30 s at most.
    volume_deadline_s: float = 120.0
    # How long (seconds) a writing verb waits for a lockspace that is still joining, before it says so.
    join_wait_s: float = 2.0
    # How long (seconds) a job waits for a lease that is only passing by (a start, a record write).
    lease_wait_s: float = 10.0
    # How often (seconds) the monitor looks at each repository, and asks when this host's leases were renewed. Leases
    # are lost 80 s after their last renewal (with the usual io_timeout): period and deadline together tell of an
    # outage an unhurried minute before that. A look costs the host some milliseconds.
    monitor_s: float = 10.0
    # A repository that has not answered a look after so long (seconds) is unreachable. sanlock's usual io_timeout:
    # storage that takes longer for one read does not renew leases either.
    monitor_deadline_s: float = 10.0
    # Space is low when less than this part of a repository is free. Percent, since what fits disks of one size says
    # little of another's; a tenth leaves time to act between two looks of whoever reads them.
    space_low_percent: float = 10.0
    # Space is enough again from here on. Above the other, so that a job that comes and goes at the edge is told once.
    space_enough_percent: float = 12.0


@dataclasses.dataclass(frozen=True)
class Sanlock:
    # Where sanlock's socket is. QEMU's launcher gets the same value.
    run_dir: str = "/run/sanlock"
    # Connect shared repositories although nothing resets this host when its sanlock dies: two hosts may then write one
    # disk. For tests, and for playing.
    unsafe_no_watchdog: bool = False
    # Registered processes: VMs, workers, children of repositories. Above some 1000 sanlock stops serving everybody.
    max_registrations: int = 900


@dataclasses.dataclass(frozen=True)
class Iscsi:
    # The three together say when I/O over a lost connection fails, or takes another path: within noop_interval_s +
    # noop_timeout_s + replacement_timeout_s. They must stay below 60 (6 x sanlock's usual io_timeout), or a host could
    # still write what it sent when its leases are another's. open-iscsi's own 5 + 5 + 120 do not.
    #
    # How often (seconds) an idle target is asked whether it is there.
    noop_interval_s: int = 5
    # How long (seconds) it may take to answer.
    noop_timeout_s: int = 5
    # How long (seconds) I/O then waits for the connection to come back.
    replacement_timeout_s: int = 5


@dataclasses.dataclass(frozen=True)
class Virt:
    # Where libvirt is asked.
    libvirt_uri: str = "qemu:///system"
    # QEMU itself, which the launcher executes once it has the leases.
    emulator: str = "/usr/bin/qemu-system-x86_64"
    # The <emulator> of our domains: takes the leases for its own pid, then becomes QEMU.
    launcher: str = "/usr/libexec/vdsm/leased-exec"
    # Console logs of VMs, one file each, rotated by virtlogd.
    console_dir: str = "/var/log/vdsm/console"
    # Kernels and initial ramdisks of VMs that boot directly must lie under these directories.
    boot_dirs: tuple[str, ...] = ("/boot", "/var/lib/vdsm/boot")
    # "auto": boot something once and see whether KVM works. "kvm" or "qemu" decide without a probe.
    domain_type: str = "auto"
    # VM starts at once; more wait. Each start is a few seconds of libvirt and QEMU.
    starts: int = 4
    # How often (seconds) statistics are sampled.
    sample_s: float = 15.0
    # How often (seconds) the table of VMs is compared with libvirt.
    reconcile_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class Hooks:
    # Directories with hook scripts, one for each point and named by it. They, the scripts and every directory above
    # belong to root or the agent's user, and nobody else can write there; otherwise the scripts are refused.
    dir: str = "/usr/libexec/vdsm/hooks"
    # How long (seconds) one script may take; then it is killed with all it has started.
    script_deadline_s: float = 30.0
    # How long all scripts of one point may take together. A verb waits for its hooks, and clients for their verbs.
    point_deadline_s: float = 45.0
    # VM starts that may be waiting for their before_vm_start scripts beside the virt.starts that are at work. Each is
    # a thread that waits; when scripts hang in more of them, other starts wait until the first deadline.
    starts: int = 16


@dataclasses.dataclass(frozen=True)
class Helper:
    # supervdsmd's socket.
    socket: str = "/run/vdsm/svdsm.sock"


@dataclasses.dataclass(frozen=True)
class Log:
    # Empty: standard error.
    file: str = ""
    # DEBUG, INFO, WARNING or ERROR.
    level: str = "INFO"


@dataclasses.dataclass(frozen=True)
class Config:
    host: Host = Host()
    paths: Paths = Paths()
    wire: Wire = Wire()
    tls: Tls = Tls()
    jobs: Jobs = Jobs()
    storage: Storage = Storage()
    sanlock: Sanlock = Sanlock()
    iscsi: Iscsi = Iscsi()
    virt: Virt = Virt()
    hooks: Hooks = Hooks()
    helper: Helper = Helper()
    log: Log = Log()


def load(path: str | None) -> Config:
    """The configuration of `path`; all defaults for None. Raises `ConfigError`."""
    if path is None:
        return Config()
    try:
        document = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    sections = get_type_hints(Config)
    for name in document.keys() - sections.keys():
        raise ConfigError(f"{path}: unknown section [{name}]")
    values = {name: _section(path, sections[name], name, given) for name, given in document.items()}
    config = Config(**values)
    if not 1 <= config.host.id <= 250:
        raise ConfigError(f"{path}: host.id must be 1 to 250")
    _check_tls(path, config.tls)
    _check_iscsi(path, config.iscsi)
    _check_storage(path, config.storage)
    return config


def _check_iscsi(path: str, iscsi: Iscsi) -> None:
    times = (iscsi.noop_interval_s, iscsi.noop_timeout_s, iscsi.replacement_timeout_s)
    if min(times) < 1 or sum(times) >= 60:
        raise ConfigError(f"{path}: the times of [iscsi] must be 1 or more, and together below 60")


def _check_storage(path: str, storage: Storage) -> None:
    if storage.volume_chunk_mib < 16:
        raise ConfigError(f"{path}: storage.volume_chunk_mib must be 16 or more")
    if storage.monitor_s <= 0 or storage.monitor_deadline_s <= 0:
        raise ConfigError(f"{path}: storage.monitor_s and storage.monitor_deadline_s must be above 0")
    if not 0 <= storage.space_low_percent <= storage.space_enough_percent <= 100:
        raise ConfigError(f"{path}: storage.space_low_percent and storage.space_enough_percent must rise from 0 to 100")


def _check_tls(path: str, tls: Tls) -> None:
    if len({bool(each) for each in (tls.cert, tls.key, tls.ca)}) > 1:
        raise ConfigError(f"{path}: tls.cert, tls.key and tls.ca belong together")
    if not 1 <= tls.port <= 65535:
        raise ConfigError(f"{path}: tls.port must be 1 to 65535")
    if tls.handshake_s <= 0 or tls.max_handshakes < 1 or tls.check_s <= 0:
        raise ConfigError(f"{path}: tls.handshake_s, tls.max_handshakes and tls.check_s must be above 0")
    try:
        ipaddress.ip_address(tls.address or "::")
    except ValueError as error:
        raise ConfigError(f"{path}: tls.address must be an IP address: {error}") from error


def _section(path: str, kind: type[Any], name: str, given: object) -> Any:
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {name} must be a section")
    hints = get_type_hints(kind)
    for option in given.keys() - hints.keys():
        raise ConfigError(f"{path}: unknown option {name}.{option}")
    return kind(**{option: _value(path, f"{name}.{option}", hints[option], value) for option, value in given.items()})


def _value(path: str, option: str, hint: Any, value: object) -> object:
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if not isinstance(value, list) or not all(isinstance(member, item) for member in value):
            raise ConfigError(f"{path}: {option} must be a list of {item.__name__}")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: {option} must be {typing.cast(type, hint).__name__}")
    return value
