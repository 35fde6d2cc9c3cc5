"""The verbs of this host's disks and iSCSI targets on the wire. Upstream's names where they mean the same."""

from typing import Any, Literal

import pydantic

from vdsm import errors
from vdsm.api import verb
from vdsm.storage import devices, targets

# By name, and as upstream numbers them.
_ISCSI, _FCP = {"iSCSI"}, {"FCP", "MIXED"}
_KINDS: dict[str | int, set[str]] = {"ISCSI": _ISCSI, "3": _ISCSI, 3: _ISCSI, "FCP": _FCP, "2": _FCP, 2: _FCP}


class DeviceListParams(verb.Params):
    storage_type: Literal["ISCSI", "FCP", "3", "2", 3, 2] | None = pydantic.Field(
        None, description="only disks behind iSCSI (3) or Fibre Channel (2); all when left out"
    )
    guids: list[str] = pydantic.Field([], description="only these; all when empty")
    check_status: bool = pydantic.Field(
        True, description="read each disk to see whether it is free; one that is not read is unknown, or in use plainly"
    )
    refresh: bool = pydantic.Field(True, description="look for new LUNs and new sizes first")


class DevicePath(verb.Result):
    """One path to a disk. A disk without multipath is its own path."""

    physdev: str = pydantic.Field(description="what the kernel calls it now")
    type: str = pydantic.Field(description="iSCSI, FCP or other")
    state: Literal["active", "failed"] = pydantic.Field(description="whether it carries I/O")
    capacity: int = pydantic.Field(description="bytes")
    lun: str = pydantic.Field(description="SCSI logical unit number; empty where there is none")


class DeviceSession(verb.Result):
    """An iSCSI session that the disk has a path over."""

    connection: str = pydantic.Field(description="IP address of the portal")
    port: int = pydantic.Field(description="its TCP port")
    portal: int = pydantic.Field(description="its target portal group tag")
    iqn: str = pydantic.Field(description="name of the target")
    initiatorname: str | None = pydantic.Field(description="this host's name there")
    state: str = pydantic.Field(description="LOGGED_IN, FAILED (it is tried again) or FREE")
    gives_up_s: int | None = pydantic.Field(
        alias="givesUpSeconds", description="how long I/O waits when the connection is lost; null: for ever"
    )


class Device(verb.Result):
    """A disk that can carry a repository, or does."""

    guid: str = pydantic.Field(
        alias="GUID", description="the WWID, the same on every host; the kernel's name where stable is false"
    )
    stable: bool = pydantic.Field(description="whether GUID names the same disk after a boot")
    name: str = pydantic.Field(description="what the kernel calls it now")
    path: str = pydantic.Field(description="under /dev; a name that stays, where there is one")
    links: list[str] = pydantic.Field(description="all names under /dev that udev gave it")
    devtype: Literal["iSCSI", "FCP", "MIXED", "other"] = pydantic.Field(description="how the host reaches it")
    status: Literal["free", "used", "unknown"] = pydantic.Field(
        description="free: it was read and holds nothing; unknown: it was not, reason says why"
    )
    used_by: list[str] = pydantic.Field(description="what it is used for, in words")
    reason: str | None = pydantic.Field(description="why it was not read; null: it was")
    capacity: int = pydantic.Field(description="bytes")
    logicalblocksize: int = pydantic.Field(description="bytes")
    physicalblocksize: int = pydantic.Field(description="bytes")
    discard_max_bytes: int = pydantic.Field(alias="discard_max_bytes", description="0: it takes no discards")
    read_only: bool = pydantic.Field(description="whether the kernel refuses writes")
    vendor: str = pydantic.Field(alias="vendorID", description="who made it; empty where it does not say")
    product: str = pydantic.Field(alias="productID", description="its model")
    revision: str = pydantic.Field(alias="fwrev", description="its firmware")
    serial: str = pydantic.Field(description="its serial number")
    partitioned: bool = pydantic.Field(description="whether the kernel sees partitions on it")
    pv_uuid: str = pydantic.Field(
        alias="pvUUID", description="of LVM's physical volume; empty: it is none, or not read"
    )
    pv_size: int | None = pydantic.Field(alias="pvsize", description="bytes of it as LVM sees it")
    vg_uuid: str = pydantic.Field(alias="vgUUID", description="of LVM's volume group; empty: none")
    vg_name: str = pydantic.Field(description="its name")
    vg_tags: list[str] = pydantic.Field(description="its tags")
    pathstatus: list[DevicePath] = pydantic.Field(description="its paths")
    pathlist: list[DeviceSession] = pydantic.Field(description="the iSCSI sessions below it")
    queueing: str | None = pydantic.Field(
        description="what I/O does without any path, as multipathd words it: off (it fails), on (it waits for ever), "
        "12 chk, 30 sec; null: it is no multipath map, or not known"
    )
    problems: list[str] = pydantic.Field(description="what is not as a shared repository needs it, in words")


