"""Requests and what must come back, for every path and transport alike. The verbs are those of `sample_verbs`.

`envelope` has the decisions in words. What the specification says is taken from https://www.jsonrpc.org/specification,
whose section 7 has the examples; "Spec." stands before the names of their methods here.
"""

import json
from dataclasses import dataclass
from typing import Any

from vdsm.api import envelope

NOTHING = None
DEEPEST = envelope.MAX_DEPTH


@dataclass(frozen=True)
class Result:
    value: Any
    id: Any


@dataclass(frozen=True)
class Failure:
    code: int
    key: str
    id: Any = None


Expected = Result | Failure | list["Result | Failure"] | None


@dataclass(frozen=True)
class Case:
    name: str
    text: bytes
    expected: Expected
    # A single well-formed call by name, which the short path takes: both paths must agree on it.
    short: bool = False


def parse_error() -> Failure:
    return Failure(-32700, "parse_error")


def invalid_request(ident: Any = None) -> Failure:
    return Failure(-32600, "invalid_request", ident)


def unknown_method(ident: Any) -> Failure:
    return Failure(-32601, "unknown_method", ident)


def invalid_params(ident: Any) -> Failure:
    return Failure(-32602, "invalid_parameters", ident)


def _echo(ident: str) -> bytes:
    """A call whose id is written as given."""
    return b'{"jsonrpc":"2.0","method":"Sample.echo","params":{"value":1},"id":%b}' % ident.encode()


def _value(value: str) -> bytes:
    """A call that sends `value` there and back."""
    return b'{"jsonrpc":"2.0","method":"Sample.echo","params":{"value":%b},"id":1}' % value.encode()


def _nested(depth: int) -> str:
    """A value that makes the whole request of `_value` `depth` deep."""
    return "[" * (depth - 2) + "]" * (depth - 2)


def _call(method: str, **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).encode()


def _typed(**params: Any) -> bytes:
    return _call("Sample.typed", **params)


def _typed_result(**changed: Any) -> Result:
    return Result({"vmID": "x", "count": 1, "force": False, "ratio": 1.0, "firstImage": None} | changed, 1)


SPECIFICATION = [
    Case("positional", b'{"jsonrpc": "2.0", "method": "Spec.subtract", "params": [42, 23], "id": 1}', Result(19, 1)),
    Case("positional-2", b'{"jsonrpc": "2.0", "method": "Spec.subtract", "params": [23, 42], "id": 2}', Result(-19, 2)),
    Case(
        "named",
        b'{"jsonrpc": "2.0", "method": "Spec.subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}',
        Result(19, 3),
        short=True,
    ),
    Case(
        "named-2",
        b'{"jsonrpc": "2.0", "method": "Spec.subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}',
        Result(19, 4),
        short=True,
    ),
    Case("notification", b'{"jsonrpc": "2.0", "method": "Spec.update", "params": [1,2,3,4,5]}', NOTHING),
    Case("notification-unknown", b'{"jsonrpc": "2.0", "method": "foobar"}', NOTHING),
    Case("unknown-method", b'{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', unknown_method("1"), short=True),
    Case("invalid-json", b'{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', parse_error()),
    Case("invalid-request", b'{"jsonrpc": "2.0", "method": 1, "params": "bar"}', invalid_request()),
    Case(
        "batch-invalid-json",
        b'[{"jsonrpc": "2.0", "method": "Spec.sum", "params": [1,2,4], "id": "1"},{"jsonrpc": "2.0", "method"]',
        parse_error(),
    ),
    Case("batch-empty", b"[]", invalid_request()),
    Case("batch-invalid-member", b"[1]", [invalid_request()]),
    Case("batch-invalid-members", b"[1,2,3]", [invalid_request(), invalid_request(), invalid_request()]),
    Case(
        "batch",
        b"""[{"jsonrpc": "2.0", "method": "Spec.sum", "params": [1,2,4], "id": "1"},"""
        b"""{"jsonrpc": "2.0", "method": "Spec.notify_hello", "params": [7]},"""
        b"""{"jsonrpc": "2.0", "method": "Spec.subtract", "params": [42,23], "id": "2"},"""
        b"""{"foo": "boo"},"""
        b"""{"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},"""
        b"""{"jsonrpc": "2.0", "method": "Spec.get_data", "id": "9"}]""",
        [Result(7, "1"), Result(19, "2"), invalid_request(), unknown_method("5"), Result(["hello", 5], "9")],
    ),
    Case(
        "batch-of-notifications",
        b"""[{"jsonrpc": "2.0", "method": "Spec.notify_sum", "params": [1,2,4]},"""
        b"""{"jsonrpc": "2.0", "method": "Spec.notify_hello", "params": [7]}]""",
        NOTHING,
    ),
]

