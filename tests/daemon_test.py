"""What the agent's main adds to the rooms: here, what the event loop is spared."""

import asyncio
import gc
import grp
import os
import signal
import types
from pathlib import Path
from typing import cast

import pytest

from tests.until import until
from vdsm import config, daemon, events
from vdsm.api import pools, verb


@pytest.mark.asyncio
async def test_a_collection_does_not_walk_what_the_start_has_made(tmp_path: Path) -> None:
    group = grp.getgrgid(os.getgid()).gr_name
    wire = config.Wire(unix_socket=str(tmp_path / "vdsmd.sock"), unix_group=group, tcp_port=0)

    def verbs(threads: pools.Pools) -> verb.Verbs:
        return verb.Verbs(threads)

    parts = types.SimpleNamespace(settings=config.Config(wire=wire), verbs=verbs, events=events.EventLog())
    serving = asyncio.create_task(daemon.serve(cast(daemon.Agent, parts)))
    try:
        await asyncio.to_thread(until, Path(wire.unix_socket).exists)
        assert len(gc.get_objects()) * 10 < gc.get_freeze_count()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
        gc.unfreeze()
