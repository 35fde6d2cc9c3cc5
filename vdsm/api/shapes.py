"""What events look like on the wire: their params, which rooms below publish in snake_case, in the wire's words.

The models describe (`rpc.discover`, docs/reference/events.md) and are not passed through, but for the jobs': a test
holds the events of the real agent against them.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from pydantic import alias_generators

from vdsm.api import job, notify, verb


class Event(verb.Result):
    """The params of the notification "event"."""

    instance_id: str = pydantic.Field(description="the agent's life that the number counts in")
    sequence: int = pydantic.Field(description="counts all events from 1; a subscriber to some topics sees holes")
    topic: str
    subject: str = pydantic.Field(description="id of the thing that the topic speaks of")
    time: float = pydantic.Field(description="seconds since 1970")
    data: dict[str, Any] = pydantic.Field(description="by topic")


class VmEvent(verb.Result):
    """A VM has moved from one state to another, or something else happened to it."""

    change: Literal["created", "state", "agent", "rebooted", "forgotten", "difference", "refused", "disk"] = (
        pydantic.Field(description="what happened; docs/events-and-state.md tells what each means")
    )
    status: str | None = pydantic.Field(description="its state now; null: a domain that was not ours is gone")
    previous: str | None = pydantic.Field(description="of state and difference: the state before; null: it was unknown")
    reason: str = pydantic.Field(description="why")
    done: str | None = pydantic.Field(None, description="only of a difference: what was done about it")
    wanted: str | None = pydantic.Field(None, description="only of a refused move: the state it did not go to")
    disk: str | None = pydantic.Field(None, description="only of a disk: its name, as in the statistics")
    image_id: str | None = pydantic.Field(None, description="only of a disk: its image")
    error: dict[str, Any] | None = pydantic.Field(None, description="only of a disk: why it cannot grow")
    exit_code: int | None = pydantic.Field(None, description="only with Down: 0 a normal end, 1 an error")
    exit_reason: int | None = pydantic.Field(None, description="only with Down: upstream's number")
    exit_message: str | None = pydantic.Field(None, description="only with Down: how it ended, in words")


class ImageEvent(verb.Result):
    """An image has changed, or a job on it has begun or ended."""

    repo_id: str = pydantic.Field(description="repository of the image")
    change: str = pydantic.Field(
        description="created, snapshot, resized, user_data, mended, undeleted, changed (by a job on its VM), fenced, "
        "removed; of a job that fills or fixes it: begun, and then done, failed or aborted"
    )
    job_id: str | None = pydantic.Field(None, description="only of a job")
    fix: str | None = pydantic.Field(None, description="only of a fix: what it does")


class RepositoryEvent(verb.Result):
    """A repository was connected or disconnected, its lockspace was joined or lost, or the monitor saw a change."""

    name: str = pydantic.Field(description="persistent name, the same on every host")
    change: Literal["state", "reachability", "space", "renewal"] = pydantic.Field(
        description="what has changed; each has its own fields below"
    )
    state: str | None = pydantic.Field(
        None, description="joining, joined, left (it was lost, and is tried again) or disconnected"
    )
    reachability: str | None = pydantic.Field(
        None,
        description="reachable, unreachable, or unknown (the look itself failed); again when the reason is another",
    )
    reason: str | None = pydantic.Field(None, description="of state and reachability: why, where that is not plain")
    space_low: bool | None = pydantic.Field(None, description="less is free than storage.space_low_percent; or enough")
    total_bytes: int | None = pydantic.Field(None, description="only of space")
    free_bytes: int | None = pydantic.Field(None, description="only of space")
    renewal_late: bool | None = pydantic.Field(None, description="two in a row have failed; false: one worked again")
    renewal_age: float | None = pydantic.Field(None, description="of renewal: seconds since the last one that worked")


class HostEvent(verb.Result):
    """Something of the host itself has changed; the subject says what: "certificates" are the files of [tls]."""

    state: str = pydantic.Field(description="of certificates: loaded, or refused: then those before stay in force")
    reason: str | None = pydantic.Field(None, description="only with refused: why")
    expires: float | None = pydantic.Field(None, description="only with loaded: until when, in seconds since 1970")


class DeviceEvent(verb.Result):
    """A disk that can carry a repository has come, has gone, or has another size or other paths than before. The
    subject is its GUID, as Host.getDeviceList tells it."""

    change: Literal["appeared", "changed", "gone"] = pydantic.Field(description="what happened")
    name: str = pydantic.Field(description="what the kernel calls it now")
    capacity: int = pydantic.Field(description="bytes; of one that is gone, as it was")
    devtype: str = pydantic.Field(description="iSCSI, FCP, MIXED or other")
    paths: dict[str, str] = pydantic.Field(description="active or failed, by the kernel's name of each path")


class HookScript(verb.Result):
    """How one hook script ended."""

    script: str = pydantic.Field(description="its file's name")
    exit: int | None = pydantic.Field(description="exit code; negative: ended by that signal; null: killed, or not run")
    seconds: float = pydantic.Field(description="how long it took")
    problem: str | None = pydantic.Field(description="why it counts as failed; null: it did its work")
    stderr: str = pydantic.Field(description="the end of what it wrote to its standard error")


class HookEvent(verb.Result):
    """Hook scripts have run for the VM that is the subject."""

    point: str = pydantic.Field(description="the hook point")
    scripts: list[HookScript] = pydantic.Field(description="in the order in which they ran")


class Gap(verb.Result):
    """Events that this subscriber will not get: read the state of things anew."""

    first: int = pydantic.Field(description="number of the first lost event")
    last: int = pydantic.Field(description="number of the last lost event")


# What the data of each topic's events are, and of the marker for lost ones.
MODELS: Mapping[str, type[verb.Result]] = {
    "job": job.JobEvent,
    "vm": VmEvent,
    "image": ImageEvent,
    "repository": RepositoryEvent,
    "host": HostEvent,
    "hook": HookEvent,
    "device": DeviceEvent,
    "gap": Gap,
}


def camel(params: dict[str, Any]) -> dict[str, Any]:
    """The params with their own names in camelCase; what is inside values is left as it is."""
    return {alias_generators.to_camel(name): value for name, value in params.items()}


SHAPES: Mapping[str, notify.Shape] = {
    "job": lambda params: job.JobEvent(**params),
    "vm": camel,
    "image": camel,
    "repository": camel,
    "host": camel,
    "hook": camel,
    "device": camel,
}