IDS = [
    Case("id-string", _echo('"a"'), Result(1, "a"), short=True),
    Case("id-empty-string", _echo('""'), Result(1, ""), short=True),
    Case("id-unicode", _echo('"\\u00e9\\n\\u0000"'), Result(1, "é\n\0"), short=True),
    Case("id-zero", _echo("0"), Result(1, 0), short=True),
    Case("id-negative", _echo("-9223372036854775808"), Result(1, -(1 << 63)), short=True),
    Case("id-largest", _echo("18446744073709551615"), Result(1, (1 << 64) - 1), short=True),
    Case("id-fraction", _echo("1.5"), Result(1, 1.5)),
    Case("id-null-is-a-request", _echo("null"), Result(1, None)),
    Case("id-beyond-64-bits", _echo("18446744073709551616"), invalid_request()),
    Case("id-huge", _echo("1" + "0" * 300), invalid_request()),
    Case("id-1e300", _echo("1e300"), invalid_request()),
    Case("id-1e400", _echo("1e400"), parse_error()),
    Case("id-nan", _echo("NaN"), parse_error()),
    Case("id-infinity", _echo("-Infinity"), parse_error()),
    Case("id-true", _echo("true"), invalid_request()),
    Case("id-false", _echo("false"), invalid_request()),
    Case("id-object", _echo('{"a":1}'), invalid_request()),
    Case("id-array", _echo("[1]"), invalid_request()),
    Case("id-twice", b'{"jsonrpc":"2.0","id":1,"method":"Spec.get_data","id":2}', Result(["hello", 5], 2), short=True),
]

ENVELOPES = [
    Case("no-params", b'{"jsonrpc":"2.0","method":"Spec.get_data","id":1}', Result(["hello", 5], 1), short=True),
    Case(
        "empty-params",
        b'{"jsonrpc":"2.0","method":"Spec.get_data","params":{},"id":1}',
        Result(["hello", 5], 1),
        short=True,
    ),
    Case("empty-array", b'{"jsonrpc":"2.0","method":"Spec.get_data","params":[],"id":1}', Result(["hello", 5], 1)),
    Case("white-space", b' \t{ "jsonrpc" : "2.0","method":"Spec.get_data","id":1 }\r', Result(["hello", 5], 1), True),
    Case("escapes", b'{"json\\u0072pc":"2.0","method":"Spec.get\\u005fdata","id":1}', Result(["hello", 5], 1), True),
    Case("params-null", b'{"jsonrpc":"2.0","method":"Spec.get_data","params":null,"id":1}', invalid_request(1)),
    Case("params-string", b'{"jsonrpc":"2.0","method":"Spec.get_data","params":"a","id":1}', invalid_request(1)),
    Case("version-missing", b'{"method":"Spec.get_data","id":1}', invalid_request(1)),
    Case("version-1.0", b'{"jsonrpc":"1.0","method":"Spec.get_data","id":1}', invalid_request(1)),
    Case("version-number", b'{"jsonrpc":2.0,"method":"Spec.get_data","id":1}', invalid_request(1)),
    Case("method-missing", b'{"jsonrpc":"2.0","id":"x"}', invalid_request("x")),
    Case("method-null", b'{"jsonrpc":"2.0","method":null,"id":1}', invalid_request(1)),
    Case("method-list", b'{"jsonrpc":"2.0","method":["Spec.get_data"],"id":1}', invalid_request(1)),
    Case("method-empty", b'{"jsonrpc":"2.0","method":"","id":1}', unknown_method(1), short=True),
    Case("method-dunder", b'{"jsonrpc":"2.0","method":"Spec.__init__","id":1}', unknown_method(1), short=True),
    Case("unknown-positional", b'{"jsonrpc":"2.0","method":"No.no","params":[1],"id":1}', unknown_method(1)),
    Case("member-misspelt", b'{"jsonrpc":"2.0","method":"Spec.get_data","parms":{},"id":1}', invalid_request(1)),
    Case("member-extra", b'{"jsonrpc":"2.0","method":"Spec.get_data","params":{},"id":1,"a":1}', invalid_request(1)),
    Case("not-a-request", b"5", invalid_request()),
    Case("a-string", b'"jsonrpc"', invalid_request()),
    Case("null", b"null", invalid_request()),
    Case("an-answer", b'{"jsonrpc":"2.0","result":1,"id":7}', invalid_request(7)),
    Case("empty-object", b"{}", invalid_request()),
    Case("notification-invalid-params", b'{"jsonrpc":"2.0","method":"Spec.subtract","params":[1]}', NOTHING),
    Case("notification-that-fails", b'{"jsonrpc":"2.0","method":"Sample.fail","params":["named"]}', NOTHING),
    Case("not-quite-a-notification", b'{"jsonrpc":"2.0","method":5}', invalid_request()),
    Case("batch-nested", b"[[]]", [invalid_request()]),
    Case(
        "batch-of-one",
        b'[{"jsonrpc":"2.0","method":"Spec.get_data","id":1}]',
        [Result(["hello", 5], 1)],
    ),
    Case(
        "batch-odd-ids",
        b'[{"jsonrpc":"2.0","method":"Spec.get_data","id":true},{"jsonrpc":"2.0","method":"Spec.get_data","id":null},'
        b'{"jsonrpc":"2.0","method":"Spec.get_data","id":1},{"jsonrpc":"2.0","method":"Spec.get_data","id":1}]',
        [invalid_request(), Result(["hello", 5], None), Result(["hello", 5], 1), Result(["hello", 5], 1)],
    ),
    Case(
        "batch-of-notifications-and-nonsense",
        b'[{"jsonrpc":"2.0","method":"Spec.get_data"},{},{"jsonrpc":"2.0","method":"Sample.fail","params":["named"]}]',
        [invalid_request()],
    ),
    Case("batch-over-the-limit", b"[" + b",".join([b"1"] * 101) + b"]", invalid_request()),
]