class Devices:
    """`Host.getDeviceList`."""

    def __init__(self, found: devices.Devices) -> None:
        self._devices = found

    @verb.verb(role="monitor", errors=(errors.WorkerDied,))
    def getDeviceList(self, params: DeviceListParams) -> list[Device]:
        """Disks of this host that can carry a repository: multipath maps and whole disks, used ones too.

        Paths of a map are told with it. Loop devices, memory disks and what lies on other disks are left out. A disk
        that hangs is told as unknown, and delays no other.
        """
        kinds = None if params.storage_type is None else _KINDS[params.storage_type]
        found = self._devices.all(kinds, params.guids, read=params.check_status, refresh=params.refresh)
        return [_device(one) for one in found]


class DiscoverParams(verb.Params):
    host: str = pydantic.Field(description="address or name of a portal")
    port: int = pydantic.Field(3260, ge=1, le=65535, description="its TCP port")
    user: str | None = pydantic.Field(None, description="for CHAP, with password; left out: none")
    password: str | None = pydantic.Field(None, repr=False, description="is kept nowhere")
    ipv6_enabled: bool = pydantic.Field(True, alias="ipv6_enabled", description="false: leave out IPv6 portals")


class SessionParams(verb.Params):
    id: str = pydantic.Field(
        min_length=1, max_length=100, description="who needs the session; any name of the caller's"
    )
    connection: str = pydantic.Field(description="IP address of the portal, as discoverSendTargets tells it")
    iqn: str = pydantic.Field(description="name of the target")
    port: int = pydantic.Field(3260, ge=1, le=65535, description="TCP port of the portal")
    tpgt: int = pydantic.Field(1, ge=0, le=65535, description="target portal group tag")


class LoginParams(SessionParams):
    user: str | None = pydantic.Field(None, description="for CHAP, with password; left out: none")
    password: str | None = pydantic.Field(
        None, repr=False, description="is kept by open-iscsi, for root alone, as long as the session lasts"
    )


class Session(verb.Result):
    """An iSCSI session of this host."""

    connection: str = pydantic.Field(description="IP address of the portal")
    port: int = pydantic.Field(description="its TCP port")
    tpgt: int = pydantic.Field(description="target portal group tag")
    iqn: str = pydantic.Field(description="name of the target")
    number: int | None = pydantic.Field(description="the kernel's; null: it has just gone")
    state: str = pydantic.Field(description="LOGGED_IN, FAILED (it is tried again) or FREE")
    gives_up_s: int | None = pydantic.Field(
        alias="givesUpSeconds", description="how long I/O waits when the connection is lost; null: for ever"
    )
    users: list[str] = pydantic.Field(description="who has logged in since the agent started")


class LoggedOut(verb.Result):
    """What became of the session."""

    users: list[str] = pydantic.Field(description="who needs the session still; empty: it has ended")


class Targets:
    """Verbs of namespace ISCSIConnection. They wait for a portal."""

    def __init__(self, found: targets.Targets) -> None:
        self._targets = found

    @verb.verb(role="admin", errors=(errors.TargetsUnknown, errors.LoginRefused, errors.HelperUnavailable))
    def discoverSendTargets(self, params: DiscoverParams) -> list[str]:
        """Asks a portal which targets it offers to this host: "address:port,tag name" each. Logs in to none."""
        return self._targets.discover(params.host, params.port, params.user, params.password, ipv6=params.ipv6_enabled)

    @verb.verb(role="admin", errors=(errors.LoginFailed, errors.LoginRefused, errors.HelperUnavailable))
    def login(self, params: LoginParams) -> Session:
        """Logs in to one portal of a target, so that its LUNs become disks here. One that is logged in is shared.

        For several paths log in to several portals. The disks come in the moments after, with an event each. After a
        boot nothing is logged in.
        """
        return _session(self._targets.login(params.id, _portal(params), params.user, params.password))

    @verb.verb(role="admin", errors=(errors.DiskInUse, errors.LogoutFailed, errors.HelperUnavailable))
    def logout(self, params: SessionParams) -> LoggedOut:
        """Ends the session when nobody else who logged in needs it. Refused while it is the last path to a disk in use.

        A session that is not there is fine.
        """
        return LoggedOut(users=self._targets.logout(params.id, _portal(params)))

    @verb.verb(role="monitor", errors=(errors.WorkerDied,))
    def getSessions(self) -> list[Session]:
        """The iSCSI sessions of this host, whoever began them."""
        return [_session(one) for one in self._targets.sessions()]


def _portal(params: SessionParams) -> targets.Portal:
    return targets.Portal(params.iqn, params.connection, params.port, params.tpgt)


def _session(told: dict[str, Any]) -> Session:
    rest = {name: told[name] for name in ("port", "number", "state", "gives_up_s", "users")}
    return Session(connection=told["address"], tpgt=told["tag"], iqn=told["target"], **rest)


def _device(told: dict[str, Any]) -> Device:
    return Device(**{**told, "pathlist": [_below(one) for one in told["pathlist"]]})


def _below(told: dict[str, Any]) -> DeviceSession:
    return DeviceSession(
        connection=told["address"],
        port=told["port"],
        portal=told["tag"],
        iqn=told["target"],
        initiatorname=told["initiator"],
        state=told["state"],
        gives_up_s=told["gives_up_s"],
    )
