"""Coverage-guided fuzzing with atheris: `python -m tests.long.fuzz.run [TARGET …] [--seconds S]`.

Inputs with new coverage are kept in build/fuzz/TARGET, and one that fails as build/fuzz/TARGET.crash-…;
`--input FILE` runs it again. Add useful inputs to the corpus by hand.
"""

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

# Modules that import regd are imported later, under atheris, which instruments them.
ROOT = Path(__file__).resolve().parents[3]
CORPUS = Path(__file__).with_name("corpus")
WORK = ROOT / "build" / "fuzz"
INPUT_BYTES_MAX = 2_048
ONE_S_MAX = 10  # per input
TARGETS = ("reader", "decoder", "session", "loader", "journal", "dns", "query", "events")
HOW_TO_GET = "atheris is not installed: pip install 'atheris>=3' (Linux, CPython 3.11 to 3.14), or --group fuzz"
_WORDS = ("true", "false", "null", "NaN", "Infinity", "1e999", "\\ud800", "\\u0000", "ready", "starting", "draining",
          "$regd", "format", "rev", "born", "holders", "quit", "\r", "\0", "* ", "127.0.0.1", "::1", "db", "kept",
          "worker/1", "cache", "job", "line", "batch", "epoch", "epochs", "valid", "keep", "down", "\n--\n",
          ',"crc":"*"}\n', "{}", "[]", '":', '","', "}\n{", '{"cmd":"', '"id":', "POST / HTTP/1.1")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.long.fuzz.run", description="Fuzz regd, coverage-guided."
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--input", type=Path, help="run one input through the targets, and no more")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # does not return
    args = parser.parse_args()
    targets = args.targets or TARGETS
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if args.input is not None:
        return _replay(targets, args.input)
    try:
        import atheris  # noqa: F401 - checks that it is installed
    except ImportError:
        sys.stderr.write(f"{HOW_TO_GET}\n")
        return 1
    if args.here:
        _fuzz(targets[0], args.seconds)
    command = [sys.executable, "-m", "tests.long.fuzz.run", "--here", "--seconds", str(args.seconds)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")])}
    failed = [name for name in targets if subprocess.run([*command, name], cwd=ROOT, env=paths).returncode]
    sys.stderr.write(f"failed: {', '.join(failed)}; see {WORK}\n" if failed else "nothing found\n")
    return bool(failed)


def _replay(wanted: "tuple[str, ...] | list[str]", path: Path) -> int:
    from tests.long.fuzz.targets import TARGETS as functions

    for name in wanted:
        functions[name](path.read_bytes())
    return 0


def _fuzz(target: str, seconds: int) -> None:
    """Run libFuzzer in this process. It exits the process."""
    import atheris

    with atheris.instrument_imports(include=["regd"]):
        from tests.long.fuzz.targets import TARGETS as functions

    from tests.long.fuzz import oracle

    logging.getLogger("regd").setLevel(logging.CRITICAL + 1)  # no log lines about other protocols
    folder = WORK / target
    folder.mkdir(parents=True, exist_ok=True)
    words = {*_WORDS, *oracle.COMMANDS, *oracle.CHECKS}
    dictionary = WORK / f"{target}.words"
    dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in sorted(words)))
    sys.stderr.write(f"{target}: {seconds} s\n")
    flags = {
        "max_total_time": seconds,
        "timeout": ONE_S_MAX,
        "max_len": INPUT_BYTES_MAX,
        "dict": dictionary,
        "artifact_prefix": f"{folder}.",
        "print_final_stats": 1,
        "verbosity": 0,
    }
    folders = [str(folder), str(CORPUS / target)]
    atheris.Setup(
        [sys.argv[0], *(f"-{name}={value}" for name, value in flags.items()), *folders], functions[target]
    )
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(
        character if character.isalnum() or character in " /.:{}[]$*_,-" else f"\\x{ord(character):02x}"
        for character in word
    )


if __name__ == "__main__":
    raise SystemExit(main())
