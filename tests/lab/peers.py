"""The agents of two hosts on shared storage, with short words for what tests do with them."""

from typing import Any

from tests import lab
from tests.lab.waiting import until
from vdsm.client import failures

JOB_S = 300.0


class Peer:
    """The agent of a host. A verb without a namespace is one of Storage."""

    def __init__(self, host: lab.Host) -> None:
        self.host = host

    def __call__(self, verb: str, timeout_s: float = 120.0, /, **given: Any) -> Any:
        with self.host.agent(timeout_s) as agent:
            return agent.call(verb if "." in verb else f"Storage.{verb}", given)

    def done(self, verb: str, **given: Any) -> Any:
        """What the verb answers, once its job is done; fails when that fails."""
        answer = self(verb, **given)
        if answer["jobId"] is not None:
            info = self("Job.wait", JOB_S + 10, jobId=answer["jobId"], timeout=JOB_S)
            assert info["status"] == "done", info
        return answer

    def refused(self, verb: str, **given: Any) -> str:
        """The key of the error that the verb answers."""
        try:
            self(verb, **given)
        except failures.ClientError as error:
            assert error.key is not None, error
            return error.key
        raise AssertionError(f"{verb} was not refused")

    def repository(self, repo_id: str) -> dict[str, Any] | None:
        found = self("listStorageRepositories")
        return next((repo for repo in found if repo["repoId"] == repo_id), None)

    def joined(self, repo_id: str, within_s: float = 180.0) -> None:
        """Returns once the host is in the repository's lockspace."""
        until(lambda: (self.repository(repo_id) or {}).get("state") == "joined", within_s)

    def image_ids(self, repo_id: str) -> set[str]:
        return {image["imageId"] for image in self("listImages", repositoryId=repo_id)}

    def agent_pid(self) -> str:
        """Of its user's processes the oldest is the agent."""
        return self.host.run(["pgrep", "-o", "-u", "vdsm"]).out.strip()

    def checksum(self, path: str) -> str:
        """Of a file that the agent's user may read."""
        return self.as_agent(f"sha256sum {path}").split()[0]

    def as_agent(self, command: str, timeout_s: float = 60.0) -> str:
        """What a shell command says, run as the agent's user."""
        argv = ["setpriv", "--reuid", "vdsm", "--regid", "vdsm", "--groups", "kvm", "--", "/bin/sh", "-ec", command]
        return self.host.run(argv, timeout_s).out

    def holder(self, lease_id: str) -> int | None:
        """The process of this host that holds the lease of an image or a VM."""
        for line in self.host.run(["sanlock", "client", "status"]).out.splitlines():
            head, _, pid = line.strip().rpartition(" p ")
            if head.startswith("r ") and f":{lease_id}:" in head and pid.isdigit():  # else it is on its way
                return int(pid)
        return None
