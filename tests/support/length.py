"""Select the short form of the tests, or with REGD_TEST_LONG=1 the long form."""

import os

LONG = os.environ.get("REGD_TEST_LONG", "0") == "1"
_SHORT_SHARE = 8


def examples(count: int) -> int:
    """Return how many examples hypothesis tries: `count` in the long form, an eighth in the short form."""
    return count if LONG else max(10, count // _SHORT_SHARE)
