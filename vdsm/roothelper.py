"""Calls to the root helper, with its failures as the agent's errors."""

from supervdsm import client, contract
from vdsm import errors


def call(helper: client.Helper, request: contract.Call[contract.R]) -> contract.R:
    """What root answers. Blocks for the call's deadline and some seconds more. Raises `HelperUnavailable` (nobody
    there, no room, no answer in time) and `HelperFailed` (refused, or tried and went wrong)."""
    try:
        return helper.call(request)
    except (contract.Refused, contract.Failed) as error:
        raise errors.HelperFailed(call=type(request).__name__, reason=error.reason) from error
    except contract.HelperError as error:
        raise errors.HelperUnavailable(reason=error.reason) from error
