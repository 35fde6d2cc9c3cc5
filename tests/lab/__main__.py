"""`python -m tests.lab`: says what this machine lacks for a lab, and exits with 1; nothing when there can be one."""

import sys

from tests import lab

sys.exit(lab.missing())
