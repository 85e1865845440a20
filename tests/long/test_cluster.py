"""The one-minute form of the history over three machines, with one seed."""

from pathlib import Path

import pytest

from tests.long.cluster import run


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_history(tmp_path: Path) -> None:
    figures = await run(tmp_path, seed=18, seconds=60)
    assert figures["rounds"] >= 2
