"""Names that somebody may have meant. Must not know where names come from."""

from collections.abc import Iterable
from difflib import SequenceMatcher
from itertools import takewhile

_MIDDLE_MAX = 24  # characters that are compared closely: beyond that names are not near, and comparing is dear


def nearest(name: str, candidates: Iterable[str], most: int) -> list[str]:
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
    """Return 0.0 to 1.0, in time that has a bound: what both begin and end with is not compared."""
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
    """Return how many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
