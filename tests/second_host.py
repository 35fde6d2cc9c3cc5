"""A second host on the same storage: a sanlock daemon of its own, and one process that does there what it is told.

Run as a module it is that process: it answers one JSON line for each, [function, argument], until its input ends.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import sanlock_fixture
from tests.until import until
from vdsm import errors, leases
from vdsm.jobs import ledger
from vdsm.storage import formats, ioproc, repository

HOST_ID = 2


class SecondHost:
    """`repo` is the repository whose lockspace it joins."""

    def __init__(
        self, repo: repository.Repository, description: repository.Description, host_id: int = HOST_ID
    ) -> None:
        self._repo = repo
        self._host_id = host_id
        self._description = {**description, "name": repo.name, "host_id": host_id}
        self._directory = tempfile.TemporaryDirectory(prefix="vdsm-second-")
        self._daemon: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """The daemon starts and joins; returns when both hosts know that it has."""
        place = Path(self._directory.name)
        environment = {**os.environ, "SANLOCK_RUN_DIR": str(place), "SANLOCK_PRIVILEGED": "0"}
        who = ["-U", str(os.getuid()), "-G", str(os.getgid())]
        with (place / "output").open("wb") as output:
            command = ["setpriv", "--pdeathsig", "KILL", "sanlock", "daemon", "-D", "-w", "0", "-e", "secondhost", *who]
            self._daemon = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        until(lambda: sanlock_fixture.answers(place / "sanlock.sock"))
        argv = [sys.executable, "-m", "tests.second_host", json.dumps(self._description)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(argv, env=environment, stdin=pipe, stdout=pipe, text=True)
        before = self.generation
        self("join", sanlock_fixture.IO_TIMEOUT_S)
        until(lambda: self.state == "live" and self.generation != before)

    def stop(self) -> None:
        """Dies, as a host does that loses its power."""
        for process in (self._daemon, self._process):
            if process is not None:
                process.kill()
                process.wait()
        for stream in (self._process.stdin, self._process.stdout) if self._process else ():
            if stream is not None:
                stream.close()
        self._daemon = self._process = None

    def close(self) -> None:
        self.stop()
        self._directory.cleanup()

    @property
    def state(self) -> str | None:
        """How this host sees it."""
        known = leases.hosts(self._repo.name).get(self._host_id)
        return known.state if known else None

    @property
    def generation(self) -> int | None:
        known = leases.hosts(self._repo.name).get(self._host_id)
        return known.generation if known else None

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Its daemon does not renew inside the block. Then it finds that it has come too late, and ends the holders."""
        assert self._daemon is not None
        os.kill(self._daemon.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._daemon.pid, signal.SIGCONT)

    def freeze(self) -> None:
        """Its process stops where it is, deaf to everything but SIGKILL."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """Its process dies, and nothing else."""
        assert self._process is not None
        self._process.kill()

    def ended(self) -> bool:
        """Whether its process has been killed, by whomever."""
        return self._process is not None and self._process.poll() is not None

    def __call__(self, function: str, argument: Any) -> Any:
        """What the function answers there: one of storage's, or of `_Process`."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, argument]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise errors.VdsmError.from_wire(answer["error"])
        return answer["result"]


class _Process:
    def __init__(self, description: repository.Description) -> None:
        self._repo = formats.open(description)
        self._session: leases.Session | None = None

    def answer(self, function: str, argument: Any) -> dict[str, Any]:
        try:
            return {"result": self._run(function, argument)}
        except errors.VdsmError as error:
            return {"error": error.to_wire()}

    def _run(self, function: str, argument: Any) -> Any:
        if function in ("join", "know_itself", "hold", "claim"):
            return getattr(self, function)(argument)
        if function in ioproc.PLAIN:
            return ioproc.PLAIN[function](self._repo, argument)
        return ioproc.LEASED[function](self._repo, self.session, argument)

    @property
    def session(self) -> leases.Session:
        self._session = self._session or leases.Session()
        return self._session

    def join(self, io_timeout_s: int) -> None:
        leases.join(self._repo.lockspace(), io_timeout_s)
        until(lambda: leases.state(self._repo.lockspace()) == "joined")

    def know_itself(self, _: None) -> None:
        """Returns when its sanlock knows the generation in which it has joined, some seconds after the join."""
        until(lambda: HOST_ID in leases.hosts(self._repo.name), 60)

    def hold(self, image_id: str) -> None:
        self.session.acquire([self._repo.slot(image_id).data_lease()], 5)

    def claim(self, argument: dict[str, Any]) -> None:
        """What a worker does first: it takes the data lease and the work of its job."""
        slot = self._repo.slot(argument["image_id"])
        books = ledger.Ledger(argument["job_id"], slot)
        books.hold([slot.data_lease()], 5, lambda: None)
        books.claim(argument.get("generation"))


def main() -> None:
    process = _Process(json.loads(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(process.answer(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
