"""The host's processors, as the kernel lists them in /proc/cpuinfo and /sys/devices/system/cpu."""

import dataclasses
from pathlib import Path

CPUINFO = "proc/cpuinfo"
SYSTEM = "sys/devices/system/cpu"


@dataclasses.dataclass(frozen=True)
class Topology:
    """The online logical processors by number, and how many cores and sockets they make up."""

    online: tuple[int, ...]
    cores: int
    sockets: int


def description(root: Path) -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor, by its own keys, which differ between architectures. Raises
    `OSError`."""
    first = (root / CPUINFO).read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def topology(root: Path) -> Topology:
    """Raises `OSError` and `ValueError`. Cores and sockets are counted as sets of processors that share one: core
    numbers repeat in every socket and die."""
    system = root / SYSTEM
    online = parse_list((system / "online").read_text())
    folders = [system / f"cpu{number}" / "topology" for number in online]
    cores = {(folder / "core_cpus_list").read_text() for folder in folders}
    sockets = {(folder / "package_cpus_list").read_text() for folder in folders}
    return Topology(online, len(cores), len(sockets))


def parse_list(text: str) -> tuple[int, ...]:
    """The kernel's list of numbers: "0-2,7" as (0, 1, 2, 7). Raises `ValueError`."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)
