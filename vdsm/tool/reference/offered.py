"""The table of verbs that `vdsm-client` has without an agent: for completion, and for help when nobody answers."""

import json
from typing import Any

from vdsm.client import schema

_HEAD = '''\
"""The verbs that this client was made with. Made from the code by `make docs`; what is changed by hand is lost."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    Param = tuple[str, str, str, tuple[str, ...]]

# fmt: off
# {"Namespace.verb": (summary, ((dotted name, type and need, description, the few values it can have), ...))}
VERBS: dict[str, tuple[str, tuple[Param, ...]]] = {
'''
_TAIL = """
}}
TOPICS = {topics}
"""


def module(document: dict[str, Any]) -> str:
    """The source of vdsm/client/offered.py."""
    lines = []
    for name, method in schema.methods(document).items():
        lines.append(f"    {_text(name)}: ({_text(method.get('summary', ''))}, (")
        for field in schema.param_fields(document, method):
            texts = (field.name, f"{field.kind}, {field.need}", field.description)
            lines.append(f"        ({', '.join(map(_text, texts))}, {_tuple(field.values)}),")
        lines.append("    )),")
    topics = tuple(topic["name"] for topic in document["x-events"]["topics"] if topic["name"] != "gap")
    return _HEAD + "\n".join(lines) + _TAIL.format(topics=_tuple(topics))


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _tuple(texts: tuple[str, ...]) -> str:
    return f"({', '.join(map(_text, texts))}{',' if len(texts) == 1 else ''})"
