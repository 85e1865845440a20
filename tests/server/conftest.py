"""What the tests of streams have: both ends of them, in each way that the system may offer."""

from collections.abc import AsyncIterator

import pytest

from regd.server.streams import Stream
from tests.support.streams import WAYS, Bench, made_streams


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
