"""Help: the command's own, and the verbs' out of the running agent's OpenRPC document (`rpc.discover`)."""

from __future__ import annotations

from vdsm.client import arguments, exits, output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_EXITS = "\n".join(f"    {code:3}  {meaning}" for code, meaning in exits.MEANING.items())

USAGE = f"""\
usage: vdsm-client [options] Namespace verb [name=value ...]
       vdsm-client [options] events [topic ...] [instanceId=ID since=N]
       vdsm-client [-a ADDRESS] [Namespace [verb]] -h

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

values:
    name=text              a string; the agent takes strings for numbers and booleans
    name={{...}} or [...]    JSON; also "..." for a string that begins with {{ [ " or @
    name=@FILE             the file's text, by the same rule; @- reads standard input
    a.b=value              a member of an object

The result is printed as JSON with sorted keys; a null result prints nothing. Events are printed one per line.

exit codes:
{_EXITS}
"""  # noqa: E501 - the text is as wide as it is

_DEEPEST = 4
_EMPTY: dict[str, Any] = {"string": "", "integer": 0, "number": 0, "boolean": False, "array": [], "object": {}}


def verbs(document: dict[str, Any], namespace: str | None = None) -> str:
    """One line for each verb, of all namespaces or of one. Raises `UsageError` for an unknown namespace."""
    lines = []
    for name, method in sorted(_methods(document).items()):
        if namespace in (None, name.partition(".")[0]):
            lines.append(f"    {name.replace('.', ' ', 1):<40} {_first_line(method)}".rstrip())
    if not lines:
        known = sorted({name.partition(".")[0] for name in _methods(document)})
        raise arguments.UsageError(f"the agent has no namespace {namespace}; it has {', '.join(known)}")
    return "\n".join(lines)


def verb(document: dict[str, Any], name: str) -> str:
    """A verb's parameters, result, and a JSON skeleton to fill for `-f`. Raises `UsageError` for an unknown verb."""
    method = _methods(document).get(name)
    if method is None:
        raise arguments.UsageError(f"the agent has no verb {name.replace('.', ' ')}; its namespace has:\n"
                                   f"{verbs(document, name.partition('.')[0])}")  # fmt: skip
    params = [_resolved(document, param) for param in method.get("params", [])]
    skeleton = {param["name"]: _skeleton(document, param.get("schema", {}), ()) for param in params}
    sections = [
        f"vdsm-client {name.replace('.', ' ', 1)} [name=value ...]",
        *dict.fromkeys(filter(None, (method.get("summary"), method.get("description")))),
        "\n".join(["parameters:", *_parameters(document, params)]) if params else "no parameters",
        f"result: {_type(document, _resolved(document, method.get('result') or {}).get('schema', {}))}",
    ]
    if params:
        sections.append("skeleton for -f FILE (leave out what is not required):\n" + output.pretty(skeleton))
    return "\n\n".join(sections)


def _methods(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {method["name"]: method for method in document.get("methods", [])}


def _first_line(method: dict[str, Any]) -> str:
    return str(method.get("summary") or method.get("description") or "").partition("\n")[0]


def _parameters(document: dict[str, Any], params: list[dict[str, Any]]) -> Iterator[str]:
    for param in params:
        text = param.get("description") or param.get("summary")
        schema = param.get("schema", {}) | ({"description": text} if text else {})
        yield from _entry(document, param["name"], schema, bool(param.get("required")), ())


def _entry(
    document: dict[str, Any], name: str, schema: dict[str, Any], required: bool, above: tuple[str, ...]
) -> Iterator[str]:
    """The lines of a parameter, and of its members by the dotted names that the command line takes."""
    resolved = _resolved(document, schema)
    yield f"    {name}: {_type(document, schema)}, {'required' if required else _default(resolved)}"
    yield from (f"        {line}" for line in resolved.get("description", "").splitlines())
    shape, in_list, above = _members(document, schema, above)
    for member, inner in shape.get("properties", {}).items():
        dotted = f"{name}{'[]' if in_list else ''}.{member}"
        yield from _entry(document, dotted, inner, member in shape.get("required", ()), above)


def _members(
    document: dict[str, Any], schema: dict[str, Any], above: tuple[str, ...]
) -> tuple[dict[str, Any], bool, tuple[str, ...]]:
    """(the object schema that `schema` is or is a list of, whether a list, the references it is in).

    {} when it is something else, or lies within itself: `above` names the references on the way here.
    """
    in_list = False
    while (reference := schema.get("$ref")) not in above:
        above = (*above, reference) if reference else above
        schema = _resolved(document, schema)
        alternatives = [each for each in schema.get("anyOf") or schema.get("oneOf") or () if each.get("type") != "null"]
        if alternatives:
            schema = alternatives[0]
        elif schema.get("type") == "array" and not in_list:
            in_list, schema = True, schema.get("items") or {}
        else:
            return (schema if schema.get("properties") else {}), in_list, above
    return {}, in_list, above


def _default(schema: dict[str, Any]) -> str:
    default = schema.get("default")
    return "optional" if default is None else f"default {output.compact(default)}"


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """`schema`, or what its `$ref` ("#/components/schemas/X") points at, with what stands beside the reference."""
    for _ in range(10):
        reference = schema.get("$ref")
        if reference is None:
            return schema
        target: Any = document
        for step in reference.removeprefix("#/").split("/"):
            target = target.get(step, {})
        schema = target | {name: value for name, value in schema.items() if name != "$ref"}
    return {}


def _type(document: dict[str, Any], schema: dict[str, Any], depth: int = 0) -> str:
    schema = _resolved(document, schema)
    if "const" in schema:
        return output.compact(schema["const"])
    if "enum" in schema:
        return " or ".join(map(output.compact, schema["enum"]))
    if depth == _DEEPEST:
        return "value"  # a type may lie within itself
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(document, each, depth + 1) for each in alternatives))
    kind = schema.get("type", "any value")
    if kind == "array" and schema.get("items"):
        return f"list of {_type(document, schema['items'], depth + 1)}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _skeleton(document: dict[str, Any], schema: dict[str, Any], above: tuple[str, ...]) -> Any:
    """A value of the schema's shape to fill in."""
    resolved = _resolved(document, schema)
    for fixed in ("default", "const"):
        if resolved.get(fixed):
            return resolved[fixed]
    shape, in_list, above = _members(document, schema, above)
    if shape:
        one = {name: _skeleton(document, inner, above) for name, inner in shape["properties"].items()}
        return [one] if in_list else one
    for alternative in resolved.get("anyOf") or resolved.get("oneOf") or [resolved]:
        kind = _resolved(document, alternative)
        if kind.get("enum"):
            return kind["enum"][0]
        if kind.get("type") in _EMPTY:
            return _EMPTY[kind["type"]]
    return None
