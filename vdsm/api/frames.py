"""Newline-delimited frames: one JSON value on a line."""


class Splitter:
    """Cuts a stream of bytes into frames of at most `limit` bytes. Holds at most one unfinished frame."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._skipping = False

    @property
    def unfinished(self) -> bool:
        """Whether the stream, if it ended here, would end inside a frame."""
        return bool(self._rest.strip()) or self._skipping

    def feed(self, data: bytes) -> list[bytes | None]:
        """The frames that `data` completes, in order; None stands for one over the limit, told as soon as it is known.

        What is left of such a frame is thrown away, and the stream goes on behind it. Blank lines are no frames.
        """
        if data.find(b"\n") == len(data) - 1 <= self._limit and not self._rest and not self._skipping:
            return [] if data.isspace() else [data]  # the usual case: one whole frame
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            if not newline:
                return []
            self._skipping = False
        *lines, rest = data.split(b"\n")
        if lines and self._rest:
            lines[0] = bytes(self._rest) + lines[0]
            self._rest.clear()
        self._rest += rest
        frames = [line if len(line) <= self._limit else None for line in lines if not line.isspace() and line]
        if len(self._rest) > self._limit:
            self._rest = bytearray()
            self._skipping = True
            frames.append(None)
        return frames
