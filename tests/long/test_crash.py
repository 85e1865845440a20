"""Some rounds of `make crash`, with each way of killing a daemon under load."""

import random
from pathlib import Path

from tests.long import crash
from tests.support.length import LONG


def test_kill_9_loses_no_acknowledged_change(tmp_path: Path) -> None:
    repeats = 2 if LONG else 1
    figures = crash.run(tmp_path, rounds=repeats * len(crash.KINDS), seed=random.randrange(2**32))
    assert figures.rounds == 5 * repeats
    assert figures.acknowledged > 0
    assert figures.in_history >= figures.acknowledged
    assert figures.resumed > 0
    assert figures.refused == repeats
