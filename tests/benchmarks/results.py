"""The results of a full run: all rounds of all rows, the machine and the date. Saved as `results.json`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.bench import Rounds

PLACE = Path(__file__).parent / "results.json"


@dataclass
class Results:
    day: str
    machine: dict[str, str]
    rounds: int
    seconds: float
    left_out: list[str]
    rows: dict[str, Rounds]


def _short(measured: dict[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.5g}") for key, value in measured.items()}


def keep(results: Results, path: Path = PLACE) -> None:
    """Save results, with one line for each server or client of a row."""
    head = {key: value for key, value in asdict(results).items() if key != "rows"}
    rows = []
    for word, rounds in results.rows.items():
        lines = [
            f"   {json.dumps(what)}: {json.dumps(list(map(_short, found)))}" for what, found in rounds.items()
        ]
        rows.append(f"  {json.dumps(word)}: {{\n" + ",\n".join(lines) + "\n  }")
    text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "rows": {\n' + ",\n".join(rows) + "\n }\n}\n"
    assert json.loads(text)["rows"].keys() == results.rows.keys()
    path.write_text(text)


def load(path: Path = PLACE) -> Results:
    return Results(**json.loads(path.read_text()))
