"""Exit codes of vdsm-client. Scripts may rely on them; any failure is not 0."""

from __future__ import annotations

from vdsm.client import failures

OK = 0
FAILED = 1
USAGE = 2
CANNOT_CONNECT = 3
DENIED = 4
NOT_FOUND = 5
CONFLICT = 6
TIMED_OUT = 7
ABORTED = 8
INTERRUPTED = 130

MEANING = {
    OK: "done",
    FAILED: "failed",
    USAGE: "the call itself is wrong: a parameter, a name, an option",
    CANNOT_CONNECT: "cannot connect, or not to whom it should be: nothing was sent",
    DENIED: "denied: the connection, its certificate or its role does not allow it",
    NOT_FOUND: "not found: no such image, VM, job, repository",
    CONFLICT: "in use, in another state, or not available now: later it may work",
    TIMED_OUT: "no answer in time, or the connection broke: the work may go on",
    ABORTED: "the job was aborted",
    INTERRUPTED: "interrupted by Ctrl-C: a job goes on",
}

_LOCAL: dict[type[failures.ClientError], int] = {
    failures.CannotConnect: CANNOT_CONNECT,
    failures.Untrusted: CANNOT_CONNECT,
    failures.NoCertificate: CANNOT_CONNECT,
    failures.Denied: DENIED,
    failures.NoAnswer: TIMED_OUT,
    failures.ConnectionLost: TIMED_OUT,
}


def of(error: failures.ClientError) -> int:
    """The exit code for a failed call or job: by the branch of the error's class, which the agent's errors define.

    An error of an agent newer than this client has an unknown key: JSON-RPC's own codes still tell a wrong call.
    """
    from vdsm import errors  # only a failure needs the tree of errors

    if type(error) in _LOCAL:
        return _LOCAL[type(error)]
    branches = (
        (errors.Aborted, ABORTED),
        (errors.Forbidden, DENIED),
        (errors.DeadlinePassed, TIMED_OUT),
        (errors.RepositoryStuck, TIMED_OUT),
        (errors.BadRequest, USAGE),
        (errors.Missing, NOT_FOUND),
        (errors.Conflict, CONFLICT),
        (errors.Unavailable, CONFLICT),
    )
    kind = errors.VdsmError.by_key.get(error.key)
    if kind is None:
        return USAGE if error.code in (-32700, -32600, -32601, -32602) else FAILED
    return next((code for branch, code in branches if issubclass(kind, branch)), FAILED)
