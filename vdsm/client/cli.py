"""vdsm-client: calls of a running agent from the shell. `vdsm-client -h` is its manual."""

from __future__ import annotations

import io
import os
import sys

from vdsm.client import arguments, exits, failures, output, transport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_HELP_TIMEOUT_S = 5.0
_INVALID_PARAMETERS, _UNKNOWN_METHOD = -32602, -32601


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; the exit code, as `exits` lists them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    output_format = None
    try:
        given = arguments.parse(sys.argv[1:] if argv is None else argv)
        output_format = given.format
        return _run(given)
    except arguments.UsageError as error:
        output.note(f"vdsm-client: {error}\nTry `vdsm-client -h`.")
        return exits.USAGE
    except failures.ClientError as error:
        output.failure(error, output_format)
        return exits.of(error)
    except KeyboardInterrupt:
        output.note("Interrupted. What was asked for may go on; `vdsm-client Host getJobs` lists the jobs.")
        return exits.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python would complain about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.FAILED


def _run(given: arguments.Arguments) -> int:
    if given.completion is not None:
        return _completion(given.completion)
    if given.help:
        return _help(given)
    if given.words[:1] == ["events"]:
        return _events(given)
    if given.words[:1] == ["explain"]:
        return _explain(given)
    if len(given.words) < 2:
        raise arguments.UsageError("a call needs a namespace and a verb")
    if given.words[2:]:
        raise arguments.UsageError(f"{given.words[2]!r} is not name=value")
    with _connect(given) as client:
        answer = _call(client, ".".join(given.words), given.params or None)
        job_id = answer.get("jobId") if isinstance(answer, dict) else None
        if given.wait and job_id:
            return _wait(client, job_id, given)
        output.result(answer, given.format, given.columns)
        return exits.OK


def _connect(given: arguments.Arguments, timeout_s: float = arguments.DEFAULT_TIMEOUT_S) -> transport.Client:
    credentials = None
    if given.cert or given.key or given.ca:
        from vdsm.client import tls

        credentials = tls.Credentials(given.cert, given.key, given.ca)
    try:
        return transport.connect(given.address, given.timeout_s or timeout_s, given.flow_id, credentials)
    except ValueError as error:
        raise arguments.UsageError(str(error)) from error


def _call(client: transport.Client, method: str, params: dict[str, Any] | None) -> Any:
    try:
        return client.call(method, params)
    except failures.ClientError as error:
        if error.code in (_INVALID_PARAMETERS, _UNKNOWN_METHOD):
            from vdsm.client import nearby

            error.near = nearby.meant(client, method, error)
        raise


def _wait(client: transport.Client, job_id: str, given: arguments.Arguments) -> int:
    from vdsm.client import waiting

    try:
        info = waiting.follow(client, job_id, given.timeout_s)
    except KeyboardInterrupt:
        output.note(f"Interrupted. Job {job_id} goes on. To abort it: vdsm-client Job abort jobId={job_id}")
        return exits.INTERRUPTED
    output.result(info, given.format, given.columns)
    if info["status"] == "done":
        return exits.OK
    error = _job_error(info)
    output.failure(error, given.format)
    return exits.ABORTED if info["status"] == "aborted" else exits.of(error)


def _job_error(info: dict[str, Any]) -> failures.ClientError:
    if info.get("error"):
        return failures.ClientError.from_wire(info["error"])
    return failures.ClientError(0, f"Job {info['id']} has {info['status']}")


def _events(given: arguments.Arguments) -> int:
    instance_id, since = given.params.pop("instanceId", None), given.params.pop("since", None)
    for name in given.params:
        raise arguments.UsageError(f"events takes topics, instanceId= and since=, not {name}=")
    if since is not None and not since.isdecimal():
        raise arguments.UsageError("since= takes a sequence number")
    with _connect(given) as client:
        for event in client.events(given.words[1:] or None, instance_id, since and int(since)):
            output.line(output.compact(event))
    return exits.OK


def _explain(given: arguments.Arguments) -> int:
    from vdsm.client import catalogue

    if len(given.words) > 2 or given.params:
        raise arguments.UsageError("explain takes one code or key")
    output.line(catalogue.explained(given.words[1]) if given.words[1:] else catalogue.listed())
    return exits.OK


def _completion(shell: str) -> int:
    from vdsm.client import completion

    output.line(completion.script(shell))
    return exits.OK


def _help(given: arguments.Arguments) -> int:
    from vdsm.client import reference

    namespace, name = given.words[0] if given.words else None, ".".join(given.words[:2])
    if namespace is None:
        output.line(reference.USAGE)
    try:
        with _connect(given, _HELP_TIMEOUT_S) as client:
            document = client.call("rpc.discover")
    except failures.ClientError as error:
        known = reference.offered_verb(name) if given.words[1:] else f"verbs:\n{reference.offered_verbs(namespace)}"
        output.line(
            f"{known}\n\nThis is what the client was made with; an agent tells more. {output.plain(error.message)}"
        )
        return exits.OK
    known = reference.verb(document, name) if given.words[1:] else f"verbs:\n{reference.verbs(document, namespace)}"
    output.line(known)
    return exits.OK


if __name__ == "__main__":
    sys.exit(main())
