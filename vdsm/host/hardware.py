"""Host.getHardwareInfo: what the machine's firmware says it is."""

from typing import Any

from supervdsm import calls, client
from vdsm import roothelper

# Upstream VDSM's name of each field, and the helper's.
FIELDS = {
    "systemManufacturer": "manufacturer",
    "systemProductName": "product_name",
    "systemVersion": "version",
    "systemSerialNumber": "serial_number",
    "systemUUID": "uuid",
    "systemFamily": "family",
}


def read(helper: client.Helper) -> dict[str, Any]:
    """{field of `FIELDS`: text or None, "reasons": {field that is None: why}}. Blocks; asks the root helper, since only
    root may read serial number and UUID. Raises `HelperUnavailable` and `HelperFailed`."""
    info = roothelper.call(helper, calls.GetHardwareInfo())
    values = {name: getattr(info, field) for name, field in FIELDS.items()}
    return values | {"reasons": {name: info.reasons[field] for name, field in FIELDS.items() if values[name] is None}}
