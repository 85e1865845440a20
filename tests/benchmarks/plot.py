"""The rows as a bar chart. Needs the group `bench`."""

from pathlib import Path
from typing import Any

from tests.benchmarks.figures import Bars, number
from tests.benchmarks.results import Results
from tests.benchmarks.rows import ROWS

_OURS, _FAST, _FLOOR, _OTHERS = "#1f5f8b", "#4f9bc9", "#d9d9d9", "#a6a6a6"
_MARK = "#c0392b"
_COLUMNS = 2


def _colour(what: str) -> str:
    if what == "floor":
        return _FLOOR
    if what.startswith("regd"):
        return _FAST if "fast" in what else _OURS
    return _OTHERS


def _panel(axes: Any, bars: Bars) -> None:
    names = [what for what, _ in bars.bars]
    values = [value for _, value in bars.bars]
    places = range(len(names))
    axes.barh(places, values, color=[_colour(what) for what in names], height=0.72)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            number(value), (value, place), xytext=(3, 0), textcoords="offset points", va="center", size=7
        )
    axes.set_yticks(places, names, size=8)
    axes.invert_yaxis()
    axes.set_title(f"{bars.title} ({bars.unit})", size=9, loc="left")
    axes.set_xlim(0, max(values) * 1.15)
    axes.xaxis.set_visible(False)
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    if bars.mark is not None:
        axes.axvline(bars.mark, color=_MARK, linewidth=1, linestyle=(0, (4, 2)))


def draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = [bars for row in ROWS if row.word in results.rows for bars in row.tell(results.rows[row.word]).bars]
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "regd", "font.family": "sans-serif"})
    lines = -(-len(panels) // _COLUMNS)
    figure, grid = pyplot.subplots(
        lines, _COLUMNS, figsize=(11, 2.3 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, bars in zip(grid.flat, panels, strict=False):
        _panel(axes, bars)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
