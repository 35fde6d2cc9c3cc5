"""Virtual machines of this host. `machines.Machines` is the door: the api and main use nothing else of this room.

This file imports nothing: the fork server loads the job bodies and shall not carry libvirt and all the agent's side
with them, for every child pays for what it carries.
"""


def preload() -> list[str]:
    """Modules with the room's job bodies, which the fork server must have loaded."""
    return ["vdsm.virt.sysprep", "vdsm.virt.template"]
