"""The points at which hook scripts run: a closed table, and what scripts may do at each.

A point's name is the name of the directory with its scripts. Upstream VDSM has 58; here are those of the verbs that
exist. A new one is a row here, a call where it happens, and a line in docs/hooks.md.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Point:
    """`data` is what a script finds in a file: the domain's XML (named by `_hook_domxml`), a JSON document (named by
    `_hook_json`), or no file at all. `may_change`: what scripts leave in the file is what the agent goes on with.
    `may_veto`: a script that fails makes the operation fail. `launch_flags`: those of libvirt's flags for the start
    that scripts may set, or find as they were set."""

    name: str
    data: Literal["domxml", "json", "none"]
    may_change: bool = False
    may_veto: bool = False
    launch_flags: int = 0


# libvirt's VIR_DOMAIN_START_PAUSED. The others mean nothing here: domains are transient.
START_PAUSED = 1


BEFORE_VM_START = Point("before_vm_start", "domxml", may_change=True, may_veto=True, launch_flags=START_PAUSED)
AFTER_VM_START = Point("after_vm_start", "domxml", launch_flags=START_PAUSED)
BEFORE_VM_CONT = Point("before_vm_cont", "domxml", may_veto=True)
AFTER_VM_CONT = Point("after_vm_cont", "domxml")
BEFORE_VM_PAUSE = Point("before_vm_pause", "domxml", may_veto=True)
AFTER_VM_PAUSE = Point("after_vm_pause", "domxml")
# No veto: whoever must get rid of a VM must be able to.
BEFORE_VM_DESTROY = Point("before_vm_destroy", "domxml")
AFTER_VM_DESTROY = Point("after_vm_destroy", "domxml")
# No veto either: VMs run without the agent, and are worse off without it.
BEFORE_VDSM_START = Point("before_vdsm_start", "none")
AFTER_VDSM_STOP = Point("after_vdsm_stop", "none")
AFTER_GET_CAPS = Point("after_get_caps", "json", may_change=True)

POINTS = {
    point.name: point
    for point in (
        *(BEFORE_VM_START, AFTER_VM_START, BEFORE_VM_CONT, AFTER_VM_CONT, BEFORE_VM_PAUSE, AFTER_VM_PAUSE),
        *(BEFORE_VM_DESTROY, AFTER_VM_DESTROY, BEFORE_VDSM_START, AFTER_VDSM_STOP, AFTER_GET_CAPS),
    )
}
