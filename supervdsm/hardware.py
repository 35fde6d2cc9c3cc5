"""What the firmware says of this machine: the kernel's view of DMI, as files of one line."""

from pathlib import Path

from supervdsm import calls, settings

DMI = Path("/sys/class/dmi/id")

FILES = {
    "manufacturer": "sys_vendor",
    "product_name": "product_name",
    "version": "product_version",
    "serial_number": "product_serial",
    "uuid": "product_uuid",
    "family": "product_family",
}


def get_hardware_info(call: calls.GetHardwareInfo, context: settings.Settings) -> calls.HardwareInfo:
    """Runs in a call's process. Never fails for a machine that says little: see `read`."""
    return read(DMI)


def read(directory: Path) -> calls.HardwareInfo:
    """What the files of `directory` say; None and a reason for each that is absent, empty or unreadable."""
    found = {field: _line(directory, name) for field, name in FILES.items()}
    reasons = {field: why for field, (value, why) in found.items() if value is None}
    return calls.HardwareInfo(**{field: value for field, (value, _) in found.items()}, reasons=reasons)


def _line(directory: Path, name: str) -> tuple[str | None, str]:
    """The text and nothing, or None and why there is no text."""
    if not directory.is_dir():
        return None, "this machine has no DMI"
    try:
        text = (directory / name).read_bytes().decode("utf-8", "replace").strip()
    except OSError as error:
        return None, f"{name}: {error.strerror}"
    return (text, "") if text else (None, f"{name} is empty")
