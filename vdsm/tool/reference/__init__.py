"""The reference pages and the client's table of verbs, made from the code. `make docs` writes them.

What is made is in the repository too, for readers without a machine to run it on; `tests/docs_test.py` fails when it is
not what the code says.
"""

from pathlib import Path
from typing import Any

from vdsm import config, daemon
from vdsm.api import discover, pools, server
from vdsm.tool.reference import errors, events, kinds, offered, options, verbs


def document() -> dict[str, Any]:
    """The OpenRPC document of this source tree's agent. Nothing is started."""
    settings = config.Config()
    agent = daemon.Agent(settings)
    threads = pools.Pools(1)
    try:
        table = agent.verbs(threads)
        server.Api(settings, table, agent.events)  # adds its own verbs
        return discover.document(table)
    finally:
        threads.close()


def pages(made: dict[str, Any]) -> dict[Path, str]:
    """What each made file must hold, by its path in the source tree. `made` is what `document` gave."""
    return {
        Path("docs/reference/verbs.md"): verbs.page(made),
        Path("docs/reference/errors.md"): errors.page(made),
        Path("docs/reference/events.md"): events.page(made),
        Path("docs/reference/jobs.md"): kinds.page(),
        Path("docs/reference/configuration.md"): options.page(),
        Path("vdsm/client/offered.py"): offered.module(made),
    }
