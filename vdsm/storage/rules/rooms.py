"""How large a volume is whose data grows while it is written: what is in it, and a step ahead. Pure; all in bytes.

    0 ......... written ......... asks at ......... size
                                     |<-- step / 2 -->|

A step is the chunk of the configuration, or a sixteenth of a large volume: so a terabyte takes some hundred extensions
and not a thousand, for at most 6 % that may stay unused. The half of it behind the mark is what can be written while
the volume is being grown.
"""

_SHARE = 16


def step(size_bytes: int, chunk_bytes: int) -> int:
    return max(chunk_bytes, size_bytes // _SHARE)


def room(written_bytes: int, chunk_bytes: int, most_bytes: int) -> int:
    """For data that holds `written_bytes`. More than `most_bytes`, which its format can take, only when it is there
    already: a QEMU that died may have left clusters that nobody needs."""
    wanted = written_bytes + step(written_bytes, chunk_bytes)
    return most_bytes if written_bytes < most_bytes < wanted else wanted


def asks_at(size_bytes: int, chunk_bytes: int, most_bytes: int) -> int:
    """Once as much is written the volume has to grow; a volume's own size when it will never have to."""
    return size_bytes if size_bytes >= most_bytes else size_bytes - step(size_bytes, chunk_bytes) // 2
