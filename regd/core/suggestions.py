"""Find names similar to a misspelled one."""

from collections.abc import Iterable
from difflib import SequenceMatcher
from itertools import takewhile

_MIDDLE_MAX = 24  # characters between the common ends; longer middles are slow to compare, and not similar


def nearest(name: str, candidates: Iterable[str], most: int) -> list[str]:
    """Return up to `most` of the candidates that are similar to `name`, the most similar first."""
    letters = set(name)
    scored: list[tuple[float, str]] = []
    for candidate in candidates:
        # Cheap tests first: a polling script asks for an unknown name many times a second.
        if candidate == name or abs(len(candidate) - len(name)) > 3 or len(letters ^ set(candidate)) > 4:
            continue
        likeness = _likeness(candidate, name)
        if likeness >= 0.6:
            scored.append((-likeness, candidate))
    return [candidate for _, candidate in sorted(scored)[:most]]


def _likeness(one: str, two: str) -> float:
    """Return the similarity, 0.0 to 1.0, in bounded time: only the part between the common ends is compared."""
    start = _common(one, two)
    end = _common(one[start:][::-1], two[start:][::-1])
    middle, other = one[start : len(one) - end], two[start : len(two) - end]
    if max(len(middle), len(other)) > _MIDDLE_MAX:
        return 0.0
    if sorted(middle) == sorted(other):
        return 1.0
    alike = sum(block.size for block in SequenceMatcher(None, middle, other).get_matching_blocks())
    return 2 * (start + end + alike) / (len(one) + len(two))


def _common(one: str, two: str) -> int:
    """Return the length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
