"""Sizes in bytes, and how to say them to people."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


def round_up(size_bytes: int, unit_bytes: int) -> int:
    """The smallest multiple of `unit_bytes` that is not smaller than `size_bytes`."""
    return -(-size_bytes // unit_bytes) * unit_bytes


def human(size_bytes: float) -> str:
    """`1536` as `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
