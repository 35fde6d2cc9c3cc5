"""`python3 -m vdsm.client` is vdsm-client."""

import sys

from vdsm.client import cli

sys.exit(cli.main())
