"""The verbs of virtual machines on the wire."""

from typing import Any, Literal

import orjson
import pydantic

from vdsm import errors
from vdsm.api import verb
from vdsm.virt import machines

_LEASE_REPO = "repository of the VM's record; looked for if not given"
_STATE = (errors.NoSuchVm, errors.VmWrongState, errors.HypervisorUnavailable, errors.HypervisorFailed)
_JOBS = (errors.NoSuchVm, errors.VmRuns, errors.ImageBusy, errors.RecordNotOwned)


class DirectKernel(verb.Params):
    """Boot a kernel from this host's files instead of the disk's boot loader."""

    kernel: str = pydantic.Field(description="file on this host, under a configured directory")
    initrd: str | None = pydantic.Field(None, description="likewise")
    cmdline: str = pydantic.Field("", description="the kernel's command line")


class Disk(verb.Params):
    """A disk of a VM: a virtual disk, or with readOnly a snapshot."""

    image_id: str = pydantic.Field(description="the image")
    repo_id: str | None = pydantic.Field(None, description="where to look; all connected repositories when left out")
    bus: Literal["virtio", "sata", "scsi"] = pydantic.Field("virtio", description="what the guest sees it on")
    read_only: bool = pydantic.Field(False, description="the guest cannot write to it; not on sata")
    serial: str | None = pydantic.Field(None, description="the image's id when left out")
    boot_order: int | None = pydantic.Field(None, description="rank among the VM's disks, from 1")


class Nic(verb.Params):
    """A network card."""

    type: Literal["user"] = pydantic.Field("user", description="user: the guest reaches out, nobody reaches in")
    model: Literal["virtio", "e1000"] = pydantic.Field("virtio", description="what the guest sees")
    mac: str | None = pydantic.Field(None, description="unicast MAC address; chosen by libvirt when left out")


class Vnc(verb.Params):
    """A console over VNC, at a port that libvirt chooses: see vncPort of VM.getInfo."""

    listen: Literal["127.0.0.1"] = pydantic.Field("127.0.0.1", description="this host only")
    password: str | None = pydantic.Field(None, repr=False, description="1 to 8 characters; told to nobody")


class VmSpec(verb.Params):
    """What a VM shall be."""

    vm_id: str = pydantic.Field(description="UUID, chosen by the caller")
    name: str = pydantic.Field("", description="the vmId when left out")
    memory_mib: int = pydantic.Field(1024, alias="memory", description="MiB")
    vcpus: int = pydantic.Field(1, description="virtual processors, 1 to 255")
    machine: Literal["q35", "pc"] = pydantic.Field("q35", description="QEMU's machine type")
    firmware: Literal["bios", "uefi"] = pydantic.Field("bios", description="what boots the guest")
    boot_order: tuple[Literal["disk", "network"], ...] = pydantic.Field(
        ("disk",), description="kinds of devices to boot from, tried one after the other"
    )
    direct_kernel: DirectKernel | None = pydantic.Field(None, description="boot this kernel instead of a boot loader")
    disks: tuple[Disk, ...] = pydantic.Field((), description="its disks, in the guest's order")
    nics: tuple[Nic, ...] = pydantic.Field((), description="its network cards")
    console_log: bool = pydantic.Field(True, description="keep what the guest writes to its serial console")
    vnc: Vnc | None = pydantic.Field(None, description="a console over VNC; none when left out")
    agent_channel: bool = pydantic.Field(True, description="channel of the QEMU guest agent")
    custom_properties: dict[str, str] = pydantic.Field({}, description="handed to hook scripts")
    lease_repo_id: str | None = pydantic.Field(
        None, description="repository of the VM's lease and record; that of the first disk when left out"
    )
    on_lease_lost: Literal["kill"] = pydantic.Field("kill", description="what happens when its leases are lost")


class CreateParams(verb.Params):
    vm_params: VmSpec


class VmParams(verb.Params):
    vm_id: str = pydantic.Field(alias="vmID", description="the VM")


class ShutdownParams(VmParams):
    delay: int = pydantic.Field(0, ge=0, description="seconds before the guest is asked")
    message: str = pydantic.Field("", description="reason, for the log and the event")
    reboot: bool = pydantic.Field(False, description="reboot instead of power off")
    timeout: float = pydantic.Field(30, gt=0, description="seconds for each way of asking")
    force: bool = pydantic.Field(False, description="destroy it when it does not obey in time")


class JobOptions(verb.Params):
    """Options of the jobs of VMs."""

    job_id: str | None = pydantic.Field(None, description="id of the job; made up when left out")
    generation: int | None = pydantic.Field(None, description="generation that the VM's record must have")


class SysprepParams(VmParams):
    lease_repo_id: str | None = pydantic.Field(None, description=_LEASE_REPO)
    options: JobOptions = JobOptions()


class TemplateOptions(JobOptions):
    """Options of makeTemplate."""

    image_ids: dict[str, str] = pydantic.Field({}, description="{disk: id of its template}; made up if not given")
    strategy: Literal["space", "performance"] = pydantic.Field("space", description="what to prefer")


class TemplateParams(VmParams):
    target_repo_id: str | None = pydantic.Field(None, description="where it is made; the VM's repository if not given")
    lease_repo_id: str | None = pydantic.Field(None, description=_LEASE_REPO)
    user_data: dict[str, Any] = pydantic.Field({}, description="stored with each image of the template")
    options: TemplateOptions = TemplateOptions()


