"""The reference documents and the client's table of verbs, made from the code. `make docs` writes them."""

from typing import Any

from vdsm import config, daemon
from vdsm.api import discover, pools, server


def document() -> dict[str, Any]:
    """The OpenRPC document of this source tree's agent. Nothing is started."""
    settings = config.Config()
    agent = daemon.Agent(settings)
    threads = pools.Pools(1)
    try:
        verbs = agent.verbs(threads)
        server.Api(settings, verbs, agent.events)
        return discover.document(verbs)
    finally:
        threads.close()
