"""What events look like on the wire: their params, which rooms below publish in snake_case, in the wire's words."""

from collections.abc import Mapping
from typing import Any

from pydantic import alias_generators

from vdsm.api import job, notify


def camel(params: dict[str, Any]) -> dict[str, Any]:
    """The params with their own names in camelCase; what is inside values is left as it is."""
    return {alias_generators.to_camel(name): value for name, value in params.items()}


SHAPES: Mapping[str, notify.Shape] = {
    "job": lambda params: job.JobInfo(**params),
    "vm": camel,
    "image": camel,
    "repository": camel,
}
