"""The one place where an exception becomes an error of the wire: {code, message, data: {key, facts, state, hint}}."""

import orjson
import pydantic

from vdsm import errors, logs

logger = logs.get("api.faults")

# Names and reasons can carry what a caller sent: long enough to find the mistake, short enough for a log.
_LONGEST = 200


def of_parameters(error: pydantic.ValidationError) -> errors.InvalidParameters:
    """The first mistake in a call's parameters, by the parameter's wire name; `vmParams.disks.0.imageId` inside one."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "params"
    reason = {"extra_forbidden": "unknown parameter", "missing": "required"}.get(first["type"], first["msg"])
    return errors.InvalidParameters(parameter=where[:_LONGEST], reason=reason[:_LONGEST])


def of_handler(error: BaseException, request: str) -> errors.VdsmError:
    """What a verb's method raised. What has no name is logged whole under `request`; the wire learns nothing of it."""
    if isinstance(error, errors.VdsmError) and _is_json(error):
        return error
    logger.error("%s failed unexpectedly", request, exc_info=error)
    return errors.Unexpected(reason=f"logged under {request}")


def _is_json(error: errors.VdsmError) -> bool:
    """False for facts that cannot be sent (bytes, paths with stray bytes): a mistake of whoever raised it."""
    try:
        orjson.dumps(error.to_wire())
    except TypeError:
        return False
    return True
