"""The entry of traced children: waits until the tracer is there, then is what it was spawned for."""

import sys
from collections.abc import Callable
from typing import Any

from vdsm import channels

PRELOADED = "tests.crash.child"
TARGET = f"{PRELOADED}:held"


def held(order: dict[str, Any], channel: channels.Channel) -> None:
    """`order`: the real target and its argument. The next message says that it may go on."""
    if channel.receive() is None:
        return
    module, _, function = order["target"].partition(":")
    called: Callable[[dict[str, Any], channels.Channel], object] = getattr(sys.modules[module], function)
    called(order["argument"], channel)
