"""Some rounds of `make crash`: each way of killing a daemon under load, twice."""

import random
from pathlib import Path

from tests import crash


def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path) -> None:
    figures = crash.run(tmp_path, rounds=2 * len(crash.KINDS), seed=random.randrange(2**32))
    assert figures.rounds == 10
    assert figures.acknowledged > 0
    assert figures.refused == 2
