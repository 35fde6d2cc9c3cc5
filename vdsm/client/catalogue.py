"""`vdsm-client explain`: what an error means and what to do about it. Needs no agent."""

from __future__ import annotations

import inspect

from vdsm import errors
from vdsm.client import arguments, exits, failures, nearby, output


def explained(wanted: str) -> str:
    """The error of this code or key. Raises `UsageError` when there is none."""
    for kind in errors.VdsmError.by_key.values():
        if wanted in (kind.key, str(kind.code)):
            return _of_agent(kind)
    for local in failures.LOCAL:
        if wanted == local.key_of_class:
            return _of_client(local)
    near = nearby.of(wanted, [*errors.VdsmError.by_key, *(local.key_of_class for local in failures.LOCAL)])
    meant = f"; did you mean {' or '.join(near)}?" if near else "; `vdsm-client explain` lists all"
    raise arguments.UsageError(f"there is no error {wanted}{meant}")


def listed() -> str:
    """All errors, by code."""
    kinds = sorted(errors.VdsmError.by_key.values(), key=lambda kind: kind.code)
    rows = [{"code": kind.code, "key": kind.key, "message": kind.templates()[0]} for kind in kinds]
    return "\n".join(output.table(rows))


def _of_agent(kind: type[errors.VdsmError]) -> str:
    message, hint = kind.templates()
    code = exits.of(failures.ClientError(kind.code, "", {"key": kind.key}))
    lines = {
        "means": inspect.getdoc(kind.branch()),
        "more": kind.__doc__ and inspect.cleandoc(kind.__doc__),
        "facts": ", ".join(kind.fact_names()),
        "hint": hint,
        "exit code": f"{code}: {exits.MEANING[code]}",
    }
    told = [f"    {name}: {text}" for name, text in lines.items() if text]
    return "\n".join([f"{kind.key} ({kind.code}): {message}", *told])


def _of_client(local: type[failures.Local]) -> str:
    code = exits.of(local(""))
    lines = {
        "means": "The client says so by itself; no agent answered.",
        "hint": local.hint,
        "exit code": f"{code}: {exits.MEANING[code]}",
    }
    return "\n".join(
        [f"{local.key_of_class}: {local.__doc__}", *(f"    {name}: {text}" for name, text in lines.items())]
    )
