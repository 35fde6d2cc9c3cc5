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
    -a, --address ADDRESS  socket path, http://HOST:PORT or ws://HOST:PORT
                           (default: VDSM_ADDRESS, or {arguments.DEFAULT_ADDRESS})
    -f, --file FILE        parameters as a JSON object; - reads standard input; name=value go over it
    -o, --output FORMAT    json or table; with json an error is a JSON object too
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
        schema = _resolved(document, param.get("schema", {}))
        need = "required" if param.get("required") else _default(schema)
        yield f"    {param['name']}: {_type(document, param.get('schema', {}))}, {need}"
        text = param.get("description") or param.get("summary") or schema.get("description") or ""
        yield from (f"        {line}" for line in text.splitlines())


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


def _type(document: dict[str, Any], schema: dict[str, Any]) -> str:
    schema = _resolved(document, schema)
    if "const" in schema:
        return output.compact(schema["const"])
    if "enum" in schema:
        return " or ".join(map(output.compact, schema["enum"]))
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(document, each) for each in alternatives))
    kind = schema.get("type", "any value")
    if isinstance(kind, list):
        return " or ".join(kind)
    return f"list of {_type(document, schema['items'])}" if kind == "array" and schema.get("items") else str(kind)


def _skeleton(document: dict[str, Any], schema: dict[str, Any], above: tuple[str, ...]) -> Any:
    """A value of the schema's shape to fill in. `above` names the references it is in, so that a loop ends."""
    reference = schema.get("$ref")
    if reference in above:
        return None
    above = (*above, reference) if reference else above
    schema = _resolved(document, schema)
    for fixed in ("default", "const"):
        if schema.get(fixed) is not None:
            return schema[fixed]
    if "enum" in schema:
        return schema["enum"][0]
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        real = [each for each in alternatives if each.get("type") != "null"]
        return _skeleton(document, real[0], above) if real else None
    if schema.get("properties"):
        return {name: _skeleton(document, each, above) for name, each in schema["properties"].items()}
    empty: dict[str, Any] = {"string": "", "integer": 0, "number": 0, "boolean": False, "array": [], "object": {}}
    kind = schema.get("type")
    return empty.get(kind) if isinstance(kind, str) else None