TEXTS = [
    Case("cut-short", b"{", parse_error()),
    Case("not-json", b"GET / HTTP/1.1", parse_error()),
    Case("trailing-comma", b"[1,]", parse_error()),
    Case("two-values", b"{} {}", parse_error()),
    Case("single-quotes", b"{'jsonrpc':'2.0'}", parse_error()),
    Case("byte-order-mark", b"\xef\xbb\xbf{}", parse_error()),
    Case("invalid-utf8", _value('"\xff"').replace("ÿ".encode(), b"\xff"), parse_error()),
    Case("utf8-surrogate", _value('"?"').replace(b"?", b"\xed\xa0\x80"), parse_error()),
    Case("utf8-overlong", _value('"?"').replace(b"?", b"\xc0\xaf"), parse_error()),
    Case("utf16", '{"jsonrpc":"2.0"}'.encode("utf-16-le"), parse_error()),
    Case("lone-surrogate", _value('"\\ud800"'), parse_error()),
    Case("surrogate-pair", _value('"\\ud83d\\ude00"'), Result("😀", 1), short=True),
    Case("nul", _value('"\\u0000"'), Result("\0", 1), short=True),
    Case("nan", _value("NaN"), parse_error()),
    Case("1e400", _value("1e400"), parse_error()),
    Case("equal-keys", _value('{"a":1,"a":2}'), Result({"a": 2}, 1), short=True),
    Case("deepest", _value(_nested(DEEPEST)), Result(json.loads(_nested(DEEPEST)), 1), short=True),
    Case("too-deep", _value(_nested(DEEPEST + 1)), parse_error()),
    Case("far-too-deep", b"[" * 100_000, parse_error()),
    Case("far-too-deep-and-closed", b"[" * 100_000 + b"]" * 100_000, parse_error()),
    Case("deep-objects", _value('{"a":' * 500 + "1" + "}" * 500), parse_error()),
    Case("broad-and-shallow", _value("[" + "[]," * 1000 + "[]]"), Result([[]] * 1001, 1), short=True),
]

