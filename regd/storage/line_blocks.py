"""The lines of the registry file, in order of their first write, joined in blocks.

From one commit to the next most of a large file is unchanged: only blocks with a changed line are split and
joined again. A line holds no line feed.
"""

from collections.abc import Iterator

_BLOCK = 64  # lines
_BETWEEN = b",\n"
_SPARSE = 4  # if less than one in so many places is used, the blocks are filled anew


class _Block:
    """The lines of a block, either `joined` as in the file or `apart` in a list. An empty block is apart."""

    __slots__ = ("apart", "joined", "keys")

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.joined = b""
        self.apart: list[bytes] | None = []

    def lines(self) -> list[bytes]:
        if self.apart is None:
            self.apart = self.joined.split(_BETWEEN)
            self.joined = b""
        return self.apart

    def join(self) -> bytes:
        if self.apart:
            self.joined = _BETWEEN.join(self.apart)
            self.apart = None
        return self.joined


class LineBlocks:
    """Lines by the key of their entry. Iterating yields the blocks, joined."""

    def __init__(self) -> None:
        self._block: dict[str, _Block] = {}  # the block of each key
        self._blocks: list[_Block] = []

    def get(self, key: str) -> bytes | None:
        block = self._block.get(key)
        return None if block is None else block.lines()[block.keys.index(key)]

    def set(self, key: str, line: bytes) -> None:
        block = self._block.get(key)
        if block is not None:
            block.lines()[block.keys.index(key)] = line
            return
        if not self._blocks or len(self._blocks[-1].keys) >= _BLOCK:
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
        if len(self._blocks) > _SPARSE and len(self._block) * _SPARSE < len(self._blocks) * _BLOCK:
            self._fill_anew()

    def _fill_anew(self) -> None:
        blocks, self._blocks = self._blocks, []
        self._block.clear()
        for block in blocks:
            for key, line in zip(block.keys, block.lines(), strict=True):
                self.set(key, line)

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            if block.keys:
                yield block.join()
