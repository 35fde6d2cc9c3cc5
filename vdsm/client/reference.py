"""Help: the command's own, and the verbs' out of the running agent's OpenRPC document (`rpc.discover`).

Without an agent the verbs that this client was made with are told (`offered`): their parameters, but not their results.
"""

from __future__ import annotations

from vdsm.client import arguments, exits, nearby, offered, output, schema

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vdsm.client.schema import Document, Schema

_EXITS = "\n".join(f"    {code:3}  {meaning}" for code, meaning in exits.MEANING.items())

USAGE = f"""\
usage: vdsm-client [options] Namespace verb [name=value ...]
       vdsm-client [options] events [topic ...] [instanceId=ID since=N]
       vdsm-client [-a ADDRESS] [Namespace [verb]] -h
       vdsm-client explain [CODE | KEY]
       vdsm-client --completion bash | zsh

options, anywhere on the line:
    -a, --host, --address ADDRESS
                           a host (over TLS), a socket's path, or wss:, https:, ws: or http://HOST:PORT
                           (default: VDSM_ADDRESS, or {arguments.DEFAULT_ADDRESS})
    -p, --port PORT        the host's port (default 54321)
    --cert, --key, --ca FILE
                           PEM files for TLS: our certificate, its key, the CA of both sides (default: VDSM_CERT,
                           VDSM_KEY, VDSM_CA; cert.pem, key.pem, ca.pem in ~/.config/vdsm/tls or /etc/vdsm/tls)
    -f, --file FILE        parameters as a JSON object; - reads standard input; name=value go over it
    -o, --output FORMAT    json, table or table:COLUMN,COLUMN...; with json an error is a JSON object too
    --wait, --no-wait      follow the job that the call starts, print how it ended
    --timeout SECONDS      longest wait for an answer (default {arguments.DEFAULT_TIMEOUT_S:g}), and with --wait for the job's end
    --flow-id ID           begins the ids of the requests in the agent's log
    -h, --help             this text; behind a namespace or a verb, what the agent says about it
    --completion SHELL     prints a script for bash or zsh that completes verbs and parameters

values:
    name=text              a string; the agent takes strings for numbers and booleans
    name={{...}} or [...]    JSON; also "..." for a string that begins with {{ [ " or @
    name=@FILE             the file's text, by the same rule; @- reads standard input
    a.b=value              a member of an object

The result is printed as JSON with sorted keys; a null result prints nothing. Events are printed one per line.
`explain` tells what an error means and what to do, without an agent; alone it lists all errors.

exit codes:
{_EXITS}
"""  # noqa: E501 - the text is as wide as it is


def verbs(document: Document, namespace: str | None = None) -> str:
    """One line for each verb, of all namespaces or of one. Raises `UsageError` for an unknown namespace."""
    return _listed({name: _first_line(method) for name, method in schema.methods(document).items()}, namespace)


def verb(document: Document, name: str) -> str:
    """A verb's parameters, result, errors, and a JSON skeleton for `-f`. Raises `UsageError` for an unknown verb."""
    methods = schema.methods(document)
    if name not in methods:
        raise _unknown_verb(name, methods)
    method, params = methods[name], schema.params(document, methods[name])
    answer = schema.result(document, method)
    skeleton = {param["name"]: schema.skeleton(document, param.get("schema", {})) for param in params}
    fields = [(field.name, f"{field.kind}, {field.need}", field.description)
              for field in schema.param_fields(document, method)]  # fmt: skip
    told = [(field.name, field.kind, field.description) for field in schema.fields_within(document, answer)]
    sections = [
        _usage(name),
        *dict.fromkeys((method.get("summary"), method.get("description"))),
        _section("parameters:", fields) if params else "no parameters",
        _section(f"result: {schema.type_name(document, answer)}", told),
        _section("errors:", _errors(document, method)) if method.get("errors") else "",
        f"role: {method['x-role']}" if method.get("x-role") else "",
        f"skeleton for -f FILE (leave out what is not required):\n{output.pretty(skeleton)}" if params else "",
    ]
    return "\n\n".join(filter(None, sections))


def offered_verbs(namespace: str | None = None) -> str:
    """As `verbs`, of what this client was made with."""
    return _listed({name: summary for name, (summary, _) in offered.VERBS.items()}, namespace)


def offered_verb(name: str) -> str:
    """As `verb`, of what this client was made with: parameters only."""
    if name not in offered.VERBS:
        raise _unknown_verb(name, offered.VERBS)
    summary, params = offered.VERBS[name]
    fields = [(param, kind, text) for param, kind, text, _ in params]
    return "\n\n".join([_usage(name), summary, _section("parameters:", fields) if params else "no parameters"])


def _usage(name: str) -> str:
    return f"vdsm-client {nearby.spoken(name)} [name=value ...]"


def _listed(summaries: Mapping[str, str], namespace: str | None) -> str:
    lines = [
        f"    {nearby.spoken(name):<40} {summary}".rstrip()
        for name, summary in sorted(summaries.items())
        if namespace in (None, name.partition(".")[0])
    ]
    if not lines:
        known = sorted({name.partition(".")[0] for name in summaries})
        raise arguments.UsageError(f"there is no namespace {namespace}; there are {', '.join(known)}")
    return "\n".join(lines)


def _unknown_verb(name: str, known: Iterable[str]) -> arguments.UsageError:
    said, near = f"there is no verb {nearby.spoken(name)}", nearby.of(name, known)
    if near:
        return arguments.UsageError(f"{said}; did you mean {' or '.join(map(nearby.spoken, near))}?")
    return arguments.UsageError(f"{said}; its namespace has:\n{_listed(dict.fromkeys(known, ''), name.split('.')[0])}")


def _first_line(method: Schema) -> str:
    return str(method.get("summary") or method.get("description") or "").partition("\n")[0]


def _section(heading: str, fields: Iterable[tuple[str, str, str]]) -> str:
    """`fields`: (name, what it is, words about it)."""
    return "\n".join([heading, *(line for field in fields for line in _entry(*field))])


def _entry(name: str, kind: str, description: str) -> Iterator[str]:
    yield f"    {name}: {kind}"
    yield from (f"        {line}" for line in description.splitlines())


def _errors(document: Document, method: Schema) -> Iterator[tuple[str, str, str]]:
    for error in (schema.resolved(document, each) for each in method["errors"]):
        key = (error.get("data") or {}).get("key")
        yield f"{key} ({error.get('code')})" if key else str(error.get("code")), str(error.get("message")), ""
