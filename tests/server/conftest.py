"""What several of the tests here have: streams with both ends, and daemons that live through the same."""

from collections.abc import Iterator

import pytest

from tests.support.twins import Twins, line, system


@pytest.fixture
def twins() -> Iterator[Twins]:
    with system():
        made = Twins()
        made.write(line("register", name="db", port=1))
        yield made
        made.close()
