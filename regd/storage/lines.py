"""The lines of the registry's file, in the order in which they came, joined in blocks.

From one commit to the next most of a large file stays as it was: only blocks with a change are joined again.
Must not know what is in a line.
"""

from collections.abc import Iterator

from regd.core.model import Key

_BLOCK = 64  # lines
_SPARSE = 4  # of so many lines that the blocks have room for, less than one is there: time to fill them anew


class _Block:
    __slots__ = ("joined", "lines")

    def __init__(self) -> None:
        self.lines: dict[Key, bytes] = {}
        self.joined: bytes | None = None  # the lines as they stand in the file; None: not joined yet


class Lines:
    """By the key of their entry. Iterate over the blocks, each as it stands in the file."""

    def __init__(self) -> None:
        self._block: dict[Key, _Block] = {}  # where a key's line is
        self._blocks: list[_Block] = []

    def get(self, key: Key) -> bytes | None:
        block = self._block.get(key)
        return None if block is None else block.lines[key]

    def set(self, key: Key, line: bytes) -> None:
        block = self._block.get(key)
        if block is None:
            if not self._blocks or len(self._blocks[-1].lines) >= _BLOCK:
                self._blocks.append(_Block())
            block = self._block[key] = self._blocks[-1]
        block.lines[key] = line
        block.joined = None

    def remove(self, key: Key) -> None:
        """Remove a line; one that is not there is no error."""
        block = self._block.pop(key, None)
        if block is not None:
            del block.lines[key]
            block.joined = None
            if len(self._blocks) > _SPARSE and len(self._block) * _SPARSE < len(self._blocks) * _BLOCK:
                self._fill_anew()

    def _fill_anew(self) -> None:
        lines = [pair for block in self._blocks for pair in block.lines.items()]
        self._block.clear()
        self._blocks.clear()
        for key, line in lines:
            self.set(key, line)

    def __iter__(self) -> Iterator[bytes]:
        for block in self._blocks:
            if block.lines:
                if block.joined is None:
                    block.joined = b",\n".join(block.lines.values())
                yield block.joined
