"""What an idle agent keeps in memory, against a process that has imported what it depends on and does nothing.

Resident set, so pages shared with others count on both sides. Needs root: the agent is a real one, in a stack of its
own.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks import table
from vdsm import standalone
from vdsm.client import transport
from vdsm.standalone import daemons

# A bare `import pydantic` leaves out what models are made with, which every user of it loads: hence `.main`.
DEPENDENCIES = """
import sys, aiohttp.web, jsonrpcserver, libvirt, orjson, pydantic.main, pyudev, sanlock, uvloop
print(flush=True)
sys.stdin.read()
"""
GOAL = 1.25


def rows(rounds: int) -> list[table.Row]:
    with standalone.Stack() as stack:

        def agent() -> float:
            stack.restart_agent()
            with transport.connect(str(stack.socket_path)) as client:
                client.call("Host.ping2")
            return resident_mib(stack.agent_pid)

        row = table.compare("idle agent, MiB", "its imports", agent, lambda: imports(stack), rounds, GOAL)
    return [row]


def imports(stack: standalone.Stack) -> float:
    """Under the same interpreter, with the same installed code."""
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", DEPENDENCIES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=daemons.environment(stack.place),
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        found = resident_mib(process.pid)
        process.stdin.close()
    return found


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


if __name__ == "__main__":
    print(table.render(rows(int(sys.argv[1]) if len(sys.argv) > 1 else 3)))
