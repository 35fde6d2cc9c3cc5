"""The standalone stack: a whole private host under one run directory, for the demo, the tests and playing."""

from vdsm.standalone.ground import GroundError
from vdsm.standalone.stack import Stack, StartError

__all__ = ["GroundError", "Stack", "StartError"]