class VmInfo(verb.Result):
    vm_id: str
    name: str
    status: str
    reason: str = pydantic.Field(description="why it is in this state")
    status_since: float
    created: float
    foreign: bool = pydantic.Field(description="not made by this agent: shown, never touched")
    pid: int | None
    vnc_port: int | None
    agent_connected: bool
    pause_code: str | None
    console_log: str | None = pydantic.Field(None, description="file with what the guest wrote to its console")
    spec: dict[str, Any] = pydantic.Field(description="what it was asked to be, without secrets")
    from_record: bool = pydantic.Field(description="it ended unseen, and its record knows no more of its spec")
    exit_code: int | None = None
    exit_reason: int | None = None
    exit_message: str | None = None
    error: dict[str, Any] | None = pydantic.Field(description="why its start failed")


class StartedJob(verb.Result):
    job_id: str


class TemplateImage(verb.Result):
    source_id: str = pydantic.Field(description="the VM's disk")
    image_id: str = pydantic.Field(description="the snapshot made from it")


class StartedTemplate(StartedJob):
    images: list[TemplateImage]


def _hooked(params: VmParams) -> str:
    return params.vm_id.lower()


class Vm:
    """Verbs of namespace VM."""

    def __init__(self, machines: machines.Machines) -> None:
        self._machines = machines

    @verb.verb(role="operator", errors=(errors.VmExists, errors.Overloaded, errors.HypervisorUnavailable))
    def create(self, params: CreateParams) -> VmInfo:
        """Reserves the id and answers WaitForLaunch; the start goes on behind the answer.

        Events of topic "vm" tell how it goes. A start that fails leaves the VM Down with its reason, and nothing else.
        """
        return _info(self._machines.create(params.vm_params.model_dump()))

    @verb.verb(role="operator", hooked=_hooked, errors=(errors.NoSuchVm, errors.HypervisorUnavailable))
    def destroy(self, params: VmParams) -> None:
        """Ends the VM at once, and forgets it. Its leases are free when this answers."""
        self._machines.destroy(params.vm_id)

    @verb.verb(role="operator", hooked=_hooked, errors=(*_STATE, errors.HookFailed))
    def pause(self, params: VmParams) -> VmInfo:
        """Stops the guest's CPUs. It keeps its memory and its leases."""
        return _info(self._machines.pause(params.vm_id))

    @verb.verb(role="operator", hooked=_hooked, errors=(*_STATE, errors.VmLeaseMismatch, errors.HookFailed))
    def cont(self, params: VmParams) -> VmInfo:
        """Lets a paused guest go on, if it still holds all its leases."""
        return _info(self._machines.cont(params.vm_id))

    @verb.verb(role="operator", errors=(*_STATE, errors.GuestAgentSilent))
    def shutdown(self, params: ShutdownParams) -> None:
        """Asks the guest to end: its agent first, then ACPI, each for `timeout`. Answers at once."""
        self._machines.shutdown(
            params.vm_id,
            delay_s=params.delay,
            message=params.message,
            reboot=params.reboot,
            timeout_s=params.timeout,
            force=params.force,
        )

    @verb.verb(role="operator", errors=_STATE)
    def reset(self, params: VmParams) -> None:
        """Presses the reset button."""
        self._machines.reset(params.vm_id)

    @verb.verb(role="monitor", blocking=False, errors=(errors.NoSuchVm,), result=list[dict[str, Any]])
    def getStats(self, params: VmParams) -> list[orjson.Fragment]:
        """The VM's statistics, as last sampled: a list of one, as upstream's clients expect."""
        return [orjson.Fragment(self._machines.get_stats(params.vm_id))]

    @verb.verb(role="monitor", blocking=False, errors=(errors.NoSuchVm,))
    def getInfo(self, params: VmParams) -> VmInfo:
        """All that is known of the VM."""
        return _info(self._machines.get_info(params.vm_id))

    @verb.verb(role="operator", aliases=("seal",), errors=_JOBS)
    def sysprep(self, params: SysprepParams) -> StartedJob:
        """Removes what makes a guest unique (host keys, machine id, logs, ...) from all its disks, as one job.

        The VM must not run anywhere. It is changed as a whole when the job is done, and not at all otherwise.
        """
        return StartedJob(
            **self._machines.sysprep(
                params.vm_id, lease_repo_id=params.lease_repo_id, options=params.options.model_dump()
            )
        )

    @verb.verb(role="operator", errors=(*_JOBS, errors.ImageExists))
    def makeTemplate(self, params: TemplateParams) -> StartedTemplate:
        """Snapshots, sysprepped, of copies of all disks of a VM that does not run: one job, one abort.

        The VM and its disks are not changed. Boot new VMs from disks made with `baseSnapshotId`.
        """
        return StartedTemplate(
            **self._machines.make_template(
                params.vm_id,
                target_repo_id=params.target_repo_id,
                lease_repo_id=params.lease_repo_id,
                user_data=params.user_data,
                options=params.options.model_dump(),
            )
        )


class ForeignVm(verb.Result):
    """A domain that this agent did not make."""

    vm_id: str
    name: str
    status: str
    foreign: Literal[True]


def shown(found: dict[str, Any]) -> VmInfo | ForeignVm:
    """Any VM of this host, ours or not."""
    return ForeignVm(**found) if found["foreign"] else _info(found)


def _info(found: dict[str, Any]) -> VmInfo:
    return VmInfo(**{**found, "spec": _wire_spec(found["spec"])})


def _wire_spec(spec: dict[str, Any]) -> dict[str, Any]:
    known = VmSpec.model_validate(spec, by_name=True, by_alias=False)
    return known.model_dump(mode="json", by_alias=True, exclude_unset=True)
