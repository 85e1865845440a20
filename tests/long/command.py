"""The command line of the runs that take a time and a seed."""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any


def main(
    module: str,
    description: str | None,
    run: Callable[[Path, int, float], Coroutine[Any, Any, Counter[str]]],
    failure: type[Exception],
) -> int:
    """Run in a temporary folder, with a seed, for some seconds. Print the figures, or the failure and its notes.

    Returns:
        The exit status: 1 after a failure.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    args = parser.parse_args()
    _show(f"seed {args.seed}, {args.minutes:g} minutes")
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        try:
            figures = asyncio.run(run(Path(folder), args.seed, 60 * args.minutes))
        except failure as error:
            _show(*getattr(error, "__notes__", ()))
            _show(f"FAILED after {time.monotonic() - began:.1f} s, seed {args.seed}: {error}")
            return 1
    _show(*(f"{what}: {count}" for what, count in sorted(figures.items())))
    return 0


def _show(*lines: str) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()
