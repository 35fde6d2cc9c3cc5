"""The verbs of the host itself on the wire: is it alive, what is it, what runs on it."""

from typing import Any

import orjson
import pydantic

from vdsm import errors
from vdsm.api import verb, vm
from vdsm.hooks import points, runner
from vdsm.host import capabilities
from vdsm.virt import machines


class EchoParams(verb.Params):
    message: str = pydantic.Field(description="any text")


class VmListParams(verb.Params):
    full_status: bool = pydantic.Field(False, description="accepted for upstream's clients; has no effect")
    vm_list: list[str] = pydantic.Field([], description="only these; all when empty")
    only_uuid: bool = pydantic.Field(True, alias="onlyUUID", description="ids only, otherwise what getInfo tells")


class Difference(verb.Result):
    """Where the table of VMs did not agree with libvirt, sanlock or the VMs' records."""

    vm_id: str
    at: float = pydantic.Field(description="seconds since 1970")
    had: str | None = pydantic.Field(description="state in the table; null: the VM was not in it")
    found: str | None = pydantic.Field(description="state found; null: a domain that was not ours is gone")
    reason: str = pydantic.Field(description="why it was so, as far as is known")
    done: str = pydantic.Field(description="what was done about it")


class Reconciled(verb.Result):
    """What a comparison with libvirt found."""

    when: float = pydantic.Field(description="seconds since 1970")
    checked: int = pydantic.Field(description="domains and VMs compared")
    unreachable: str | None = pydantic.Field(description="why libvirt could not be asked; null: it was")
    differences: list[Difference] = pydantic.Field(description="found by this comparison")
    history: list[Difference] = pydantic.Field(description="all differences that are kept, the oldest first")
    foreign: list[vm.ForeignVm] = pydantic.Field(description="domains that this agent did not make; left alone")


class Host:
    """Verbs of namespace Host. `Host.getJobs` lives with the jobs, `Host.subscribe` with the events."""

    def __init__(self, machines: machines.Machines, sources: capabilities.Sources, scripts: runner.Runner) -> None:
        self._machines = machines
        self._sources = sources
        self._scripts = scripts

    @verb.verb(role="monitor", blocking=False)
    def ping2(self) -> None:
        """Answers, and does nothing else."""

    @verb.verb(role="monitor", blocking=False)
    def echo(self, params: EchoParams) -> str:
        """Answers the message."""
        return params.message

    @verb.verb(role="monitor", blocking=False)
    def getVMList(self, params: VmListParams) -> list[str | vm.VmInfo | vm.ForeignVm]:
        """VMs of this host: their ids, or with onlyUUID=false what VM.getInfo tells of each.

        Domains that this agent did not make have no place among the ids; the long list marks them as foreign.
        """
        wanted = {vm_id.lower() for vm_id in params.vm_list}
        found = [info for info in self._machines.list() if not wanted or info["vm_id"] in wanted]
        if params.only_uuid:
            return [info["vm_id"] for info in found if not info["foreign"]]
        return [vm.shown(info) for info in found]

    @verb.verb(role="admin")
    def reconcile(self) -> Reconciled:
        """Compares the table of VMs with libvirt now, corrects the table, and tells every difference.

        The same is done when the agent starts, when libvirt is back and every minute. Domains of others are left alone.
        """
        found = self._machines.reconcile()
        told = {name: [Difference(**one) for one in found[name]] for name in ("differences", "history")}
        return Reconciled(**{**found, **told, "foreign": [vm.ForeignVm(**one) for one in found["foreign"]]})

    @verb.verb(role="monitor", blocking=False, result=list[dict[str, Any]])
    def getAllVmStats(self) -> orjson.Fragment:
        """Statistics of all VMs, as last sampled."""
        return orjson.Fragment(self._machines.all_stats_bytes())

    @verb.verb(role="monitor", errors=(errors.HelperUnavailable, errors.HelperFailed))
    def getHardwareInfo(self) -> dict[str, Any]:
        """What the firmware says of the machine; a field is null where it says nothing, and `reasons` says why."""
        return dict(self._sources.hardware())

    @verb.verb(role="monitor", hooked=lambda _: "capabilities")
    def getCapabilities(self) -> dict[str, Any]:
        """What this host is and can do."""
        found = capabilities.read(self._sources)
        outcome = self._scripts.run(points.AFTER_GET_CAPS, lambda: orjson.dumps(found).decode())
        return found if outcome.data is None else dict(orjson.loads(outcome.data))
