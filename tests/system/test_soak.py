"""The long random run, short, and always the same: see `tests/soak.py`."""

from pathlib import Path

import pytest

from tests.soak import soak


@pytest.mark.timeout(150)
async def test_soak(tmp_path: Path) -> None:
    figures = await soak(tmp_path, seed=4, seconds=15)
    assert figures["kill"]
    assert figures["states compared"]
