"""`python -m tests.benchmarks [ROW …]`: measure rows, all without a word."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.generator import Generator, build
from tests.benchmarks.page import tables
from tests.benchmarks.rows import ROWS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(row.word for row in ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="that count, of each measurement")
    parser.add_argument("--folder", type=Path, help="where the servers keep their files (default: the system's)")
    given = parser.parse_args()
    if unknown := set(given.rows) - {row.word for row in ROWS}:
        parser.error(f"no row {', '.join(sorted(unknown))}")
    return given


def main() -> int:
    given = arguments()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        build(Path(folder))
        bench = Bench(Generator(Path(folder)), Path(folder), given.rounds, given.seconds)
        for row in ROWS:
            if not given.rows or row.word in given.rows:
                bench.tell(row.title)
                sys.stdout.write(tables(row.tell(row.measure(bench))) + "\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
