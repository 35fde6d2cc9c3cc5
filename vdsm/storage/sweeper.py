"""What killed processes have left active on this host is taken from it: until then no other host can remove it."""

from collections.abc import Callable, Mapping

from vdsm import errors, logs, periodic
from vdsm.storage import ioproc

_log = logs.get("storage.sweeper")

SWEEP_S = 60.0


class Sweeper:
    """Asks the repositories that `concerned` names, one after the other, in a thread of its own."""

    def __init__(self, concerned: Callable[[], Mapping[str, ioproc.Children]], deadline_s: float) -> None:
        self._concerned = concerned
        self._deadline_s = deadline_s
        self._ticks = periodic.Periodic("sweep", SWEEP_S, self._sweep)

    def start(self) -> None:
        self._ticks.start()

    def stop(self) -> None:
        """Does not wait for one that is under way, which may be waiting for storage."""
        self._ticks.stop(0)

    def _sweep(self) -> None:
        for name, children in self._concerned().items():
            try:
                children.call("sweep", {}, name, self._deadline_s)
            except errors.VdsmError as error:
                _log.warning("%s is not swept: %s", name, error)
