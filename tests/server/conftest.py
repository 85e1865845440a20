"""What several of the tests here have: streams with both ends, and daemons that live through the same."""

from collections.abc import AsyncIterator, Iterator

import pytest

from regd.server.streams import Stream
from tests.support.streams import WAYS, Bench, made_streams
from tests.support.twins import Twins, line, system


@pytest.fixture(params=WAYS)
async def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    running = Bench(made_streams(request.param))
    serve = Stream.serve

    def counted(stream: Stream, events: int) -> None:
        running.served += 1
        serve(stream, events)

    monkeypatch.setattr(Stream, "serve", counted)
    yield running
    await running.close()


@pytest.fixture
def twins() -> Iterator[Twins]:
    with system():
        made = Twins()
        made.write(line("register", name="db", port=1))
        yield made
        made.close()
