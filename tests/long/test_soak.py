"""The short form of the soak, with one seed."""

from pathlib import Path

import pytest

from tests.long.soak import soak
from tests.support.length import LONG


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_soak(tmp_path: Path) -> None:
    figures = await soak(tmp_path, seed=4, seconds=15 if LONG else 2)
    assert figures["kill"] or not LONG
    assert figures["states compared"]
