"""`LineBlocks`: the lines of `registry.json` in memory, joined in blocks.

Between two checkpoints, most lines of a large file stay the same. So a checkpoint joins only the blocks in which
a line has changed. Lines are in the order in which they were first set, and contain no line feed.
"""

from collections.abc import Iterator

_BLOCK_LINES = 64
_BETWEEN = b",\n"
_SPARSE = 4  # the blocks are rebuilt when they hold less than 1/_SPARSE of the lines for which they have room


class _Block:
    """Some lines, either `joined` as in the file, or `separate` in a list. An empty block is separate."""

    __slots__ = ("joined", "keys", "separate")

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.joined = b""
        self.separate: list[bytes] | None = []

    def lines(self) -> list[bytes]:
        if self.separate is None:
            self.separate = self.joined.split(_BETWEEN)
            self.joined = b""
        return self.separate

    def join(self) -> bytes:
        if self.separate:
            self.joined = _BETWEEN.join(self.separate)
            self.separate = None
        return self.joined


class LineBlocks:
    """Lines by key. Iterating joins the blocks that have changed, and yields all blocks as bytes."""

    def __init__(self) -> None:
        self._block: dict[str, _Block] = {}  # the block of each key
        self._blocks: list[_Block] = []

    def set(self, key: str, line: bytes) -> None:
        """Replace the line of a key in its place, or append it."""
        block = self._block.get(key)
        if block is not None:
            block.lines()[block.keys.index(key)] = line
            return
        if not self._blocks or len(self._blocks[-1].keys) >= _BLOCK_LINES:
            if self._blocks:
                self._blocks[-1].join()
            self._blocks.append(_Block())
        block = self._block[key] = self._blocks[-1]
        block.lines().append(line)
        block.keys.append(key)

    def remove(self, key: str) -> None:
        """Remove a line. Idempotent."""
        block = self._block.pop(key, None)
        if block is None:
            return
        at = block.keys.index(key)
        del block.lines()[at], block.keys[at]
        if len(self._blocks) > _SPARSE and len(self._block) * _SPARSE < len(self._blocks) * _BLOCK_LINES:
            self._rebuild()

    def _rebuild(self) -> None:
        blocks, self._blocks = self._blocks, []
        self._block.clear()
        for block in blocks:
            for key, line in zip(block.keys, block.lines(), strict=True):
                self.set(key, line)

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            if block.keys:
                yield block.join()
