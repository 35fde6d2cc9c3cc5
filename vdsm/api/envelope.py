"""JSON-RPC 2.0 envelopes: what a request must look like, and how answers are written.

Decisions where the specification leaves room or parsers differ. Each has a line in `tests/jsonrpc_corpus.py`:

- Text: one JSON value in UTF-8. Not read, and answered as a parse error with id null: invalid UTF-8, a byte order
  mark, lone surrogates, NaN and Infinity, numbers beyond a double (1e400), nesting deeper than MAX_DEPTH. Of equal
  keys in an object the last counts.
- An id is a string, null, an integer from -2^63 to 2^64 - 1, or a fraction below 2^53: what we can send back as it
  came. Anything else is an invalid request, answered with id null.
- A request has "jsonrpc": "2.0", a string "method", and "params" as an array or object or not at all. Other members
  are refused: a misspelt "params" must not silently mean none. The answer carries the id if that was fit to use.
- A request without "id" that is otherwise well formed is a notification: never answered, not even when it fails.
  What is not a request at all is answered, id or not. "id": null is a request, and is answered with null.
- An answer ends with a newline: the end of a frame on the Unix socket, white space elsewhere.
- A batch is answered member by member in order, by an array. An empty batch and one over the limit are answered by
  one error object. A batch of notifications alone is not answered.
"""

from typing import Any

import orjson

from vdsm import errors

# orjson writes no deeper than this, ...
_WRITABLE_DEPTH = 254
# ... so this leaves room for what an answer wraps around: all that is taken can be sent back.
MAX_DEPTH = 240

_NO_PARAMETERS: dict[str, Any] = {}
_MEMBERS = frozenset({"jsonrpc", "method", "params", "id"})
# Doubles beyond lose integers: 2^64 arrives as a double and would go back as another number.
_EXACT = float(1 << 53)


def parse(text: bytes) -> Any:
    """The JSON value of a request. Raises `errors.ParseError`."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise errors.ParseError(reason=str(error)) from None
    # Length and brackets clear nearly every request of the real, dearer question.
    if len(text) > MAX_DEPTH and text.count(b"[") + text.count(b"{") > MAX_DEPTH and _too_deep(value):
        raise errors.ParseError(reason=f"nested deeper than {MAX_DEPTH}")
    return value


def _too_deep(value: Any) -> bool:
    """Asks the encoder, which is faster than any walk of ours: parsed values fail there for their depth alone."""
    for _ in range(_WRITABLE_DEPTH - MAX_DEPTH):
        value = [value]
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return True
    return False


def plain(request: dict[str, Any]) -> tuple[str, dict[str, Any], Any] | None:
    """(method, params, id) of a well-formed call by name with a string or integer id; None for all else.

    What it takes, `check` takes too: it is the same question, put so that the usual case is answered soonest.
    """
    try:
        name, ident, params = request["method"], request["id"], request.get("params", _NO_PARAMETERS)
        if (
            type(params) is dict
            and type(name) is str
            and (type(ident) is int or type(ident) is str)
            and request["jsonrpc"] == "2.0"
            and len(request) == (3 if params is _NO_PARAMETERS else 4)
        ):
            return name, params, ident
    except KeyError:
        pass
    return None


def check(member: Any) -> errors.InvalidRequest | None:
    """What is wrong with one request, or None."""
    if not isinstance(member, dict):
        return errors.InvalidRequest(reason="not an object")
    if member.get("jsonrpc") != "2.0":
        return errors.InvalidRequest(reason='"jsonrpc" is not "2.0"')
    if not isinstance(member.get("method"), str):
        return errors.InvalidRequest(reason='"method" is not a string')
    if not isinstance(member.get("params", {}), dict | list):
        return errors.InvalidRequest(reason='"params" is neither an array nor an object')
    if not is_id(member.get("id")):
        return errors.InvalidRequest(reason='"id" is not a string, a number or null')
    if unknown := member.keys() - _MEMBERS:
        return errors.InvalidRequest(reason=f"unknown member {min(unknown)[:100]}")
    return None


def is_id(value: Any) -> bool:
    """Whether we can send this id back as it came."""
    kind = type(value)
    return value is None or kind is str or kind is int or (kind is float and abs(value) < _EXACT)


def id_of(member: Any) -> Any:
    """The id to answer a refused request with."""
    ident = member.get("id") if isinstance(member, dict) else None
    return ident if is_id(ident) else None


def success(ident: Any, result: bytes) -> bytes:
    """An answer with an encoded result."""
    return b'{"jsonrpc":"2.0","result":%b,"id":%b}\n' % (result, orjson.dumps(ident))


def failure(ident: Any, error: errors.VdsmError) -> bytes:
    """An answer with an error."""
    return b'{"jsonrpc":"2.0","error":%b,"id":%b}\n' % (orjson.dumps(error.to_wire()), orjson.dumps(ident))