PARAMETERS = [
    Case("typed", _typed(vmID="x"), _typed_result(), short=True),
    Case("string-number", _typed(vmID="x", count="5"), _typed_result(count=5), short=True),
    Case("string-boolean", _typed(vmID="x", force="true"), _typed_result(force=True), short=True),
    Case("string-fraction", _typed(vmID="x", ratio="0.5"), _typed_result(ratio=0.5), short=True),
    Case("upper-case-boolean", _typed(vmID="x", force="False"), _typed_result(), short=True),
    Case(
        "inside",
        _typed(vmID="x", disks=[{"imageId": "i", "readOnly": "true"}]),
        _typed_result(firstImage="i"),
        short=True,
    ),
    Case("missing", _typed(count=1), invalid_params(1), short=True),
    Case("unknown", _typed(vmID="x", cuont=1), invalid_params(1), short=True),
    Case("snake-case", _typed(vm_id="x"), invalid_params(1), short=True),
    Case("wrong-type", _typed(vmID="x", count="five"), invalid_params(1), short=True),
    Case("null", _typed(vmID=None), invalid_params(1), short=True),
    Case("number-for-string", _typed(vmID=5), invalid_params(1), short=True),
    Case("infinite", _typed(vmID="x", ratio="1e400"), invalid_params(1), short=True),
    Case("huge-integer", _typed(vmID="x", count="9" * 5000), invalid_params(1), short=True),
    Case("unknown-inside", _typed(vmID="x", disks=[{"imageId": "i", "no": 1}]), invalid_params(1), short=True),
    Case("too-many-positional", b'{"jsonrpc":"2.0","method":"Spec.get_data","params":[1],"id":1}', invalid_params(1)),
    Case("too-few-positional", b'{"jsonrpc":"2.0","method":"Spec.subtract","params":[1],"id":1}', invalid_params(1)),
    Case("positional-default", b'{"jsonrpc":"2.0","method":"Sample.typed","params":["x"],"id":1}', _typed_result()),
]

INTERNAL = Failure(-32603, "internal_error", 1)
NAMED = Failure(10050, "vm_wrong_state", 1)

VERBS = [
    Case("alias", _call("Spec.minus", minuend=3, subtrahend=1), Result(2, 1), short=True),
    Case("pre-encoded", _call("Sample.bulk"), Result([1, 2, 3], 1), short=True),
    Case("own-name", _call("Sample.failInPool", name=""), Result("nothing failed", 1), short=True),
    Case("python-name", _call("Sample.fail_in_pool", name=""), unknown_method(1), short=True),
    Case("named-error", _call("Sample.fail", name="named"), NAMED, short=True),
    Case("named-error-in-pool", _call("Sample.failInPool", name="named"), NAMED, short=True),
    Case("named-error-while-waiting", _call("Sample.failWaiting", name="named"), NAMED, short=True),
    Case("unknown-error", _call("Sample.fail", name="unknown"), INTERNAL, short=True),
    Case("unknown-error-in-pool", _call("Sample.failInPool", name="unknown"), INTERNAL, short=True),
    Case("unknown-error-while-waiting", _call("Sample.failWaiting", name="unknown"), INTERNAL, short=True),
]

CASES = [*SPECIFICATION, *IDS, *ENVELOPES, *TEXTS, *PARAMETERS, *VERBS]


def check(expected: Expected, answer: bytes | None) -> None:
    """Fails unless `answer` is what is expected, and JSON-RPC to the letter."""
    if expected is NOTHING:
        assert answer is None
        return
    assert answer is not None, "no answer"
    parsed = json.loads(answer, parse_constant=_not_json)
    if isinstance(expected, list):
        assert isinstance(parsed, list) and len(parsed) == len(expected), parsed
        for one, its in zip(expected, parsed, strict=True):
            _check_one(one, its)
    else:
        _check_one(expected, parsed)


def _not_json(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _check_one(expected: Result | Failure | Any, answer: Any) -> None:
    assert isinstance(answer, dict), answer
    assert answer["jsonrpc"] == "2.0"
    assert (answer["id"], type(answer["id"])) == (expected.id, type(expected.id))
    if isinstance(expected, Result):
        assert answer.keys() == {"jsonrpc", "result", "id"}, answer
        assert answer["result"] == expected.value
        return
    assert answer.keys() == {"jsonrpc", "error", "id"}, answer
    error = answer["error"]
    assert error.keys() == {"code", "message", "data"}
    assert error["data"].keys() == {"key", "facts", "state", "hint"}
    assert (error["code"], error["data"]["key"]) == (expected.code, expected.key), error
    assert isinstance(error["message"], str) and error["message"]
