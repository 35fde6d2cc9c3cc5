"""The verbs of the host itself on the wire: is it alive, what is it, what runs on it."""

from typing import Any

import orjson
import pydantic

from vdsm import errors, virt
from vdsm.api import verb, vm
from vdsm.host import capabilities


class EchoParams(verb.Params):
    message: str = pydantic.Field(description="any text")


class VmListParams(verb.Params):
    full_status: bool = pydantic.Field(False, description="accepted for upstream's clients; has no effect")
    vm_list: list[str] = pydantic.Field([], description="only these; all when empty")
    only_uuid: bool = pydantic.Field(True, alias="onlyUUID", description="ids only, otherwise what getInfo tells")


class Host:
    """Verbs of namespace Host. `Host.getJobs` lives with the jobs, `Host.subscribe` with the events."""

    def __init__(self, machines: virt.Machines, sources: capabilities.Sources) -> None:
        self._machines = machines
        self._sources = sources

    @verb.verb(role="monitor", blocking=False)
    def ping2(self) -> None:
        """Answers, and does nothing else."""

    @verb.verb(role="monitor", blocking=False)
    def echo(self, params: EchoParams) -> str:
        """Answers the message."""
        return params.message

    @verb.verb(role="monitor", blocking=False)
    def getVMList(self, params: VmListParams) -> list[str | vm.VmInfo | vm.ForeignVm]:
        """VMs of this host: their ids, or with onlyUUID=false what VM.getInfo tells of each."""
        wanted = {vm_id.lower() for vm_id in params.vm_list}
        found = [info for info in self._machines.list() if not wanted or info["vm_id"] in wanted]
        return [info["vm_id"] if params.only_uuid else vm.shown(info) for info in found]

    @verb.verb(role="monitor", blocking=False, result=list[dict[str, Any]])
    def getAllVmStats(self) -> orjson.Fragment:
        """Statistics of all VMs, as last sampled."""
        return orjson.Fragment(self._machines.all_stats_bytes())

    @verb.verb(role="monitor", errors=(errors.HelperUnavailable, errors.HelperFailed))
    def getHardwareInfo(self) -> dict[str, Any]:
        """What the firmware says of the machine; a field is null where it says nothing, and `reasons` says why."""
        return dict(self._sources.hardware())

    @verb.verb(role="monitor")
    def getCapabilities(self) -> dict[str, Any]:
        """What this host is and can do."""
        return capabilities.read(self._sources)
