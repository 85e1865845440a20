"""`Client.history` and `blocking.Client.history`."""

import os
import signal

import pytest

import regd_client
from regd_client import blocking
from regd_client.client import Client
from tests.support.daemon import DaemonProcess

pytestmark = pytest.mark.socket


@pytest.fixture(autouse=True)
def address(process: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGD_ADDRESS", process.addresses[0])


async def register(client: Client, *ports: int) -> None:
    for port in ports:
        await client.register("db", port, static=True)


def revisions(page: regd_client.models.History) -> list[int]:
    return [change["rev"] for change in page["changes"]]


async def test_fields_of_a_change() -> None:
    async with Client() as client:
        await register(client, 1, 2)
        page = await client.history("db")
    assert set(page) == {"ok", "id", "changes"}
    up, down, _ = page["changes"]
    assert (up["op"], up["name"], up["instance"], up["host"], up["port"], up["state"]) == (
        "up", "db", "", "127.0.0.1", 1, "ready",
    )  # fmt: skip
    assert (down["op"], down["reason"], down["by"]["uid"]) == ("down", "replaced", os.geteuid())
    assert "reason" not in up
    assert up["at"] > 1.7e9


async def test_history_after_and_before_a_revision_in_pages() -> None:
    async with Client() as client:
        await register(client, 1, 2, 3)  # revisions 1 to 5
        assert revisions(await client.history()) == [1, 2, 3, 4, 5]
        assert revisions(await client.history(since=3)) == [4, 5]
        assert revisions(await client.history(before=3)) == [1, 2]
        assert revisions(await client.history(age_s=3_600)) == [1, 2, 3, 4, 5]
        assert revisions(await client.history(age_s=0)) == []
        assert revisions(await client.history("nobody")) == []
        assert revisions(await client.history("db", "1")) == []
        page = await client.history(since=0, limit=2)
        seen = revisions(page)
        while "next" in page:
            page = await client.history(since=page["next"], limit=2)
            seen += revisions(page)
        assert seen == [1, 2, 3, 4, 5]
        page = await client.history(limit=2)
        assert revisions(page) == [4, 5]
        assert revisions(await client.history(before=page["next"], limit=2)) == [2, 3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_history_survives_the_daemon(number: int, process: DaemonProcess) -> None:
    async with Client() as client:
        await register(client, 1, 2)
        before = (await client.history())["changes"]
    process.end(number)
    process.start()
    async with Client() as client:
        assert (await client.history())["changes"] == before


@pytest.mark.parametrize(
    "arguments",
    [{"name": 7}, {"name": "A b"}, {"since": "1"}, {"before": True}, {"age_s": "1h"}, {"limit": 1.5}],
)  # fmt: skip
async def test_wrong_type_is_refused_before_it_is_sent(arguments: dict[str, object]) -> None:
    async with Client() as client:
        with pytest.raises(regd_client.BadArgument):
            await client.history(**arguments)  # type: ignore[arg-type]
        assert "history" not in (await client.stats())["requests"]


async def test_value_that_the_daemon_refuses() -> None:
    async with Client() as client:
        for arguments, field in (({"since": 1, "before": 2}, "before"), ({"limit": 1_001}, "limit")):
            with pytest.raises(regd_client.BadArgument) as caught:
                await client.history(**arguments)  # type: ignore[arg-type]
            assert caught.value.details["field"] == field


def test_blocking_twin(process: DaemonProcess) -> None:
    with blocking.Client() as client:
        for port in (1, 2):
            client.register("db", port, static=True)
        page = client.history("db", since=0, limit=2, timeout=10)
        assert revisions(page) == [1, 2]
        assert revisions(client.history("db", since=page["next"])) == [3]
        assert revisions(client.history(before=2)) == [1]
        with pytest.raises(regd_client.BadArgument):
            client.history(since="1")  # type: ignore[arg-type]
    process.end()
    with blocking.Client() as client, pytest.raises(regd_client.Unavailable):
        client.history()
