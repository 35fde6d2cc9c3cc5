"""What the firmware says of the machine."""

import dataclasses

from supervdsm.contract import Call


@dataclasses.dataclass(frozen=True)
class HardwareInfo:
    """What the firmware says of this machine. A field is None where it says nothing; `reasons` then tells why."""

    manufacturer: str | None
    product_name: str | None
    version: str | None
    serial_number: str | None
    uuid: str | None
    family: str | None
    reasons: dict[str, str]


@dataclasses.dataclass(frozen=True)
class GetHardwareInfo(Call[HardwareInfo], deadline_s=5):
    """Read the machine's DMI identity; serial number and UUID are readable by root only."""
