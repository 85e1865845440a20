"""`python -m tests.benchmarks [ROW …]`: measure rows and print them. Without rows, measure all and write the pages."""

import argparse
import datetime
import importlib.util
import resource
import signal
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import page, plot, results
from tests.benchmarks.bench import Bench, Rounds
from tests.benchmarks.generator import Generator, WrongReply, build
from tests.benchmarks.machine import facts
from tests.benchmarks.rows import ROWS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(row.word for row in ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each measurement")
    parser.add_argument("--short", action="store_true", help="two short rounds; writes no page")
    parser.add_argument(
        "--folder", type=Path, help="folder for the servers' files (default: the system's temporary folder)"
    )
    parser.add_argument(
        "--page", action="store_true", help="measure nothing; write the pages from the last whole run"
    )
    args = parser.parse_args()
    args.words = set()
    for word in args.rows:
        # A word selects all rows whose name starts with it, unless it is a row's name itself.
        meant = {row.word for row in ROWS if row.word == word} or {
            row.word for row in ROWS if row.word.startswith(word)
        }
        if not meant:
            parser.error(f"no row {word!r}; the rows are {', '.join(row.word for row in ROWS)}")
        args.words |= meant
    args.words = args.words or {row.word for row in ROWS}
    if args.short:
        args.rounds, args.seconds = 2, 0.4
    return args


def measure(bench: Bench, words: set[str]) -> dict[str, Rounds]:
    rounds_by_row = {}
    for row in ROWS:
        if row.word in words:
            bench.tell(f"{row.word}: {row.title}")
            rounds_by_row[row.word] = row.measure(bench)
            sys.stdout.write(f"\n{page.row_text(row.tell(rounds_by_row[row.word]))}\n")
            sys.stdout.flush()
    return rounds_by_row


def write(found: results.Results) -> None:
    page.write(found)
    if importlib.util.find_spec("matplotlib") is None:
        sys.stdout.write("no matplotlib: the plot stays as it was\n")
    else:
        plot.draw(found, page.PLOT)
    sys.stdout.write(
        f"written: {page.PAGE.name}, {page.PLOT.name}, {page.TARGETS.relative_to(page.TARGETS.parents[2])}\n"
    )


def main() -> int:
    args = arguments()
    if args.page:
        write(results.load())
        return 0
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that the servers are ended, too
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        build(folder)
        bench = Bench(Generator(folder), folder, args.rounds, args.seconds)
        if args.short:
            bench.warm_up_s, bench.patience_s = 0.5, 60.0
        try:
            rows = measure(bench, args.words)
        except WrongReply as wrong:
            sys.stderr.write(f"wrong: {wrong}\n")
            return 1
        if args.words == {row.word for row in ROWS} and not args.short:
            day = datetime.date.today().isoformat()  # noqa: DTZ011 - the local day
            run = results.Results(day, facts(folder), args.rounds, args.seconds, bench.left_out, rows)
            results.keep(run)
            write(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
