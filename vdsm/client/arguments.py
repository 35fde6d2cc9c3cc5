"""The command line: options, `Namespace verb`, and parameters as `name=value`.

name=text           a string; the agent takes strings for numbers and booleans
name={...} [...]    JSON; also "..." for a string that begins with one of { [ " @
name=@FILE          the file's text, by the same rule; @- reads standard input
a.b=value           a member of an object: {"a": {"b": "value"}}
"""

from __future__ import annotations

import getopt
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

DEFAULT_ADDRESS = "/run/vdsm/vdsmd.sock"
DEFAULT_TIMEOUT_S = 60.0
FORMATS = ("json", "table")
SHELLS = ("bash", "zsh")
# As getopt takes them.
SHORT_OPTIONS = "a:p:f:o:h"
LONG_OPTIONS = (
    "address=",
    "host=",
    "port=",
    "cert=",
    "key=",
    "ca=",
    "file=",
    "output=",
    "wait",
    "no-wait",
    "timeout=",
    "flow-id=",
    "completion=",
    "help",
)
_TEXTS = {"-a": "address", "--address": "address", "--host": "address", "--flow-id": "flow_id"}
_TEXTS |= {"--cert": "cert", "--key": "key", "--ca": "ca"}


class UsageError(Exception):
    """The command line is wrong; the text says where."""


class Arguments:
    """What was asked for. `words` are the namespace and the verb, or `events` and its topics."""

    def __init__(self) -> None:
        self.address = os.environ.get("VDSM_ADDRESS") or DEFAULT_ADDRESS
        self.port: int | None = None
        self.cert: str | None = None
        self.key: str | None = None
        self.ca: str | None = None
        self.timeout_s: float | None = None
        self.flow_id: str | None = None
        self.format: str | None = None
        self.columns: list[str] = []  # of a table; empty: all
        self.wait = False
        self.help = False
        self.completion: str | None = None  # the shell it is for
        self.words: list[str] = []
        self.params: dict[str, Any] = {}


def parse(argv: Sequence[str]) -> Arguments:
    """Raises `UsageError`."""
    arguments = Arguments()
    try:
        options, words = getopt.gnu_getopt(list(argv), SHORT_OPTIONS, LONG_OPTIONS)
    except getopt.GetoptError as error:
        raise UsageError(str(error)) from error
    for name, value in options:
        _take_option(arguments, name, value)
    if arguments.port is not None:
        arguments.address = _with_port(arguments.address, arguments.port)
    names = set()
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            arguments.words.append(word)
            continue
        if name in names:
            raise UsageError(f"{name} is given twice")
        names.add(name)
        put(arguments.params, name, _value(name, value))
    return arguments


def _take_option(arguments: Arguments, name: str, value: str) -> None:
    if name in _TEXTS:
        setattr(arguments, _TEXTS[name], value)
    elif name in ("-p", "--port"):
        arguments.port = _port(value)
    elif name == "--timeout":
        arguments.timeout_s = _seconds(value)
    elif name in ("-f", "--file"):
        given = _json(_text(value), value)
        if not isinstance(given, dict):
            raise UsageError(f"{value}: the parameters must be a JSON object")
        arguments.params.update(given)
    elif name in ("-o", "--output"):
        arguments.format, _, columns = value.partition(":")
        arguments.columns = columns.split(",") if columns else []
        if arguments.format not in FORMATS or (columns and arguments.format != "table"):
            raise UsageError(f"-o takes {', '.join(FORMATS)} or table:COLUMN,COLUMN..., not {value!r}")
    elif name in ("-h", "--help"):
        arguments.help = True
    elif name == "--completion":
        arguments.completion = _shell(value)
    else:
        arguments.wait = name == "--wait"


def _with_port(address: str, port: int) -> str:
    """A port alone is one of this host."""
    if address == DEFAULT_ADDRESS:
        address = "localhost"
    if "/" in address or "]" in address or address.count(":") == 1:
        raise UsageError(f"-p goes with a host's name, not with {address!r}")
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def put(params: dict[str, Any], name: str, value: Any) -> None:
    """Set `a.b.c` in nested objects. Raises `UsageError` where something else than an object is in the way."""
    *path, last = name.split(".")
    if not all([*path, last]):
        raise UsageError(f"{name!r} is no parameter's name")
    place: Any = params
    for step in path:
        place = place.setdefault(step, {})
        if not isinstance(place, dict):
            raise UsageError(f"{name}: {step} is given as something else than an object")
    if isinstance(value, dict) and isinstance(place.get(last), dict):
        place[last].update(value)
    else:
        place[last] = value


def _value(name: str, text: str) -> Any:
    if text.startswith("@"):
        text = _text(text[1:])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name}: the value is not UTF-8") from error
    return _json(text, name) if text.lstrip()[:1] in ("{", "[", '"') else text


def _text(path: str) -> str:
    import sys

    try:
        if path == "-":
            return sys.stdin.buffer.read().decode()
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib would cost a third of the client's own start-up
            return file.read().decode()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _json(text: str, source: str) -> Any:
    import json

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not JSON: {error}") from error


def _shell(text: str) -> str:
    if text not in SHELLS:
        raise UsageError(f"--completion takes {' or '.join(SHELLS)}, not {text!r}")
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise UsageError(f"-p takes a port's number, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise UsageError(f"--timeout takes a number of seconds, not {text!r}")
    return seconds
