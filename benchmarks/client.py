"""What a call from the shell costs: vdsm-client against bare Python.

Byte code is cached, as in an installation: the first run of each, which is not counted, writes it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import table

ROOT = Path(__file__).resolve().parent.parent


def rows(rounds: int) -> list[table.Row]:
    """One row. The server answers at once, so nothing but the client is measured: its start, its imports, one call.

    A run is some tens of milliseconds: each round is the best of five, so that a busy machine does not decide.
    """
    directory = tempfile.mkdtemp(prefix="vdsm-bench-")
    path = f"{directory}/vdsmd.sock"
    # What the installed `vdsm-client` script does.
    script = "import sys; from vdsm.client import cli; sys.exit(cli.main())"
    try:
        with socket.create_server(path, family=socket.AF_UNIX) as server:
            threading.Thread(target=_answer, args=(server,), daemon=True).start()
            call = _timed(["-c", script, "-a", path, "Host", "ping2"], f"{directory}/bytecode")
            bare = _timed(["-c", "pass"], f"{directory}/bytecode")
            row = table.compare("vdsm-client Host ping2", "python3 -c pass", call, bare, rounds, 3.0)
            server.shutdown(socket.SHUT_RDWR)
    finally:
        shutil.rmtree(directory)
    return [row]


def _timed(arguments: list[str], bytecode: str) -> Callable[[], float]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": bytecode}

    def once() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
        return time.perf_counter() - began

    return lambda: min(once() for _ in range(5))


def _answer(server: socket.socket) -> None:
    """Serves one request after the other until the server is shut down."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection, connection.makefile("rb") as lines:
            request = json.loads(lines.readline())
            answer = {"jsonrpc": "2.0", "id": request["id"], "result": True}
            connection.sendall(json.dumps(answer).encode() + b"\n")
