"""`LineBlocks` behaves like a dictionary in order of insertion."""

import random

import pytest

from regd.storage import line_blocks as module
from regd.storage.line_blocks import LineBlocks


def file_of(lines: LineBlocks) -> list[bytes]:
    return [line for block in lines for line in block.split(b",\n")]


@pytest.mark.parametrize("seed", range(8))
def test_lines_equal_those_of_a_dict(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_LINES", 4)
    chance = random.Random(seed)
    lines, model = LineBlocks(), dict[str, bytes]()
    for step in range(2_000):
        key = f"n{chance.randrange(60)}"
        what = chance.random()
        growing = step % 500 < 250  # then it shrinks, so that blocks are rebuilt
        if what < (0.6 if growing else 0.15):
            line = b"%d" % chance.randrange(1_000)
            lines.set(key, line)
            model[key] = line
        elif what < 0.8:
            lines.remove(key)
            model.pop(key, None)
        else:
            assert file_of(lines) == list(model.values())
    assert file_of(lines) == list(model.values())


def test_only_changed_blocks_are_joined_again() -> None:
    lines = LineBlocks()
    for number in range(10 * module._BLOCK_LINES):
        lines.set(f"n{number}", b"line %d" % number)
    before = list(lines)
    lines.set("n100", b"other")
    after = list(lines)
    assert [old is new for old, new in zip(before, after, strict=True)].count(False) == 1


def test_nearly_empty_blocks_are_rebuilt() -> None:
    lines = LineBlocks()
    for number in range(100 * module._BLOCK_LINES):
        lines.set(f"n{number}", b"line")
    for number in range(100 * module._BLOCK_LINES):
        if number % 50:
            lines.remove(f"n{number}")
    assert len(list(lines)) <= 2 * module._SPARSE
