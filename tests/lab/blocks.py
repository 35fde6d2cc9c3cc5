"""Blocks of one letter each, written and read past all caches: who sees what on a LUN, a disk or an export."""

from tests import lab
from tests.lab import lun

BLOCK_BYTES = 4096


def write(host: lab.Host, path: str, letter: str, block: int = 0, timeout_s: float = 30.0) -> None:
    """A block full of `letter`, past all caches."""
    fill = f"head -c {BLOCK_BYTES} /dev/zero | tr '\\0' {letter}"
    place = f"of={path} bs={BLOCK_BYTES} seek={block}"
    host.sh(f"{fill} | dd {place} oflag=direct iflag=fullblock conv=notrunc status=none", timeout_s)


def read(host: lab.Host, path: str, block: int = 0) -> str:
    """The letter that a block is full of."""
    data = _bytes(host, path, block)
    assert len(data) == BLOCK_BYTES
    assert len(set(data)) == 1
    return data[0]


def readable(disk: lun.Lun, block: int = 0) -> bool:
    """Whether it can be read, whatever it holds; fails the test when it fails with anything but EIO."""
    try:
        return bool(_bytes(disk.owner, disk.path, block))
    except lab.CommandError as error:
        assert "Input/output error" in str(error)
        return False


def _bytes(host: lab.Host, path: str, block: int) -> str:
    argv = ["dd", f"if={path}", f"bs={BLOCK_BYTES}", f"skip={block}", "count=1", "iflag=direct", "status=none"]
    return host.run(argv).out
