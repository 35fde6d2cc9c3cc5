"""What the fork server's tests run in its children."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from vdsm import channels, programs

PRELOADED_IN = os.getpid()


def echo(argument: dict[str, Any], channel: channels.Channel) -> None:
    facts = {"pid": os.getpid(), "parent": os.getppid(), "preloaded_in": PRELOADED_IN, "session": os.getsid(0)}
    channel.send({"argument": argument, **facts, "fd_count": len(list(Path("/proc/self/fd").iterdir()))})
    while (message := channel.receive()) is not None:
        channel.send(message)


def leave(argument: dict[str, Any], channel: channels.Channel) -> None:
    raise SystemExit(argument["code"])


def fail(argument: dict[str, Any], channel: channels.Channel) -> None:
    raise RuntimeError("a bug in the child")


def write(argument: dict[str, Any], channel: channels.Channel) -> None:
    (fd,) = argument["fds"]
    os.write(fd, b"from the child")


def adopt_out(argument: dict[str, Any], channel: channels.Channel) -> None:
    """Hands the liveness pipe to whoever listens at `address`, as a tool would inherit it; then waits."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(argument["address"])
        socket.send_fds(line, [b"!"], [channel.liveness_fd])
    channel.send({"handed": True})
    channel.receive()


def start_tool(argument: dict[str, Any], channel: channels.Channel) -> None:
    """Starts a tool that nothing but the fork server would kill, and waits."""
    inherited = [channel.liveness_fd] if argument["inherit"] else []
    tool = programs.start(argument["argv"], pass_fds=inherited, die_with_parent=False)
    channel.send({"tool": tool.pid})
    channel.receive()


def sleep(argument: dict[str, Any], channel: channels.Channel) -> None:
    channel.send({"ready": True})
    time.sleep(60)
